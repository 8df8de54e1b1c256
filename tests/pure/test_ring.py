"""Rings: every index wrap, every instruction to be killed at, every lie a peer can tell."""

from __future__ import annotations

import random
import re
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.errors import LocalProtocolError, RingError
from xtool.proto import shm
from xtool.proto.ring import HEADER_SIZE, BackRing, FrontRing, ring_slots
from xtool.proto.ringjournal import ResponseJournal

PAGE = 4096
PACKAGE = Path(__file__).parents[2] / "xtool"
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = 0, 4, 8, 12
#: Start indexes: at the beginning, and so that the first batches wrap 2**31 and 2**32.
STARTS = [0, 0x7FFF_FFFD, 0xFFFF_FFF9]


class Killed(Exception):
    pass


class Mortal:
    """A memoryview whose owner dies after ``budget`` stores. A copy is one store a byte, as a signal that
    cannot be caught may come between any two of them. Words are stored whole, as the processor does."""

    def __init__(self, view: memoryview, clock: Clock, step: int = 1) -> None:
        self._view, self._clock, self._step = view, clock, step

    def __len__(self) -> int:
        return len(self._view)

    def __enter__(self) -> Mortal:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getitem__(self, key: Any) -> Any:
        found = self._view[key]
        return Mortal(found, self._clock) if isinstance(found, memoryview) else found

    def __bytes__(self) -> bytes:
        return bytes(self._view)

    def cast(self, kind: str) -> Any:
        return Mortal(self._view.cast(kind), self._clock)  # type: ignore[call-overload]

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self._view))
            assert stop - start == len(value)
            for i, byte in enumerate(value):
                self._clock.tick()
                self._view[start + i] = byte
        else:
            self._clock.tick()
            self._view[key] = value

    def release(self) -> None:
        pass


class Clock:
    def __init__(self) -> None:
        self.budget: int | None = None
        self.stores = 0

    def tick(self) -> None:
        if self.budget is not None and self.stores >= self.budget:
            raise Killed
        self.stores += 1


SLOT = 24  # larger than a response, so that padding is seen


def request(number: int) -> bytes:
    return b"REQ!" + number.to_bytes(8, "little") + bytes([number & 0xFF] * 12)


def answer(slot: bytes) -> bytes:
    """What a backend says to a request: only possible if its slot is intact."""
    assert slot[:4] == b"REQ!", f"not a request: {slot!r}"
    assert slot[12:] == slot[4:5] * 12, f"a torn request: {slot!r}"
    return b"RSP!" + slot[4:12]


class Guest:
    """A frontend that checks: each request answered once, with its own number, in whole clean slots."""

    def __init__(self, view: memoryview, start: int) -> None:
        self.ring = FrontRing(view, SLOT, start=start)
        self.sent = 0
        self.expected: deque[int] = deque()
        self.answered = 0

    def send(self, count: int) -> None:
        for _ in range(min(count, self.ring.free())):
            self.ring.push(request(self.sent))
            self.expected.append(self.sent)
            self.sent += 1
        self.ring.publish()

    def collect(self) -> None:
        for slot in self.ring.take_responses():
            assert slot == (b"RSP!" + self.expected.popleft().to_bytes(8, "little")).ljust(SLOT, b"\0")
            self.answered += 1


def serve(ring: BackRing, rng: random.Random) -> None:
    """What a backend does once: take some, answer some, in one or two puts."""
    held = [answer(slot) for slot in ring.take(rng.randrange(1, 12))]
    while held:
        batch, held = held[: (n := rng.randrange(1, 9))], held[n:]
        if n & 1:
            ring.put(batch)
        else:
            ring.put_block(b"".join(batch), len(batch[0]))
        if rng.random() < 0.6:
            ring.publish()
    ring.publish()
    ring.final_check()


def run_until_killed(seed: int, start: int, budget: int | None) -> int:
    """A guest and a backend; the backend dies at store ``budget``, the next one perhaps while it recovers.

    Returns how many stores the backend made until all was done.
    """
    rng = random.Random(seed)
    shared = memoryview(bytearray(PAGE))
    kept = memoryview(bytearray(ResponseJournal.size_for(128, 12)))
    guest = Guest(shared, start)
    clock = Clock()
    clock.budget = budget
    view: Any = Mortal(shared, clock)
    journal: Any = Mortal(kept, clock)
    try:
        ring = BackRing(view, SLOT, ResponseJournal(journal))
    except Killed:  # before it was connected
        clock.budget = None
        ring = BackRing(view, SLOT, ResponseJournal(journal))
    todo = 40
    rounds = 0
    while guest.answered < todo:
        rounds += 1
        assert rounds < 500
        if guest.sent < todo:
            guest.send(min(rng.randrange(14), todo - guest.sent))
        try:
            if clock.budget is not None and clock.stores >= clock.budget:
                raise Killed
            serve(ring, rng)
        except Killed:
            guest.collect()  # a guest goes on while the backend is away
            guest.send(min(3, todo - guest.sent))
            # The first successor dies early too, inside recover as often as not; the second lives.
            for again in (rng.randrange(40), None):
                clock.budget = None if again is None else clock.stores + again
                try:
                    ring = BackRing.recover(view, SLOT, ResponseJournal(journal))
                    assert ring.publish()  # a notification may have been lost
                    serve(ring, rng)
                    break
                except Killed:
                    guest.collect()
            clock.budget = None
        guest.collect()
    assert not guest.expected
    assert guest.answered == guest.sent == todo
    return clock.stores


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_every_store(seed: int, start: int) -> None:
    stores = run_until_killed(seed, start, None)
    assert stores > 1000
    for budget in range(stores):
        run_until_killed(seed * 100_003 + budget if budget % 2 else seed, start, budget)


def test_without_a_journal_that_test_fails() -> None:
    """The proof above would notice a journal that does nothing."""
    lost = 0
    record, ResponseJournal.record_block = ResponseJournal.record_block, lambda *_: None  # type: ignore[method-assign]
    try:
        for budget in range(300):
            try:
                run_until_killed(1, 0, budget)
            except AssertionError:
                lost += 1
    finally:
        ResponseJournal.record_block = record  # type: ignore[method-assign]
    assert lost > 100


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_traffic(data: st.DataObject) -> None:
    """Any order of sends, takes, answers and looks, from any index, over 1, 2 or 4 pages."""
    start = data.draw(st.sampled_from(STARTS) | st.integers(0, 0xFFFF_FFFF))
    view = memoryview(bytearray(PAGE * data.draw(st.sampled_from([1, 2, 4]))))
    guest, held = Guest(view, start), deque[bytes]()
    back = BackRing(view, SLOT)
    assert back.size == guest.ring.size == ring_slots(len(view), SLOT)
    for _ in range(data.draw(st.integers(1, 30))):
        step = data.draw(st.sampled_from(["send", "take", "put", "collect"]))
        size = data.draw(st.integers(0, back.size + 5))
        if step == "send":
            guest.send(size)
        elif step == "take":
            held.extend(answer(slot) for slot in back.take(size))
        elif step == "put":
            back.put([held.popleft() for _ in range(min(size, len(held)))])
            back.publish()
        else:
            guest.collect()
        assert back.unanswered == len(held) <= back.size
    held.extend(answer(slot) for slot in back.take(back.size))
    back.put(list(held))
    back.publish()
    guest.collect()
    assert not guest.expected


@pytest.mark.parametrize("start", STARTS)
def test_nobody_sleeps_while_there_is_work(start: int) -> None:
    """Each end sleeps only after final_check; a wake-up comes exactly when publish asks for one."""
    rng = random.Random(start)
    view = memoryview(bytearray(PAGE))
    front, back = FrontRing(view, SLOT, start=start), BackRing(view, SLOT)
    back_awake = front_awake = False
    wakes = answered = sent = 0
    while answered < 3000:
        if rng.random() < 0.5 and sent < 3000 and front.free():
            for _ in range(min(rng.randrange(1, 6), front.free(), 3000 - sent)):
                front.push(request(sent))
                sent += 1
            if front.publish():
                back_awake, wakes = True, wakes + 1
        elif back_awake and rng.random() < 0.7:
            back.put([answer(slot) for slot in back.take(rng.randrange(1, 5))])
            if back.publish():
                front_awake = True
            back_awake = back.final_check()
        elif front_awake:
            answered += len(front.take_responses())
            front_awake = front.final_check()
        elif not back_awake and (sent >= 3000 or not front.free()):
            assert answered == sent  # both asleep: nothing may be left
            if sent >= 3000:
                break
    assert answered == 3000
    assert wakes < sent  # and not a wake-up for each


def poke(view: memoryview, word: int, value: int) -> None:
    shm.store32(view, word, value)


def loaded(start: int) -> tuple[memoryview, FrontRing, BackRing]:
    """A ring with 5 requests taken, 2 of them answered."""
    view = memoryview(bytearray(PAGE))
    front, back = FrontRing(view, SLOT, start=start), BackRing(view, SLOT)
    for number in range(5):
        front.push(request(number))
    front.publish()
    slots = back.take(10)
    back.put([answer(slot) for slot in slots[:2]])
    back.publish()
    return view, front, back


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("ahead", [2 + 128 + 1, 0x8000_0000, 4, 3, 1, -1, 0x7FFF_FFFF])
def test_hf_1_2_4_a_request_index_that_makes_no_sense(start: int, ahead: int) -> None:
    view, _, back = loaded(start)
    poke(view, REQ_PROD, start + ahead)
    for method in (back.pending, back.final_check, lambda: back.take(9)) * 2:
        with pytest.raises(RingError):
            method()
    poke(view, REQ_PROD, start + 6)  # an honest value does not mend it
    with pytest.raises(RingError):
        back.take(1)


def test_hf_4_a_request_index_that_goes_back_among_those_not_taken() -> None:
    view, front, back = loaded(0)
    for number in range(5, 15):
        front.push(request(number))
    front.publish()
    assert back.pending() == 10
    poke(view, REQ_PROD, 12)
    with pytest.raises(RingError, match="went back from 15 to 12"):
        back.pending()


@pytest.mark.parametrize("start", STARTS)
def test_hf_4_our_own_words_overwritten(start: int) -> None:
    view, front, back = loaded(start)
    for lie in (0, start - 77, start + 12345):
        poke(view, RSP_PROD, lie)
        poke(view, REQ_EVENT, lie)
        assert back.take(10) == []
        assert back.unanswered == 3
    back.put([b"RSP!" + n.to_bytes(8, "little") for n in (2, 3, 4)])
    back.publish()
    assert shm.load32(view, RSP_PROD) == (start + 5) & shm.MASK32
    assert not back.final_check()
    assert shm.load32(view, REQ_EVENT) == (start + 6) & shm.MASK32
    assert [slot[4] for slot in front.take_responses()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("ahead", [6, -1, 0x8000_0000, 1])
def test_a_backend_that_lies(start: int, ahead: int) -> None:
    view, front, _ = loaded(start)
    assert len(front.take_responses()) == 2
    poke(view, RSP_PROD, start + ahead)
    for method in (front.take_responses, front.final_check):
        with pytest.raises(RingError):
            method()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, PAGE - 1), st.binary(min_size=1, max_size=16)), max_size=20), st.data()
)
def test_nothing_but_ring_errors(writes: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """A guest that writes anywhere: RingError or bounded work, on a living ring and on a recovered one."""
    view, _, back = loaded(data.draw(st.sampled_from(STARTS)))
    kept = memoryview(bytearray(data.draw(st.binary(max_size=400)).ljust(3000, b"\0")))
    for at, raw in writes:
        raw = raw[: PAGE - at]
        view[at : at + len(raw)] = raw
        try:
            back.take(data.draw(st.integers(0, 200)))
            assert back.unanswered <= back.size
            back.put([b"x" * 12] * min(back.unanswered, data.draw(st.integers(0, 200))))
            back.publish()
            back.final_check()
        except RingError:
            back = BackRing.__new__(BackRing)
            try:
                back = BackRing.recover(view, SLOT, ResponseJournal(kept))
            except RingError:
                return


def test_r3_responses_leave_nothing_old_in_their_slots() -> None:
    view = memoryview(bytearray(b"\xaa" * PAGE))
    front, back = FrontRing(view, SLOT), BackRing(view, SLOT)
    for _ in range(back.size):
        front.push(b"\xbb" * SLOT)
    front.publish()
    back.put([b"ok"] * len(back.take(7)))
    back.put_block(b"ok" * (len(back.take_block(back.size)) // SLOT), 2)
    back.publish()
    assert set(front.take_responses()) == {b"ok".ljust(SLOT, b"\0")}


def test_r1_a_taken_request_is_private() -> None:
    view, _, back = loaded(0)
    front_slot = HEADER_SIZE + 5 * SLOT
    view[front_slot : front_slot + SLOT] = request(5)
    poke(view, REQ_PROD, 6)
    (slot,) = back.take(1)
    view[front_slot : front_slot + SLOT] = b"\xff" * SLOT
    assert slot == request(5)


def test_recovering_from_a_ring_whose_index_the_guest_moved() -> None:
    view, _, _ = loaded(0)
    kept = memoryview(bytearray(4096))
    ResponseJournal(kept).record(0, [b"RSP!" + bytes(8)] * 3)
    poke(view, RSP_PROD, 1)  # neither before the recorded batch nor after it
    with pytest.raises(RingError, match="rsp_prod was moved"):
        BackRing.recover(view, SLOT, ResponseJournal(kept))
    ResponseJournal(kept).record(0, [b"RSP!" + bytes(8)] * 90)
    poke(view, RSP_PROD, 0)  # more responses than there are requests
    with pytest.raises(RingError):
        BackRing.recover(view, SLOT, ResponseJournal(kept))


def test_a_new_connection_does_not_believe_the_journal_of_the_last() -> None:
    kept = memoryview(bytearray(4096))
    ResponseJournal(kept).record(0, [b"old"])
    view = memoryview(bytearray(PAGE))
    front = FrontRing(view, SLOT)
    BackRing(view, SLOT, ResponseJournal(kept))  # and dies at once
    front.push(request(0))
    front.publish()
    back = BackRing.recover(view, SLOT, ResponseJournal(kept))
    assert back.take(1) == [request(0)]
    assert front.take_responses() == []


@given(st.binary(max_size=200), st.integers(0, 511), st.integers(1, 255))
def test_a_damaged_journal_is_no_journal(payload: bytes, at: int, flip: int) -> None:
    kept = memoryview(bytearray(512))
    responses = [payload[i : i + 4].ljust(4, b"\0") for i in range(0, len(payload) or 1, 4)]
    ResponseJournal(kept).record(0xFFFF_FFFF, responses)
    used = 64 + 4 * len(responses)
    kept[at] ^= flip
    record = ResponseJournal(kept).read()
    if 20 <= at < 64 or at >= used:
        assert record is not None and record.responses == tuple(responses)
    else:
        assert record is None


def test_misuse() -> None:
    view, front, back = loaded(0)
    with pytest.raises(LocalProtocolError, match="4 responses to 3 requests"):
        back.put([b""] * 4)
    with pytest.raises(LocalProtocolError, match="longer than a slot"):
        back.put([b"x" * (SLOT + 1)])
    for payload, size in ((b"x" * 16, 4), (b"x" * (SLOT + 1), SLOT + 1), (b"x" * 5, 4)):
        with pytest.raises(LocalProtocolError, match="responses to 3 requests"):
            back.put_block(payload, size)
    assert back.unanswered == 3
    for _ in range(front.free()):
        front.push(b"")
    with pytest.raises(LocalProtocolError, match="in use"):
        front.push(b"")
    for size in (0, 100, 17 * PAGE):
        with pytest.raises(LocalProtocolError):
            BackRing(memoryview(bytearray(size)), SLOT)
    with pytest.raises(LocalProtocolError, match="do not fit"):
        ResponseJournal(memoryview(bytearray(64))).record(0, [b"x"])
    back.release()
    with pytest.raises(ValueError):
        view[0]


@pytest.mark.parametrize(
    ("pages", "slot", "slots"), [(1, 112, 32), (1, 108, 32), (16, 112, 512), (1, 12, 256)]
)
def test_number_of_slots(pages: int, slot: int, slots: int) -> None:
    assert ring_slots(pages * PAGE, slot) == slots


def test_words() -> None:
    raw = bytearray(64)
    view = memoryview(raw)
    shm.store32(view, 4, 0x1_0000_0001)
    shm.store16(view, 10, 0x1_0002)
    words = shm.Words(view, 4, 2)
    assert raw[:12] == b"\0\0\0\0\1\0\0\0\0\0\2\0"
    assert (words.load(0), shm.load16(view, 10), shm.load32(view, 8)) == (1, 2, 0x2_0000)
    words.release()
    view.release()
    raw.clear()  # no view is left


def test_only_shm_touches_shared_words() -> None:
    """``pack_into`` shows a reader zeroes; a cast to words belongs into one place."""
    forbidden = re.compile(r"pack_into|\.cast\((?!\"B\"\))|ctypes")  # bytes are no words
    for part in ("proto", "backends", "frontends"):
        for path in (PACKAGE / part).rglob("*.py"):
            code = [line for line in path.read_text().splitlines() if "``" not in line]
            found = [line for line in code if forbidden.search(line)]
            assert path.name == "shm.py" or not found, f"{path.name}: {found}"
