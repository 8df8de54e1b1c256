"""The container of the program lzop, and liblzo2 by ctypes for what is in it.

Facts about lzop and liblzo2
----------------------------
* All numbers are big-endian. After the header come blocks: decompressed size (0 ends the file), stored
  size, the checksums the header's flags announce, data. Equal sizes mean the block is stored as it is;
  such a block has no checksum of its compressed form.
* ``lzo1x_decompress_safe`` checks every access and reports the size it produced. It needs no set-up call.
* No Python package wraps liblzo2 without a compiler, and only old kernels use lzo: so a library found at
  run time (Debian: ``liblzo2-2``) rather than a dependency.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator
from struct import error as StructError
from struct import unpack_from

from xtool.builder.image.baddata import BadData, trailing, truncated

_MAGIC_SIZE = 9
_ADLER_OUT, _ADLER_IN, _EXTRA, _CRC_OUT, _CRC_IN, _FILTER = 1, 2, 0x40, 0x100, 0x200, 0x800
_MAX_BLOCK = 64 << 20  # lzop's own limit
_LIBRARY = "liblzo2.so.2"


def decompress(source: memoryview) -> Iterator[bytes]:
    """Yield the blocks of an lzop file. Raises ``BadData``."""
    try:
        flags, position = _header(source)
        while True:
            (size,) = unpack_from(">I", source, position)
            if not size:
                rest = source[position + 4 :]
                if any(rest):
                    raise trailing(len(rest), "lzo")
                return
            stored, adler, crc, position = _block_header(source, position + 4, size, flags)
            if position + stored > len(source):
                raise truncated("lzo")
            raw = source[position : position + stored]
            block = bytes(raw) if stored == size else _decompress_block(bytes(raw), size)
            if (adler is not None and zlib.adler32(block) != adler) or (
                crc is not None and zlib.crc32(block) != crc
            ):
                raise BadData("has corrupt lzo data: a block's checksum is wrong")
            yield block
            position += stored
    except (IndexError, StructError) as error:
        raise truncated("lzo") from error


def _header(source: memoryview) -> tuple[int, int]:
    """``(flags, offset of the first block)``."""
    position = _MAGIC_SIZE
    (version,) = unpack_from(">H", source, position)
    extended = version >= 0x940
    position += 6 if extended else 4  # version, library version, needed version
    method = source[position]
    if method not in (1, 2, 3):  # LZO1X-1, LZO1X-1(15), LZO1X-999: one decoder for all
        raise BadData(f"has lzo data that uses the unknown method {method}")
    position += 2 if extended else 1  # method, level
    (flags,) = unpack_from(">I", source, position)
    position += 4
    if flags & _FILTER:
        raise BadData("has lzo data that uses a filter, which is not supported")
    position += 12 if extended else 8  # mode, time
    position += 1 + source[position] + 4  # name, header checksum
    if flags & _EXTRA:
        position += 8 + unpack_from(">I", source, position)[0]
    return flags, position


def _block_header(
    source: memoryview, position: int, size: int, flags: int
) -> tuple[int, int | None, int | None, int]:
    """``(stored size, adler32 and crc32 of the decompressed block, offset of the data)``."""
    (stored,) = unpack_from(">I", source, position)
    position += 4
    if size > _MAX_BLOCK or stored > size:
        raise BadData(f"has corrupt lzo data: a block of {stored} bytes claims to hold {size}")
    adler = crc = None
    if flags & _ADLER_OUT:
        (adler,) = unpack_from(">I", source, position)
        position += 4
    if flags & _CRC_OUT:
        (crc,) = unpack_from(">I", source, position)
        position += 4
    if stored < size:
        position += 4 * (bool(flags & _ADLER_IN) + bool(flags & _CRC_IN))
    return stored, adler, crc, position


def _decompress_block(raw: bytes, size: int) -> bytes:
    library = load_library()
    out = ctypes.create_string_buffer(size)
    produced = ctypes.c_size_t(size)
    status = library.lzo1x_decompress_safe(raw, ctypes.c_size_t(len(raw)), out, ctypes.byref(produced), None)
    if status != 0 or produced.value != size:
        raise BadData(f"has corrupt lzo data (liblzo2 says {status})")
    return out.raw


def load_library() -> ctypes.CDLL:
    """liblzo2. Raises ``BadData`` when it is not installed."""
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise BadData(
            f"is compressed with lzo, and {_LIBRARY} is not installed here",
            hint="apt install liblzo2-2",
        ) from error
