"""xtoold from the command line: run, status, stop; its operations; and the verb ``events``."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import daemon_client
from xtool.cli.options import MaybeDomain, Output
from xtool.cli.output import columns, emit, escape, note, pairs, plain, write
from xtool.errors import DeadlineError, HostError

if TYPE_CHECKING:
    from xtool.client.records import Event, Operation

daemon_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="xtoold, the daemon: docs/daemon.md.",
)
#: How long a daemon that is asked to may take to end, seconds.
_STOP_TIME = 30.0


@daemon_app.command("run")
def run(
    socket: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Listen here.", show_default=False)
    ] = None,
    background: Annotated[bool, typer.Option("-b", "--background", help="Return when it listens.")] = False,
) -> int:
    """Be the daemon of this host, in the foreground, until Ctrl-C or SIGTERM.

    \b
    Examples:
      xtool daemon run
      xtool daemon run -b
    """
    if background:
        from xtool.client.start import start

        start(os.environ.get("XTOOL_CONNECT") or "xen:")
        return 0
    from xtool.client.start import ALREADY, lock_path
    from xtool.daemon.main import run as be_daemon

    code = be_daemon(os.environ.get("XTOOL_CONNECT") or "xen:", socket)
    if code == ALREADY:
        raise HostError(f"another xtoold runs: it holds {lock_path()}", hint="xtool daemon status")
    return code


@daemon_app.command("status")
def status(output: Output = "table") -> int:
    """Show how the daemon is. Ends with 1 when none runs; it is not started by this.

    \b
    Examples:
      xtool daemon status
      xtool daemon status -o json
    """
    client = daemon_client()
    if not _listens(client.path):
        emit({"running": False}, output, lambda: f"xtoold does not run (nobody listens on {client.path})")
        return 1
    found = client.status()
    client.close()
    rows = [(name.replace("_", " "), value) for name, value in plain(found).items() if name != "uptime"]
    shown = [("running", "yes"), ("socket", client.path), ("uptime", f"{found.uptime:.0f} s"), *rows]
    emit({"running": True, **plain(found)}, output, lambda: pairs(shown))
    return 0


@daemon_app.command("stop")
def stop() -> None:
    """End the daemon. Domains, and what operations are at, go on without it.

    \b
    Examples:
      xtool daemon stop
      xtool daemon stop && xtool daemon run -b
    """
    import signal

    client = daemon_client()
    if not _listens(client.path):
        note("xtoold does not run")
        return
    pid = client.status().pid
    client.close()
    try:
        handle = os.pidfd_open(pid)
        signal.pidfd_send_signal(handle, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError:
        raise HostError(f"xtoold (process {pid}) is another user's", hint="run as root") from None
    import select

    if not select.select([handle], [], [], _STOP_TIME)[0]:
        raise DeadlineError(f"xtoold (process {pid}) did not end within {_STOP_TIME:g} s")


@daemon_app.command("operations")
def operations(output: Output = "table") -> None:
    """List what the daemon is at, and what it did last.

    \b
    Examples:
      xtool daemon operations
      xtool daemon operations -o json
    """
    found = daemon_client().operations()
    emit(found, output, lambda: _operations(found))


@daemon_app.command("cancel")
def cancel(
    operation: Annotated[str, typer.Argument(metavar="ID", help="As `xtool daemon operations` lists it.")],
) -> None:
    """Interrupt an operation, as Ctrl-C would where it was begun: what it has begun is undone.

    \b
    Examples:
      xtool daemon cancel 3f2a1c-7
    """
    daemon_client().cancel(operation)


def events(
    domain: MaybeDomain = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="ID|TIME",
            help="Go on behind an event, or from 90s, 10m ago or an ISO time.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option(help="Wait for what is to come.")] = True,
    output: Output = "table",
) -> None:
    """Show what happens to the domains, as it happens; also to those of xl and libvirt.

    \b
    Examples:
      xtool events
      xtool events --since 10m --no-follow -o json web
    """  # fmt: skip
    from xtool.cli.attach import when

    begin, after = None, ""
    if since is not None:
        if "-" in since and since.rpartition("-")[2].isdecimal() and len(since.split("-")) == 2:
            after = since
        else:
            begin = when(since, time.time())
    for event in daemon_client().events(domain, after=after, since=begin, follow=follow):
        if output == "table":
            write(_event(event))
        elif output == "json":
            import json

            write(json.dumps(plain(event)))
        else:
            import yaml

            write("---\n" + yaml.safe_dump(plain(event), sort_keys=False).rstrip("\n"))


def _listens(path: str) -> bool:
    from xtool.client.start import connect

    link = connect(path)
    if link is not None:
        link.close()
    return link is not None


def _operations(found: list[Operation]) -> str:
    rows = [
        [o.id, o.method, o.subject, o.state, _time(o.created), o.error.detail if o.error else o.stage]
        for o in found
    ]
    return columns(["ID", "Verb", "Domain", "State", "Begun", "Stage"], rows)


def _event(event: Event) -> str:
    who = f"{escape(event.name)} (domain {event.domid})" if event.domid >= 0 else escape(event.name)
    details = " ".join(
        f"{name}={escape(str(value))}" for name, value in event.details.items() if value is not None
    )
    return "  ".join(part for part in (_time(event.time), event.kind, who, details) if part)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "milliseconds")
