"""QEMU's command line for an HVM guest under Xen: pure, one small function per kind of option.

Facts about QEMU (7.2, and what the Xen toolstack has passed to it since 4.17):

- ``-xen-domid N`` attaches to a domain that already exists. The memory is the guest's: ``-m`` only says
  where RAM ends (MiB, video memory not counted), so that QEMU puts its own pages above it.
- Machine ``xenfv`` is ``pc`` with Xen's platform PCI device; ``pc,accel=xen`` is the same without.
- ``-nodefaults`` and ``-no-user-config``: nothing but what is written here. ``-display none``: no window
  and no VNC server unless ``-vnc`` asks for one.
- ``-no-shutdown``: QEMU outlives the guest's power-off; whoever runs the domain ends it.
- In ``key=value,...`` options a comma is written twice. An absolute path is never taken for a protocol.
- Options that take one plain word (``-kernel``, ``-append``, ...) are passed untouched.
- The clock chip is Xen's, not QEMU's: a local-time offset is set by hypercall, there is no ``-rtc``.
"""

from __future__ import annotations

from collections.abc import Iterator

from xtool.devicemodel.spec import (
    FORMATS,
    MIB,
    USB_DEVICES,
    VGA,
    DeviceModelSpec,
    EmulatedDisk,
    VncSpec,
)
from xtool.errors import DeviceModelError

#: Where distributions put the QEMU that can serve Xen guests, best first; ``*`` stands for a release.
BINARIES = (
    "/usr/libexec/xen-qemu-system-i386",
    "/usr/lib/xen-*/bin/qemu-system-i386",
    "/usr/lib/xen/bin/qemu-system-i386",
    "/usr/libexec/xen/bin/qemu-system-i386",
    "/usr/local/lib/xen/bin/qemu-system-i386",
    "/usr/local/libexec/xen/bin/qemu-system-i386",
    "/usr/bin/qemu-system-i386",
)

#: ``usbversion`` beyond 1, which is the controller of the machine itself.
USB_CONTROLLERS: dict[int | None, str] = {2: "usb-ehci", 3: "nec-usb-xhci"}

#: QEMU tries displays ``display`` to this one when it may choose.
LAST_DISPLAY = 99


def find_device_model(override: str | None = None) -> str:
    """The QEMU to run: ``override`` if given, else the first of ``BINARIES`` there is.

    Raises ``DeviceModelError`` when there is none, or the one asked for cannot be executed.
    """
    import os

    if override:
        if not os.access(override, os.X_OK) or os.path.isdir(override):
            raise DeviceModelError(
                f"the device model {override} is missing or not executable",
                hint="check device_model_override, or leave it out",
            )
        return override
    for pattern in BINARIES:
        for path in _expand(pattern):
            if os.access(path, os.X_OK):
                return path
    raise DeviceModelError(
        "no QEMU for Xen found: an HVM guest needs one as its device model",
        hint="install it (Debian: apt install qemu-system-xen), or set device_model_override",
    )


def _expand(pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    from glob import glob

    return sorted(glob(pattern), reverse=True)


def escape(value: str) -> str:
    """A value inside a ``key=value,...`` option: commas doubled."""
    return value.replace(",", ",,")


def options(*words: str, **values: object) -> str:
    """``options("socket", id="a", path="/x,y")`` -> ``socket,id=a,path=/x,,y``; ``_`` in a key is ``-``."""
    pairs = (f"{key.replace('_', '-')}={escape(str(value))}" for key, value in values.items())
    return ",".join((*map(escape, words), *pairs))


def build_argv(spec: DeviceModelSpec, domid: int, binary: str, qmp_fd: int) -> list[str]:
    """The whole command line. ``qmp_fd``: QEMU's number of an already listening socket for QMP."""
    return [binary, *_frame(spec, domid, qmp_fd), *_guest(spec), *spec.extra]


def _frame(spec: DeviceModelSpec, domid: int, qmp_fd: int) -> Iterator[str]:
    """What makes it a device model of this domain."""
    yield from ("-xen-domid", str(domid))
    yield from ("-name", options(guest=spec.name))
    yield from ("-uuid", spec.uuid)
    yield from ("-no-shutdown", "-nodefaults", "-no-user-config")
    yield from ("-chardev", options("socket", id="qmp", fd=qmp_fd, server="on", wait="off"))
    yield from ("-mon", options(chardev="qmp", mode="control"))
    yield from ("-display", "none")
    if spec.vnc:
        yield from ("-vnc", _vnc(spec.vnc))
    if spec.keymap:
        yield from ("-k", spec.keymap)


def _guest(spec: DeviceModelSpec) -> Iterator[str]:
    """The machine the guest sees."""
    yield from ("-machine", _machine(spec))
    yield from ("-m", str((spec.memory - spec.videoram) // MIB))
    if spec.maxvcpus > 1:
        yield from ("-smp", f"{spec.vcpus},maxcpus={spec.maxvcpus}")
    yield from ("-boot", options(order=spec.boot))
    for flag, value in (("-kernel", spec.kernel), ("-initrd", spec.ramdisk), ("-append", spec.cmdline)):
        if value:
            yield from (flag, value)
    if spec.vga != "none":
        yield from ("-device", _vga(spec))
    for port in spec.serial:
        yield from ("-serial", port)
    yield from _usb(spec)
    yield from _disks(spec)
    for nic in spec.nics:
        yield from (
            "-netdev",
            options("tap", id=f"net{nic.index}", ifname=nic.tap, script="no", downscript="no"),
        )
        yield from (
            "-device",
            options(nic.model, id=f"nic{nic.index}", netdev=f"net{nic.index}", mac=nic.mac),
        )


def _machine(spec: DeviceModelSpec) -> str:
    # The description of the machine in a save stream is of no use to Xen, and large.
    words = ["xenfv" if spec.xen_platform_pci else "pc,accel=xen", "suppress-vmdesc=on"]
    if not spec.acpi:
        words.append("acpi=off")
    if spec.max_ram_below_4g is not None:
        words.append(f"max-ram-below-4g={spec.max_ram_below_4g}")
    return ",".join(words)


def _vga(spec: DeviceModelSpec) -> str:
    device = VGA[spec.vga][0]
    mib = spec.videoram // MIB
    if spec.vga == "qxl":  # two memories, half each
        return f"{device},vram_size_mb={mib // 2},ram_size_mb={mib // 2}"
    return f"{device},vgamem_mb={mib}"


def _vnc(vnc: VncSpec) -> str:
    host = f"[{vnc.listen}]" if ":" in vnc.listen else vnc.listen
    words = [f"{escape(host)}:{vnc.display}"]
    if vnc.password:
        words.append("password=on")  # nobody gets in until one is set over QMP
    if vnc.unused:
        words.append(f"to={LAST_DISPLAY}")
    return ",".join(words)


def _usb(spec: DeviceModelSpec) -> Iterator[str]:
    if spec.usb_version in USB_CONTROLLERS:
        yield from ("-device", options(USB_CONTROLLERS[spec.usb_version], id="usb"))
    elif spec.usb or spec.usbdevices:
        yield "-usb"
    for device in spec.usbdevices:
        yield from ("-device", USB_DEVICES[device])


def _disks(spec: DeviceModelSpec) -> Iterator[str]:
    buses = {disk.bus for disk in spec.disks}
    if "ahci" in buses:
        yield from ("-device", options("ahci", id="ahci"))
    if "scsi" in buses:
        yield from ("-device", options("lsi53c895a", id="scsi"))
    for disk in spec.disks:
        yield from ("-drive", _drive(disk))
        yield from ("-device", _disk_device(disk))


def _drive(disk: EmulatedDisk) -> str:
    """The image. Its format is always said: a guest must not choose it by what it writes to sector 0."""
    readonly = "on" if disk.readonly or disk.cdrom else "off"
    if disk.path is None:
        return options(id=f"drive-{disk.id}", **{"if": "none", "readonly": readonly})
    image = {"if": "none", "format": FORMATS[disk.format], "readonly": readonly, "cache": "writeback"}
    return options(id=f"drive-{disk.id}", **image, file=disk.path)


def _disk_device(disk: EmulatedDisk) -> str:
    """The drive the guest sees, at its place on the bus."""
    ids = {"id": disk.id, "drive": f"drive-{disk.id}"}
    if disk.bus == "scsi":
        return options("scsi-hd", **ids, bus="scsi.0", scsi_id=disk.index)
    device = "ide-cd" if disk.cdrom else "ide-hd"
    if disk.bus == "ahci":
        return options(device, **ids, bus=f"ahci.{disk.index}", unit=0)
    return options(device, **ids, bus=f"ide.{disk.index // 2}", unit=disk.index % 2)
