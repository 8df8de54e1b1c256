"""The console verb, and ``create -c``: attach, and see to the domain when its console ends."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.lifecycle import describe
from xtool.cli.options import Domain
from xtool.cli.output import escape, note
from xtool.errors import DomainNotFoundError, UsageError, XtoolError

if TYPE_CHECKING:
    from xtool.toolstack.api import Client, ConsoleTarget

KINDS = ("pv", "serial")


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
) -> int:
    """Attach to a domain's console. Ctrl-] leaves it; the domain goes on.

    \b
    Examples:
      xtool console web
      xtool console -t serial windows
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"unknown console type {kind!r}", hint=f"it is {' or '.join(KINDS)}")
    with connect() as client:
        found = client.list(domain)
        if not found:
            raise DomainNotFoundError(f"there is no domain {domain}", hint="xtool list shows those there are")
        target = client.console(str(found[0].domid), kind)
        return follow(client, target, found[0].uuid, timeout=timeout)


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
        target = client.console(str(settled.new_domid), target.kind)


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
        held.callback(os.close, open_tty(target.tty))
        if not paused:
            client.unpause(str(domid))
        return follow(client, target, uuid)
