"""A pair of rings of a net frontend, with the pages behind their slots."""

from __future__ import annotations

from contextlib import ExitStack

from xtool.evtchn.port import EventChannels
from xtool.grant.port import GrantAllocator
from xtool.proto.netfeatures import NetQueue
from xtool.proto.netif import PAGE_SIZE, RX_SLOT_SIZE, TX_SLOT_SIZE, Gso
from xtool.proto.ring import FrontRing


class Pair:
    """A pair of rings, their pages and ports."""

    def __init__(
        self, events: EventChannels, allocator: GrantAllocator, peer: int, pages: int, split: bool, start: int
    ) -> None:
        self.undo = ExitStack()
        with ExitStack() as undo:
            self.rings = undo.enter_context(allocator.share(peer, 2))
            self.tx_pages = undo.enter_context(allocator.share(peer, pages, False))
            self.rx_pages = undo.enter_context(allocator.share(peer, pages))
            self.tx = FrontRing(self.rings.view[:PAGE_SIZE], TX_SLOT_SIZE, start=start)
            undo.callback(self.tx.release)
            self.rx = FrontRing(self.rings.view[PAGE_SIZE:], RX_SLOT_SIZE, start=start)
            undo.callback(self.rx.release)
            self.tx_port = self.rx_port = events.bind_unbound(peer)
            undo.callback(events.unbind, self.tx_port)
            if split:
                self.rx_port = events.bind_unbound(peer)
                undo.callback(events.unbind, self.rx_port)
            self.undo = undo.pop_all()
        self.tx_free = list(range(pages))
        self.rx_free = list(range(pages))
        #: Pages with a part of a frame that is not answered yet, and slots of extra info.
        self.tx_slots: set[int] = set()
        self.tx_extras = 0
        self.rx_slots: dict[int, int] = {}
        #: What was received of a frame whose end did not come yet.
        self.parts: list[bytes] = []
        self.head: tuple[int, Gso | None] = (0, None)
        self.bad = self.extra_next = self.inside = False

    def names(self) -> NetQueue:
        return NetQueue(self.rings.refs[0], self.rings.refs[1], self.tx_port, self.rx_port)
