"""What net frontend and backend tell each other in xenstore (``public/io/netif.h``), as pure functions.

Order of things: the backend writes ``offer_nodes`` and goes to InitWait; the frontend writes
``frontend_nodes`` and goes to Connected; the backend reads those with ``parse_frontend``, once, and goes to
Connected as well.

Facts about the two ends
------------------------
* ``request-rx-copy`` and ``feature-rx-notify`` are mandatory: every frontend of this age copies and notifies.
* Checksum offload for IPv4 is on unless ``feature-no-csum-offload`` says otherwise, for IPv6 the other way.
* Either one ``event-channel`` or the pair ``event-channel-tx``, ``-rx``, in each queue.
* The control ring (receive hashing) and multicast control are not offered, so nothing of them is read.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from xtool.abi.io import XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6
from xtool.errors import BackendError, LocalProtocolError
from xtool.proto.netif import GSO_TCP, RxBuilder, TxAssembler
from xtool.proto.nodes import Nodes, Reader, flags

MAX_QUEUES = 64

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


class NetOffer(NamedTuple):
    """What a backend can do."""

    sg: bool = True
    gso_tcpv4: bool = True
    gso_tcpv6: bool = True
    ipv6_csum: bool = True
    split_event_channels: bool = True
    max_queues: int = 1

    def gso_types(self) -> frozenset[int]:
        """What the frontend may send."""
        return _gso_types(self.gso_tcpv4, self.gso_tcpv6)

    def assembler(self) -> TxAssembler:
        return TxAssembler(gso_types=self.gso_types())


class NetQueue(NamedTuple):
    """One pair of rings: grant references and the frontend's ports, which may be one and the same."""

    tx_ref: int
    rx_ref: int
    tx_port: int
    rx_port: int


class NetFrontend(NamedTuple):
    """What a frontend wants and can take, checked against what was offered."""

    queues: tuple[NetQueue, ...]
    sg: bool = False
    gso_tcpv4: bool = False
    gso_tcpv6: bool = False
    csum: bool = True
    ipv6_csum: bool = False

    def gso_types(self) -> frozenset[int]:
        """What the backend may send."""
        return _gso_types(self.gso_tcpv4, self.gso_tcpv6)

    def builder(self) -> RxBuilder:
        return RxBuilder(sg=self.sg, gso_types=self.gso_types())


def _gso_types(tcpv4: bool, tcpv6: bool) -> frozenset[int]:
    wanted = {XEN_NETIF_GSO_TYPE_TCPV4: tcpv4, XEN_NETIF_GSO_TYPE_TCPV6: tcpv6}
    return frozenset(kind for kind in GSO_TCP if wanted[kind])


def offer_nodes(offer: NetOffer) -> dict[str, str]:
    """The backend's nodes before InitWait."""
    if not 1 <= offer.max_queues <= MAX_QUEUES:
        raise LocalProtocolError(f"{offer.max_queues} queues")
    return {
        **flags(
            feature_rx_copy=True,
            feature_rx_flip=False,
            feature_sg=offer.sg,
            feature_gso_tcpv4=offer.gso_tcpv4,
            feature_gso_tcpv6=offer.gso_tcpv6,
            feature_ipv6_csum_offload=offer.ipv6_csum,
            feature_split_event_channels=offer.split_event_channels,
        ),
        "multi-queue-max-queues": str(offer.max_queues),
    }


def parse_frontend(nodes: Nodes, offer: NetOffer) -> NetFrontend:
    """What the frontend's nodes ask for. ``nodes``: those of its directory, and ``queue-N/...``.

    Raises ``FrontendError`` on anything that was not offered or makes no sense.
    """
    read = Reader(nodes)
    for node in ("request-rx-copy", "feature-rx-notify"):
        if not read.flag(node):
            raise read.error(node, "is not set: a frontend too old to be served")
    count = read.number("multi-queue-num-queues", 1, offer.max_queues, 1)
    prefixes = [""] if count == 1 else [f"queue-{number}/" for number in range(count)]
    queues = tuple(_queue(read, prefix, offer) for prefix in prefixes)
    read.distinct("ring-ref", (ref for q in queues for ref in (q.tx_ref, q.rx_ref)), "grant")
    read.distinct("event-channel", (p for q in queues for p in {q.tx_port, q.rx_port}), "port")
    sg = read.flag("feature-sg")
    return NetFrontend(
        queues,
        sg=sg,
        gso_tcpv4=sg and read.flag("feature-gso-tcpv4"),
        gso_tcpv6=sg and read.flag("feature-gso-tcpv6"),
        csum=not read.flag("feature-no-csum-offload"),
        ipv6_csum=read.flag("feature-ipv6-csum-offload"),
    )


def _queue(read: Reader, prefix: str, offer: NetOffer) -> NetQueue:
    refs = read.ref(f"{prefix}tx-ring-ref"), read.ref(f"{prefix}rx-ring-ref")
    if offer.split_event_channels and f"{prefix}event-channel-tx" in read.nodes:
        tx, rx = read.port(f"{prefix}event-channel-tx"), read.port(f"{prefix}event-channel-rx")
        if tx == rx:
            raise read.error(f"{prefix}event-channel-rx", f"port {rx} is that of -tx")
        return NetQueue(*refs, tx, rx)
    port = read.port(f"{prefix}event-channel")
    return NetQueue(*refs, port, port)


# -- the frontend's side


def parse_backend(nodes: Nodes) -> NetOffer:
    """What a backend in InitWait offers. Raises ``BackendError`` when its nodes make no sense."""
    read = Reader(nodes, BackendError)
    if not read.flag("feature-rx-copy"):
        raise read.error("feature-rx-copy", "is not set: a backend too old to be used")
    sg = read.flag("feature-sg")
    return NetOffer(
        sg=sg,
        gso_tcpv4=sg and read.flag("feature-gso-tcpv4"),
        gso_tcpv6=sg and read.flag("feature-gso-tcpv6"),
        ipv6_csum=read.flag("feature-ipv6-csum-offload"),
        split_event_channels=read.flag("feature-split-event-channels"),
        max_queues=max(1, min(read.number("multi-queue-max-queues", 0, 0xFFFF_FFFF, 1), MAX_QUEUES)),
    )


def frontend_nodes(frontend: NetFrontend) -> dict[str, str]:
    """The frontend's nodes before Connected; relative paths, with ``queue-N/`` for more than one queue."""
    nodes = flags(
        request_rx_copy=True,
        feature_rx_notify=True,
        feature_sg=frontend.sg,
        feature_gso_tcpv4=frontend.gso_tcpv4,
        feature_gso_tcpv6=frontend.gso_tcpv6,
        feature_no_csum_offload=not frontend.csum,
        feature_ipv6_csum_offload=frontend.ipv6_csum,
    )
    many = len(frontend.queues) > 1
    if many:
        nodes["multi-queue-num-queues"] = str(len(frontend.queues))
    for number, queue in enumerate(frontend.queues):
        prefix = f"queue-{number}/" if many else ""
        nodes[f"{prefix}tx-ring-ref"] = str(queue.tx_ref)
        nodes[f"{prefix}rx-ring-ref"] = str(queue.rx_ref)
        if queue.tx_port == queue.rx_port:
            nodes[f"{prefix}event-channel"] = str(queue.tx_port)
        else:
            nodes[f"{prefix}event-channel-tx"] = str(queue.tx_port)
            nodes[f"{prefix}event-channel-rx"] = str(queue.rx_port)
    return nodes


def parse_mac(text: str) -> bytes:
    """``"00:16:3e:01:02:03"`` -> 6 bytes. ``ValueError`` for other text, group addresses, all zeroes."""
    if not _MAC.fullmatch(text):
        raise ValueError(f"not a MAC address: {text[:40]!r}")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise ValueError(f"not the address of one interface: {text}")
    return mac


def format_mac(mac: bytes) -> str:
    return mac.hex(":")
