"""How each key of a domain file can change for a domain that runs: the one table of that.

``live``: the running domain is changed. ``reboot``: it is kept in the domain's definition, and counts when
the domain is started again, which a reboot does. ``recreate``: it takes another domain in its place. What the
table says holds where nothing stands against it; ``xtool.apply.compare`` knows what may (a guest that has
no room for more memory, a disk in use) and says why.
"""

from __future__ import annotations

from typing import NamedTuple

LIVE, REBOOT, RECREATE = "live", "reboot", "recreate"
#: From weak to strong: what one domain needs is the strongest of what its keys need.
ORDER = (LIVE, REBOOT, RECREATE)


class Way(NamedTuple):
    """``why`` it is so, or how it is done."""

    when: str
    why: str


_STARTED = Way(REBOOT, "it is read when the domain is started")
_BUILT = Way(REBOOT, "the domain is built with it")
_QEMU = Way(REBOOT, "its device model is started with it")
_LIMIT = Way(REBOOT, "Xen fixes it when the domain is created")
_ENDS = Way(LIVE, "it is looked up when the domain ends")
_WEIGHT = Way(LIVE, "the scheduler is told")
_OURS = Way(LIVE, "only xtool reads it")

CHANGES: dict[str, Way] = {
    "name": Way(
        RECREATE, "a domain and its file find each other by the name: another name is another domain"
    ),
    "type": Way(RECREATE, "another type is another machine"),
    "uuid": Way(RECREATE, "a domain keeps its uuid"),
    "memory": Way(LIVE, "the guest's balloon driver is asked"),
    "maxmem": Way(REBOOT, "the guest's memory map was made for the maxmem it started with"),
    "vcpus": Way(LIVE, "the guest is asked to bring vCPUs online or offline"),
    "maxvcpus": Way(REBOOT, "the domain has the vCPUs it was created with"),
    "cpus": Way(LIVE, "the vCPUs are pinned anew"),
    "cpus_soft": Way(LIVE, "the vCPUs are pinned anew"),
    "pool": Way(LIVE, "the domain is moved into the other CPU pool"),
    "cpu_weight": _WEIGHT,
    "cap": _WEIGHT,
    "period": _WEIGHT,
    "budget": _WEIGHT,
    "extratime": _WEIGHT,
    "kernel": _STARTED,
    "ramdisk": _STARTED,
    "cmdline": _STARTED,
    "firmware": _STARTED,
    "firmware_override": _STARTED,
    "boot": _STARTED,
    "disk": Way(LIVE, "disks are attached and detached; see the sub-keys"),
    "vif": Way(LIVE, "interfaces are attached and detached; see the sub-keys"),
    "channel": Way(REBOOT, "consoles are made when the domain is created"),
    "cloud_init": Way(RECREATE, "cloud-init acts once for an instance: another seed is for another instance"),
    "console_backend": Way(REBOOT, "consoles are made when the domain is created"),
    "depends_on": _OURS,
    "ready": _OURS,
    "hdtype": _QEMU,
    "serial": _QEMU,
    "vnc": _QEMU,
    "vnclisten": _QEMU,
    "vncdisplay": _QEMU,
    "vncunused": _QEMU,
    "vncpasswd": _QEMU,
    "keymap": _QEMU,
    "vga": _QEMU,
    "videoram": _QEMU,
    "usb": _QEMU,
    "usbversion": _QEMU,
    "usbdevice": _QEMU,
    "device_model_override": _QEMU,
    "device_model_args": _QEMU,
    "device_model_args_hvm": _QEMU,
    "device_model_args_pv": _QEMU,
    "on_poweroff": _ENDS,
    "on_reboot": _ENDS,
    "on_crash": _ENDS,
    "on_watchdog": _ENDS,
    "on_soft_reset": _ENDS,
    "on_dm_exit": Way(LIVE, "it is looked up when the device model ends"),
    "acpi": _BUILT,
    "acpi_s3": _BUILT,
    "acpi_s4": _BUILT,
    "apic": _BUILT,
    "pae": _BUILT,
    "hpet": _BUILT,
    "hap": _LIMIT,
    "nestedhvm": _LIMIT,
    "shadow_memory": _BUILT,
    "xen_platform_pci": _QEMU,
    "viridian": _BUILT,
    "timer_mode": _BUILT,
    "ms_vm_genid": _STARTED,
    "smbios": _STARTED,
    "mmio_hole": _BUILT,
    "tsc_mode": _BUILT,
    "localtime": _STARTED,
    "rtc_timeoffset": _STARTED,
    "max_grant_frames": _LIMIT,
    "max_grant_version": _LIMIT,
    "max_maptrack_frames": _LIMIT,
    "max_event_channels": _LIMIT,
}

_EXCHANGED = "a disk the guest has is not exchanged under it"
_RECONNECTED = "an interface the guest has is not exchanged under it"
_LIMITED = Way(LIVE, "the backend is told")

#: Sub-keys of a disk that the domain has already.
DISK_CHANGES: dict[str, Way] = {
    "target": Way(REBOOT, _EXCHANGED),  # a CD's medium is
    "format": Way(REBOOT, _EXCHANGED),
    "vdev": Way(REBOOT, _EXCHANGED),
    "access": Way(REBOOT, _EXCHANGED),
    "devtype": Way(REBOOT, _EXCHANGED),
    "backend": Way(REBOOT, _EXCHANGED),
    "backendtype": Way(REBOOT, _EXCHANGED),
    "script": Way(REBOOT, _EXCHANGED),
    "shared": Way(REBOOT, _EXCHANGED),
    "direct-io-safe": Way(REBOOT, _EXCHANGED),
    "discard": Way(REBOOT, _EXCHANGED),
    "trusted": Way(REBOOT, _EXCHANGED),
    "specification": Way(REBOOT, _EXCHANGED),
    "bytes-per-second": _LIMITED,
    "ops-per-second": _LIMITED,
    "persistent": Way(REBOOT, "it is agreed upon when the guest connects"),
}
#: The same of an interface.
VIF_CHANGES: dict[str, Way] = {
    "mac": Way(REBOOT, _RECONNECTED),
    "bridge": Way(REBOOT, _RECONNECTED),
    "gatewaydev": Way(REBOOT, _RECONNECTED),
    "type": Way(REBOOT, _RECONNECTED),
    "model": Way(REBOOT, _RECONNECTED),
    "vifname": Way(REBOOT, _RECONNECTED),
    "script": Way(REBOOT, _RECONNECTED),
    "ip": Way(REBOOT, _RECONNECTED),
    "backend": Way(REBOOT, _RECONNECTED),
    "backendtype": Way(REBOOT, _RECONNECTED),
    "rate": _LIMITED,
    "devid": Way(REBOOT, _RECONNECTED),
    "mtu": Way(REBOOT, _RECONNECTED),
    "vlan": Way(REBOOT, _RECONNECTED),
    "trusted": Way(REBOOT, _RECONNECTED),
    "network": Way(REBOOT, _RECONNECTED),
    "forwards": Way(REBOOT, _RECONNECTED),
    "mac-filter": Way(REBOOT, _RECONNECTED),
    "queues": Way(REBOOT, _RECONNECTED),
    "rate-in": _LIMITED,
}


def strongest(whens: list[str]) -> str:
    """Of several; ``live`` of none."""
    return max(whens, key=ORDER.index, default=LIVE)
