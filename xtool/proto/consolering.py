"""The console's page (``struct xencons_interface`` of ``public/io/console.h``), both ends.

::

    0     in[1024]    backend to guest        3072  in_cons   3076  in_prod
    1024  out[2048]   guest to backend        3080  out_cons  3084  out_prod

Facts about the console ring
----------------------------
* There is no event index: tell the peer after every ``consume`` and ``write`` that did something.
* ``out_cons`` in the shared page is all there is to know after the backend died. So ``peek``, put the bytes
  where they are safe, then ``consume``: killed in between, they are read again, not lost.
* The guest may write to every word. Our own indexes are kept privately; the peer's are read once per look.
"""

from __future__ import annotations

from xtool.errors import LocalProtocolError, RingError
from xtool.proto.shm import MASK32, Words, mb, snapshot, write

IN_SIZE, OUT_SIZE = 1024, 2048
IN_AT, OUT_AT = 0, 1024
INDEXES_AT = 3072
_IN_CONS, _IN_PROD, _OUT_CONS, _OUT_PROD = range(4)


class ConsoleEnd:
    """One end: ``backend`` reads ``out`` and writes ``in``, a frontend the other way round.

    Continues at the indexes it finds. Raises ``RingError``, here and in every method, when an index makes
    no sense; the console cannot be used from then on.
    """

    def __init__(self, view: memoryview, *, backend: bool) -> None:
        if len(view) < INDEXES_AT + 16:
            raise LocalProtocolError(f"a console page of {len(view)} bytes")
        self._view = view
        self._words = Words(view, INDEXES_AT, 4)
        ours, theirs = (IN_AT, IN_SIZE, _IN_CONS, _IN_PROD), (OUT_AT, OUT_SIZE, _OUT_CONS, _OUT_PROD)
        if not backend:
            ours, theirs = theirs, ours
        self._to_at, self._to_size, self._to_cons, self._to_prod = ours
        self._from_at, self._from_size, self._from_cons, self._from_prod = theirs
        self.broken: str | None = None
        self._cons = self._seen_prod = self._words.load(self._from_cons)
        self._prod = self._words.load(self._to_prod)
        self._seen_cons = (self._prod - self._to_size) & MASK32
        self.pending()
        self.free()

    def release(self) -> None:
        """Let go of the view, so that it can be unmapped."""
        self._words.release()
        self._view.release()

    @property
    def consumed(self) -> int:
        """The index up to which we have read."""
        return self._cons

    def indexes(self) -> tuple[int, int, int, int]:
        """``in_cons``, ``in_prod``, ``out_cons``, ``out_prod`` as they stand in the page, for people."""
        load = self._words.load
        return load(0), load(1), load(2), load(3)

    def pending(self) -> int:
        """Bytes waiting to be read."""
        prod = self._look(self._from_prod)
        ahead = (prod - self._cons) & MASK32
        if ahead > self._from_size or ahead < (self._seen_prod - self._cons) & MASK32:
            raise self._break(f"the producer index is {prod}, {self._cons} was consumed")
        self._seen_prod = prod
        return ahead

    def free(self) -> int:
        """Bytes that can be written now."""
        cons = self._look(self._to_cons)
        behind = (self._prod - cons) & MASK32
        if behind > self._to_size or behind > (self._prod - self._seen_cons) & MASK32:
            raise self._break(f"the consumer index is {cons}, {self._prod} was produced")
        self._seen_cons = cons
        return self._to_size - behind

    def peek(self, limit: int = OUT_SIZE) -> bytes:
        """A copy of the bytes waiting, up to ``limit``; they stay in the ring."""
        count = min(self.pending(), limit)
        if count <= 0:
            return b""
        mb()
        start = self._cons & (self._from_size - 1)
        run = min(count, self._from_size - start)
        data = snapshot(self._view, self._from_at + start, run)
        return data + snapshot(self._view, self._from_at, count - run) if run < count else data

    def consume(self, count: int) -> None:
        """Give the room of ``count`` peeked bytes back to the peer, which is to be notified."""
        if not 0 <= count <= (self._seen_prod - self._cons) & MASK32:
            raise LocalProtocolError(f"{count} bytes were not waiting")
        self._cons = (self._cons + count) & MASK32
        mb()  # the bytes are read before their room is given back
        self._words.store(self._from_cons, self._cons)

    def read(self, limit: int = OUT_SIZE) -> bytes:
        """``peek`` and ``consume`` at once: for who need not survive a kill."""
        data = self.peek(limit)
        if data:
            self.consume(len(data))
        return data

    def write(self, data: bytes) -> int:
        """Write what fits and return how much; if any, the peer is to be notified."""
        count = min(self.free(), len(data))
        if not count:
            return 0
        mb()
        start = self._prod & (self._to_size - 1)
        run = min(count, self._to_size - start)
        write(self._view, self._to_at + start, data[:run])
        if run < count:
            write(self._view, self._to_at, data[run:count])
        self._prod = (self._prod + count) & MASK32
        mb()  # the bytes are there before the index that covers them
        self._words.store(self._to_prod, self._prod)
        return count

    def _look(self, word: int) -> int:
        if self.broken is not None:
            raise RingError(self.broken)
        return self._words.load(word)

    def _break(self, reason: str) -> RingError:
        self.broken = f"console: {reason}"
        return RingError(self.broken)


class ConsoleBackend(ConsoleEnd):
    """Reads what the guest prints, writes what it is to read."""

    def __init__(self, view: memoryview) -> None:
        super().__init__(view, backend=True)


class ConsoleFrontend(ConsoleEnd):
    """The guest's end."""

    def __init__(self, view: memoryview) -> None:
        super().__init__(view, backend=False)
