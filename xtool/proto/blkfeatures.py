"""What block frontend and backend tell each other in xenstore (``public/io/blkif.h``), as pure functions.

Order of things: the backend writes ``offer_nodes`` and goes to InitWait; the frontend reads them with
``parse_backend``, writes ``frontend_nodes`` and goes to Initialised; the backend reads those with
``parse_frontend``, once, writes ``device_nodes`` and goes to Connected.

Facts about the two ends
------------------------
* ``ring-page-order`` stands beside the queues, not in them. Without it the ring is one page in
  ``ring-ref``; with order 0 frontends write ``ring-ref`` or ``ring-ref0``.
* A frontend with one queue writes its nodes at the top, with more below ``queue-N/``.
* ``protocol`` missing means the backend's own ABI; every guest known to us names its.
* Linux reads features only when the backend is Connected, except ring order and queues.
"""

from __future__ import annotations

from typing import NamedTuple

from xtool.abi.io import VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE
from xtool.errors import BackendError, LocalProtocolError
from xtool.proto.blkif import LAYOUTS, MAX_INDIRECT, SECTOR, X86_64, Layout, Limits
from xtool.proto.nodes import Nodes, Reader, flags

MAX_RING_PAGE_ORDER = 4
MAX_QUEUES = 64


class BlockOffer(NamedTuple):
    """What a backend can do with one disk. ``sectors`` counts 512-byte units; other sizes are bytes.

    ``discard_granularity`` 0: discard is not offered. ``max_indirect`` 0: indirect requests are not.
    """

    sectors: int
    readonly: bool = False
    cdrom: bool = False
    removable: bool = False
    flush: bool = True
    barrier: bool = False
    discard_granularity: int = 0
    discard_alignment: int = 0
    discard_secure: bool = False
    persistent: bool = False
    max_indirect: int = 256
    max_ring_page_order: int = MAX_RING_PAGE_ORDER
    max_queues: int = 1
    sector_size: int = SECTOR
    physical_sector_size: int = SECTOR

    def limits(self) -> Limits:
        """What requests are held against."""
        return Limits(
            self.sectors,
            self.readonly,
            self.flush,
            self.barrier,
            bool(self.discard_granularity),
            self.discard_secure,
            self.max_indirect,
        )


class BlockQueue(NamedTuple):
    """One ring: its pages' grant references in order, and the frontend's event channel port."""

    refs: tuple[int, ...]
    port: int


class BlockFrontend(NamedTuple):
    """What a frontend wants, checked against what was offered."""

    layout: Layout
    queues: tuple[BlockQueue, ...]
    persistent: bool = False


def offer_nodes(offer: BlockOffer) -> dict[str, str]:
    """The backend's nodes before InitWait."""
    if not 0 <= offer.max_ring_page_order <= MAX_RING_PAGE_ORDER or not 1 <= offer.max_queues <= MAX_QUEUES:
        raise LocalProtocolError(f"rings of order {offer.max_ring_page_order}, {offer.max_queues} queues")
    if not 0 <= offer.max_indirect <= MAX_INDIRECT:
        raise LocalProtocolError(f"{offer.max_indirect} indirect segments")
    nodes = flags(
        feature_flush_cache=offer.flush,
        feature_barrier=offer.barrier,
        feature_persistent=offer.persistent,
        feature_discard=offer.discard_granularity > 0,
    )
    nodes["max-ring-page-order"] = str(offer.max_ring_page_order)
    nodes["multi-queue-max-queues"] = str(offer.max_queues)
    if offer.max_indirect:
        nodes["feature-max-indirect-segments"] = str(offer.max_indirect)
    if offer.discard_granularity:
        nodes["discard-granularity"] = str(offer.discard_granularity)
        nodes["discard-alignment"] = str(offer.discard_alignment)
        nodes["discard-secure"] = str(int(offer.discard_secure))
    return nodes


def device_nodes(offer: BlockOffer) -> dict[str, str]:
    """The backend's nodes before Connected, and again (``sectors``) when the disk was resized."""
    size = offer.sector_size
    if size < SECTOR or size & (size - 1) or offer.physical_sector_size % size:
        raise LocalProtocolError(f"sectors of {size} bytes, physical ones of {offer.physical_sector_size}")
    info = VDISK_CDROM * offer.cdrom | VDISK_REMOVABLE * offer.removable | VDISK_READONLY * offer.readonly
    return {
        "sectors": str(offer.sectors),
        "info": str(info),
        "sector-size": str(size),
        "physical-sector-size": str(offer.physical_sector_size),
    }


def parse_frontend(nodes: Nodes, offer: BlockOffer) -> BlockFrontend:
    """What the frontend's nodes ask for. ``nodes``: those of its directory, and ``queue-N/...``.

    Raises ``FrontendError`` on anything that was not offered or makes no sense.
    """
    read = Reader(nodes)
    protocol = nodes.get("protocol", X86_64.protocol)
    if protocol not in LAYOUTS:
        raise read.error("protocol", f"{protocol[:40]!r} is not one of {', '.join(LAYOUTS)}")
    order = None
    if "ring-page-order" in nodes:
        order = read.number("ring-page-order", 0, offer.max_ring_page_order)
    count = read.number("multi-queue-num-queues", 1, offer.max_queues, 1)
    if count == 1:
        queues = [_queue(read, "", order)]
    else:
        queues = [_queue(read, f"queue-{number}/", order) for number in range(count)]
    read.distinct("ring-ref", (ref for queue in queues for ref in queue.refs), "grant")
    read.distinct("event-channel", (queue.port for queue in queues), "port")
    return BlockFrontend(LAYOUTS[protocol], tuple(queues), read.flag("feature-persistent"))


def _queue(read: Reader, prefix: str, order: int | None) -> BlockQueue:
    if order is None or (order == 0 and f"{prefix}ring-ref0" not in read.nodes):
        refs = [read.ref(f"{prefix}ring-ref")]
    else:
        refs = [read.ref(f"{prefix}ring-ref{page}") for page in range(1 << order)]
    return BlockQueue(tuple(refs), read.port(f"{prefix}event-channel"))


# -- the frontend's side


def parse_backend(nodes: Nodes) -> BlockOffer:
    """What a Connected backend offers. Raises ``BackendError`` when its nodes make no sense."""
    read = Reader(nodes, BackendError)
    size = read.number("sector-size", SECTOR, 1 << 16, SECTOR)
    if size & (size - 1):
        raise read.error("sector-size", f"{size} is not a power of two")
    info = read.number("info", 0, 0xFFFF_FFFF, 0)
    discard = read.flag("feature-discard")
    granularity = read.number("discard-granularity", 1, 0xFFFF_FFFF, size) if discard else 0
    limits = transport_limits(nodes)
    return BlockOffer(
        sectors=read.number("sectors", 0, (1 << 55) - 1),
        readonly=bool(info & VDISK_READONLY),
        cdrom=bool(info & VDISK_CDROM),
        removable=bool(info & VDISK_REMOVABLE),
        flush=read.flag("feature-flush-cache"),
        barrier=read.flag("feature-barrier"),
        discard_granularity=granularity,
        discard_alignment=read.number("discard-alignment", 0, 0xFFFF_FFFF, 0) if discard else 0,
        discard_secure=discard and read.flag("discard-secure"),
        persistent=read.flag("feature-persistent"),
        max_indirect=min(read.number("feature-max-indirect-segments", 0, 0xFFFF_FFFF, 0), MAX_INDIRECT),
        max_ring_page_order=limits[0],
        max_queues=limits[1],
        sector_size=size,
        physical_sector_size=read.number("physical-sector-size", size, 1 << 24, size),
    )


def transport_limits(nodes: Nodes) -> tuple[int, int]:
    """Largest ring page order and number of queues we may use with a backend in InitWait."""
    read = Reader(nodes, BackendError)
    order = read.number("max-ring-page-order", 0, 0xFFFF_FFFF, 0)
    queues = read.number("multi-queue-max-queues", 0, 0xFFFF_FFFF, 1)
    return min(order, MAX_RING_PAGE_ORDER), max(1, min(queues, MAX_QUEUES))


def frontend_nodes(frontend: BlockFrontend) -> dict[str, str]:
    """The frontend's nodes before Initialised; relative paths, with ``queue-N/`` for more than one queue."""
    nodes = {"protocol": frontend.layout.protocol, **flags(feature_persistent=frontend.persistent)}
    many = len(frontend.queues) > 1
    if many:
        nodes["multi-queue-num-queues"] = str(len(frontend.queues))
    pages = len(frontend.queues[0].refs)
    if pages > 1:
        nodes["ring-page-order"] = str(pages.bit_length() - 1)
    for number, queue in enumerate(frontend.queues):
        prefix = f"queue-{number}/" if many else ""
        nodes[f"{prefix}event-channel"] = str(queue.port)
        for page, ref in enumerate(queue.refs):
            nodes[f"{prefix}ring-ref{page if pages > 1 else ''}"] = str(ref)
    return nodes
