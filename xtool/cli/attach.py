"""The console verb, and ``create -c``: attach, and see to the domain when its console ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
        return follow(client, client.console(str(found[0].domid), kind), found[0].uuid)


def follow(client: Client, target: ConsoleTarget, uuid: str) -> int:
    """Attach to ``target``; when the domain ends, carry out its action, and stay with it over reboots.

    Returns the exit code.
    """
    from xtool.cli.console import attach

    while True:
        code = attach(target)
        settled = client.settle(target.domid, uuid)
        if settled is None:
            return code
        note(describe(settled))
        if settled.new_domid is None:
            return code
        target = client.console(str(settled.new_domid), target.kind)


def follow_from_start(client: Client, domid: int, name: str, uuid: str, *, paused: bool) -> int:
    """Attach to a domain that was created paused, then let it run, so that its first line is seen.

    With ``paused`` it stays paused. If its console cannot be had, the domain runs and the error goes on.
    """
    try:
        target = client.console(str(domid))
    except XtoolError:
        if not paused:
            client.unpause(str(domid))
            note(f"{escape(name)} runs, without its console")
        raise
    with _held_open(target.tty):
        if not paused:
            client.unpause(str(domid))
        return follow(client, target, uuid)


@contextmanager
def _held_open(tty: str) -> Iterator[None]:
    """Keep the terminal open, so that nothing the guest prints before ``attach`` reads is dropped."""
    try:
        fd = os.open(tty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield  # attach will say what is wrong with it
        return
    try:
        yield
    finally:
        os.close(fd)
