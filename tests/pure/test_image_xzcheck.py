"""The checksum an .xz file holds of its content."""

from __future__ import annotations

import lzma
import zlib

from hypothesis import given
from hypothesis import strategies as st

from xtool.builder.image.xzcheck import stored_crc32


@given(st.binary(max_size=3000), st.integers(1, 40))
def test_it_is_the_content_s(data: bytes, times: int) -> None:
    content = data * times
    packed = lzma.compress(content, check=lzma.CHECK_CRC32)
    if content:  # an empty stream has no block
        assert stored_crc32(memoryview(packed)) == zlib.crc32(content)
    for check in (lzma.CHECK_CRC64, lzma.CHECK_SHA256, lzma.CHECK_NONE):
        assert stored_crc32(memoryview(lzma.compress(content, check=check))) is None


def test_several_streams_or_none() -> None:
    packed = lzma.compress(b"content", check=lzma.CHECK_CRC32)
    assert stored_crc32(memoryview(b"")) is None
    assert stored_crc32(memoryview(packed[:-1])) is None
    for end in range(len(packed)):
        stored_crc32(memoryview(packed[:end]))


@given(st.binary(max_size=200), st.integers(0, 60))
def test_garbage_raises_nothing(noise: bytes, at: int) -> None:
    packed = bytearray(lzma.compress(b"x" * 100, check=lzma.CHECK_CRC32))
    packed[-at - 1 : len(packed)] = noise
    stored_crc32(memoryview(bytes(packed) + b"YZ"))
