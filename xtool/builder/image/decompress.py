"""Streams out of the seven compressions Linux kernels come in, with bounded memory.

Every decoder is a generator of chunks over a read-only view of the whole input, so the input is never
copied and the output is only ever as large as one chunk (lz4: one 8 MiB block, lzo: one block). It raises
``BadData`` for input that ends early or goes on after its end.

Facts
-----
* Linux writes lz4 in the *legacy* container (``lz4 -l``): blocks of at most 8 MiB behind 32-bit sizes,
  and no end mark. lzo comes in the container of the program lzop. The others are their usual formats.
* zstd kernels use windows of up to 128 MiB, xz dictionaries likewise.
* The library for zstd returns short at the end of cut-off input instead of failing, so the frame's block
  headers are walked first (RFC 8878, section 3.1.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import unpack_from
from typing import Any, Protocol

from xtool.builder.image.baddata import BadData, trailing, truncated
from xtool.errors import ImageError

_IN, _OUT = 1 << 18, 1 << 20
_LZ4_BLOCK = 8 << 20
_MEMORY = 512 << 20  # what liblzma may use
_LZ4_LEGACY_MAGIC, _LZ4_FRAME_MAGIC = b"\x02\x21\x4c\x18", b"\x04\x22\x4d\x18"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

_MAGICS = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x5d\0\0", "lzma"),
    (b"\x89LZO\0\r\n\x1a\n", "lzo"),
    (_LZ4_LEGACY_MAGIC, "lz4"),
    (_LZ4_FRAME_MAGIC, "lz4"),
    (_ZSTD_MAGIC, "zstd"),
)


class Writer(Protocol):
    def write(self, chunk: bytes) -> None: ...


def sniff(head: bytes) -> str | None:
    """The compression ``head`` (at least the first 9 bytes) begins with."""
    return next((name for magic, name in _MAGICS if head.startswith(magic)), None)


def decompress(source: memoryview, compression: str, sink: Writer, path: str) -> None:
    """Decompress all of ``source`` into ``sink``. Raises ``ImageError`` naming ``path`` for bad input;
    what ``sink.write`` raises passes through."""
    chunks = _DECODERS[compression](source)
    while True:
        try:
            chunk = next(chunks, None)
        except BadData as error:
            raise ImageError(f"{path} {error}", hint=error.hint) from error.__cause__
        except MemoryError:
            raise
        except Exception as error:  # each library has its own exception; all of them mean bad input
            raise ImageError(
                f"{path} has corrupt {compression} data: {error}", hint="copy or download the file again"
            ) from error
        if chunk is None:
            return
        sink.write(chunk)


def _check_rest(rest: memoryview | bytes, compression: str) -> None:
    """Padding with zeros is harmless; anything else after the end means a file put together wrongly."""
    for start in range(0, len(rest), _IN):
        if any(rest[start : start + _IN]):
            raise trailing(len(rest), compression)


def _gzip(source: memoryview) -> Iterator[bytes]:
    import zlib

    decoder = zlib.decompressobj(wbits=31)
    position = 0
    while not decoder.eof:
        feed: Any = decoder.unconsumed_tail
        if not feed:
            feed = source[position : position + _IN]
            position += len(feed)
        chunk = decoder.decompress(feed, _OUT)
        if chunk:
            yield chunk
        elif not feed and not decoder.eof:
            raise truncated("gzip")
    _check_rest(decoder.unused_data, "gzip")
    _check_rest(source[position:], "gzip")


def _stream(decoder: Any, source: memoryview, compression: str) -> Iterator[bytes]:
    """The interface shared by ``bz2``, ``lzma`` and ``lz4.frame`` decompressor objects."""
    position = 0
    while not decoder.eof:
        feed: memoryview | bytes = b""
        if decoder.needs_input:
            feed = source[position : position + _IN]
            position += len(feed)
            if not feed:
                raise truncated(compression)
        chunk = decoder.decompress(feed, _OUT)
        if chunk:
            yield chunk
    _check_rest(decoder.unused_data or b"", compression)
    _check_rest(source[position:], compression)


def _bzip2(source: memoryview) -> Iterator[bytes]:
    import bz2

    return _stream(bz2.BZ2Decompressor(), source, "bzip2")


def _xz(source: memoryview) -> Iterator[bytes]:
    import lzma

    return _stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY), source, "xz")


def _lzma(source: memoryview) -> Iterator[bytes]:
    import lzma

    return _stream(lzma.LZMADecompressor(lzma.FORMAT_ALONE, _MEMORY), source, "lzma")


def _lz4(source: memoryview) -> Iterator[bytes]:
    if bytes(source[:4]) == _LZ4_FRAME_MAGIC:
        import lz4.frame  # type: ignore[import-untyped]

        yield from _stream(lz4.frame.LZ4FrameDecompressor(), source, "lz4")
        return
    import lz4.block  # type: ignore[import-untyped]

    position = 4
    while position < len(source):
        if position + 4 > len(source):
            raise truncated("lz4")
        (size,) = unpack_from("<I", source, position)
        position += 4
        if size == 0x184C2102:  # another legacy stream follows directly
            continue
        if position + size > len(source):
            raise truncated("lz4")
        yield lz4.block.decompress(source[position : position + size], uncompressed_size=_LZ4_BLOCK)
        position += size


def _lzo(source: memoryview) -> Iterator[bytes]:
    from xtool.builder.image import lzo

    return lzo.decompress(source)


def _zstd(source: memoryview) -> Iterator[bytes]:
    import zstandard

    end = _zstd_frame_end(source)
    _check_rest(source[end:], "zstd")
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    with decoder.stream_reader(source[:end]) as reader:
        while chunk := reader.read(_OUT):
            yield chunk


def _zstd_frame_end(source: memoryview) -> int:
    """Walk one frame: header, blocks up to the last, optional checksum."""
    if len(source) < 6:
        raise truncated("zstd")
    descriptor = source[4]
    single_segment = descriptor >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    dictionary = (0, 1, 2, 4)[descriptor & 3]
    position = 5 + (1 - single_segment) + dictionary + content_size
    last = 0
    while not last:
        if position + 3 > len(source):
            raise truncated("zstd")
        header = int.from_bytes(source[position : position + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == 1 else size)  # kind 1: one byte, repeated
    position += 4 * (descriptor >> 2 & 1)
    if position > len(source):
        raise truncated("zstd")
    return position


_DECODERS: dict[str, Callable[[memoryview], Iterator[bytes]]] = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "xz": _xz,
    "lzma": _lzma,
    "lzo": _lzo,
    "lz4": _lz4,
    "zstd": _zstd,
}
