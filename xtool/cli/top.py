"""``xtool top`` and ``xtool metrics``: what every domain uses."""

from __future__ import annotations

import sys
from time import sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xtool.cli.client import connect
from xtool.cli.options import Output
from xtool.cli.output import MIB, check_format, columns, escape, plain, write
from xtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtool.toolstack.api import Client
    from xtool.toolstack.rates import DomainRate, Usage

SORTS = ("cpu", "memory", "name", "id", "disk", "network")
_HEADER = (
    "Name",
    "ID",
    "State",
    "CPU%",
    "Time(s)",
    "Mem",
    "VCPUs",
    "Read/s",
    "Written/s",
    "Sent/s",
    "Received/s",
)
_RIGHT = (*_HEADER[1:2], *_HEADER[3:])


def top(
    count: Annotated[
        int | None, typer.Option("-n", "--count", metavar="N", help="So many samples, then end.", min=1)
    ] = None,
    interval: Annotated[
        float, typer.Option("-i", "--interval", metavar="SECONDS", help="Between two samples.", min=0.05)
    ] = 2.0,
    sort: Annotated[str, typer.Option("-s", "--sort", metavar="|".join(SORTS), help="Order.")] = "cpu",
    devices: Annotated[bool, typer.Option("-d", "--devices", help="Each disk and interface too.")] = False,
    output: Output = "table",
) -> int:
    """Show what the domains use: CPU, memory, disks, interfaces, rings that stand still.

    On a terminal the view is live, until Ctrl-C. Elsewhere, or with -o json, one sample is printed; with
    --count, so many, as a line of JSON each. Rates are between two looks, CPU in percent of one CPU.

    \b
    Examples:
      xtool top
      xtool top -o json --count 10 --interval 5
    """
    if sort not in SORTS:
        raise UsageError(f"unknown order {sort!r}", hint=f"it is one of {', '.join(SORTS)}")
    check_format(output)
    live = output == "table" and count is None and sys.stdout.isatty() and sys.stdin.isatty()
    with connect() as client:
        samples = usages(client, None if live else count or 1, interval)
        try:
            if live:
                _live(samples, sort, devices)
            else:
                _print(samples, output, sort, devices, lines=count is not None)
        except KeyboardInterrupt:
            if not live:
                raise
    return 0


def metrics() -> None:
    """Print what every domain uses once, as Prometheus text.

    \b
    Examples:
      xtool metrics
      xtool metrics > /var/lib/node_exporter/xtool.prom
    """
    with connect() as client:
        text = client.metrics()
    write(text.rstrip("\n"))


def usages(client: Client, count: int | None, interval: float) -> Iterator[Usage]:
    """``count`` samples, or without end; the first comes after one interval."""
    from xtool.toolstack.rates import usage

    before = client.sample()
    while count is None or count > 0:
        sleep(interval)
        after = client.sample()
        yield usage(before, after)
        before = after
        count = None if count is None else count - 1


def ordered(found: Usage, sort: str) -> list[DomainRate]:
    keys: dict[str, Any] = {
        "cpu": lambda d: (-d.cpu, d.domid),
        "memory": lambda d: (-d.memory, d.domid),
        "name": lambda d: (d.name, d.domid),
        "id": lambda d: d.domid,
        "disk": lambda d: (-(d.read + d.written), d.domid),
        "network": lambda d: (-(d.sent + d.received), d.domid),
    }
    return sorted(found.domains, key=keys[sort])


def head(found: Usage) -> str:
    """``Xen 4.17.5, 2 CPUs 13% busy, 8192 MiB, 6000 free, 3 domains``."""
    busy = found.cpu / max(1, found.cpus)
    return (
        f"Xen {found.xen_version}, {found.cpus} CPUs {busy:.0f}% busy, {found.total_memory // MIB} MiB "
        f"({found.free_memory // MIB} free), {len(found.domains)} domains, {found.interval:.1f} s"
    )


def rows(found: Usage, sort: str, devices: bool) -> list[list[str]]:
    """The table's rows, escaped; those of devices begin with two spaces."""
    table = []
    for d in ordered(found, sort):
        table.append(
            [
                escape(d.name) or "-",
                str(d.domid),
                d.state,
                f"{d.cpu:.1f}",
                f"{d.cpu_time:.0f}",
                str(d.memory // MIB),
                str(d.vcpus),
                *(rate(value) for value in (d.read, d.written, d.sent, d.received)),
            ]
        )
        if devices:
            empty = ["", "", "", "", ""]
            for disk in d.disks:
                name = [f"  {escape(disk.vdev)}", "", escape(disk.backend), *empty[:4]]
                table.append([*name, rate(disk.read), rate(disk.written), "", ""])
            for vif in d.interfaces:
                name = [f"  {escape(vif.interface)}", "", escape(vif.backend), *empty[:4]]
                table.append([*name, "", "", rate(vif.sent), rate(vif.received)])
    return table


def stalls(found: Usage) -> list[str]:
    return [f"{escape(d.name)}: {escape(words)}" for d in found.domains for words in d.stalls]


def rate(value: float | None) -> str:
    """Bytes per second for people; ``-`` where nobody counts."""
    from xtool.cli.devices import amount

    return "-" if value is None else amount(int(value))


def page(found: Usage, sort: str, devices: bool) -> str:
    parts = [head(found), columns(_HEADER, rows(found, sort, devices), _RIGHT)]
    if words := stalls(found):
        parts.append("Rings that stand still:\n" + "\n".join(f"  {line}" for line in words))
    return "\n\n".join(parts)


def _print(samples: Iterator[Usage], output: str, sort: str, devices: bool, *, lines: bool) -> None:
    import json

    for number, found in enumerate(samples):
        if output == "json":
            write(json.dumps(plain(found), indent=None if lines else 2))
        elif output == "yaml":
            import yaml

            write(
                ("---\n" if lines else "") + str(yaml.safe_dump(plain(found), sort_keys=False)).rstrip("\n")
            )
        else:
            write(("\n" if number else "") + page(found, sort, devices))


def _live(samples: Iterator[Usage], sort: str, devices: bool) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def picture(found: Usage) -> Group:
        table = Table(box=None, pad_edge=False)
        for name in _HEADER:
            table.add_column(name, justify="right" if name in _RIGHT else "left", no_wrap=True)
        for row in rows(found, sort, devices):
            table.add_row(*(Text(cell) for cell in row))  # Text: a domain's name is no markup
        words = [Text(line, style="bold red") for line in stalls(found)]
        return Group(Text(head(found), style="bold"), table, *words)

    with Live(Text("looking ..."), screen=True, auto_refresh=False) as screen:
        for found in samples:
            screen.update(picture(found), refresh=True)
