"""One pair of rings of an interface: frames from the guest to a link, frames from a link to the guest.

From the guest: all slots of one look at the ring are one batch of grant copies; the frames go to the link,
then their slots are answered, whole frames at a time. To the guest: what the link has is read into
``_arena``, and what the guest has room for is copied to it in one batch.

What is bounded, and by what
----------------------------
* Frames from the guest that wait for their rate: by the ring, since they are not answered.
* Frames for the guest: ``ARENA`` bytes, and ``STALL_TIME`` seconds without a slot for them. After that they
  are dropped, and what comes next is dropped each ``DRAIN_TIME`` until the guest takes frames again.
* Work in one call: the dispatcher's budget in slots, ``READ_BUDGET`` in frames.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from xtool.backends.link import FRAME_ROOM, Link, LinkGoneError
from xtool.backends.loop import READ, WRITE, Timer
from xtool.backends.nettx import Device, FromGuest
from xtool.backends.vnethdr import Offload
from xtool.errors import RemoteProtocolError
from xtool.evtchn.dispatch import Verdict
from xtool.grant.copy import DEST_FOREIGN, CopyBatch
from xtool.grant.window import Buffer
from xtool.proto.netif import (
    ETH_HLEN,
    PAGE_SIZE,
    RX_RESPONSE,
    RxBuilder,
    RxPlan,
    TxAssembler,
    rx_answer,
    rx_flags,
    rx_words,
)
from xtool.proto.ring import BackRing

ARENA = 1 << 19
READ_BUDGET = 64
STALL_TIME = 10.0
DRAIN_TIME = 1.0
#: How long a link may take nothing before it is given up.
BLOCKED_TIME = 10.0
#: Frames thrown away at once while the guest takes none.
_DRAIN = 2048
#: The arena is full when it is filled beyond this: each frame begins on a page, so that the copy of one that
#: fits a slot is one to Xen.
_FULL = ARENA - FRAME_ROOM - PAGE_SIZE


class Waiting(NamedTuple):
    """A frame for the guest: where in the arena it begins, its size in bytes, the rx requests it needs."""

    at: int
    size: int
    todo: Offload
    needed: int


class Queue:
    """``notify_tx`` and ``notify_rx`` tell the guest; ``kick_tx`` has ``transmit`` called soon."""

    def __init__(
        self,
        device: Device,
        tx: BackRing,
        rx: BackRing,
        batch: CopyBatch,
        assembler: TxAssembler,
        builder: RxBuilder,
        notify_tx: Callable[[], None],
        notify_rx: Callable[[], None],
        kick_tx: Callable[[], None],
    ) -> None:
        self.tx, self.rx = tx, rx
        self._device = device
        self._batch = batch
        self._builder = builder
        self._notify_rx, self.kick_tx = notify_rx, kick_tx
        self._from_guest = FromGuest(device, tx, batch, assembler, notify_tx, self)
        self.transmit = self._from_guest.transmit
        self.link: Link | None = None
        self._arena = Buffer(ARENA)
        self._queue: deque[Waiting] = deque()
        #: Where a frame may be read to, with its head: the frame itself begins at page 1, 2...
        self._rooms: list[memoryview] = []
        self._end = 0
        self._watched = 0
        self._stalled = False
        self._timers: dict[str, Timer] = {}

    # --- the link
    def set_link(self, link: Link | None) -> None:
        """Use this link from now on; None: there is none, frames are dropped."""
        self._unwatch()
        self.link = link
        self._rooms.clear()
        if link is not None:
            view, begin = self._arena.view, range(PAGE_SIZE - link.head, _FULL + 2 * PAGE_SIZE, PAGE_SIZE)
            self._rooms += [view[at : at + FRAME_ROOM] for at in begin if at + FRAME_ROOM <= ARENA]
        self._forget("blocked")
        self.watch()
        self.kick_tx()  # what waited for the other one goes to this one, or is dropped

    def _unwatch(self) -> None:
        if self.link is not None and self._watched:
            self._device.loop.unwatch(self.link.fileno())
        self._watched = 0

    def drain(self) -> None:
        """Throw away what waits in the link: it came for somebody who was not there."""
        with self._arena.view[-FRAME_ROOM:] as room:
            for _ in range(_DRAIN):
                if self.link is None or not self.link.receive(room):
                    return
                self._device.counters.rx_dropped += 1

    def watch(self) -> None:
        link = self.link
        if link is None:
            return
        room = not self._stalled and self._end <= _FULL
        wanted = (READ if room else 0) | (WRITE if link.blocked else 0)
        if link.blocked:
            self.after("blocked", BLOCKED_TIME, self._blocked_too_long)
        else:
            self._forget("blocked")
        if room and link.holds:
            self.after("held", 0.0, self._take_held)
        if wanted != self._watched:
            self._watched = wanted
            if wanted:
                self._device.loop.watch(link.fileno(), self._ready, wanted, self._device.failed)
            else:
                self._device.loop.unwatch(link.fileno())

    def _ready(self, events: int) -> None:
        link = self.link
        if link is None:
            return
        try:
            if link.blocked and events & ~READ:
                link.flush()
                if not link.blocked:
                    self.kick_tx()
            if events & ~WRITE:
                self._receive(link)
        except LinkGoneError as error:
            self.gone(error)
            return
        self.watch()

    def _take_held(self) -> None:
        """What the link read already, and the budget or the guest's room did not reach to."""
        self._ready(READ)

    def _blocked_too_long(self) -> None:
        self.gone(LinkGoneError(f"the link took no frame for {BLOCKED_TIME:g} s"))

    def gone(self, error: LinkGoneError) -> None:
        self.set_link(None)
        self._device.link_gone(error)

    def after(self, name: str, seconds: float, callback: Callable[[], None]) -> None:
        """Call once, after that time; a second call of the same name changes nothing."""
        if name not in self._timers:

            def due() -> None:
                del self._timers[name]
                callback()

            self._timers[name] = self._device.loop.call_later(seconds, due, self._device.failed)

    def _forget(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    # --- to the guest
    def _receive(self, link: Link) -> None:
        rooms, head, csum, builder = self._rooms, link.head, self._device.csum, self._builder
        receive, offload, waits = link.receive, link.offload, self._queue.append
        for _ in range(READ_BUDGET):
            if self._end > _FULL or self._stalled:
                break
            page = (self._end + head + PAGE_SIZE - 1) // PAGE_SIZE
            room = rooms[page - 1]
            size = receive(room)
            if not size:
                break
            try:
                todo = offload(room, size, csum)
            except RemoteProtocolError:
                self._device.counters.rx_dropped += 1
                continue
            size -= head
            needed = 1
            if size > PAGE_SIZE or size < ETH_HLEN or todo.gso is not None:
                if builder.refusal(size, todo.gso) is not None:
                    self._device.counters.rx_dropped += 1
                    continue
                needed = builder.needed(size, todo.gso)
            at = page * PAGE_SIZE
            waits(Waiting(at, size, todo, needed))
            self._end = at + size
        self._deliver()

    def rx_event(self, budget: int) -> Verdict:
        """The guest has made room. Raises ``RingError`` and ``GrantError``."""
        if self._stalled and self.rx.pending():
            self._stalled = False
            self._forget("stall")
            self.drain_safely()
        delivered = self._deliver()
        self.watch()
        return Verdict.DONE if delivered else Verdict.IDLE

    def _deliver(self) -> int:
        """Copy to the guest what it has room for; how many frames."""
        total = 0
        while self._queue:
            count = self._deliver_batch()
            total += count
            if not count:
                break
        if total:
            self._forget("stall")
        if not self._queue:
            self._end = 0
        elif "rx-rate" not in self._timers:
            self.after("stall", STALL_TIME, self._stall)
        return total

    def _deliver_batch(self) -> int:
        frames: list[Waiting] = []
        available, slots, rate = self.rx.pending(), 0, self._device.rx_rate
        limited = bool(rate)
        for frame in self._queue:
            needed = frame.needed
            if slots + needed > available:
                break
            if limited:
                if pause := rate.wait():
                    self.after("rx-rate", pause, self._go_on)
                    break
                rate.charge(frame.size, 1)
            frames.append(frame)
            slots += needed
        if not frames:
            if "rx-rate" in self._timers:
                return 0
            enough = self.rx.final_check(self._queue[0].needed)
            return self._deliver_batch() if enough else 0
        answers = self._copy_to_guest(frames, rx_words(self.rx.take_block(slots)))
        if len(frames) == len(self._queue):
            self._queue.clear()
        else:
            for _ in frames:
                self._queue.popleft()
        self.rx.put_block(array("Q", answers).tobytes(), RX_RESPONSE.size)
        if self.rx.publish():
            self._notify_rx()
        return len(frames)

    def _copy_to_guest(self, frames: list[Waiting], requests: Sequence[int]) -> list[int]:
        """The responses, as words."""
        batch, words, domid, base = (
            self._batch,
            self._batch.words,
            self._batch.domid_word,
            self._arena.address,
        )
        answers: list[int] = []
        plans: list[RxPlan | None] = []
        at = total = 0
        for start, size, todo, needed in frames:
            total += size
            flags = rx_flags(todo.csum_blank, todo.data_validated)
            if needed == 1:
                request = requests[at]
                words += (base + start, request >> 32 | domid, size | DEST_FOREIGN)
                answers.append(rx_answer(request, flags, size))
                plans.append(None)
            else:
                plan = self._builder.spread(size, requests[at : at + needed], todo.gso, flags)
                batch.write_pages(plan.grefs[:-1], base + start)
                whole = len(plan.grefs) * PAGE_SIZE - PAGE_SIZE
                batch.write(plan.grefs[-1], 0, base + start + whole, size - whole)
                answers += plan.answers
                plans.append(plan)
            at += needed
        statuses = batch.run()
        counters = self._device.counters
        counters.rx_frames += len(frames)
        counters.rx_bytes += total
        return self._refused(frames, plans, answers, statuses) if any(statuses) else answers

    def _refused(
        self, frames: list[Waiting], plans: list[RxPlan | None], answers: list[int], statuses: list[int]
    ) -> list[int]:
        """The responses where Xen did not copy everything."""
        counters = self._device.counters
        said: list[int] = []
        done = 0
        for frame, plan in zip(frames, plans, strict=True):
            at = len(said)
            if plan is None:
                plan = RxPlan([0], frame.size, answers[at : at + 1])
            of_it = statuses[done : done + len(plan.grefs)]
            done += len(plan.grefs)
            if any(of_it):
                counters.rx_failed += 1
                counters.rx_frames -= 1
                counters.rx_bytes -= frame.size
                self._device.complain(f"not given to the guest: a grant gave status {min(of_it)}")
                for copy, status in enumerate(of_it):
                    if status:
                        plan.failed(copy)
            said += plan.answers
        return said

    def _go_on(self) -> None:
        self._deliver()
        self.watch()

    def rates_changed(self) -> None:
        """What waits under the old rates, for a pause that may have been long, is looked at now."""
        for name in ("rate", "rx-rate"):
            self._forget(name)
        self.kick_tx()
        self.after("rx-rate", 0.0, self._go_on)

    def _stall(self) -> None:
        """The guest has taken nothing for too long."""
        counters = self._device.counters
        counters.stalls += not self._stalled
        counters.rx_dropped += len(self._queue)
        self._queue.clear()
        self._end = 0
        self._stalled = not self.rx.pending()
        self.drain_safely()
        if self._stalled:
            self.rx.final_check()
            self.after("stall", DRAIN_TIME, self._stall)
        self.watch()

    def drain_safely(self) -> None:
        try:
            self.drain()
        except LinkGoneError as error:
            self.gone(error)

    # --- telling and ending
    def describe(self) -> dict[str, object]:
        return {
            "tx": self._from_guest.describe(),
            "rx": {
                "req_cons": self.rx.req_cons,
                "rsp_prod": self.rx.rsp_prod,
                "queued": len(self._queue),
                "queued_bytes": self._end,
                "stalled": self._stalled,
            },
        }

    def close(self) -> None:
        """Let go of the link and the rings' views. The link stays open."""
        self._unwatch()
        self.link = None
        for name in list(self._timers):
            self._forget(name)
        self._batch.clear()
        self.tx.release()
        self.rx.release()
        while self._rooms:
            # Not only forgotten: where the device is closed for an error of the ring, that error's traceback
            # still holds some of them, and the arena could not be unmapped.
            self._rooms.pop().release()
        self._arena.close()
