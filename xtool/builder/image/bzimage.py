"""Where a Linux bzImage keeps its kernel. Source: Linux, ``Documentation/arch/x86/boot.rst``.

A bzImage is a boot sector and set-up code (``setup_sects`` sectors of 512 bytes after the first), then the
protected-mode code, which carries the real kernel as a compressed ELF file, its *payload*. Linux appends
the decompressed size, 32 bits, to every payload; gzip ends with the same number by itself.
"""

from __future__ import annotations

from struct import unpack_from
from typing import NamedTuple

from xtool.errors import ImageError

_SETUP_SECTS, _BOOT_FLAG, _MAGIC, _VERSION, _PAYLOAD = 0x1F1, 0x1FE, 0x202, 0x206, 0x248
_FIRST_VERSION = 0x208  # the first boot protocol with payload_offset and payload_length
_HEADER_END = 0x250


class Payload(NamedTuple):
    """``data[offset:offset + length]`` is the payload, size trailer included; ``size`` is what it
    decompresses to, modulo 4 GiB."""

    offset: int
    length: int
    size: int


def is_bzimage(data: memoryview) -> bool:
    return len(data) > _MAGIC + 4 and bytes(data[_MAGIC : _MAGIC + 4]) == b"HdrS"


def find_payload(data: memoryview, path: str) -> Payload:
    """Raises ``ImageError`` for a damaged header or a payload that reaches beyond the file."""
    if len(data) < _HEADER_END:
        raise ImageError(f"{path} is cut off in its set-up header: {len(data)} bytes, expected {_HEADER_END}")
    if unpack_from("<H", data, _BOOT_FLAG)[0] != 0xAA55:
        raise ImageError(f"{path} has a Linux set-up header but no boot sector mark; the file is damaged")
    (version,) = unpack_from("<H", data, _VERSION)
    if version < _FIRST_VERSION:
        raise ImageError(
            f"{path} has boot protocol {version >> 8}.{version & 0xFF:02}; 2.08 or newer is needed",
            hint="that kernel is older than Linux 2.6.26; use its vmlinux instead",
        )
    start, length = unpack_from("<II", data, _PAYLOAD)
    offset = ((data[_SETUP_SECTS] or 4) + 1) * 512 + start
    if length <= 4:
        raise ImageError(f"{path} is a bzImage without a payload")
    if offset + length > len(data):
        raise ImageError(
            f"{path} is cut off: its payload reaches to byte {offset + length}, the file ends at {len(data)}",
            hint="copy the file again; it is shorter than its own header says",
        )
    return Payload(offset, length, unpack_from("<I", data, offset + length - 4)[0])
