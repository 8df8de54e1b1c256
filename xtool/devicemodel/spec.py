"""What an HVM guest's emulated machine consists of: plain frozen values, checked when they are made.

Sizes are bytes. A value QEMU cannot do raises ``DeviceModelError`` here, before anything is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from xtool.errors import DeviceModelError

T = TypeVar("T")

MIB = 1 << 20

#: xl's names of disk image formats, and QEMU's.
FORMATS = {
    "raw": "raw",
    "qcow": "qcow",
    "qcow2": "qcow2",
    "qed": "qed",
    "vhd": "vpc",
    "vhdx": "vhdx",
    "vmdk": "vmdk",
}

#: xl's names of video cards, QEMU's device for each, and the smallest (and default) video memory.
VGA = {
    "stdvga": ("VGA", 16 * MIB),
    "cirrus": ("cirrus-vga", 8 * MIB),
    "qxl": ("qxl-vga", 128 * MIB),
    "none": ("", 0),
}

#: xl's names of USB devices, and QEMU's.
USB_DEVICES = {"tablet": "usb-tablet", "mouse": "usb-mouse", "keyboard": "usb-kbd"}

#: QEMU's network cards that guests have drivers for.
NIC_MODELS = ("e1000", "rtl8139", "e1000e", "ne2k_pci", "pcnet", "virtio-net-pci")

#: Disks per bus.
BUS_SLOTS = {"ide": 4, "ahci": 6, "scsi": 7}


def default_videoram(vga: str) -> int:
    """Bytes of video memory of a card when the configuration does not say. It counts as guest memory."""
    return _known(VGA, vga, "video card")[1]


def default_platform_pci(*, has_pv_devices: bool) -> bool:
    """Whether a guest gets Xen's platform PCI device when the configuration does not say.

    A Linux guest that finds the device's magic number at I/O port 0x10 unplugs *all* emulated disks and
    NICs at boot, whether or not paravirtual ones are offered instead (its platform-pci-unplug.c): a guest
    with emulated disks only would then have none. Without the device it leaves them alone, and it also
    could not use paravirtual ones. So: the device if there are paravirtual devices, else not.
    """
    return has_pv_devices


@dataclass(frozen=True)
class EmulatedDisk:
    """One disk or CD drive. ``index`` counts on its bus; ``path`` None is a drive without a medium."""

    index: int
    path: str | None
    format: str = "raw"
    cdrom: bool = False
    readonly: bool = False
    bus: str = "ide"

    def __post_init__(self) -> None:
        slots = _known(BUS_SLOTS, self.bus, "disk bus")
        _known(FORMATS, self.format, "disk format")
        what = f"{'CD drive' if self.cdrom else 'disk'} {self.index} on {self.bus}"
        if not 0 <= self.index < slots:
            raise DeviceModelError(f"{what}: the bus has slots 0 to {slots - 1}")
        if self.cdrom and self.bus == "scsi":
            raise DeviceModelError(f"{what}: emulated CD drives are on the IDE or AHCI bus only")
        if self.path is None:
            if not self.cdrom:
                raise DeviceModelError(f"{what} has no image")
        elif not self.path.startswith("/"):
            # A relative name with a colon in it would be taken for a protocol such as nbd:.
            raise DeviceModelError(f"{what}: the image {self.path!r} is not an absolute path")
        if self.readonly and not self.cdrom and self.bus != "scsi":
            raise DeviceModelError(
                f"{what}: an emulated {self.bus.upper()} disk cannot be read-only",
                hint="give it to the guest as a CD (devtype: cdrom), or as a SCSI disk (vdev: sda)",
            )

    @property
    def id(self) -> str:
        """What the drive is called in QMP."""
        return f"{self.bus}{self.index}"


@dataclass(frozen=True)
class EmulatedNic:
    """One network card. QEMU makes the tap device ``tap``, which goes with it; whoever started QEMU puts it
    on a bridge. ``mac`` is ``aa:bb:cc:dd:ee:ff``."""

    index: int
    mac: str
    tap: str
    model: str = "e1000"

    def __post_init__(self) -> None:
        if self.model not in NIC_MODELS:
            raise DeviceModelError(
                f"unknown emulated network card {self.model!r}", hint="known: " + ", ".join(NIC_MODELS)
            )
        if not 0 < len(self.tap.encode()) <= 15:
            raise DeviceModelError(f"{self.tap!r} is too long for the name of an interface")


@dataclass(frozen=True)
class VncSpec:
    """Where the display is served. ``unused``: take the next free number from ``display`` on.

    ``password`` only says that there is one: it reaches QEMU over QMP, never a command line or xenstore.
    """

    listen: str = "127.0.0.1"
    display: int = 0
    unused: bool = True
    password: bool = False


@dataclass(frozen=True)
class DeviceModelSpec:
    """The whole machine. ``memory`` is all of the guest's, ``videoram`` included; both are bytes."""

    name: str
    uuid: str
    memory: int
    videoram: int = 16 * MIB
    vga: str = "stdvga"
    vcpus: int = 1
    maxvcpus: int = 1
    kernel: str | None = None
    ramdisk: str | None = None
    cmdline: str | None = None
    #: Letters in the order to try: ``c`` disk, ``d`` CD, ``n`` network, ``a`` floppy.
    boot: str = "cda"
    disks: tuple[EmulatedDisk, ...] = ()
    nics: tuple[EmulatedNic, ...] = ()
    #: One QEMU character device each (``pty``, ``file:/path``, ...): the guest's COM1, COM2, ...
    serial: tuple[str, ...] = ()
    vnc: VncSpec | None = None
    usb: bool = False
    usbdevices: tuple[str, ...] = ()
    #: 1, 2 or 3: the controller; None for the machine's own, which is the first.
    usb_version: int | None = None
    keymap: str | None = None
    acpi: bool = True
    #: See ``default_platform_pci``.
    xen_platform_pci: bool = False
    #: End of the RAM below 4 GiB if the PCI hole is larger than usual, as a guest-physical address.
    max_ram_below_4g: int | None = None
    #: Words put at the end of the command line as they are.
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = default_videoram(self.vga)
        if self.videoram < least:
            raise DeviceModelError(f"video card {self.vga} needs at least {least // MIB} MiB of videoram")
        if (self.memory - self.videoram) // MIB < 1:
            raise DeviceModelError(
                f"{self.memory // MIB} MiB of memory less {self.videoram // MIB} MiB of videoram leave none",
                hint="give the guest more memory, or vga: none",
            )
        if not 1 <= self.vcpus <= self.maxvcpus:
            raise DeviceModelError(f"{self.vcpus} vCPUs of at most {self.maxvcpus} make no sense")
        if (self.ramdisk or self.cmdline) and not self.kernel:
            raise DeviceModelError("a ramdisk or command line without a kernel has no effect for HVM")
        for device in self.usbdevices:
            _known(USB_DEVICES, device, "USB device")
        taken = [(disk.bus, disk.index) for disk in self.disks]
        for slot in taken:
            if taken.count(slot) > 1:
                raise DeviceModelError(f"two disks at place {slot[1]} of the {slot[0]} bus")


def _known(table: dict[str, T], name: str, what: str) -> T:
    try:
        return table[name]
    except KeyError:
        raise DeviceModelError(f"unknown {what} {name!r}", hint="known: " + ", ".join(table)) from None


def emulated_place(vdev: str, ide: str = "ide") -> tuple[str, int] | None:
    """Where a disk named as xl does goes: ``hda`` and ``xvda`` -> ``("ide", 0)``, ``sdb`` -> ``("scsi", 1)``.

    ``ide`` is the bus that stands for IDE (``ahci``). None when it cannot be emulated: a partition, or beyond
    the bus. (xl gives an emulated IDE disk to ``xvd`` names too, so that firmware can boot from it.)
    """
    for prefix, bus in (("xvd", ide), ("hd", ide), ("sd", "scsi")):
        letter = vdev.removeprefix(prefix)
        if letter != vdev and len(letter) == 1 and "a" <= letter <= "z":
            index = ord(letter) - ord("a")
            return (bus, index) if index < BUS_SLOTS[bus] else None
    return None
