"""Our net backend: the vifs of a domain, each joined to a tap on a bridge or to a passt of its own.

Nodes of its directory, beside those every vif has (``devices/vif.py``)
-----------------------------------------------------------------------
``network``       ``user``: through passt; otherwise through the interface ``vifname``, or
``vif<domid>.<devid>`` ``forwards``      for ``user``: what comes in, separated by blanks
``mac-filter``    ``0``: the guest may send from any address
``queues``        how many pairs of rings the guest may use
``rate``          what the guest may send, ``bytes,microseconds``; ``rate-in``: what it may be sent

Facts about the frontend (Linux's netfront)
-------------------------------------------
* It goes to Connected at once, its rings ready. It gives its device up for good when a response names a
  request that it did not make: so what was answered is kept in journals, one for each ring.
* Responses to extra info must say NULL, and every frame's slots are answered as they came.
* A status other than OKAY for a frame it sent is taken for the loss it is.
* When its backend goes away and comes back with state Connected all along it notices nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from xtool.backends.frame import Backend, BackendContext
from xtool.backends.journalfile import JournalFile
from xtool.backends.link import Link, LinkGoneError, LinkSource
from xtool.backends.loop import Timer
from xtool.backends.netqueue import Queue
from xtool.backends.netrules import SourceRules, parse_rate
from xtool.backends.nettx import TX_ROOM, Counters, Device
from xtool.backends.passt import PasstSource
from xtool.backends.tap import QUEUES_MAX, TapSource, mtu_of
from xtool.backends.throttle import Throttle
from xtool.devices.xenbus import DeviceId
from xtool.errors import HostError
from xtool.evtchn.dispatch import Verdict
from xtool.grant.copy import CopyBatch
from xtool.grant.window import Buffer
from xtool.proto.netfeatures import NetFrontend, NetOffer, NetQueue, offer_nodes, parse_frontend, parse_mac
from xtool.proto.netif import MAX_FRAME, RX_SLOT_SIZE, TX_SLOT_SIZE, TxAssembler
from xtool.proto.nodes import Nodes
from xtool.proto.ring import PAGE_SIZE, BackRing, ring_slots
from xtool.proto.ringjournal import ResponseJournal
from xtool.proto.xenbus import XenbusState

log = logging.getLogger(__name__)

#: Pauses before a link is made again, seconds; after the last one the device is closed.
REMAKE_AFTER = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
#: A link that lasted this long is taken for good again.
LASTING = 30.0
#: Ethernet header, one VLAN tag.
_BESIDE_MTU = 18
#: Nodes that limit what the guest sends, and what it is sent; domain 0 may change them at any time.
_RATES = ("rate", "rate-in")
_RINGS = (("tx", TX_SLOT_SIZE, 4), ("rx", RX_SLOT_SIZE, 8))


def make_source(device: DeviceId, nodes: Nodes) -> LinkSource:
    """The host's end that the nodes ask for. Raises ``ValueError``."""
    mtu = int(nodes["mtu"]) if nodes.get("mtu", "").isdecimal() else None
    if nodes.get("network") == "user":
        return PasstSource(nodes.get("forwards", "").split(), mtu=mtu)
    name = nodes.get("vifname") or f"vif{device.domid}.{device.devid}"
    return TapSource(name, nodes.get("bridge"), mtu, queues=_number(nodes, "queues", 1, QUEUES_MAX))


class NetBackend(Backend):
    """``source`` makes the host's end; tests give one of their own."""

    connect_on = frozenset({XenbusState.CONNECTED})

    def __init__(
        self,
        context: BackendContext,
        device: DeviceId,
        nodes: Nodes,
        source: Callable[[DeviceId, Nodes], LinkSource] = make_source,
    ) -> None:
        super().__init__(context, device, nodes)
        filtered = nodes.get("mac-filter", "1") != "0"
        self._rules = SourceRules(parse_mac(nodes.get("mac", "")) if filtered else None)
        self._rates = {name: Throttle(context.loop.clock) for name in _RATES}
        self._set_rates(nodes)
        self.counters = Counters()
        self._suspended = False
        self._queues: list[Queue] = []
        self._attached = ExitStack()
        self._remake_timer: Timer | None = None
        self._remakes = 0
        self._made_at = 0.0
        self._accepts: NetFrontend | None = None
        self._links: Sequence[Link] = ()
        self._source = source(device, nodes)
        self._open_links(1)  # whatever is wrong with them shall be known now
        self._offer = NetOffer(max_queues=self._source.queues)
        self._tx_room = Buffer(TX_ROOM)

    # --- the frame's calls
    def offer(self) -> Mapping[str, str]:
        return offer_nodes(self._offer)

    def connect(self, frontend: Nodes) -> Mapping[str, str]:
        self._attach(frontend, resume=False)
        return {}

    def resume(self, frontend: Nodes) -> None:
        self._attach(frontend, resume=True)

    def disconnect(self) -> None:
        self._detach()
        for number in range(self._offer.max_queues):
            for kind, *_ in _RINGS:
                self._journal_path(number, kind).unlink(missing_ok=True)

    def suspend(self) -> None:
        self._suspended = True
        self._detach()

    def close(self) -> None:
        if self._remake_timer is not None:
            self._remake_timer.cancel()
        self._detach()
        self._source.close(for_good=not self._suspended)
        self._links = ()
        self._tx_room.close()

    def _set_rates(self, nodes: Nodes) -> None:
        """Raises ``ValueError``."""
        wanted = {name: parse_rate(nodes.get(name)) for name in _RATES}
        for name, (rate, burst) in wanted.items():
            self._rates[name].set(rate, burst=burst)

    def reconfigure(self, nodes: Nodes) -> None:
        """Other rates: they hold for what waits, too."""
        before, self.nodes = self.nodes, nodes
        if any(nodes.get(name) != before.get(name) for name in _RATES):
            try:
                self._set_rates(nodes)
            except ValueError as error:
                self.complain(str(error))  # the old ones stay
            for queue in self._queues:
                queue.rates_changed()

    def describe(self) -> dict[str, Any]:
        return {
            **self._source.describe(),
            "rate": self._rates["rate"].rates[0],
            "rate_in": self._rates["rate-in"].rates[0],
            "link": bool(self._links),
            "mac_filter": self._rules.active,
            "ports": list(self.ports),
            "counters": self.counters.as_dict(),
            "queues": [queue.describe() for queue in self._queues],
        }

    # --- attaching
    def _attach(self, nodes: Nodes, *, resume: bool) -> None:
        frontend = parse_frontend(nodes, self._offer)
        self._detach()
        if len(self._links) != len(frontend.queues):
            self._open_links(len(frontend.queues))
        self._accepts = frontend
        self._tell_source()
        device = Device(
            self.context.loop,
            self.counters,
            self._rules,
            self._tx_room,
            self._rates["rate"],
            self._rates["rate-in"],
            (frontend.csum, frontend.ipv6_csum),
            self.complain,
            self._link_gone,
            self.failed,
        )
        try:
            for number, grants in enumerate(frontend.queues):
                self._queues.append(self._queue(number, grants, frontend, device, resume=resume))
        except BaseException:
            self._detach()
            raise
        for queue, link in zip(self._queues, self._links, strict=True):
            queue.set_link(link)
            if not resume:
                queue.drain_safely()

    def _queue(
        self, number: int, names: NetQueue, frontend: NetFrontend, device: Device, *, resume: bool
    ) -> Queue:
        rings = []
        for (kind, slot, answer), ref in zip(_RINGS, (names.tx_ref, names.rx_ref), strict=True):
            journal = self._journal(number, kind, slot, answer)
            mapped = self._attached.enter_context(self.context.grants.map(self.context.domid, (ref,)))
            make = BackRing.recover if resume else BackRing
            rings.append(make(mapped.view, slot, journal))
            self._attached.callback(rings[-1].release)
        ports: dict[str, int] = {}

        def kick() -> None:
            if "tx" in ports:
                self.context.loop.dispatcher.add(ports["tx"], *handlers["tx"])

        queue = Queue(
            device,
            rings[0],
            rings[1],
            CopyBatch(self.context.grants, self.context.domid),
            self._assembler(),
            frontend.builder(),
            lambda: self.notify(ports["tx"]),
            lambda: self.notify(ports["rx"]),
            kick,
        )
        self._attached.callback(queue.close)

        def both(budget: int) -> Verdict:
            to_guest = queue.rx_event(budget)
            from_guest = queue.transmit(budget)
            return to_guest if from_guest is Verdict.IDLE else from_guest

        one = names.tx_port == names.rx_port
        handlers = {
            "tx": (both if one else queue.transmit, lambda _, error: self.failed(error)),
            "rx": (queue.rx_event, lambda _, error: self.failed(error)),
        }
        ports["tx"] = self.bind(names.tx_port, handlers["tx"][0])
        ports["rx"] = ports["tx"] if one else self.bind(names.rx_port, queue.rx_event)
        return queue

    def _assembler(self) -> TxAssembler:
        mtu = mtu_of(str(self._source.describe().get("interface", "")))
        largest = MAX_FRAME if mtu is None else min(MAX_FRAME, mtu + _BESIDE_MTU)
        return TxAssembler(gso_types=self._offer.gso_types(), max_size=largest)

    def _detach(self) -> None:
        """Stop, unbind, unmap."""
        self.unbind_all()
        self._accepts = None
        self._queues.clear()
        self._attached.close()

    # --- journals
    def _journal_path(self, number: int, kind: str) -> Path:
        return self.context.folder / f"vif-{self.id.devid}-{number}-{kind}.journal"

    def _journal(self, number: int, kind: str, slot: int, answer: int) -> ResponseJournal:
        size = ResponseJournal.size_for(ring_slots(PAGE_SIZE, slot), answer)
        file = JournalFile(self._journal_path(number, kind), size)
        self._attached.callback(file.close)
        return file.journal

    # --- the link
    def _open_links(self, count: int) -> None:
        self._links = ()
        self._links = self._source.open(count)
        self._made_at = self.context.loop.clock()

    def _tell_source(self) -> None:
        if self._accepts is not None and self._links:
            takes = self._accepts
            self._source.accept(
                csum=takes.csum, tso4=takes.gso_tcpv4, tso6=takes.gso_tcpv6 and takes.ipv6_csum
            )

    def _link_gone(self, error: LinkGoneError) -> None:
        """Make it again, after a pause that grows; the guest's frames are lost meanwhile."""
        if self._remake_timer is not None:
            return
        said = self._source.last_words()
        if self.context.loop.clock() - self._made_at > LASTING:
            self._remakes = 0
        if self._remakes >= len(REMAKE_AFTER):
            self.failed(
                HostError(f"{error.message}, again and again" + (f" ({said[-120:]})" if said else ""))
            )
            return
        log.warning("%s: %s%s", self.id, error.message, f" ({said})" if said else "")
        for queue in self._queues:
            queue.set_link(None)
        self._links = ()
        pause = REMAKE_AFTER[self._remakes]
        self._remakes += 1
        self._remake_timer = self.context.loop.call_later(pause, self._remake, self.failed)

    def _remake(self) -> None:
        self._remake_timer = None
        try:
            self._open_links(max(1, len(self._queues)))
            self._tell_source()
        except HostError as error:
            self._link_gone(LinkGoneError(error.message))
            return
        log.info("%s: the link was made again", self.id)
        for queue, link in zip(self._queues, self._links, strict=False):
            queue.set_link(link)


def _number(nodes: Nodes, name: str, default: int, most: int) -> int:
    text = nodes.get(name, "")
    return max(1, min(int(text), most)) if text.isdecimal() and len(text) < 6 else default
