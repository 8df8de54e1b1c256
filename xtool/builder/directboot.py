"""Booting a Linux kernel straight in an HVM guest, without the guest reading it through emulated ports. Pure.

QEMU can hand a kernel to the firmware (``-kernel``), but under Xen every byte of it then passes through an
emulated I/O port: a minute for 14 MiB in the lab. We can write to the guest's memory before it runs, so the
kernel is put in place by the builder:

    15 MiB       the kernel's real-mode set-up code, its header filled in, and the command line
    16 MiB       the protected-mode code, where the kernel prefers to be
    below the    the ramdisk, out of reach of the kernel's decompressor and of the firmware, which keeps its
    top          own things in the last 16 MiB below the end of RAM

All that QEMU gets is a *stub*: a "kernel" of a kilobyte whose set-up code has the firmware copy the real
one's to 0x40000 (which the firmware cleared as it started) and jumps there. So the firmware runs as ever, and
the kernel's set-up code asks it for the memory map and the display as ever.

Layout and protocol: Linux, ``Documentation/arch/x86/boot.rst``. What the firmware leaves alone: hvmloader
uses memory below 16 MiB (scratch space at 0x10000, its tests up to 8 MiB), SeaBIOS the ends of low and high
memory.
"""

from __future__ import annotations

from struct import pack_into, unpack_from
from typing import NamedTuple

from xtool.abi.base import PAGE_SIZE, page_up
from xtool.errors import UsageError

#: Where the set-up code waits, and where it runs.
STAGED = 15 << 20
SETUP_SEGMENT = 0x4000
SETUP = SETUP_SEGMENT << 4
_CMDLINE = 0xE000  # both within the set-up code's own 64 KiB segment
_CMDLINE_LIMIT = 0x1000
_HEAP_END = _CMDLINE - 0x200
#: What the firmware may use at the end of RAM below 4 GiB.
_FIRMWARE = 18 << 20
_LOWEST = 16 << 20

_SETUP_SECTS, _MAGIC, _VERSION, _LOADER, _FLAGS = 0x1F1, 0x202, 0x206, 0x210, 0x211
_CODE32, _RAMDISK, _HEAP, _CMDLINE_PTR = 0x214, 0x218, 0x224, 0x228
_RELOCATABLE, _PREFERRED, _INIT_SIZE = 0x234, 0x258, 0x260
_VIDEO_MODE = 0x1FA
_LOADED_HIGH, _CAN_USE_HEAP = 1, 0x80
_NORMAL_VIDEO = 0xFFFF


class DirectBoot(NamedTuple):
    """``(address, contents)`` of each piece; addresses are guest-physical."""

    setup: tuple[int, bytes]
    cmdline: tuple[int, bytes]
    code: tuple[int, memoryview]
    ramdisk: tuple[int, int] | None  # address and size


def plan_direct_boot(image: memoryview, cmdline: str, ramdisk_size: int, low_end: int) -> DirectBoot | None:
    """Where the pieces of a bzImage go; None if it is no such kernel or memory is too small for this: then
    QEMU's own way remains. Raises ``UsageError`` for a command line that is too long."""
    if len(image) < 0x268 or bytes(image[_MAGIC : _MAGIC + 4]) != b"HdrS":
        return None
    (version,) = unpack_from("<H", image, _VERSION)
    if version < 0x20A or not image[_FLAGS] & _LOADED_HIGH or not image[_RELOCATABLE]:
        return None
    setup_size = ((image[_SETUP_SECTS] or 4) + 1) * 512
    (preferred,) = unpack_from("<Q", image, _PREFERRED)
    (init_size,) = unpack_from("<I", image, _INIT_SIZE)
    code = image[setup_size:]
    end = page_up(preferred + max(init_size, len(code)))
    ramdisk_at = (low_end - _FIRMWARE - ramdisk_size) & ~(PAGE_SIZE - 1)
    if setup_size > _HEAP_END - 0x1000 or preferred < _LOWEST or ramdisk_at < end:
        return None
    text = cmdline.encode() + b"\0"
    if len(text) > _CMDLINE_LIMIT:
        raise UsageError(f"the kernel command line is {len(text) - 1} bytes long, at most 4095 fit")
    setup = bytearray(image[:setup_size])
    setup[_LOADER] = 0xFF  # a boot loader without a number of its own
    setup[_FLAGS] |= _CAN_USE_HEAP
    pack_into("<H", setup, _VIDEO_MODE, _NORMAL_VIDEO)
    pack_into("<I", setup, _CODE32, preferred)
    pack_into("<H", setup, _HEAP, _HEAP_END)
    pack_into("<I", setup, _CMDLINE_PTR, SETUP + _CMDLINE)
    pack_into("<II", setup, _RAMDISK, ramdisk_at if ramdisk_size else 0, ramdisk_size)
    return DirectBoot(
        (STAGED, bytes(setup)),
        (STAGED + _CMDLINE, text),
        (preferred, code),
        (ramdisk_at, ramdisk_size) if ramdisk_size else None,
    )


_START = 0x268  # in the stub's file; its code segment begins at 0x200
_TABLE = 0x2A0
#: push cs; pop es; mov si, table; mov cx, 0x8000; mov ah, 0x87; int 0x15: the firmware moves 64 KiB.
_COPY = bytes.fromhex("0e 07 be a000 b9 0080 b4 87 cd 15")
#: cli; mov ax, SETUP_SEGMENT; mov ds/es/fs/gs/ss, ax; mov sp, _HEAP_END; jmp far SETUP_SEGMENT+0x20:0
_JUMP = bytes.fromhex("fa b8 0040 8ed8 8ec0 8ee0 8ee8 8ed0 bc 00de ea 0000 2040")


def _descriptor(base: int) -> bytes:
    """A 64 KiB data segment, as INT 15h function 87h wants it."""
    return b"\xff\xff" + base.to_bytes(3, "little") + b"\x93\0" + base.to_bytes(4, "little")[3:]


def stub_kernel() -> bytes:
    """The "kernel" for QEMU: one set-up sector beyond the boot sector, and code that is never reached."""
    stub = bytearray(1024 + 512)
    stub[_SETUP_SECTS] = 1
    stub[0x1FE:0x200] = b"\x55\xaa"
    stub[0x200:0x202] = bytes((0xEB, _START - 0x202))  # over the header
    stub[0x202:0x206] = b"HdrS"
    pack_into("<H", stub, _VERSION, 0x20C)
    stub[_FLAGS] = _LOADED_HIGH
    pack_into("<I", stub, _CODE32, 0x100000)
    pack_into("<I", stub, 0x22C, 0x7FFFFFFF)  # how high a ramdisk may lie
    pack_into("<I", stub, 0x238, 255)  # the longest command line
    code = _COPY + _JUMP
    stub[_START : _START + len(code)] = code
    stub[_TABLE + 16 : _TABLE + 32] = _descriptor(STAGED) + _descriptor(SETUP)
    return bytes(stub)
