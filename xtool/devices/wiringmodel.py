"""The two ends of split drivers as they are at one moment: records, and how raw nodes and pages become them.

Pure: the toolstack collects nodes, port states, grant entries and pages. Everything a guest can write (its
nodes, its grant table, the rings) is a hint: it is shown, never followed blindly, and nonsense becomes a line
in ``problems``.

Facts about what is shown
-------------------------
* A ring's page holds what each end *published*. How far an end has read is private to it, so a request counts
  as in flight from its publication until its answer's.
* On a net ``rx`` ring the requests are empty buffers: what is in flight there waits for packets.
* Xen knows who is at each end of an event channel; the nodes only say who is meant to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, NamedTuple

from xtool.errors import RemoteProtocolError
from xtool.proto.blkif import LAYOUTS, X86_64
from xtool.proto.consolering import IN_SIZE, INDEXES_AT, OUT_SIZE
from xtool.proto.netif import RX_SLOT_SIZE, TX_SLOT_SIZE
from xtool.proto.nodes import Reader
from xtool.proto.ring import PAGE_SIZE, ring_slots
from xtool.proto.shm import MASK32

#: What is looked at of one device at most: a guest can claim any number of queues.
MAX_QUEUES, MAX_PAGES = 16, 16
_SRING = Struct("<4I")


@dataclass(frozen=True)
class GrantView:
    """A page of a ring. ``frame`` is the guest's number for it, None where the guest granted nothing under
    ``ref``; ``domid`` is who may use it, ``mapped`` whether somebody does, as Xen noted it."""

    ref: int
    frame: int | None = None
    domid: int | None = None
    readonly: bool = False
    mapped: bool = False


@dataclass(frozen=True)
class ChannelView:
    """An event channel. ``port`` is the frontend's, as its node says; the rest is Xen's word: what that port
    is, and the other end's domain, port and state."""

    role: str
    port: int
    status: str = "unknown"
    backend_domid: int | None = None
    backend_port: int | None = None
    backend_status: str = ""


@dataclass(frozen=True)
class RingView:
    """A ring of ``slots``, those from ``first`` on, ``in_flight`` of them, are in use. For consoles a slot is
    a byte. ``indexes`` are the words in the page; None: it could not be read."""

    role: str
    grants: tuple[GrantView, ...]
    slots: int = 0
    first: int = 0
    in_flight: int = 0
    indexes: Mapping[str, int] | None = None


@dataclass(frozen=True)
class QueueView:
    number: int
    channels: tuple[ChannelView, ...] = ()
    rings: tuple[RingView, ...] = ()


@dataclass(frozen=True)
class EndView:
    """``state`` is a word such as ``connected``, or empty where a device has none."""

    domid: int
    path: str
    state: str = ""


@dataclass(frozen=True)
class DeviceView:
    """``server``: ``kernel``, ``qemu``, ``process`` (ours) or ``daemon``; ``backend_kind`` names the backend.
    ``details`` is what a backend of ours tells of itself."""

    kind: str
    devid: int
    name: str
    backend_kind: str
    server: str
    frontend: EndView
    backend: EndView
    queues: tuple[QueueView, ...] = ()
    problems: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WiringView:
    """One domain."""

    domid: int
    name: str
    type: str
    devices: tuple[DeviceView, ...] = ()


class RingPlan(NamedTuple):
    """What the frontend's nodes say of a ring."""

    role: str
    refs: tuple[int, ...]
    slot_size: int


class QueuePlan(NamedTuple):
    number: int
    ports: tuple[tuple[str, int], ...]  # (role, port)
    rings: tuple[RingPlan, ...]


# --- what nodes say -------------------------------------------------------------------------------------
def parse_frontend(kind: str, nodes: Mapping[str, str]) -> tuple[list[QueuePlan], list[str]]:
    """The queues a frontend's nodes describe, and what is wrong with them. ``nodes`` holds those of folders
    as ``queue-N/name``. Takes anything, raises nothing."""
    problems: list[str] = []
    known = {"vbd": _block_queue, "vif": _net_queue, "console": _console_queue}.get(kind)
    if known is None or not any(_has_ring(name) for name in nodes):
        return [], problems
    read = Reader(nodes)
    count, prefix = 1, ""
    if kind != "console" and "multi-queue-num-queues" in nodes:
        try:
            count = read.number("multi-queue-num-queues", 1, 1 << 16)
        except RemoteProtocolError as error:
            problems.append(error.message)
        if count > MAX_QUEUES:
            problems.append(f"{count} queues; {MAX_QUEUES} of them are shown")
    queues = []
    for number in range(min(count, MAX_QUEUES)):
        prefix = f"queue-{number}/" if count > 1 else ""
        try:
            queues.append(known(read, prefix, number))
        except RemoteProtocolError as error:
            problems.append(error.message)
    return queues, problems


def _has_ring(name: str) -> bool:
    return "ring-ref" in name


def _block_queue(read: Reader, prefix: str, number: int) -> QueuePlan:
    if f"{prefix}ring-ref" in read.nodes:
        refs: tuple[int, ...] = (read.ref(f"{prefix}ring-ref"),)
    else:
        order = read.number("ring-page-order", 0, 4, 0)
        refs = tuple(read.ref(f"{prefix}ring-ref{page}") for page in range(1 << order))
    layout = LAYOUTS.get(read.nodes.get("protocol", ""), X86_64)
    port = read.port(f"{prefix}event-channel")
    return QueuePlan(number, (("", port),), (RingPlan("", refs, layout.slot_size),))


def _net_queue(read: Reader, prefix: str, number: int) -> QueuePlan:
    if f"{prefix}event-channel" in read.nodes:
        ports: tuple[tuple[str, int], ...] = (("", read.port(f"{prefix}event-channel")),)
    else:
        ports = tuple((role, read.port(f"{prefix}event-channel-{role}")) for role in ("tx", "rx"))
    rings = tuple(
        RingPlan(role, (read.ref(f"{prefix}{role}-ring-ref"),), size)
        for role, size in (("tx", TX_SLOT_SIZE), ("rx", RX_SLOT_SIZE))
    )
    return QueuePlan(number, ports, rings)


def _console_queue(read: Reader, prefix: str, number: int) -> QueuePlan:
    return QueuePlan(0, (("", read.port("port")),), (RingPlan("", (read.ref("ring-ref"),), 1),))


# --- what pages say -------------------------------------------------------------------------------------
def shared_ring(plan: RingPlan, grants: Sequence[GrantView], page: bytes | None) -> tuple[RingView, str]:
    """A block or net ring by a copy of its first page; the second is a problem, or empty."""
    grants = tuple(grants)
    slots = ring_slots(len(plan.refs) * PAGE_SIZE, plan.slot_size)
    if page is None:
        return RingView(plan.role, grants, slots), ""
    words = dict(
        zip(("req_prod", "req_event", "rsp_prod", "rsp_event"), _SRING.unpack_from(page), strict=True)
    )
    in_flight = (words["req_prod"] - words["rsp_prod"]) & MASK32
    problem = ""
    if in_flight > slots:
        problem = f"ring {plan.role}: {in_flight} requests in a ring of {slots}".replace("  ", " ")
        in_flight = 0
    return RingView(plan.role, grants, slots, words["rsp_prod"] % slots, in_flight, words), problem


def console_rings(grants: Sequence[GrantView], page: bytes | None) -> tuple[list[RingView], list[str]]:
    """The two byte rings of a console page."""
    grants = tuple(grants)
    if page is None:
        return [RingView("out", grants, OUT_SIZE), RingView("in", grants, IN_SIZE)], []
    words = _SRING.unpack_from(page, INDEXES_AT)
    found, problems = [], []
    for role, size, cons, prod in (
        ("out", OUT_SIZE, words[2], words[3]),
        ("in", IN_SIZE, words[0], words[1]),
    ):
        waiting = (prod - cons) & MASK32
        if waiting > size:
            problems.append(f"ring {role}: {waiting} bytes in a ring of {size}")
            waiting = 0
        indexes = {f"{role}_cons": cons, f"{role}_prod": prod}
        found.append(RingView(role, grants, size, cons % size, waiting, indexes))
    return found, problems


def judge(device: DeviceView) -> list[str]:
    """What of a connected device does not fit together."""
    found = []
    connected = device.backend.state == "connected"
    for queue in device.queues:
        for channel in queue.channels:
            label = f"port {channel.port} of domain {device.frontend.domid}"
            if connected and channel.status != "interdomain":
                found.append(f"{label} is {channel.status}, though the backend is connected")
            elif channel.backend_domid not in (None, device.backend.domid):
                found.append(f"{label} leads to domain {channel.backend_domid}, not to the backend")
        for ring in queue.rings:
            for grant in ring.grants:
                if connected and grant.frame is None:
                    found.append(f"grant {grant.ref} is not in the guest's grant table")
                elif grant.domid not in (None, device.backend.domid):
                    found.append(f"grant {grant.ref} is for domain {grant.domid}, not for the backend")
    return list(dict.fromkeys(found))
