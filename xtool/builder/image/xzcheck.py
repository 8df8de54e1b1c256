"""The CRC-32 that an .xz file already holds of what it decompresses to.

Facts (the .xz format, version 1.1.0): a stream is a header of 12 bytes, blocks, an index and a footer of 12
bytes. The footer tells the index' size and the kind of check (1: CRC-32); the index lists each block's size
without its padding; a block ends with the check of its decompressed data. Numbers in the index are
little-endian groups of seven bits. With a single block, as Linux packs its kernels, that check is the whole
content's, and liblzma has compared it by the time the data is there.
"""

from __future__ import annotations

_HEADER = 12
_CHECK_CRC32 = 1


def stored_crc32(stream: memoryview) -> int | None:
    """The CRC-32 of the decompressed content of one whole .xz stream, or None if it holds none."""
    footer = bytes(stream[-_HEADER:])
    if len(stream) < 2 * _HEADER or footer[10:] != b"YZ" or footer[9] != _CHECK_CRC32:
        return None
    index_size = (int.from_bytes(footer[4:8], "little") + 1) * 4
    if index_size + 2 * _HEADER > len(stream):
        return None
    index = bytes(stream[-_HEADER - index_size : -_HEADER])
    if index[:2] != b"\0\1":  # the index' mark, and one record
        return None
    size, shift = 0, 0
    for byte in index[2:11]:
        size |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            break
    end = _HEADER + (size + 3 & ~3)  # the padding stands before the check
    if size < 4 or end > len(stream) - _HEADER - index_size:
        return None
    return int.from_bytes(stream[end - 4 : end], "little")
