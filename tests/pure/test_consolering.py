"""The console's page: bytes in order whatever happens, and no sense in nonsense."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.errors import LocalProtocolError, RingError
from xtool.proto import shm
from xtool.proto.consolering import ConsoleBackend, ConsoleEnd, ConsoleFrontend

IN_CONS, IN_PROD, OUT_CONS, OUT_PROD = 3072, 3076, 3080, 3084
STARTS = st.sampled_from([0, 0x7FFF_FFF0, 0xFFFF_FFF0]) | st.integers(0, 2**32 - 1)


def page(start: int = 0) -> memoryview:
    view = memoryview(bytearray(4096))
    for word in (IN_CONS, IN_PROD, OUT_CONS, OUT_PROD):
        shm.store32(view, word, start)
    return view


@settings(max_examples=200, deadline=None)
@given(STARTS, st.lists(st.tuples(st.booleans(), st.integers(0, 3000), st.integers(0, 2500)), max_size=30))
def test_every_byte_once_in_order(start: int, steps: list[tuple[bool, int, int]]) -> None:
    view = page(start)
    back, front = ConsoleBackend(view), ConsoleFrontend(view)
    sent, got = {True: bytearray(), False: bytearray()}, {True: bytearray(), False: bytearray()}
    for out, offered, wanted in steps:
        writer, reader = (front, back) if out else (back, front)
        data = bytes((len(sent[out]) + i) % 251 for i in range(offered))
        room = writer.free()
        assert writer.write(data) == min(room, offered)
        sent[out] += data[: min(room, offered)]
        got[out] += reader.read(wanted)
    for out, reader in ((True, back), (False, front)):
        got[out] += reader.read()
        assert got[out] == sent[out]


def test_the_place_of_things() -> None:
    view = page()
    ConsoleFrontend(view).write(b"out" * 1000)
    ConsoleBackend(view).write(b"in" * 1000)
    assert bytes(view[1024:3072]) == (b"out" * 1000)[:2048]
    assert bytes(view[:1024]) == (b"in" * 1000)[:1024]
    assert [shm.load32(view, at) for at in (IN_CONS, IN_PROD, OUT_CONS, OUT_PROD)] == [0, 1024, 0, 2048]


@pytest.mark.parametrize("start", [0, 0xFFFF_FC00])
def test_killed_between_peek_and_consume(start: int) -> None:
    view = page(start)
    front = ConsoleFrontend(view)
    log = b""
    for line in (b"one\n" * 300, b"two\n" * 300, b"three\n" * 200):
        assert front.write(line) == len(line)
        assert ConsoleBackend(view).peek() == line  # killed: nothing was kept
        back = ConsoleBackend(view)
        log += back.peek()
        back.consume(len(line))
    assert log == b"one\n" * 300 + b"two\n" * 300 + b"three\n" * 200
    with pytest.raises(LocalProtocolError):
        back.consume(1)


@pytest.mark.parametrize("start", [0, 0xFFFF_FFF8])
@pytest.mark.parametrize(
    ("word", "value"),
    [(OUT_PROD, 2049 + 5), (OUT_PROD, 4), (OUT_PROD, 2**31), (IN_CONS, 4), (IN_CONS, -1020)],
)
def test_hf_35_corrupt_indexes(word: int, value: int, start: int) -> None:
    view = page(start)
    front, back = ConsoleFrontend(view), ConsoleBackend(view)
    front.write(b"hello world")
    back.consume(len(back.peek(5)))
    assert back.pending() == 6
    back.write(b"abc")
    shm.store32(view, word, start + value)
    for _ in range(2):
        with pytest.raises(RingError):
            back.read()
            back.write(b"x")
    if word == OUT_PROD and value != 4:  # out of range is seen by a new process as well
        with pytest.raises(RingError):
            ConsoleBackend(view)


def test_our_own_indexes_overwritten() -> None:
    view = page()
    front, back = ConsoleFrontend(view), ConsoleBackend(view)
    front.write(b"abc")
    shm.store32(view, OUT_CONS, 99)
    shm.store32(view, IN_PROD, 99)
    assert back.read() == b"abc" and back.write(b"xyz") == 3
    assert (shm.load32(view, OUT_CONS), shm.load32(view, IN_PROD)) == (3, 3)


@given(
    st.lists(st.tuples(st.sampled_from(range(3072, 3088, 4)), st.integers(0, 2**32 - 1)), max_size=8),
    st.booleans(),
)
def test_nothing_but_ring_errors(writes: list[tuple[int, int]], backend: bool) -> None:
    view = page()
    end = ConsoleEnd(view, backend=backend)
    try:
        for at, value in writes:
            shm.store32(view, at, value)
            assert len(end.read()) <= 2048
            assert end.write(b"x" * 5000) <= 2048
    except RingError:
        assert end.broken
    end.release()


def test_a_page_is_needed() -> None:
    with pytest.raises(LocalProtocolError):
        ConsoleBackend(memoryview(bytearray(3000)))
