"""Verbs for disks and interfaces of running domains."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from os.path import abspath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xtool.cli.client import connect
from xtool.cli.options import Domain, Output
from xtool.cli.output import columns, emit, escape, note
from xtool.errors import UsageError

if TYPE_CHECKING:
    from xtool.toolstack.api import BlockInfo, DeviceResult, NetworkInfo, ServedDisk

DiskSpec = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC...", help="As in a domain file: xl's string, or key=value words.", show_default=False
    ),
]
VifSpec = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SPEC]...", help="As for block-attach; none: defaults.", show_default=False),
]
Vdev = Annotated[str, typer.Argument(metavar="VDEV", help="xvdb, or its number.", show_default=False)]
Drive = Annotated[str, typer.Argument(metavar="VDEV", help="The drive: hdc, say.", show_default=False)]
Devid = Annotated[
    str, typer.Argument(metavar="DEVICE", help="Its number or MAC address.", show_default=False)
]
Medium = Annotated[
    str, typer.Argument(metavar="TARGET", help="An ISO image, or a block device.", show_default=False)
]
Force = Annotated[bool, typer.Option("-f", "--force", help="Also when the guest holds on to it.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait.", min=0)]


def block_attach(domain: Domain, spec: DiskSpec, timeout: Timeout = 40.0, output: Output = "table") -> None:
    """Give a running domain a disk. A restart of the domain keeps it.

    \b
    Examples:
      xtool block-attach web /images/data.img,raw,xvdb
      xtool block-attach web vdev=xvdb format=qcow2 target=/images/data.qcow2
    """
    from xtool.config.single import parse_disk

    disk = parse_disk(spec)
    with connect() as client:
        result = client.block_attach(domain, disk, deadline=timeout)
    _print(result, output)


def block_detach(
    domain: Domain, vdev: Vdev, force: Force = False, timeout: Timeout = 10.0, output: Output = "table"
) -> None:
    """Take a disk away from a running domain; the guest is asked first.

    \b
    Examples:
      xtool block-detach web xvdb
      xtool block-detach web 51728 --force
    """
    with connect() as client:
        result = client.block_detach(domain, vdev, force=force, deadline=timeout)
    _print(result, output)


def block_list(domain: Domain, output: Output = "table") -> None:
    """List a domain's disks: who serves each, why, and how far it is.

    \b
    Examples:
      xtool block-list web
      xtool block-list web -o json
    """
    with connect() as client:
        found = client.block_list(domain)
    emit(found, output, lambda: _disks(found))


def _disks(found: list[BlockInfo]) -> str:
    table: list[dict[str, object]] = []
    for d in found:
        limits = [f"{amount(d.bytes_per_second)}/s"] if d.bytes_per_second else []
        limits += [f"{d.ops_per_second} ops/s"] if d.ops_per_second else []
        row = {"Vdev": d.vdev, "Devid": d.devid, "Backend": d.backend, "State": d.state or "-"}
        row |= {"Mode": "r" if d.readonly else "w", "Format": d.format, "Limit": ", ".join(limits)}
        row |= _traffic(d.live, "read_bytes", "written_bytes", ("errors",))
        table.append({**row, "Target": d.target or "-", "Why this backend": d.reason or "-"})
    return _table(_DISK, table) + _problems((d.vdev, d.problem) for d in found)


def _traffic(live: dict[str, Any], read: str, written: str, errors: tuple[str, ...]) -> dict[str, object]:
    """The columns that only our own backends fill; all empty for the others."""
    from xtool.toolstack.live import in_flight

    counters = live.get("counters")
    if counters is None:
        return dict.fromkeys(_TRAFFIC, "")
    values = (in_flight(live), amount(counters[read]), amount(counters[written]))
    return dict(zip(_TRAFFIC, (*values, sum(counters[name] for name in errors)), strict=True))


_TRAFFIC = ("In flight", "Read", "Written", "Errors")
#: Columns that are left out where no device has anything for them.
_WHERE_USEFUL = ("Limit", *_TRAFFIC)


_DISK = (
    *("Vdev", "Devid", "Backend", "State", "Mode", "Format"),
    *(*_WHERE_USEFUL, "Target", "Why this backend"),
)
_VIF = (
    *("Devid", "MAC", "Backend", "State", "Bridge", "Interface", "Type"),
    *(*_WHERE_USEFUL, "Why this backend"),
)


def _table(header: tuple[str, ...], rows: list[dict[str, object]]) -> str:
    names = [name for name in header if name not in _WHERE_USEFUL or any(row[name] != "" for row in rows)]
    cells = [["-" if row[name] == "" else row[name] for name in names] for row in rows]
    return columns(names, cells, ["Devid", *_TRAFFIC])


def _problems(found: Iterable[tuple[object, str]]) -> str:
    return "".join(f"\n{name}: {escape(text)}" for name, text in found if text)


def amount(size: int) -> str:
    """Bytes for people."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:.0f}{units[0]}" if value == int(value) else f"{value:.1f}{units[0]}"


def block_limit(
    domain: Domain,
    vdev: Vdev,
    bytes_per_second: Annotated[
        str | None, typer.Option(metavar="SIZE", help="20MiB, say; 0 or none: no limit.", show_default=False)
    ] = None,
    ops_per_second: Annotated[
        str | None, typer.Option(metavar="N", help="Requests; 0 or none: no limit.", show_default=False)
    ] = None,
    output: Output = "table",
) -> None:
    """Limit how fast a disk is read and written; for disks that xtool serves. A restart keeps it.

    \b
    Examples:
      xtool block-limit web xvda --bytes-per-second 20MiB --ops-per-second 500
      xtool block-limit web xvda --bytes-per-second none
    """
    from xtool.config.single import limit

    if bytes_per_second is None and ops_per_second is None:
        raise UsageError("no limit is given", hint="give --bytes-per-second, --ops-per-second, or both")
    size = limit("bytes-per-second", bytes_per_second)
    ops = limit("ops-per-second", ops_per_second)
    with connect() as client:
        result = client.block_limit(domain, vdev, bytes_per_second=size, ops_per_second=ops)
    _print(result, output)


def block_serve(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC...|DOMAIN:VDEV",
            help="As for block-attach (vdev may be left out), or a disk of a running domain.",
            show_default=False,
        ),
    ],
    socket: Annotated[
        str, typer.Option("-k", "--socket", metavar="PATH", help="Where to listen.", show_default=False)
    ] = "",
    read_only: Annotated[bool, typer.Option("-r", "--read-only", help="Nobody may write.")] = False,
    force_share: Annotated[
        bool,
        typer.Option("-U", "--force-share", help="Read-only, and also while somebody else writes to it."),
    ] = False,
    output: Output = "table",
) -> int:
    """Attach a disk to this host and serve it over NBD, until Ctrl-C.

    A running domain's disk is served read-only; one that the domain may write to needs --force-share, since
    what is read while it writes need not fit together.

    \b
    Examples:
      xtool block-serve /images/web.img --read-only
      xtool block-serve web:xvda --force-share
    """
    from xtool.config.single import parse_disk
    from xtool.toolstack.api import ServeOptions

    domain, vdev = _domain_and_vdev(what)
    options = ServeOptions(
        None if vdev else parse_disk(what, vdev="xvda"),
        domain,
        vdev,
        abspath(socket) if socket else "",
        read_only,
        force_share,
    )

    def ready(served: ServedDisk) -> None:
        emit(served, output, lambda: _served(served))

    with connect() as client:
        try:
            client.block_serve(options, ready)
        except KeyboardInterrupt:
            note("detached")
    return 0


def _domain_and_vdev(words: list[str]) -> tuple[str, str]:
    """``web:xvda``; two empty strings for a disk specification."""
    if len(words) != 1 or any(sign in words[0] for sign in "/,="):
        return "", ""
    domain, _, vdev = words[0].rpartition(":")
    return (domain, vdev) if domain else ("", "")


def _served(served: ServedDisk) -> str:
    url = shlex.quote(served.url)
    mode = "read-only" if served.readonly else "read and write"
    lines = [
        served.url,
        f"{escape(served.target)}: {served.size} bytes, {mode}. Ctrl-C ends it; try:",
        f"  qemu-img info {url}",
        f"  nbdcopy {url} copy.img",
    ]
    return "\n".join(lines)


def network_attach(
    domain: Domain, spec: VifSpec = None, timeout: Timeout = 40.0, output: Output = "table"
) -> None:
    """Give a running domain an interface. A restart of the domain keeps it.

    \b
    Examples:
      xtool network-attach web bridge=xenbr0
      xtool network-attach web mac=00:16:3e:12:34:56 rate=10Mb/s
    """
    from xtool.config.single import parse_vif

    vif = parse_vif(spec or [])
    with connect() as client:
        result = client.network_attach(domain, vif, deadline=timeout)
    _print(result, output)


def network_detach(
    domain: Domain, device: Devid, force: Force = False, timeout: Timeout = 10.0, output: Output = "table"
) -> None:
    """Take an interface away from a running domain; the guest is asked first.

    \b
    Examples:
      xtool network-detach web 0
      xtool network-detach web 00:16:3e:12:34:56 --force
    """
    with connect() as client:
        result = client.network_detach(domain, device, force=force, deadline=timeout)
    _print(result, output)


def network_list(domain: Domain, output: Output = "table") -> None:
    """List a domain's interfaces.

    \b
    Examples:
      xtool network-list web
      xtool network-list web -o json
    """
    with connect() as client:
        found = client.network_list(domain)
    emit(found, output, lambda: _networks(found))


def _networks(found: list[NetworkInfo]) -> str:
    table: list[dict[str, object]] = []
    for n in found:
        limits = [n.rate] if n.rate else []
        limits += [f"in {n.rate_in}"] if n.rate_in else []
        row = {"Devid": n.devid, "MAC": n.mac, "Backend": n.backend, "State": n.state}
        row |= {"Bridge": n.bridge or "-", "Interface": n.interface, "Type": n.type}
        row |= {"Limit": ", ".join(limits)}
        # As the host sees it: what the guest sent was read.
        row |= _traffic(n.live, "tx_bytes", "rx_bytes", ("tx_invalid", "tx_refused", "tx_lost", "rx_failed"))
        table.append({**row, "Why this backend": n.reason or "-"})
    return _table(_VIF, table) + _problems((n.interface, n.problem) for n in found)


def network_limit(
    domain: Domain,
    device: Devid,
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate", metavar="RATE", help="What the guest sends: 10Mb/s, or none.", show_default=False
        ),
    ] = None,
    rate_in: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="What it is sent (xtool's backend).", show_default=False),
    ] = None,
    output: Output = "table",
) -> None:
    """Limit what an interface's guest sends and is sent. A restart keeps it.

    \b
    Examples:
      xtool network-limit web 0 --rate 10Mb/s
      xtool network-limit web 0 --rate none --rate-in 100Mb/s
    """
    if rate is None and rate_in is None:
        raise UsageError("no limit is given", hint="give --rate, --rate-in, or both")
    wanted = ["" if text in ("none", "0") else text for text in (rate, rate_in)]
    with connect() as client:
        result = client.network_limit(domain, device, rate=wanted[0], rate_in=wanted[1])
    _print(result, output)


def cd_insert(domain: Domain, drive: Drive, target: Medium, output: Output = "table") -> None:
    """Put a medium into a domain's CD drive, in place of what is there.

    \b
    Examples:
      xtool cd-insert windows hdc /images/drivers.iso
      xtool cd-insert windows hdc /dev/sr0
    """
    with connect() as client:
        result = client.cd_insert(domain, drive, abspath(target))
    _print(result, output)


def cd_eject(domain: Domain, drive: Drive, output: Output = "table") -> None:
    """Take the medium out of a domain's CD drive, locked by the guest or not.

    \b
    Examples:
      xtool cd-eject windows hdc
      xtool cd-eject 3 hdc -o json
    """
    with connect() as client:
        result = client.cd_eject(domain, drive)
    _print(result, output)


def _print(result: DeviceResult, output: str) -> None:
    what = "disk" if result.kind == "vbd" else "interface"
    emit(
        result,
        output,
        lambda: f"domain {result.domid}: {what} {escape(result.name)} ({result.devid}): {result.action}",
    )
