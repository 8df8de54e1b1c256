"""Keys that xl.cfg has and xtool does not act upon: refused by name with the reason, not taken for typing
errors.

The names are those xl reads in Xen 4.17 to 4.22, and the few it reads without documenting them.
"""

from __future__ import annotations

_REASONS = {
    "xtool does not boot from what is inside a guest's disk (pygrub and the like)": """
        bootloader bootloader_args bootloader_restrict bootloader_user""",
    "devices of the host cannot be given to guests yet": """
        dtdev gfx_passthru iomem ioports irqs passthrough pci pci_msitranslate pci_permissive pci_power_mgmt
        pci_seize rdm rdm_mem_boundary""",
    "it runs device models as processes of domain 0 only, without stub domains or restrictions": """
        device_model_stubdomain_override device_model_stubdomain_seclabel device_model_user dm_restrict
        stubdomain_cmdline stubdomain_kernel stubdomain_memory stubdomain_ramdisk""",
    "QEMU (qemu-xen) is its only device model": "device_model device_model_version",
    "it has no PV frame buffer or keyboard": "vfb vkb vkb_device",
    "VNC is the only display it serves": """
        display nographic opengl sdl spice spice_clipboard_sharing spice_image_compression
        spice_streaming_video spiceagent_mouse spicedisable_ticketing spicehost spicepasswd spiceport
        spicetls_port spiceusbredirection spicevdagent vncviewer xauthority""",
    "it has no backend for such devices": """
        p9 pvcalls usbctrl usbdev vdispl virtio vsnd vtpm""",
    "another key says the same": "bios bios_path_override builder stdvga",
    "it is for Arm, and xtool builds x86 guests": """
        arm_sci device_tree gic_version llc_colors nr_spis sve tee trap_unmapped_accesses vpmu vuart""",
    "it does not set CPUID bits or CPU features one by one": "cpuid mca_caps nx oos vmtrace_buf_kb",
    "it does not set security labels or host-wide options per guest": """
        init_seclabel seclabel xenstore_feature_mask xenstore_quota""",
    "it was for the sedf scheduler, which Xen no longer has": "latency slice",
    "guests have one virtual NUMA node": "vnuma",
    "it does not run PV guests inside a PVH shim": "pvshim pvshim_cmdline pvshim_extra pvshim_path",
    "it loads no tables of your own into guests": "acpi_firmware smbios_firmware",
    "there is no migration to rule out yet": "nomigrate",
    "backends in other domains do not work yet": "driver_domain",
    "a PV guest always gets a plain memory map": "e820_host",
    "views of memory for introspection are not set up": "altp2m altp2m_count altp2mhvm",
    "no guest it can run was found to need it": """
        acpi_laptop_slate hvm_pirq msr_relaxed vendor_device vpt_align xen_platform_pci_bar_uc
        xend_suspend_evtchn_compat""",
    "there is no sound card; QEMU's can be added by hand": "soundhw",
    "xl itself does not act upon it any more": "blkdev_start vif2",
}

#: Key -> why it is refused.
UNSUPPORTED = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}

#: What to write instead, where xtool has another way.
INSTEAD = {
    "bios": "use firmware: seabios, or firmware: ovmf",
    "bios_path_override": "use firmware_override",
    "bootloader": "use kernel and ramdisk, or type: hvm, which boots its disk",
    "builder": "use type: pv, pvh or hvm",
    "device_model": "use device_model_override",
    "device_model_version": "remove it",
    "nographic": "use vga: none",
    "sdl": "use vnc: true",
    "soundhw": "use device_model_args: [-device, AC97]",
    "spice": "use vnc: true",
    "stdvga": "use vga: stdvga",
    "usbctrl": "use usb: true",
    "vfb": "for an hvm guest use vnc: true",
}
