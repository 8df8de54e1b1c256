"""Where a disk goes by its vdev, and back. Pure.

======  =========================================================  ==================
vdev    under QEMU                                                 under Xen
======  =========================================================  ==================
hda-d   IDE, or SATA (AHCI) with ``hdtype: ahci``                  emulated IDE
sda-g   emulated SCSI (an LSI 53c895a, as Xen's device model has)  emulated SCSI
xvda-   virtio: ``xvdb`` is ``vdb``                                paravirtual alone
======  =========================================================  ==================
"""

from __future__ import annotations

from typing import NamedTuple

from xtool.config.vdev import vdev_number

SCSI_SLOTS = 7


class Place(NamedTuple):
    """``dev`` is libvirt's name of the target."""

    bus: str
    dev: str


def decoded(vdev: str) -> tuple[str, int, int]:
    """``("xvd", 1, 0)`` for xvdb, d1 and 51728: family, disk, partition."""
    number = vdev_number(vdev)
    assert number is not None  # checked when it was read
    if number >> 28:
        return "xvd", (number & (1 << 28) - 1) >> 8, number & 0xFF
    major, minor = number >> 8, number & 0xFF
    if major == 202:
        return "xvd", minor >> 4, minor & 0xF
    if major == 8:
        return "sd", minor >> 4, minor & 0xF
    if major in (3, 22):
        return "hd", (minor >> 6) + (2 if major == 22 else 0), minor & 0x3F
    return "", number, 0


def letters(index: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa."""
    text = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


def place(vdev: str, hdtype: str, xen: bool) -> Place | None:
    """Where the disk goes, None if there is no such place."""
    family, index, partition = decoded(vdev)
    if partition and not (xen and family == "xvd"):
        return None
    suffix = str(partition) if partition else ""
    if family == "xvd":
        return Place("xen", f"xvd{letters(index)}{suffix}") if xen else Place("virtio", f"vd{letters(index)}")
    if family == "hd":
        return Place("sata" if hdtype == "ahci" and not xen else "ide", f"hd{letters(index)}")
    if family == "sd" and index < SCSI_SLOTS:
        return Place("scsi", f"sd{letters(index)}")
    return None


def vdev_of(dev: str, bus: str, taken: frozenset[str] = frozenset()) -> str | None:
    """The vdev of one of libvirt's targets; those of other tools are moved to where we have such a disk.

    ``taken`` are vdevs in use. None where there is no place left.
    """
    if vdev_number(dev) is not None and not (bus == "sata" and dev.startswith("sd")) and bus != "usb":
        wanted = dev
    elif bus == "virtio" and dev.startswith("vd") and vdev_number("xvd" + dev[2:]) is not None:
        wanted = "xvd" + dev[2:]
    elif bus == "sata" and dev.startswith("sd") and vdev_number("hd" + dev[2:]) is not None:
        wanted = "hd" + dev[2:]
    else:
        return None
    return None if wanted in taken else wanted
