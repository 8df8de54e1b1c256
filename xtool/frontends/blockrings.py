"""Requests of a block frontend under way on its rings. Sleeps nowhere, knows no xenstore.

What a caller asks for is cut into chunks, each a request on the ring. A chunk needs a slot and pages for its
data; where either is wanting it waits in line.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from xtool.abi.io import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_OKAY,
)
from xtool.errors import BackendError
from xtool.evtchn.port import EventChannels
from xtool.frontends.chunks import Chunk, cut
from xtool.frontends.pages import PagePool
from xtool.grant.port import Shared
from xtool.proto.blkfeatures import BlockOffer
from xtool.proto.blkif import (
    SECTOR,
    Layout,
    build_discard,
    build_indirect,
    build_segments,
    build_transfer,
    parse_response,
)
from xtool.proto.ring import FrontRing

PAGE = 4096

#: Called with None or the error, once.
Done = Callable[[OSError | None], None]


@dataclass
class _Job:
    """What one caller asked for: done when all its chunks are."""

    done: Done
    left: int
    error: OSError | None = None


@dataclass
class _Flight:
    """A request on the ring: what it carries and the pages lent to it."""

    chunk: Chunk
    job: _Job
    pages: list[int]
    index_pages: list[int]


class Queue:
    def __init__(self, shared: Shared, port: int, layout: Layout, start: int) -> None:
        self.shared = shared
        self.port = port
        self.ring = FrontRing(shared.view[:], layout.slot_size, start=start)

    def close(self) -> None:
        self.ring.release()
        self.shared.close()


class BlockRings:
    """The rings of one disk. ``segments``: the largest request, in pages. For one thread."""

    def __init__(self, events: EventChannels, pool: PagePool, layout: Layout, segments: int) -> None:
        self._events = events
        self._pool = pool
        self._layout = layout
        self._segments = segments
        self._queues: list[Queue] = []
        self._waiting: deque[tuple[Chunk, _Job]] = deque()
        self._flights: dict[int, _Flight] = {}
        self._next_id = 0
        self.offer = BlockOffer(0)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.offer.sectors * SECTOR

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def submit(self, operation: int, offset: int, data: memoryview, done: Done) -> None:
        """Read into ``data`` or write it (``BLKIF_OP_READ``, ``..._WRITE``), whole sectors; ``poll`` calls
        ``done``."""
        step = self._step()
        chunks = cut(operation, offset, data, step)
        job = _Job(done, len(chunks))
        self._waiting.extend((chunk, job) for chunk in chunks)
        if not chunks:
            done(None)

    def submit_flush(self, done: Done) -> None:
        if not self.offer.flush:
            done(None)
            return
        chunk = Chunk(BLKIF_OP_FLUSH_DISKCACHE, 0, 0, memoryview(b""))
        self._waiting.append((chunk, _Job(done, 1)))

    def submit_discard(self, offset: int, length: int, done: Done) -> None:
        if not self.offer.discard_granularity or not length:
            done(None)  # it is a hint
            return
        self._waiting.append((Chunk(BLKIF_OP_DISCARD, offset, length, memoryview(b"")), _Job(done, 1)))

    def poll(self) -> None:
        """Take in responses and send what waits. Does not sleep. Raises ``RingError``, ``BackendError``."""
        while True:
            answered = sum(self._take(queue) for queue in self._queues)
            self._send()
            if not answered and not any(queue.ring.final_check() for queue in self._queues):
                return

    def _step(self) -> int:
        """The largest request, in bytes; two of them with their indirect pages fit the pool."""
        most = min(self._segments, self.offer.max_indirect, len(self._pool.refs) // 2 - 8)
        return max(11, most) * PAGE

    def _send(self) -> None:
        touched: set[int] = set()
        while self._waiting:
            number = min(range(len(self._queues)), key=lambda n: self._queues[n].ring.outstanding)
            queue = self._queues[number]
            chunk, job = self._waiting[0]
            count = -(-len(chunk.data) // PAGE)
            indexes = -(-count // 512) if count > 11 else 0
            if not queue.ring.free() or count + indexes > self._pool.free:
                break
            self._waiting.popleft()
            flight = _Flight(chunk, job, self._pool.take(count), self._pool.take(indexes))
            self._next_id += 1
            self._flights[self._next_id] = flight
            queue.ring.push(self._build(self._next_id, flight))
            touched.add(number)
        for number in touched:
            if self._queues[number].ring.publish():
                self._events.notify(self._queues[number].port)

    def _build(self, request_id: int, flight: _Flight) -> bytes:
        chunk, pool, layout = flight.chunk, self._pool, self._layout
        sector = chunk.offset // SECTOR
        if chunk.operation == BLKIF_OP_DISCARD:
            return build_discard(request_id, sector, chunk.length // SECTOR, layout=layout)
        if chunk.operation == BLKIF_OP_WRITE:
            pool.fill(flight.pages, chunk.data)
        size = len(chunk.data)
        segments = [
            (pool.refs[page], 0, min(PAGE, size - number * PAGE)) for number, page in enumerate(flight.pages)
        ]
        if not flight.index_pages:
            return build_transfer(chunk.operation, request_id, sector, segments, layout=layout)
        pool.fill(flight.index_pages, memoryview(build_segments(segments)))
        refs = [pool.refs[page] for page in flight.index_pages]
        return build_indirect(chunk.operation, request_id, sector, len(segments), refs, layout=layout)

    def _take(self, queue: Queue) -> int:
        slots = queue.ring.take_responses()
        for slot in slots:
            response = parse_response(slot, self._layout)
            flight = self._flights.pop(response.id, None)
            if flight is None:
                raise BackendError("response", f"{response.id} was not asked for")
            chunk, job = flight.chunk, flight.job
            if response.status == BLKIF_RSP_OKAY:
                if chunk.operation == BLKIF_OP_READ and job.error is None:
                    self._pool.drain(flight.pages, chunk.data)
            elif job.error is None:
                number = errno.EOPNOTSUPP if response.status == BLKIF_RSP_EOPNOTSUPP else errno.EIO
                job.error = OSError(number, f"{os.strerror(number)} at byte {chunk.offset}")
            self._pool.give(flight.pages)
            self._pool.give(flight.index_pages)
            job.left -= 1
            if not job.left:
                job.done(job.error)
        return len(slots)

    def abandon(self, done: Done) -> None:
        """A late answer must not go into memory that nobody waits with any more."""
        for job in [flight.job for flight in self._flights.values()]:
            if job.done == done:
                job.error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        self._waiting = deque((chunk, job) for chunk, job in self._waiting if job.done != done)

    def give_up(self) -> list[Done]:
        """Forget everything under way; those who wait for it, each once."""
        jobs = [flight.job for flight in self._flights.values()] + [job for _, job in self._waiting]
        self._flights.clear()
        self._waiting.clear()
        return [job.done for job in {id(job): job for job in jobs}.values()]

    def close_rings(self) -> None:
        while self._queues:
            queue = self._queues.pop()
            self._events.unbind(queue.port)
            queue.close()
