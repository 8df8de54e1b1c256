"""The console verb, and ``create -c``: attach, and see to the domain when its console ends."""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.lifecycle import describe
from xtool.cli.options import Domain
from xtool.cli.output import escape, escape_lines, note, write
from xtool.errors import DomainNotFoundError, UsageError, XtoolError

if TYPE_CHECKING:
    from xtool.toolstack.api import Client, ConsoleTarget

KINDS = ("pv", "serial")
#: A line that does not end is broken here, characters.
_LINE_MAX = 8192


def console(
    domain: Domain,
    kind: Annotated[
        str | None,
        typer.Option("-t", "--type", metavar="pv|serial", help="Which console.", show_default=False),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Leave by itself after so long.", show_default=False),
    ] = None,
    number: Annotated[
        int, typer.Option("-n", "--number", metavar="N", help="A channel: 1 and on.", min=0)
    ] = 0,
    log: Annotated[bool, typer.Option("--log", help="Print what was kept, with times, and end.")] = False,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="With --log: 90s, 10m, 2h, 1d ago, or an ISO time.", show_default=False
        ),
    ] = None,
) -> int:
    """Attach to a domain's console. Ctrl-] leaves it; the domain goes on.

    \b
    Examples:
      xtool console web
      xtool console --log --since 10m web
    """
    if since is not None and not log:
        raise UsageError("--since is for --log")
    if log:
        moment = when(since, time.time()) if since else 0.0
        with connect() as client:
            return print_log(client, domain, number, moment)
    if kind is not None and kind not in KINDS:
        raise UsageError(f"unknown console type {kind!r}", hint=f"it is {' or '.join(KINDS)}")
    with connect() as client:
        found = client.list(domain)
        if not found:
            raise DomainNotFoundError(f"there is no domain {domain}", hint="xtool list shows those there are")
        target = client.console(str(found[0].domid), kind, number=number)
        return follow(client, target, found[0].uuid, timeout=timeout)


def when(text: str, now: float) -> float:
    """``10m`` or an ISO time as seconds since the epoch. Raises ``UsageError``."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if match:
        return now - int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(f"{text!r} is no time", hint="as in 90s, 10m, 2h, 1d or 2024-05-01T12:00") from None


def print_log(client: Client, domain: str, number: int, since: float) -> int:
    """Line by line, each with the time at which it began; whatever could steer a terminal is escaped."""
    begun, line = 0.0, ""

    def flush() -> None:
        nonlocal line
        if line:
            stamp = datetime.fromtimestamp(begun).isoformat(" ", "milliseconds")
            write(f"{stamp}  {escape_lines(line.rstrip(chr(13)))}")
        line = ""

    for record in client.console_log(domain, number, since):
        if record.boot or record.skipped:
            flush()
            begun = record.time
            line = "-- connected --" if record.boot else f"-- {record.skipped} bytes were not kept --"
            flush()
            continue
        # Not splitlines: what else it takes for the end of a line is the guest's to print.
        *whole, rest = record.text.split("\n")
        for text in whole:
            begun = begun if line else record.time
            line = (line + text) or " "
            flush()
        if rest:
            begun = begun if line else record.time
            line += rest
            if len(line) > _LINE_MAX:
                flush()
    flush()
    return 0


def follow(client: Client, target: ConsoleTarget, uuid: str, *, timeout: float | None = None) -> int:
    """Attach to ``target``; when the domain ends, carry out its action, and stay with it over reboots.

    Nobody else does so while there is no daemon: a domain that has shut down keeps its console open until
    somebody acts. Returns the exit code.
    """
    from xtool.cli.console import attach

    end = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if end is None else max(end - time.monotonic(), 0.0)
        code = attach(target, timeout=left, is_alive=partial(_runs, client, target.domid, uuid))
        settled = client.settle(target.domid, uuid)
        if settled is None:
            return code
        note(describe(settled))
        if settled.new_domid is None:
            return code
        target = client.console(str(settled.new_domid), target.kind, number=target.number)


def _runs(client: Client, domid: int, uuid: str) -> bool:
    """The domain is there, and has not shut down."""
    try:
        found = client.list(str(domid))
    except DomainNotFoundError:
        return False
    return any(d.uuid == uuid and d.state not in ("shutdown", "crashed", "dying") for d in found)


def follow_from_start(client: Client, domid: int, name: str, uuid: str, *, paused: bool) -> int:
    """Attach to a domain that was created paused, then let it run, so that its first line is seen.

    With ``paused`` it stays paused. If its console cannot be had, the domain runs and the error goes on.
    """
    from xtool.devices.console import open_tty

    try:
        target = client.console(str(domid))
    except XtoolError:
        if not paused:
            client.unpause(str(domid))
            note(f"{escape(name)} runs, without its console")
        raise
    with ExitStack() as held:
        # Opened before the guest runs and until the end, so that nothing it prints is dropped.
        if not target.socket and not target.via:  # else it is kept for us
            held.callback(os.close, open_tty(target.tty))
        if not paused:
            client.unpause(str(domid))
        return follow(client, target, uuid)
