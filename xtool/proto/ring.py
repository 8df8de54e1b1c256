"""Request and response rings (``public/io/ring.h``), both ends, without any event channel.

A ring is 1 to 16 contiguous pages: 64 bytes of indexes, then a power of two of slots. The frontend puts
requests in and takes responses out, the backend the other way round, both in the same slots. Methods that
put something in say with ``publish() -> bool`` whether the peer wants to be notified; the caller does that.

The backend's loop::

    while True:
        for slot in ring.take(32): ...        # private copies
        ring.put(responses)                   # in the order of the requests
        if ring.publish(): notify(port)
        if not ring.final_check(): break      # else: more came in meanwhile

Facts about rings
-----------------
* Indexes run freely through 32 bits. Each end keeps its own ones privately and only ever stores them; what
  the peer writes over them is not looked at.
* The peer's index is read once per look. More than a ringful ahead, or behind what it said before: the ring
  is broken for good (``RingError``), as nothing in it can be believed any more.
* ``req_event`` and ``rsp_event`` say from which index on the other side wants to be told. After setting
  one's own, look once more with a barrier between (``final_check``).
* Responses are given in the order of the requests here, though the protocol allows any. So the requests
  from ``rsp_prod`` on are always those not answered yet, and still intact: a backend that was killed takes
  them again. ``xtool.proto.ringjournal`` says what covers the moment in which slots are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

from xtool.errors import LocalProtocolError, RingError
from xtool.proto.ringjournal import ResponseJournal
from xtool.proto.shm import MASK32, Words, mb, snapshot, write

PAGE_SIZE = 4096
HEADER_SIZE = 64
MAX_PAGES = 16

_REQ_PROD, _REQ_EVENT, _RSP_PROD, _RSP_EVENT = range(4)


def ring_slots(size: int, slot_size: int) -> int:
    """How many slots a ring of ``size`` bytes has: the largest power of two that fits."""
    return 1 << (((size - HEADER_SIZE) // slot_size).bit_length() - 1)


class _Ring:
    """What both ends share: the view, its slots, and what happens when the peer cannot be believed."""

    def __init__(self, view: memoryview, slot_size: int) -> None:
        pages, rest = divmod(len(view), PAGE_SIZE)
        if rest or not 1 <= pages <= MAX_PAGES:
            raise LocalProtocolError(f"a ring of {len(view)} bytes; 1 to {MAX_PAGES} pages can be used")
        if not 4 <= slot_size <= PAGE_SIZE - HEADER_SIZE:
            raise LocalProtocolError(f"ring slots of {slot_size} bytes")
        self.slot_size = slot_size
        self.size = ring_slots(len(view), slot_size)
        self.broken: str | None = None
        self._view = view
        self._words = Words(view, 0, 4)

    def release(self) -> None:
        """Let go of the view, so that it can be unmapped. The ring cannot be used afterwards."""
        self._words.release()
        self._view.release()

    def _break(self, reason: str) -> RingError:
        self.broken = reason
        return RingError(reason)

    def _copy_out(self, index: int, count: int) -> bytes:
        """A private copy of ``count`` slots from ``index`` on; the shared bytes are read once."""
        slot, start = self.slot_size, index & (self.size - 1)
        run = min(count, self.size - start)
        raw = snapshot(self._view, HEADER_SIZE + start * slot, run * slot)
        if run < count:
            raw += snapshot(self._view, HEADER_SIZE, (count - run) * slot)
        return raw

    def _apart(self, raw: bytes) -> list[bytes]:
        slot = self.slot_size
        return [raw[at : at + slot] for at in range(0, len(raw), slot)]

    def _copy_in(self, index: int, messages: Sequence[bytes]) -> None:
        """Overwrite whole slots, zero padded: nothing old is left in them."""
        slot = self.slot_size
        raw = b"".join([message.ljust(slot, b"\0") for message in messages])
        if len(raw) != slot * len(messages):
            raise LocalProtocolError(f"a message longer than a slot of {slot} bytes")
        self._store_slots(index, raw)

    def _store_slots(self, index: int, raw: bytes) -> None:
        slot, start = self.slot_size, index & (self.size - 1)
        run = (self.size - start) * slot
        write(self._view, HEADER_SIZE + start * slot, raw[:run])
        if run < len(raw):
            write(self._view, HEADER_SIZE, raw[run:])


class BackRing(_Ring):
    """The backend's end of a ring whose frontend has just set it up.

    ``slot_size`` is that of the larger of request and response, in bytes. A ``journal`` makes the ring
    survive a kill; it is cleared here. Raises ``RingError``, keeping no hold on the view, if the indexes
    make no sense to begin with.
    """

    def __init__(self, view: memoryview, slot_size: int, journal: ResponseJournal | None = None) -> None:
        super().__init__(view, slot_size)
        self._journal = journal
        if journal is not None:
            journal.clear()
        try:
            self._attach()
        except RingError:
            self._words.release()  # the error keeps us alive, and must not keep the view from being unmapped
            raise

    @classmethod
    def recover(cls, view: memoryview, slot_size: int, journal: ResponseJournal | None) -> BackRing:
        """Continue on a ring that another process served until it died, at whatever instruction.

        Responses it had begun to write are finished from the journal and published; every request not
        answered yet is pending again. The next ``publish`` asks for a notification, which may have been
        lost. Raises ``RingError`` if the frontend moved the indexes meanwhile.
        """
        ring = cls.__new__(cls)
        _Ring.__init__(ring, view, slot_size)
        ring._journal = journal
        try:
            ring._attach()
            record = journal.read() if journal is not None else None
            if record is not None:
                ring._replay(record.first, record.responses)
        except RingError:
            ring._words.release()
            raise
        ring._owes_notify = True
        return ring

    def _attach(self) -> None:
        at = self._words.load(_RSP_PROD)
        self._req_cons = self._req_prod = self._rsp_prod = self._exposed = self._notified = at
        self._owes_notify = False
        self._look()

    def _replay(self, first: int, responses: tuple[bytes, ...]) -> None:
        count = len(responses)
        begun = (self._rsp_prod - first) & MASK32
        if begun == count:  # the batch was published
            return
        if begun or count > (self._req_prod - self._rsp_prod) & MASK32:
            raise self._break(f"rsp_prod was moved to {self._rsp_prod}, {first} or {first + count} was left")
        self._copy_in(first, responses)
        self._rsp_prod = self._req_cons = (first + count) & MASK32
        self._expose()

    def _look(self) -> int:
        """Read the frontend's index, once; how many requests there are that were not taken."""
        if self.broken is not None:
            raise RingError(self.broken)
        prod = self._words.load(_REQ_PROD)
        ahead = (prod - self._req_cons) & MASK32
        if ahead > self.size - self.unanswered:
            raise self._break(
                f"req_prod is {prod}: {self._req_cons} taken, {self.unanswered} of {self.size} unanswered"
            )
        if ahead < (self._req_prod - self._req_cons) & MASK32:
            raise self._break(f"req_prod went back from {self._req_prod} to {prod}")
        self._req_prod = prod
        return ahead

    @property
    def req_cons(self) -> int:
        """Index of the next request to be taken."""
        return self._req_cons

    @property
    def rsp_prod(self) -> int:
        """Index of the next request to be answered."""
        return self._rsp_prod

    @property
    def unanswered(self) -> int:
        """Requests taken and not answered."""
        return (self._req_cons - self._rsp_prod) & MASK32

    def pending(self) -> int:
        """Requests waiting to be taken. Raises ``RingError``."""
        return self._look()

    def take(self, limit: int) -> list[bytes]:
        """Up to ``limit`` requests as private copies, in order; [] if there are none.

        Unanswered requests never exceed the ring's size. Raises ``RingError``, then and ever after, if the
        frontend's index makes no sense.
        """
        return self._apart(self.take_block(limit))

    def take_block(self, limit: int) -> bytes:
        """As ``take``, the slots one after the other."""
        count = min(self._look(), limit)
        if count <= 0:
            return b""
        mb()  # the slots are read after the index that covers them
        raw = self._copy_out(self._req_cons, count)
        self._req_cons = (self._req_cons + count) & MASK32
        return raw

    def put(self, responses: Sequence[bytes]) -> None:
        """Write the responses to the oldest unanswered requests, in their order; not visible yet.

        With a journal, all are equally long, and an earlier ``put`` becomes visible by this one. Raises
        ``LocalProtocolError`` for more responses than requests taken.
        """
        if not responses:
            return
        if len(responses) > self.unanswered:
            raise LocalProtocolError(f"{len(responses)} responses to {self.unanswered} requests")
        if max(map(len, responses)) > self.slot_size:
            raise LocalProtocolError(f"a response longer than a slot of {self.slot_size} bytes")
        if self._journal is not None:
            self._expose()  # the record of the last batch is about to be replaced
            self._journal.record(self._rsp_prod, list(responses))
        self._copy_in(self._rsp_prod, responses)
        self._rsp_prod = (self._rsp_prod + len(responses)) & MASK32

    def put_block(self, payload: bytes, size: int) -> None:
        """As ``put``: responses of ``size`` bytes, one after the other."""
        count, rest = divmod(len(payload), size)
        if not count and not rest:
            return
        if rest or size > self.slot_size or count > self.unanswered:
            raise LocalProtocolError(
                f"{len(payload)} bytes of {size}-byte responses to {self.unanswered} requests"
            )
        if self._journal is not None:
            self._expose()  # the record of the last batch is about to be replaced
            self._journal.record_block(self._rsp_prod, payload, size)
        raw = payload
        if size < self.slot_size:  # zero padded: nothing old is left
            padded = bytearray(count * self.slot_size)
            for byte in range(size):
                padded[byte :: self.slot_size] = payload[byte::size]
            raw = bytes(padded)
        self._store_slots(self._rsp_prod, raw)
        self._rsp_prod = (self._rsp_prod + count) & MASK32

    def _expose(self) -> None:
        if self._exposed != self._rsp_prod:
            mb()  # the slots are written before the index that covers them
            self._words.store(_RSP_PROD, self._rsp_prod)
            self._exposed = self._rsp_prod

    def publish(self) -> bool:
        """Make all responses visible. True if the frontend wants to be notified."""
        self._expose()
        old, new = self._notified, self._rsp_prod
        self._notified = new
        mb()  # they are visible before rsp_event is read
        wanted = (new - self._words.load(_RSP_EVENT)) & MASK32 < (new - old) & MASK32
        owed, self._owes_notify = self._owes_notify, False
        return wanted or owed

    def final_check(self, needed: int = 1) -> bool:
        """Before sleeping: ask to be notified once ``needed`` requests are there, look again. True: they
        are."""
        if self._look() >= needed:
            return True
        self._words.store(_REQ_EVENT, (self._req_cons + needed) & MASK32)
        mb()
        return self._look() >= needed


class FrontRing(_Ring):
    """The frontend's end. Initialises the shared ring, from index ``start`` on (0 but in tests).

    The pages must be granted afterwards, not before: the backend could see them half-initialised.
    """

    def __init__(self, view: memoryview, slot_size: int, *, start: int = 0) -> None:
        super().__init__(view, slot_size)
        write(view, 0, bytes(HEADER_SIZE))
        self._req_prod = self._exposed = self._rsp_cons = self._rsp_prod = start
        for word, value in enumerate((start, start + 1, start, start + 1)):
            self._words.store(word, value & MASK32)

    @property
    def rsp_cons(self) -> int:
        """Index of the next response to be taken: the request with that index made the slot."""
        return self._rsp_cons

    @property
    def req_prod(self) -> int:
        """Index the next request will have."""
        return self._req_prod

    def free(self) -> int:
        """How many requests can be pushed now."""
        return self.size - ((self._req_prod - self._rsp_cons) & MASK32)

    @property
    def outstanding(self) -> int:
        """Requests pushed whose response was not taken."""
        return (self._req_prod - self._rsp_cons) & MASK32

    def push(self, request: bytes) -> int:
        """Write one request, not visible yet, and return its index. The ring must not be full."""
        if self.free() <= 0:
            raise LocalProtocolError(f"the ring's {self.size} slots are in use")
        index = self._req_prod
        self._copy_in(index, (request,))
        self._req_prod = (index + 1) & MASK32
        return index

    def publish(self) -> bool:
        """Make all requests visible. True if the backend wants to be notified."""
        old, new = self._exposed, self._req_prod
        mb()
        self._words.store(_REQ_PROD, new)
        self._exposed = new
        mb()
        return (new - self._words.load(_REQ_EVENT)) & MASK32 < (new - old) & MASK32

    def _look(self) -> int:
        if self.broken is not None:
            raise RingError(self.broken)
        prod = self._words.load(_RSP_PROD)
        if (prod - self._rsp_cons) & MASK32 > (self._exposed - self._rsp_cons) & MASK32:
            raise self._break(f"rsp_prod is {prod}, no request after {self._exposed} was sent")
        if (prod - self._rsp_cons) & MASK32 < (self._rsp_prod - self._rsp_cons) & MASK32:
            raise self._break(f"rsp_prod went back from {self._rsp_prod} to {prod}")
        self._rsp_prod = prod
        return (prod - self._rsp_cons) & MASK32

    def take_responses(self) -> list[bytes]:
        """All responses there are, as private copies of whole slots. Raises ``RingError``."""
        count = self._look()
        if not count:
            return []
        mb()
        slots = self._apart(self._copy_out(self._rsp_cons, count))
        self._rsp_cons = (self._rsp_cons + count) & MASK32
        return slots

    def final_check(self) -> bool:
        """Before sleeping: ask to be notified of the next response, look again. True: one is there."""
        if self._look():
            return True
        self._words.store(_RSP_EVENT, (self._rsp_cons + 1) & MASK32)
        mb()
        return self._look() > 0
