"""A block frontend in user space: a disk of any backend as a file, with many requests in flight.

::

    with BlockFrontend(store, events, allocator, place) as disk:
        disk.connect(30.0)
        first = disk.pread(4096, 0)
        disk.pwrite(first, 1 << 20)
        disk.flush()

Requests are cut into chunks, each a request on the ring, and as many chunks are under way as fit.
``submit_*`` and ``poll`` are for those with a loop of their own (the NBD server); the others wait.

Facts about being a frontend
----------------------------
* A ring page is initialised before it is granted and named in xenstore.
* Every page that is shared is shared until ``close``: the backend may copy at any moment in between.
* A backend that is killed and comes back goes on with the same ring, and we notice no more than a pause.
* Our nodes lie below ``/local/domain/<own>/xtool/device``: below ``device`` the kernel's blkfront takes them.
* Linux's blkback keeps our pages mapped when ``feature-persistent`` of ours is 1. Ours are shared until
  ``close`` and used again last one first either way, so it is nothing but a wish.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple

from xtool.abi.io import BLKIF_OP_READ, BLKIF_OP_WRITE
from xtool.errors import DeadlineError, HostError, StoreError
from xtool.evtchn.port import EventChannels
from xtool.frontends.blockrings import BlockRings, Done, Queue
from xtool.frontends.pages import PagePool
from xtool.grant.port import GrantAllocator
from xtool.proto.blkfeatures import (
    BlockFrontend as Wanted,
)
from xtool.proto.blkfeatures import (
    BlockQueue,
    frontend_nodes,
    parse_backend,
    transport_limits,
)
from xtool.proto.blkif import X86_64, Layout
from xtool.proto.xenbus import XenbusState, parse_state
from xtool.xenstore.port import Store

#: Pages for data under way. gntalloc gives 1024 to all its users together.
DATA_PAGES = 256
#: The largest request: segments of a page.
SEGMENTS = 32
#: How long a response may take, seconds. A backend that is replaced meanwhile is not noticed.
DEADLINE = 60.0

#: The backend's nodes that are for us; others in its directory may be for domain 0 alone.
_OFFERED = (
    "sectors",
    "info",
    "sector-size",
    "physical-sector-size",
    "feature-flush-cache",
    "feature-barrier",
    "feature-discard",
    "discard-granularity",
    "discard-alignment",
    "discard-secure",
    "feature-persistent",
    "feature-max-indirect-segments",
    "max-ring-page-order",
    "multi-queue-max-queues",
)


class Place(NamedTuple):
    """Where the two ends' nodes are: ``frontend`` and ``backend`` are directories in xenstore."""

    frontend: str
    backend: str
    backend_domid: int = 0


class BlockFrontend(BlockRings):
    """One disk. ``events`` and ``allocator`` are this object's own; it closes neither. ``relax`` is called
    with the seconds it may wait for an event, by default sleeps on ``events``. For one thread.

    ``ring_order``, ``queues`` and ``persistent`` (the backend may keep our pages mapped) are wishes: the
    backend may offer less. ``start`` is for tests.
    """

    def __init__(
        self,
        store: Store,
        events: EventChannels,
        allocator: GrantAllocator,
        place: Place,
        *,
        ring_order: int = 1,
        queues: int = 1,
        persistent: bool = False,
        segments: int = SEGMENTS,
        data_pages: int = DATA_PAGES,
        layout: Layout = X86_64,
        deadline: float = DEADLINE,
        start: int = 0,
        relax: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(events, PagePool(allocator, place.backend_domid, data_pages), layout, segments)
        self._store = store
        self._allocator = allocator
        self.place = place
        self._wishes = (ring_order, queues)
        self.persistent = persistent
        self._deadline = deadline
        self._start = start
        self._relax = relax or self._sleep

    # --- coming and going
    def connect(self, deadline: float = 30.0) -> None:
        """Until the backend is connected. Raises ``HostError`` if it gives up, ``BackendError`` for what it
        wrote, ``DeadlineError``."""
        end = time.monotonic() + deadline
        self._wait_state({XenbusState.INIT_WAIT}, end, "the backend did not come up")
        offered = self._backend_nodes()
        order, queues = transport_limits(offered)
        order, queues = min(order, self._wishes[0]), min(queues, self._wishes[1])
        for _ in range(queues):
            shared = self._allocator.share(self.place.backend_domid, 1 << order)
            port = self._events.bind_unbound(self.place.backend_domid)
            self._queues.append(Queue(shared, port, self._layout, self._start))
        self.persistent = self.persistent and offered.get("feature-persistent") == "1"
        rings = tuple(BlockQueue(q.shared.refs, q.port) for q in self._queues)
        wanted = Wanted(self._layout, rings, self.persistent)
        with self._store.batch() as batch:
            for name, value in frontend_nodes(wanted).items():
                batch.write(f"{self.place.frontend}/{name}", value)
            batch.write(f"{self.place.frontend}/state", str(int(XenbusState.INITIALISED)))
        self._wait_state({XenbusState.CONNECTED}, end, "the backend did not connect")
        self.offer = parse_backend(self._backend_nodes())
        self._write_state(XenbusState.CONNECTED)

    def look_again(self) -> None:
        """The disk may have another size: read it."""
        self.offer = parse_backend(self._backend_nodes())

    def _backend_nodes(self) -> Mapping[str, str]:
        root = self.place.backend
        values = self._store.get_many(f"{root}/{name}" for name in _OFFERED)
        return {name: value for name in _OFFERED if (value := values[f"{root}/{name}"]) is not None}

    def _state(self) -> XenbusState | None:
        return parse_state(self._store.get(f"{self.place.backend}/state"))

    def _write_state(self, state: XenbusState) -> None:
        self._store.write(f"{self.place.frontend}/state", str(int(state)))

    def _wait_state(self, wanted: set[XenbusState], end: float, what: str, failed: bool = True) -> None:
        """``failed``: a backend that closes is an error."""
        gone = {XenbusState.CLOSING, XenbusState.CLOSED, XenbusState.UNKNOWN} if failed else set()
        with self._store.watch(f"{self.place.backend}/state") as watch:
            while (state := self._state()) not in wanted:
                if state in gone:
                    raise HostError(f"{what}: {self._reason()}")
                left = end - time.monotonic()
                if left <= 0:
                    raise DeadlineError(what)
                if self._relax == self._sleep:
                    watch.wait(min(left, 1.0))
                else:
                    self._relax(min(left, 0.01))

    def check(self) -> None:
        """Raises ``HostError`` with its reason when the backend has given the disk up."""
        if self._state() in (XenbusState.CLOSING, XenbusState.CLOSED, XenbusState.UNKNOWN, None):
            raise HostError(f"the backend serves the disk no more: {self._reason()}")

    def _reason(self) -> str:
        """The backend's own words; only domain 0 may read them."""
        try:
            return (self._store.get(_error_node(self.place.backend)) or "it gave no reason")[:300]
        except StoreError:
            return "it gave no reason that can be read here"

    def close(self, deadline: float = 5.0) -> None:
        """Leave: the backend lets go of our pages, then they go. What is in flight is given up."""
        for done in self.give_up():
            done(OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN)))
        if self._queues:
            self._write_state(XenbusState.CLOSED)
            try:
                gone = {XenbusState.CLOSED, XenbusState.UNKNOWN, XenbusState.INIT_WAIT}
                self._wait_state(gone, time.monotonic() + deadline, "the backend does not let go", False)
            except DeadlineError:
                pass  # pages it still has stay shared until it does
        self.close_rings()
        self._pool.close()

    def __enter__(self) -> BlockFrontend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable when ``events_came`` should be called."""
        return self._events.fileno()

    def events_came(self) -> None:
        self._events.unmask(self._events.pending())

    def _sleep(self, seconds: float) -> None:
        if select.select([self._events.fileno()], [], [], seconds)[0]:
            self.events_came()

    # --- as a file
    def _wait(self, submit: Callable[[Done], None]) -> None:
        answer: list[OSError | None] = []
        submit(answer.append)
        end = time.monotonic() + self._deadline
        self.poll()
        while not answer:
            left = end - time.monotonic()
            if left <= 0:
                self.abandon(answer.append)
                raise DeadlineError(f"the disk did not answer within {self._deadline:g} s")
            self._relax(min(left, 1.0))
            self.poll()
        if answer[0] is not None:
            raise answer[0]

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes at ``offset``, fewer at the end. Raises ``OSError`` EIO, ``DeadlineError``."""
        length = max(0, min(length, self.size - offset))
        first = offset - offset % self.offer.sector_size
        data = bytearray(_up(offset + length, self.offer.sector_size) - first)
        with memoryview(data) as view:
            self._wait(lambda done: self.submit(BLKIF_OP_READ, first, view, done))
        return bytes(data[offset - first : offset - first + length])

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write it all; what is not whole sectors is read first. Raises ``OSError``, ``DeadlineError``."""
        if offset + len(data) > self.size:
            raise OSError(errno.ENOSPC, f"bytes {offset} + {len(data)} on a disk of {self.size}")
        unit = self.offer.sector_size
        first, last = offset - offset % unit, _up(offset + len(data), unit)
        head = self.pread(offset - first, first)
        tail = self.pread(last - offset - len(data), offset + len(data))
        whole = memoryview(head + data + tail)
        self._wait(lambda done: self.submit(BLKIF_OP_WRITE, first, whole, done))
        return len(data)

    def flush(self) -> None:
        self._wait(self.submit_flush)

    def discard(self, offset: int, length: int) -> None:
        self._wait(lambda done: self.submit_discard(offset, length, done))


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _error_node(backend: str) -> str:
    """``/local/domain/0/backend/...`` -> ``/local/domain/0/error/backend/.../error``."""
    head, _, tail = backend.partition("/backend/")
    return f"{head}/error/backend/{tail}/error"
