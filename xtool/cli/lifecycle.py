"""Verbs that change a running domain: pause, unpause, shutdown, reboot, destroy; and gc."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.options import Domain, MaybeDomain, Output
from xtool.cli.output import emit, escape, note
from xtool.errors import DomainNotFoundError, UsageError

if TYPE_CHECKING:
    from xtool.toolstack.api import Client, LifecycleResult

Wait = Annotated[bool, typer.Option("-w", "--wait", help="Return when it has happened.")]
Fallback = Annotated[
    bool, typer.Option("-F", "--fallback", help="If the guest has no PV driver, press its ACPI button.")
]
Everyone = Annotated[bool, typer.Option("-a", "--all", help="Every domain that xtool created.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait, with -w.", min=0)]


def pause(domain: Domain, output: Output = "table") -> None:
    """Stop a domain's vCPUs; its memory and devices stay.

    \b
    Examples:
      xtool pause web
      xtool pause 3
    """
    _each(lambda client: [client.pause(domain)], output)


def unpause(domain: Domain, output: Output = "table") -> None:
    """Let a paused domain run.

    \b
    Examples:
      xtool unpause web
      xtool unpause 3
    """
    _each(lambda client: [client.unpause(domain)], output)


def destroy(domain: Domain, output: Output = "table") -> None:
    """End a domain at once, as pulling the plug would, and remove all that belongs to it.

    \b
    Examples:
      xtool destroy web
      xtool destroy 3 -o json
    """
    _each(lambda client: [client.destroy(domain)], output)


def shutdown(
    domain: MaybeDomain = None,
    wait: Wait = False,
    fallback: Fallback = False,
    everyone: Everyone = False,
    timeout: Timeout = 600.0,
    output: Output = "table",
) -> None:
    """Ask a domain to power off. Without -w, this returns when it has been asked.

    \b
    Examples:
      xtool shutdown -w web
      xtool shutdown -a -w --timeout 120
    """
    _one_or_all("shutdown", domain, everyone)
    _each(lambda client: _ask(client, "shutdown", domain, everyone, wait, fallback, timeout), output)


def reboot(
    domain: MaybeDomain = None,
    wait: Wait = False,
    fallback: Fallback = False,
    everyone: Everyone = False,
    timeout: Timeout = 600.0,
    output: Output = "table",
) -> None:
    """Ask a domain to reboot. Without -w, this returns when it has been asked.

    \b
    Examples:
      xtool reboot web
      xtool reboot -w -F windows
    """
    _one_or_all("reboot", domain, everyone)
    _each(lambda client: _ask(client, "reboot", domain, everyone, wait, fallback, timeout), output)


def gc(output: Output = "table") -> None:
    """Remove what creations left behind that were killed half way. Safe at any time.

    \b
    Examples:
      xtool gc
      xtool gc -o json
    """
    with connect() as client:
        done = client.gc()
    emit(done, output, lambda: _lines(done) or "nothing was left behind")


def _ask(
    client: Client, verb: str, domain: str | None, everyone: bool, wait: bool, fallback: bool, timeout: float
) -> list[LifecycleResult]:
    def ask(name: str, wait: bool) -> LifecycleResult:
        verbs = {"shutdown": client.shutdown, "reboot": client.reboot}
        return verbs[verb](name, wait=wait, acpi_fallback=fallback, deadline=timeout)

    if domain is not None:
        return [ask(domain, wait)]
    results = []
    guests = [guest for guest in client.list() if guest.domid != 0]
    for guest in guests:
        if guest.managed:
            results.append(ask(str(guest.domid), False))
        else:
            note(f"{escape(guest.name)} was not created by xtool: left alone")
    if not wait:
        return results
    waited = []
    for result in results:  # all have been asked by now, so they go down side by side
        try:
            waited.append(ask(str(result.domid), True))
        except DomainNotFoundError:
            waited.append(result)
    return waited


def _one_or_all(verb: str, domain: str | None, everyone: bool) -> None:
    if everyone == (domain is not None):
        raise UsageError(f"{verb} wants a domain, or -a", hint=f"as in: xtool {verb} -w web")


def _each(work: Callable[[Client], list[LifecycleResult]], output: str) -> None:
    with connect() as client:
        results = work(client)
    emit(results, output, lambda: _lines(results))


def _lines(results: list[LifecycleResult]) -> str:
    return "\n".join(describe(result) for result in results)


def describe(result: LifecycleResult) -> str:
    """``web (domain 3): restarted as domain 4``."""
    name = f"{escape(result.name)} (domain {result.domid})" if result.name else f"domain {result.domid}"
    renewed = f" as domain {result.new_domid}" if result.new_domid is not None else ""
    return f"{name}: {result.action}{renewed}"
