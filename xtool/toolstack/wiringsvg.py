"""``xtool wiring -o svg``: the split drivers as a picture. Geometry here, drawing in ``wiring.svg.j2``. Pure.

The same wiring gives the same bytes. Every text is escaped and cut: a guest may have chosen it, and it must
neither leave its box nor be anything but text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import cos, pi, sin
from typing import TYPE_CHECKING

from xtool.devices.wiringmodel import ChannelView, DeviceView, GrantView, RingView, WiringView

if TYPE_CHECKING:
    from jinja2 import Template

WIDTH = 1120
_MARGIN, _BOX, _TOP = 32, 250, 84  # the picture's edge, a domain's width, its heading
_BACK, _FRONT = _MARGIN, WIDTH - _MARGIN - _BOX  # left edges
_LANE, _GAP, _RADIUS, _BORE = 168, 20, 46, 31
#: Slots that are drawn one by one; rings with more show several in each.
_SECTORS = 64
_GRANTS_SHOWN = 3
_KINDS = {"connected": "good", "init-wait": "wait", "initialised": "wait", "initialising": "wait", "": "none"}


@dataclass(frozen=True)
class Sector:
    path: str
    filled: bool


@dataclass(frozen=True)
class RingDrawing:
    x: float
    y: float
    label: str
    count: str
    of: str
    sectors: tuple[Sector, ...]
    grants: tuple[str, ...]
    unread: bool


@dataclass(frozen=True)
class LineDrawing:
    y: float
    left: str
    right: str
    label: str
    broken: bool


@dataclass(frozen=True)
class LaneDrawing:
    y: float
    rings: tuple[RingDrawing, ...]
    lines: tuple[LineDrawing, ...]


@dataclass(frozen=True)
class NodeDrawing:
    """A driver's box: at most a title and some lines. ``mood`` is its state's colour."""

    x: float
    title: str
    state: str
    mood: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class DeviceDrawing:
    y: float
    height: float
    back: NodeDrawing
    front: NodeDrawing
    lanes: tuple[LaneDrawing, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class DomainDrawing:
    y: float
    height: float
    title: str
    subtitle: str
    devices: tuple[DeviceDrawing, ...]


def draw(views: Sequence[WiringView]) -> str:
    """The picture: an SVG document of its own."""
    y: float = _MARGIN
    domains = []
    for view in views:
        domain = _domain(view, y)
        domains.append(domain)
        y += domain.height + _GAP
    height = (y - _GAP if domains else y + 40) + _MARGIN
    page = _template().render(
        width=WIDTH, height=int(height), back=_BACK, front=_FRONT, box=_BOX, domains=domains, radius=_RADIUS
    )
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip())


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    text = files("xtool.toolstack").joinpath("wiring.svg.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text)


def clean(text: object, limit: int = 40) -> str:
    """Text that XML can hold, on one line, no longer than ``limit`` characters."""
    whole = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1]
    )
    return whole if len(whole) <= limit else whole[: limit - 1] + "…"


def _domain(view: WiringView, y: float) -> DomainDrawing:
    at = y + _TOP
    devices = []
    for device in view.devices:
        drawing = _device(device, at)
        devices.append(drawing)
        at += drawing.height + _GAP
    subtitle = f"domain {view.domid}, {view.type}"
    return DomainDrawing(y, max(at - y, _TOP + 24), clean(view.name, 26), subtitle, tuple(devices))


def _device(device: DeviceView, y: float) -> DeviceDrawing:
    problems = tuple(clean(problem, 110) for problem in device.problems[:4])
    if len(device.problems) > 4:
        problems += (f"and {len(device.problems) - 4} more",)
    lanes, at = [], y
    for queue in device.queues:
        lanes.append(_lane(queue.number, len(device.queues), queue.rings, queue.channels, at))
        at += _LANE
    height = max(at - y, 96) + 16 * len(problems)
    server = {"kernel": "kernel", "qemu": "QEMU", "process": "xtool process", "daemon": "daemon"}
    back = NodeDrawing(
        _BACK + 14,
        clean(f"{device.backend_kind} ({server.get(device.server, device.server)})", 28),
        clean(device.backend.state or "no state", 28),
        _mood(device.backend.state),
        tuple(
            clean(line, 34)
            for line in (device.backend.path.removeprefix("/local/domain/0/"), *_details(device))
        ),
    )
    front = NodeDrawing(
        _FRONT + 14,
        clean(f"{device.kind} {device.name}" if device.kind not in device.name else device.name, 28),
        clean(device.frontend.state or "no state", 28),
        _mood(device.frontend.state),
        (clean(device.frontend.path.removeprefix(f"/local/domain/{device.frontend.domid}/"), 34),),
    )
    return DeviceDrawing(y, height, back, front, tuple(lanes), problems)


def _details(device: DeviceView) -> list[str]:
    """The numbers a backend of ours tells, the first few."""
    numbers = [
        (k, v) for k, v in device.details.items() if isinstance(v, int) and not isinstance(v, bool) and v
    ]
    return [f"{key.replace('_', ' ')}: {value}" for key, value in numbers[:3]]


def _mood(state: str) -> str:
    return _KINDS.get(state, "bad")


def _lane(
    number: int, queues: int, rings: Sequence[RingView], channels: Sequence[ChannelView], y: float
) -> LaneDrawing:
    left, right = _BACK + _BOX, _FRONT
    step = (right - left) / max(1, len(rings))
    drawn = []
    for index, ring in enumerate(rings):
        label = ring.role if queues == 1 else f"q{number} {ring.role}".strip()
        drawn.append(_ring(ring, label, left + step * (index + 0.5), y + _RADIUS + 2))
    lines = []
    for index, channel in enumerate(channels[:2]):
        label = f"{channel.role} event channel".strip() + (
            "" if channel.status == "interdomain" else f": {channel.status}"
        )
        far = "?" if channel.backend_port is None else str(channel.backend_port)
        at = y + _LANE - 14 - 16 * (len(channels[:2]) - 1 - index)
        broken = channel.status != "interdomain"
        lines.append(LineDrawing(at, f"port {far}", f"port {channel.port}", clean(label, 40), broken))
    return LaneDrawing(y + _RADIUS + 2, tuple(drawn), tuple(lines))


def _ring(ring: RingView, label: str, x: float, y: float) -> RingDrawing:
    count = max(1, min(_SECTORS, ring.slots))
    each = max(1, ring.slots) / count
    taken = set()
    if ring.in_flight:
        first, last = int(ring.first / each), int((ring.first + ring.in_flight - 1) / each)
        taken = {sector % count for sector in range(first, last + 1)}
    sectors = tuple(Sector(_sector(x, y, index, count), index in taken) for index in range(count))
    shown_grants = _GRANTS_SHOWN if len(ring.grants) <= _GRANTS_SHOWN else _GRANTS_SHOWN - 1
    grants = [_grant(grant) for grant in ring.grants[:shown_grants]]
    if len(ring.grants) > shown_grants:
        grants.append(f"and {len(ring.grants) - shown_grants} more grants")
    unread = ring.indexes is None
    shown = "?" if unread else str(ring.in_flight)
    return RingDrawing(
        round(x, 1), y, clean(label, 18), shown, f"of {ring.slots}", sectors, tuple(grants), unread
    )


def _grant(grant: GrantView) -> str:
    if grant.frame is None:
        return f"grant {grant.ref}: not in the table"
    words = ("read-only, " if grant.readonly else "") + ("mapped" if grant.mapped else "not mapped")
    return f"grant {grant.ref} → {grant.frame:#x}, {words}"


def _sector(x: float, y: float, index: int, count: int) -> str:
    """One slot: a piece of the circle, the first one at the top, clockwise."""
    if count == 1:
        edge = f"{_RADIUS},{_RADIUS} 0 1 1"
        return f"M{x:.1f},{y - _RADIUS:.1f} A{edge} {x - 0.1:.1f},{y - _RADIUS:.1f} Z"
    gap = min(0.03, pi / count / 6)
    start, stop = 2 * pi * index / count + gap, 2 * pi * (index + 1) / count - gap
    large = int(stop - start > pi)

    def at(angle: float, radius: float) -> str:
        return f"{x + radius * sin(angle):.2f},{y - radius * cos(angle):.2f}"

    return (
        f"M{at(start, _RADIUS)} A{_RADIUS},{_RADIUS} 0 {large} 1 {at(stop, _RADIUS)} "
        f"L{at(stop, _BORE)} A{_BORE},{_BORE} 0 {large} 0 {at(start, _BORE)} Z"
    )
