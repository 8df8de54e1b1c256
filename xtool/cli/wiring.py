"""The wiring verb: the split drivers as they are at this moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.options import MaybeDomain
from xtool.cli.output import columns, emit, escape, write
from xtool.errors import UsageError

if TYPE_CHECKING:
    from xtool.devices.wiringmodel import DeviceView, GrantView, QueueView, RingView, WiringView

FORMATS = ("table", "json", "yaml", "svg")
_HOME_AND_CLEAR = "\x1b[H\x1b[J"


def _check(form: str) -> str:
    if form not in FORMATS:
        raise UsageError(f"unknown output format {form!r}", hint=f"it is one of {', '.join(FORMATS)}")
    return form


def wiring(
    domain: MaybeDomain = None,
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="table|json|yaml|svg", help="What to print.", callback=_check),
    ] = "table",
    watch: Annotated[
        bool, typer.Option("-w", "--watch", help="Look again and again; Ctrl-C ends it.")
    ] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="How often, with -w.", min=0.1)] = 2.0,
) -> None:
    """Show who is connected to whom: states, event channels, grants, rings and what is in flight.

    \b
    Examples:
      xtool wiring web
      xtool wiring web -o svg > web.svg
    """
    with connect() as client:
        while True:
            views = client.wiring(domain)
            if watch and sys.stdout.isatty():
                sys.stdout.write(_HOME_AND_CLEAR)
            show(views, output)
            if not watch:
                return
            time.sleep(every)


def show(views: Sequence[WiringView], output: str) -> None:
    if output == "svg":
        from xtool.toolstack.wiringsvg import draw

        write(draw(views))
    else:
        emit(list(views), output, lambda: table(views))


def table(views: Sequence[WiringView]) -> str:
    """One line for each ring, and below them what is wrong."""
    rows: list[tuple[str, ...]] = []
    notes = []
    for view in views:
        for device in view.devices:
            start = (view.name or str(view.domid), device.name, device.backend_kind, _states(device))
            for queue in device.queues or (None,):
                for index, ring in enumerate(queue.rings if queue else ()):
                    rows.append((*start, _label(device, queue, ring), *_cells(queue, ring, index)))
                if queue is None:
                    rows.append((*start, "-", "-", "-", "-"))
            notes += [f"{escape(view.name)} {escape(device.name)}: {escape(p)}" for p in device.problems]
    header = ("DOMAIN", "DEVICE", "BACKEND", "STATES", "RING", "PORTS", "IN FLIGHT", "GRANTS")
    return "\n".join([columns(header, rows), *notes])


def _states(device: DeviceView) -> str:
    return f"{device.backend.state or '-'} / {device.frontend.state or '-'}"


def _label(device: DeviceView, queue: QueueView | None, ring: RingView) -> str:
    number = f"{queue.number}" if queue and len(device.queues) > 1 else ""
    return f"{number} {ring.role}".strip() or "-"


def _cells(queue: QueueView | None, ring: RingView, index: int) -> tuple[str, str, str]:
    """Ports (backend's - frontend's), what is in flight, grants."""
    ports = []
    for channel in queue.channels if queue else ():
        if channel.role in ("", ring.role):
            far = "?" if channel.backend_port is None else channel.backend_port
            ports.append(f"{far} - {channel.port}" + ("" if channel.status == "interdomain" else "!"))
    flight = "?" if ring.indexes is None else str(ring.in_flight)
    grants = [_grant(grant) for grant in ring.grants[:2]]
    more = f" +{len(ring.grants) - 2}" if len(ring.grants) > 2 else ""
    return " ".join(ports) or "-", f"{flight} of {ring.slots}", " ".join(grants) + more or "-"


def _grant(grant: GrantView) -> str:
    if grant.frame is None:
        return f"{grant.ref}:?"
    return f"{grant.ref}:{grant.frame:#x}{'' if grant.mapped else ' unmapped'}"
