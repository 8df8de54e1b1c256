"""Loop devices: a file as a block device, for the kernel's block backend.

Facts about loop devices (Linux 5.8 and later, ``linux/loop.h``)
----------------------------------------------------------------
- LOOP_CTL_GET_FREE on ``/dev/loop-control`` names a device that is free *now*; somebody else may take it
  before LOOP_CONFIGURE, which then says EBUSY: ask again.
- LOOP_CONFIGURE sets file, flags and block size in one step; no half-configured device is ever seen.
- With LO_FLAGS_AUTOCLEAR the device lets go of its file on the last close. So it is held open here until the
  backend has opened it too; if we are killed between, nothing is left.
- LO_FLAGS_DIRECT_IO wants a file system that can; one that cannot (tmpfs) makes the kernel ignore or refuse
  it, depending on its release: then we go on without.
- LO_FLAGS_READ_ONLY goes with a file opened for reading only.
- LOOP_GET_STATUS64 tells device and inode of the file; the path in sysfs is cut off, relative to another
  root, or " (deleted)".
- Without udev a device beyond the first eight may have no node in ``/dev``: it is made.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from ctypes import LittleEndianStructure, c_uint8, c_uint32, c_uint64
from typing import NamedTuple

from xtool.errors import HostError

LOOP_CONFIGURE = 0x4C0A
LOOP_GET_STATUS64 = 0x4C05
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16
LOOP_MAJOR = 7
_CONTROL = "/dev/loop-control"
_TRIES = 64


class LoopInfo64(LittleEndianStructure):
    """``struct loop_info64`` (``linux/loop.h``)."""

    _fields_ = [
        ("lo_device", c_uint64),
        ("lo_inode", c_uint64),
        ("lo_rdevice", c_uint64),
        ("lo_offset", c_uint64),
        ("lo_sizelimit", c_uint64),
        ("lo_number", c_uint32),
        ("lo_encrypt_type", c_uint32),
        ("lo_encrypt_key_size", c_uint32),
        ("lo_flags", c_uint32),
        ("lo_file_name", c_uint8 * 64),
        ("lo_crypt_name", c_uint8 * 64),
        ("lo_encrypt_key", c_uint8 * 32),
        ("lo_init", c_uint64 * 2),
    ]


class LoopConfig(LittleEndianStructure):
    """``struct loop_config`` (``linux/loop.h``)."""

    _fields_ = [
        ("fd", c_uint32),
        ("block_size", c_uint32),
        ("info", LoopInfo64),
        ("reserved", c_uint64 * 8),
    ]


class LoopStatus(NamedTuple):
    """What a loop device shows: device and inode of its file, and whether it may write."""

    device: int
    inode: int
    readonly: bool


class BlockDevice:
    """A block device that is held open. Closing lets go of it; the backend may have it by then."""

    def __init__(self, fd: int, path: str, *, loop: bool) -> None:
        status = os.fstat(fd)
        self._fd = fd
        self.path = path
        self.major, self.minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        self.loop = loop

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_block(path: str, *, readonly: bool) -> BlockDevice:
    """A block device as it is. Raises ``HostError``."""
    try:
        fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}") from error
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        os.close(fd)
        raise HostError(f"{path} is not a block device")
    return BlockDevice(fd, os.path.realpath(path), loop=False)


def attach(path: str, *, readonly: bool, direct_io: bool = True) -> BlockDevice:
    """Make a loop device of a file; it goes when its last user closes it.

    Raises ``HostError`` when the file cannot be opened or no device can be had.
    """
    try:
        file = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise HostError(f"{path} is not a regular file")
        try:
            return _configure(file, path, readonly, direct_io)
        except OSError as error:
            raise HostError(
                f"cannot make a loop device of {path}: {error.strerror or error}",
                hint="is the module loop loaded, and is a device free (losetup -a)?",
            ) from error
    finally:
        os.close(file)


def _configure(file: int, path: str, readonly: bool, direct_io: bool) -> BlockDevice:
    config = LoopConfig(fd=file)
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR | (LO_FLAGS_READ_ONLY if readonly else 0)
    if direct_io:
        config.info.lo_flags |= LO_FLAGS_DIRECT_IO
    name = path.encode()[:63]
    config.info.lo_file_name[: len(name)] = name
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            device = _node(number)
            fd = os.open(device, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, LOOP_CONFIGURE, config)
                return BlockDevice(fd, device, loop=True)
            except OSError as error:
                os.close(fd)
                if error.errno == errno.EBUSY:  # somebody was faster
                    continue
                if error.errno == errno.EINVAL and config.info.lo_flags & LO_FLAGS_DIRECT_IO:
                    config.info.lo_flags &= ~LO_FLAGS_DIRECT_IO
                    continue
                raise
            except BaseException:
                os.close(fd)
                raise
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "every loop device offered was taken by somebody else")


def _node(number: int) -> str:
    path = f"/dev/loop{number}"
    if not os.path.exists(path):
        try:
            os.mknod(path, stat.S_IFBLK | 0o660, os.makedev(LOOP_MAJOR, number))
        except FileExistsError:
            pass
    return path


def status(path: str) -> LoopStatus | None:
    """What a loop device shows, or None for one that is free or no loop device."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    info = LoopInfo64()
    try:
        fcntl.ioctl(fd, LOOP_GET_STATUS64, info)
    except OSError:
        return None
    finally:
        os.close(fd)
    return LoopStatus(info.lo_device, info.lo_inode, bool(info.lo_flags & LO_FLAGS_READ_ONLY))
