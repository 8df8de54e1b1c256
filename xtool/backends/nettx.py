"""From the guest's tx ring to a link.

All slots of one look at the ring are one batch of grant copies; the frames go to the link, then their slots
are answered, whole frames at a time. Frames that wait for their rate are not answered, so the ring bounds
them.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

from xtool.abi.io import NETIF_RSP_DROPPED, NETIF_RSP_ERROR
from xtool.backends.link import Link, LinkGoneError
from xtool.backends.loop import Loop
from xtool.backends.netrules import SourceRules
from xtool.backends.throttle import Throttle
from xtool.backends.vnethdr import BLANK, Offload
from xtool.errors import RemoteProtocolError
from xtool.evtchn.dispatch import Verdict
from xtool.grant.copy import SOURCE_FOREIGN, CopyBatch
from xtool.grant.window import Buffer
from xtool.proto.netif import (
    PAGE_SIZE,
    TX_RESPONSE,
    TX_SLOT_SIZE,
    Fragment,
    TxAssembler,
    TxDrop,
    TxFrame,
)
from xtool.proto.ring import BackRing

TX_ROOM = 1 << 19
#: Slots for each unit of the dispatcher's budget, which counts frames: those to be cut have up to 18.
_SLOTS = 2
_PAGE_REST = PAGE_SIZE - 1


def _before_whole_page(fragments: Sequence[Fragment]) -> int:
    """Bytes of a frame before its first fragment of a whole page; 0 if it has none. That fragment, and those
    that follow it, shall lie on pages of ours: a copy over two pages is two to Xen."""
    ahead = 0
    for _, _, length in fragments:
        if length == PAGE_SIZE:
            return ahead
        ahead += length
    return 0


@dataclass
class Counters:
    """Of one interface. ``tx`` is from the guest, ``rx`` to it. Dropped by the guest's fault, by the rules,
    by the link; ``stalls``: how often it took no frames for ``STALL_TIME``."""

    tx_frames: int = 0
    tx_bytes: int = 0
    tx_invalid: int = 0
    tx_refused: int = 0
    tx_lost: int = 0
    rx_frames: int = 0
    rx_bytes: int = 0
    rx_dropped: int = 0
    rx_failed: int = 0
    stalls: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Device(NamedTuple):
    """What the queues of an interface share."""

    loop: Loop
    counters: Counters
    rules: SourceRules
    tx_room: Buffer
    tx_rate: Throttle
    rx_rate: Throttle
    #: Which blank checksums the guest takes: IPv4, IPv6.
    csum: tuple[bool, bool]
    complain: Callable[[str], None]
    #: The link is gone; it will be given again, or the device closed.
    link_gone: Callable[[LinkGoneError], None]
    failed: Callable[[Exception], None]


class Owner(Protocol):
    """What keeps the link, for both directions."""

    @property
    def link(self) -> Link | None: ...

    def kick_tx(self) -> None:
        """Have ``FromGuest.transmit`` called soon."""

    def gone(self, error: LinkGoneError) -> None: ...

    def watch(self) -> None:
        """``link.blocked`` may have changed."""

    def after(self, name: str, seconds: float, callback: Callable[[], None]) -> None:
        """Call once, after that time; a second call of the same name changes nothing."""


class FromGuest:
    """``notify`` tells the guest of responses."""

    def __init__(
        self,
        device: Device,
        ring: BackRing,
        batch: CopyBatch,
        assembler: TxAssembler,
        notify: Callable[[], None],
        owner: Owner,
    ) -> None:
        self.ring = ring
        self._device = device
        self._batch = batch
        self._assembler = assembler
        self._notify = notify
        self._owner = owner
        self._waiting: deque[TxFrame | TxDrop] = deque()

    def transmit(self, budget: int) -> Verdict:
        """Handle the tx ring. Raises ``RingError`` and ``GrantError``: the device is to be closed."""
        link = self._owner.link
        if link is not None and link.blocked:
            return Verdict.IDLE
        taken = 0
        budget *= _SLOTS
        if not self._waiting:
            block = self.ring.take_block(budget)
            taken = len(block) // TX_SLOT_SIZE
            self._waiting.extend(self._assembler.feed_block(block))
        answered = self._send_waiting(link)
        if answered:
            self.ring.put_block(array("I", answered).tobytes(), TX_RESPONSE.size)
            if self.ring.publish():
                self._notify()
        if self._waiting or (link is not None and link.blocked):
            self._owner.watch()  # the bucket or the link will kick us
            return Verdict.DONE if answered else Verdict.IDLE
        if taken == budget or self.ring.final_check():
            return Verdict.MORE
        return Verdict.DONE if taken or answered else Verdict.IDLE

    def _send_waiting(self, link: Link | None) -> list[int]:
        responses: list[int] = []
        while self._waiting and not (link is not None and link.blocked):
            chunk = self._copy_chunk(link.head if link is not None else 0)
            if not chunk:
                break
            responses += self._send_chunk(link, chunk)
            link = self._owner.link
        return responses

    def _copy_chunk(self, head: int) -> list[tuple[TxFrame | TxDrop, int]]:
        """Frames as far as rate and room go, and where in the room each begins; their copies are in the
        batch."""
        room, rate, words, domid = self._device.tx_room, self._device.tx_rate, *self._words()
        waiting, limited, most = self._waiting, bool(rate), room.size
        chunk: list[tuple[TxFrame | TxDrop, int]] = []
        at = 0
        while waiting:
            item = waiting[0]
            if isinstance(item, TxFrame):
                fragments, size = item.fragments, item.size
                ahead = _before_whole_page(fragments) if len(fragments) > 2 else 0
                start = (at + head + ahead + _PAGE_REST & ~_PAGE_REST) - ahead
                if start + size > most:
                    break
                if limited:
                    if pause := rate.wait():
                        self._owner.after("rate", pause, self._owner.kick_tx)
                        break
                    rate.charge(size, 1)
                address = room.address + start
                for ref, offset, length in fragments:
                    words += (ref | offset << 32 | domid, address, length | SOURCE_FOREIGN)
                    address += length
                chunk.append((item, start - head))
                at = start + size
            else:
                chunk.append((item, 0))
            waiting.popleft()
        return chunk

    def _words(self) -> tuple[list[int], int]:
        # The assembler has seen to it that each fragment lies in its page.
        return self._batch.words, self._batch.domid_word

    def _send_chunk(self, link: Link | None, chunk: list[tuple[TxFrame | TxDrop, int]]) -> list[int]:
        statuses = self._batch.run()
        bad = any(statuses)
        counters, view = self._device.counters, self._device.tx_room.view
        head = link.head if link is not None else 0
        responses: list[int] = []
        frames: list[memoryview] = []
        total = copied = 0
        for item, at in chunk:
            if isinstance(item, TxDrop):
                counters.tx_invalid += 1
                self._device.complain(f"dropped from the guest: {item.reason}")
                responses += item.answers()
                continue
            first, copied = copied, copied + len(item.fragments)
            status = NETIF_RSP_ERROR
            if bad and any(statuses[first:copied]):
                counters.tx_invalid += 1
                number = min(statuses[first:copied])
                self._device.complain(f"dropped from the guest: a grant gave status {number}")
            elif link is None:
                counters.tx_lost += 1
                status = NETIF_RSP_DROPPED
            else:
                room = view[at : at + head + item.size]
                if self._fit(link, item, room):
                    frames.append(room)
                    total += item.size
                    responses += item.slots
                    continue
            responses += item.answers(status)
        if frames and link is not None:
            try:
                lost = link.send(frames)
            except LinkGoneError as error:
                lost = len(frames)
                self._owner.gone(error)
            counters.tx_frames += len(frames) - lost
            counters.tx_bytes += total
            counters.tx_lost += lost
        return responses

    def _fit(self, link: Link, frame: TxFrame, room: memoryview) -> bool:
        if not self._device.rules.easy(room, link.head):
            reason = self._device.rules.refusal(bytes(room[link.head : link.head + 64]))
            if reason is not None:
                self._device.counters.tx_refused += 1
                self._device.complain(f"not sent for the guest: {reason}")
                return False
        todo = BLANK
        if frame.gso is not None or not frame.csum_blank:
            todo = Offload(frame.csum_blank, frame.data_validated, frame.gso)
        try:
            link.prepare(room, todo)
        except RemoteProtocolError as error:
            self._device.counters.tx_invalid += 1
            self._device.complain(f"dropped from the guest: {error.message}")
            return False
        return True

    def describe(self) -> dict[str, object]:
        return {
            "req_cons": self.ring.req_cons,
            "rsp_prod": self.ring.rsp_prod,
            "in_flight": self.ring.unanswered,
            "waiting": len(self._waiting),
        }
