"""Keys that xl.cfg has and xtool does not act upon yet: refused by name, not taken for typing errors.

The names are those xl reads in Xen 4.17 to 4.22, and the few it reads without documenting them.
"""

from __future__ import annotations

UNSUPPORTED = frozenset(
    """
    acpi_firmware acpi_laptop_slate acpi_s3 acpi_s4 altp2m altp2m_count altp2mhvm arm_sci bios
    bios_path_override blkdev_start bootloader bootloader_args bootloader_restrict bootloader_user builder
    cpuid device_model device_model_args_pv device_model_stubdomain_override
    device_model_stubdomain_seclabel device_model_user device_model_version device_tree display dm_restrict
    driver_domain dtdev e820_host gfx_passthru gic_version hvm_pirq init_seclabel iomem
    ioports irqs latency llc_colors max_grant_version mca_caps mmio_hole ms_vm_genid msr_relaxed nographic
    nomigrate nr_spis nx oos opengl p9 passthrough pci pci_msitranslate pci_permissive pci_power_mgmt
    pci_seize pvcalls pvshim pvshim_cmdline pvshim_extra pvshim_path rdm rdm_mem_boundary sdl
    seclabel slice smbios smbios_firmware soundhw spice spice_clipboard_sharing spice_image_compression
    spice_streaming_video spiceagent_mouse spicedisable_ticketing spicehost spicepasswd spiceport
    spicetls_port spiceusbredirection spicevdagent stdvga stubdomain_cmdline stubdomain_kernel
    stubdomain_memory stubdomain_ramdisk sve tee timer_mode trap_unmapped_accesses usbctrl usbdev usbversion
    vdispl vendor_device vfb vif2 viridian virtio vkb vkb_device vmtrace_buf_kb vncviewer vnuma vpmu
    vpt_align vsnd vtpm vuart xauthority xen_platform_pci_bar_uc xend_suspend_evtchn_compat
    xenstore_feature_mask xenstore_quota
    """.split()  # noqa: SIM905 (a table of names)
)

#: What to write instead, where xtool has another way.
INSTEAD = {
    "bios": "use firmware: seabios, or firmware: ovmf",
    "bios_path_override": "use firmware_override",
    "builder": "use type: pv, pvh or hvm",
    "device_model": "use device_model_override",
    "sdl": "use vnc: true",
    "spice": "use vnc: true",
    "stdvga": "use vga: stdvga",
    "usbctrl": "use usb: true",
}
