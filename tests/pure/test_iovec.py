"""Reading and writing memory in many pieces, against a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtool.backends.iovec import IOV_MAX, read_some, whole

CONTENT = bytes(range(256)) * 64


@pytest.fixture(scope="module")
def fd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path: Path = tmp_path_factory.mktemp("iovec") / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def cut(data: bytearray, sizes: Sequence[int]) -> list[memoryview]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(memoryview(data)[at : at + size])
        at += size
    return pieces


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=40),
    st.lists(st.integers(1, 300), min_size=1),
    st.integers(0, 2000),
)
def test_calls_that_do_less_than_they_were_asked_to(
    fd: int, sizes: list[int], most: list[int], offset: int
) -> None:
    """Each call stops after so many bytes, wherever in a piece that is."""
    limits = iter(most * 10_000)

    def short(fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        left, some = next(limits), []
        for piece in pieces:
            some.append(piece[:left])
            left -= len(some[-1])
            if not left:
                break
        return os.preadv(fd, some, offset)

    data = bytearray(sum(sizes))
    assert whole(short, fd, cut(data, sizes), offset) is None
    assert data == CONTENT[offset : offset + len(data)]


def test_more_pieces_than_a_call_takes(fd: int) -> None:
    count = 2 * IOV_MAX + 5
    data = bytearray(count * 4)
    with pytest.raises(OSError):
        os.preadv(fd, cut(data, [4] * count), 0)
    assert read_some(fd, cut(data, [4] * count), 0) == len(data)
    assert data == CONTENT[: len(data)]
    new = bytearray(os.urandom(count * 4))
    assert whole(os.pwritev, fd, cut(new, [4] * count), 100) is None
    got = bytearray(len(new))
    assert whole(os.preadv, fd, cut(got, [4] * count), 100) is None and got == new
    os.pwrite(fd, CONTENT, 0)


def test_the_end_of_the_file(fd: int) -> None:
    data = bytearray(3 * 4096)
    assert whole(os.preadv, fd, cut(data, [4096] * 3), len(CONTENT) - 5000) == len(CONTENT)
    assert data[:5000] == CONTENT[-5000:]
    assert read_some(fd, cut(data, [4096] * 3), len(CONTENT) - 5000) == 5000
