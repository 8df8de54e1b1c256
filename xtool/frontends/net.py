"""Our net frontend: send and receive frames on a vif of any backend, from domain 0.

::

    with dom0vif.attached(host, parse_vif(["bridge=xenbr0"])) as port:     # toolstack/dom0vif.py
        port.send(frame)
        data = port.receive(1.0)

Or by itself, on nodes that are there: ``NetPort(store, events, allocator, NetDevice(front, back))``, then
``connect``.

Facts about the backend (Linux's netback)
-----------------------------------------
* It wants 18 rx requests or so before it gives a frame, whatever its size; it frees all of a frame's slots.
* It answers rx requests in the order of the ring, and the response stands in the slot of its request: pages
  are found by that, not by the id. Extra info stands where a request was, too.
* It answers tx requests as it is done with each, in any order: pages are found by the id. The answer to extra
  info has a status of its own and any id.
* A page it has not answered for may still be written to; so a page is used again after its response only.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NamedTuple

from xtool.abi.io import (
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    XEN_NETIF_EXTRA_FLAG_MORE,
    XEN_NETIF_EXTRA_TYPE_GSO,
    NETRXF_csum_blank,
    NETRXF_data_validated,
    NETRXF_extra_info,
    NETRXF_more_data,
    NETTXF_csum_blank,
    NETTXF_data_validated,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from xtool.errors import BackendError, DeadlineError, DeviceError, LocalProtocolError, RingError
from xtool.evtchn.port import EventChannels
from xtool.frontends.netnodes import NetDevice
from xtool.frontends.netpair import Pair
from xtool.grant.port import GrantAllocator
from xtool.proto.netfeatures import NetFrontend, NetOffer, frontend_nodes, parse_backend
from xtool.proto.netif import (
    ETH_HLEN,
    EXTRA,
    MAX_FRAME,
    MAX_SLOTS,
    PAGE_SIZE,
    RX_REQUEST,
    RX_RESPONSE,
    TX_REQUEST,
    TX_RESPONSE,
    Gso,
)
from xtool.proto.xenbus import Action, FrontendMachine, XenbusState
from xtool.xenstore.port import Store

#: Received frames that wait for ``receive``; more are dropped and counted.
QUEUE_MAX = 4096


class Frame(NamedTuple):
    """A received frame and what is left to do to it."""

    data: bytes
    csum_blank: bool = False
    data_validated: bool = False
    gso: Gso | None = None


class NetPort:
    """``pages``: how many frames' pages each way and queue; gntalloc has 1024 for all (its ``limit``).

    ``wants`` leaves out what is not to be used of the backend's offer. For one thread. Raises
    ``BackendError`` and ``RingError`` when the backend makes no sense.
    """

    def __init__(
        self,
        store: Store,
        events: EventChannels,
        allocator: GrantAllocator,
        device: NetDevice,
        *,
        pages: int = 64,
        wants: NetOffer | None = None,
        start: int = 0,
    ) -> None:
        self._store, self._events, self._allocator = store, events, allocator
        self._device = device
        self._pages = pages
        self._wants = wants or NetOffer()
        self._start = start
        self._machine = FrontendMachine(at_once=True)
        self._watch = store.watch(f"{device.backend}/state")
        self._poll = select.poll()
        self._poll.register(events.fileno(), select.POLLIN)
        self._received: deque[Frame] = deque()
        self.pairs: list[Pair] = []
        self.offer = NetOffer()
        #: Frames the backend said it could not send; frames that came and could not be used.
        self.tx_errors = self.rx_errors = 0

    # --- states
    def connect(self, deadline: float) -> None:
        """Until both ends are Connected. Raises ``DeadlineError``, ``DeviceError`` when the backend
        closes."""
        end = time.monotonic() + deadline
        while True:
            state = self.look()
            if self._machine.state is XenbusState.CONNECTED and state == "4":
                return
            if self._machine.state in (XenbusState.CLOSING, XenbusState.CLOSED):
                raise DeviceError(f"the backend {self._device.backend} closed ({state})")
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlineError(f"{self._device.backend} did not connect within {deadline:g} s ({state})")
            self._store.wait_any([self._watch], min(left, 0.5))

    def look(self) -> str | None:
        """Follow the backend's state; what it is."""
        self._watch.pending()
        state = self._store.get(f"{self._device.backend}/state")
        self._carry_out(self._machine.backend_changed(state))
        return state

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if action is Action.PUBLISH:
                self._publish()
            elif action is Action.DISCONNECT:
                self._release()
            elif action is Action.CLOSE:
                self._say(XenbusState.CLOSING)
            elif action is Action.CLOSE_DONE:
                self._say(XenbusState.CLOSED)

    def _say(self, state: XenbusState, nodes: Mapping[str, str] | None = None) -> None:
        with self._store.batch() as batch:
            for name, value in (nodes or {}).items():
                batch.write(f"{self._device.frontend}/{name}", value)
            batch.write(f"{self._device.frontend}/state", str(int(state)))

    def _publish(self) -> None:
        root = self._device.backend
        names = self._store.list(root)
        values = self._store.get_many([f"{root}/{name}" for name in names])
        nodes = {n: v for n in names if (v := values[f"{root}/{n}"]) is not None}
        offer, wants = parse_backend(nodes), self._wants
        self.offer = offer
        for _ in range(min(offer.max_queues, wants.max_queues)):
            split = offer.split_event_channels and wants.split_event_channels
            pair = Pair(
                self._events, self._allocator, self._device.backend_domid, self._pages, split, self._start
            )
            self.pairs.append(pair)
            self._refill(pair, notify=False)
        sg = offer.sg and wants.sg
        frontend = NetFrontend(
            tuple(pair.names() for pair in self.pairs),
            sg=sg,
            gso_tcpv4=sg and wants.gso_tcpv4,
            gso_tcpv6=sg and wants.gso_tcpv6,
            ipv6_csum=wants.ipv6_csum,
        )
        self._say(XenbusState.CONNECTED, frontend_nodes(frontend))

    def close(self, deadline: float = 5.0) -> None:
        """Close in good order, or in any case after ``deadline`` seconds; the nodes stay. May be called
        again."""
        if self._machine.state is not XenbusState.CLOSED:
            self._say(XenbusState.CLOSING)
            end = time.monotonic() + deadline
            while self._store.get(f"{self._device.backend}/state") == "4":
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._store.wait_any([self._watch], min(left, 0.5))
                self._watch.pending()
            self._carry_out(self._machine.close())
        self._release()
        self._watch.close()

    def _release(self) -> None:
        while self.pairs:
            self.pairs.pop().undo.close()

    def __enter__(self) -> NetPort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- frames out
    def try_send(
        self,
        data: bytes,
        *,
        csum_blank: bool = False,
        gso: Gso | None = None,
        queue: int = 0,
        chunk: int = PAGE_SIZE,
    ) -> bool:
        """Put a frame on the ring, in pieces of ``chunk`` bytes; False if there is no room for it now.

        The backend is told by ``kick``, so that several frames can go together.
        """
        pair = self.pairs[queue]
        slots = -(-len(data) // chunk)
        if not ETH_HLEN <= len(data) <= MAX_FRAME or slots > MAX_SLOTS or not 0 < chunk <= PAGE_SIZE:
            raise LocalProtocolError(f"a frame of {len(data)} bytes in {slots} slots")
        if len(pair.tx_free) < slots or pair.tx.free() < slots + (gso is not None):
            self._reap(pair)
            if len(pair.tx_free) < slots or pair.tx.free() < slots + (gso is not None):
                return False
        first = NETTXF_csum_blank | NETTXF_data_validated if csum_blank else 0
        for number in range(slots):
            piece = data[number * chunk : (number + 1) * chunk]
            page = pair.tx_free.pop()
            pair.tx_pages.view[page * PAGE_SIZE : page * PAGE_SIZE + len(piece)] = piece
            flags = NETTXF_more_data if number < slots - 1 else 0
            size = len(piece)
            if number == 0:
                flags |= first | (NETTXF_extra_info if gso else 0)
                size = len(data)
            pair.tx.push(TX_REQUEST.pack(pair.tx_pages.refs[page], 0, flags, page, size))
            pair.tx_slots.add(page)
            if number == 0 and gso is not None:
                extra = EXTRA.pack(XEN_NETIF_EXTRA_TYPE_GSO, 0, gso.mss, gso.type, 0)
                pair.tx.push(extra)
                pair.tx_extras += 1
        return True

    def kick(self, queue: int = 0) -> None:
        """Make what was put on the ring visible, and tell the backend if it wants to be told."""
        pair = self.pairs[queue]
        if pair.tx.publish():
            self._events.notify(pair.tx_port)

    def send(self, data: bytes, deadline: float = 5.0, **how: object) -> None:
        """Send one frame, waiting for room. Raises ``DeadlineError``."""
        end = time.monotonic() + deadline
        while not self.try_send(data, **how):  # type: ignore[arg-type]
            self.kick(int(str(how.get("queue", 0))))
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlineError(f"the backend took no frame within {deadline:g} s")
            self._sleep(left)
        self.kick(int(str(how.get("queue", 0))))

    def _reap(self, pair: Pair) -> None:
        while True:
            for raw in pair.tx.take_responses():
                page, status = TX_RESPONSE.unpack_from(raw)
                if status == NETIF_RSP_NULL and pair.tx_extras:
                    pair.tx_extras -= 1  # its id is whatever stood there
                    continue
                if page not in pair.tx_slots:
                    raise RingError(f"a response to request {page}, which is not on the ring")
                pair.tx_slots.remove(page)
                self.tx_errors += status != NETIF_RSP_OKAY
                pair.tx_free.append(page)
            if not pair.tx.final_check():
                return

    # --- frames in
    def receive(self, deadline: float = 0.0) -> Frame | None:
        """The next frame; None if none comes within ``deadline`` seconds."""
        end = time.monotonic() + deadline
        while True:
            if self._received:
                return self._received.popleft()
            self.poll()
            left = end - time.monotonic()
            if not self._received:
                if left <= 0:
                    return None
                self._sleep(left)

    def poll(self) -> int:
        """Take in what is on the rings; how many frames wait to be received."""
        self._events.unmask(self._events.pending())
        for pair in self.pairs:
            self._reap(pair)
            self._take(pair)
        return len(self._received)

    def _sleep(self, seconds: float) -> None:
        self._poll.poll(1000 * min(seconds, 0.5))
        self._events.unmask(self._events.pending())

    def _refill(self, pair: Pair, *, notify: bool = True) -> None:
        while pair.rx_free and pair.rx.free():
            page = pair.rx_free.pop()
            index = pair.rx.req_prod
            pair.rx.push(RX_REQUEST.pack(index % pair.rx.size, pair.rx_pages.refs[page]))
            pair.rx_slots[index % pair.rx.size] = page
        if pair.rx.publish() and notify:
            self._events.notify(pair.rx_port)

    def _take(self, pair: Pair) -> None:
        while True:
            at = pair.rx.rsp_cons
            for raw in pair.rx.take_responses():
                page = pair.rx_slots.pop(at % pair.rx.size)
                at += 1
                self._one(pair, raw, page)
                pair.rx_free.append(page)
            self._refill(pair)
            if not pair.rx.final_check():
                return

    def _one(self, pair: Pair, raw: bytes, page: int) -> None:
        if pair.extra_next:
            kind, flags, size, gso_type, _ = EXTRA.unpack_from(raw)
            if kind == XEN_NETIF_EXTRA_TYPE_GSO:
                pair.head = (pair.head[0], Gso(gso_type, size))
            pair.extra_next = bool(flags & XEN_NETIF_EXTRA_FLAG_MORE)
            if not pair.extra_next and not pair.inside:
                self._end(pair)
            return
        _, offset, flags, status = RX_RESPONSE.unpack_from(raw)
        if not pair.parts and not pair.bad:
            pair.head = (flags, None)
            pair.extra_next = bool(flags & NETRXF_extra_info)
        if status < 0:
            pair.bad = True
        elif offset + status > PAGE_SIZE:
            raise BackendError("rx ring", f"{status} bytes at {offset} of a page")
        else:
            start = page * PAGE_SIZE + offset
            pair.parts.append(bytes(pair.rx_pages.view[start : start + status]))
        pair.inside = bool(flags & NETRXF_more_data)
        if len(pair.parts) > pair.rx.size:
            raise BackendError("rx ring", "a frame without an end")
        if not pair.inside and not pair.extra_next:
            self._end(pair)

    def _end(self, pair: Pair) -> None:
        flags, gso = pair.head
        if pair.bad or len(self._received) >= QUEUE_MAX:
            self.rx_errors += 1
        else:
            self._received.append(
                Frame(
                    b"".join(pair.parts),
                    bool(flags & NETRXF_csum_blank),
                    bool(flags & NETRXF_data_validated),
                    gso,
                )
            )
        pair.parts, pair.bad, pair.inside = [], False, False
