"""Which data a path really leads to: the same image under two names, or through a loop device.

Facts: a file is its device and inode, whatever symbolic or hard link leads there; a block device is its
number; a loop device is its file as well. Opening a block device with O_EXCL fails with EBUSY while a mount,
device-mapper or md has it; that takes nothing from anybody.
"""

from __future__ import annotations

import errno
import os
import stat

from xtool.devices.backendkinds import TargetFacts
from xtool.devices.hotplug import loop
from xtool.diskurl import is_url, parse_url


def look_at(target: str | None) -> TargetFacts:
    if target is None:
        return TargetFacts("none")
    if is_url(target):
        return TargetFacts("remote")
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return TargetFacts("missing", detail="does not exist")
    except OSError as error:
        return TargetFacts("missing", detail=f"cannot be looked at: {error.strerror}")
    if stat.S_ISREG(status.st_mode):
        return TargetFacts("file", status.st_size)
    if stat.S_ISBLK(status.st_mode):
        return TargetFacts("block", _block_size(status.st_rdev))
    return TargetFacts("other")


def _block_size(device: int) -> int:
    try:
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size") as file:
            return int(file.read()) * 512
    except (OSError, ValueError):
        return 0


def identity(target: str) -> frozenset[str]:
    """Two targets are the same data when these overlap. Empty when the target cannot be looked at.

    Two servers that give the same disk are not found out.
    """
    if is_url(target):
        try:
            return frozenset((parse_url(target).identity,))
        except ValueError:
            return frozenset()
    try:
        status = os.stat(target)
    except OSError:
        return frozenset()
    if stat.S_ISBLK(status.st_mode):
        names = {f"block {status.st_rdev}"}
        found = loop.status(target) if os.major(status.st_rdev) == loop.LOOP_MAJOR else None
        if found:
            names.add(f"file {found.device} {found.inode}")
        return frozenset(names)
    return frozenset((f"file {status.st_dev} {status.st_ino}",))


def users(target: str) -> list[tuple[str, bool]]:
    """What the host itself does with this data: loop devices of the same file, mounts of the device."""
    found: list[tuple[str, bool]] = []
    try:
        status = os.stat(target)
    except OSError:
        return found
    if stat.S_ISBLK(status.st_mode):
        try:
            os.close(os.open(target, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                found.append(("the host itself (a mount, LVM or RAID)", True))
        return found
    for name in _loops():
        seen = loop.status(f"/dev/{name}")
        if seen and (seen.device, seen.inode) == (status.st_dev, status.st_ino):
            found.append((f"/dev/{name} on this host", not seen.readonly))
    return found


def _loops() -> list[str]:
    """Loop devices in use."""
    try:
        names = os.listdir("/sys/block")
    except OSError:
        return []
    return sorted(n for n in names if n.startswith("loop") and os.path.exists(f"/sys/block/{n}/loop"))
