"""Names of virtual disks and their numbers in xenstore (xen-vbd-interface(7))."""

from __future__ import annotations

import re

_XVD, _SD, _HD = (re.compile(rf"{kind}([a-z]{{1,5}})(\d{{0,3}})") for kind in ("xvd", "sd", "hd"))
_DP = re.compile(r"d(\d{1,7})(?:p(\d{1,3}))?")


def vdev_number(vdev: str) -> int | None:
    """The number a virtual device has in xenstore, None if ``vdev`` names none (xen-vbd-interface(7))."""
    if vdev.isascii() and vdev.isdigit() and len(vdev) <= 9:
        return int(vdev)
    if match := _DP.fullmatch(vdev):
        disk, partition = int(match[1]), int(match[2] or 0)
        return _xvd_number(disk, partition)
    for pattern in (_XVD, _SD, _HD):
        match = pattern.fullmatch(vdev)
        if match is None:
            continue
        disk, partition = _letters(match[1]), int(match[2] or 0)
        if pattern is _XVD:
            return _xvd_number(disk, partition)
        if pattern is _SD:
            return 8 << 8 | disk << 4 | partition if disk < 16 and partition < 16 else None
        if disk > 3 or partition > 63:
            return None
        return (3 << 8 | disk << 6 if disk < 2 else 22 << 8 | (disk - 2) << 6) | partition
    return None


def _letters(text: str) -> int:
    """``a`` -> 0, ``z`` -> 25, ``aa`` -> 26..."""
    value = 0
    for char in text:
        value = value * 26 + ord(char) - ord("a") + 1
    return value - 1


def _xvd_number(disk: int, partition: int) -> int | None:
    if disk < 16 and partition < 16:
        return 202 << 8 | disk << 4 | partition
    return 1 << 28 | disk << 8 | partition if disk < 1 << 20 and partition < 256 else None
