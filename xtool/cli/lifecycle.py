"""Verbs that change running domains: pause, unpause, shutdown, reboot, destroy. Each takes several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.options import Domains, MaybeDomains, Output
from xtool.cli.output import emit, escape, note
from xtool.errors import DeadlineError, DomainError, DomainNotFoundError, UsageError, XtoolError

if TYPE_CHECKING:
    from xtool.toolstack.api import Client, LifecycleResult

Wait = Annotated[bool, typer.Option("-w", "--wait", help="Return when it has happened.")]
Fallback = Annotated[
    bool, typer.Option("-F", "--fallback", help="If the guest has no PV driver, press its ACPI button.")
]
Everyone = Annotated[bool, typer.Option("-a", "--all", help="Every domain that xtool created.")]
Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", help="How long to wait, with -w or -f, for all together.", min=0)
]
Force = Annotated[
    bool, typer.Option("-f", "--force", help="Wait, and destroy what has not shut down in time.")
]


def pause(domains: MaybeDomains = None, everyone: Everyone = False, output: Output = "table") -> int:
    """Stop domains' vCPUs; their memory and devices stay.

    \b
    Examples:
      xtool pause web
      xtool pause web db
    """
    return _each("pause", domains, everyone, lambda client, name: client.pause(name), output)


def unpause(domains: MaybeDomains = None, everyone: Everyone = False, output: Output = "table") -> int:
    """Let paused domains run.

    \b
    Examples:
      xtool unpause web
      xtool unpause --all
    """
    return _each("unpause", domains, everyone, lambda client, name: client.unpause(name), output)


def destroy(domains: Domains, output: Output = "table") -> int:
    """End domains at once, as pulling the plug would, and remove all that belongs to them.

    \b
    Examples:
      xtool destroy web
      xtool destroy 3 4 -o json
    """
    return _each("destroy", domains, False, lambda client, name: client.destroy(name), output)


def shutdown(
    domains: MaybeDomains = None,
    wait: Wait = False,
    fallback: Fallback = False,
    everyone: Everyone = False,
    force: Force = False,
    timeout: Timeout = 600.0,
    output: Output = "table",
) -> int:
    """Ask domains to power off. Without -w or -f, this returns when they have been asked.

    \b
    Examples:
      xtool shutdown -w web db
      xtool shutdown -a --force --timeout 120
    """
    return _ask_each("shutdown", domains, everyone, wait or force, fallback, force, timeout, output)


def reboot(
    domains: MaybeDomains = None,
    wait: Wait = False,
    fallback: Fallback = False,
    everyone: Everyone = False,
    timeout: Timeout = 600.0,
    output: Output = "table",
) -> int:
    """Ask domains to reboot. Without -w, this returns when they have been asked.

    \b
    Examples:
      xtool reboot web
      xtool reboot -w -F windows
    """
    return _ask_each("reboot", domains, everyone, wait, fallback, False, timeout, output)


class _Several:
    """One after another; a domain that fails stops none of the others."""

    def __init__(self, names: list[str]) -> None:
        self._alone = len(names) == 1
        self.names = names
        self.results: dict[str, LifecycleResult] = {}
        self.code = 0

    def run(self, names: Iterable[str], act: Callable[[str], LifecycleResult]) -> None:
        for name in names:
            try:
                self.results[name] = act(name)
            except XtoolError as error:
                if self._alone:
                    raise
                from xtool.cli.report import report

                self.results.pop(name, None)
                report(error)
                self.code = self.code or error.exit_code

    def print(self, output: str) -> int:
        done = [self.results[name] for name in self.names if name in self.results]
        emit(done, output, lambda: _lines(done))
        return self.code


def _each(
    verb: str,
    domains: list[str] | None,
    everyone: bool,
    act: Callable[[Client, str], LifecycleResult],
    output: str,
) -> int:
    _some_or_all(verb, domains, everyone)
    with connect() as client:
        several = _Several(_chosen(client, domains))
        several.run(several.names, lambda name: act(client, name))
    return several.print(output)


def _ask_each(
    verb: str,
    domains: list[str] | None,
    everyone: bool,
    wait: bool,
    fallback: bool,
    force: bool,
    timeout: float,
    output: str,
) -> int:
    _some_or_all(verb, domains, everyone)
    end = monotonic() + timeout
    with connect() as client:
        verbs = {"shutdown": client.shutdown, "reboot": client.reboot}

        def ask(name: str, wait: bool) -> LifecycleResult:
            left = max(0.0, end - monotonic()) if several.results else timeout
            try:
                return verbs[verb](name, wait=wait, acpi_fallback=fallback, deadline=left)
            except (DeadlineError, DomainError) as error:
                if not force or isinstance(error, DomainNotFoundError):
                    raise
                note(f"{escape(error.message)}: destroyed")
                return client.destroy(name)

        def await_it(name: str) -> LifecycleResult:
            asked = several.results[name]
            if asked.action != "requested":
                return asked
            try:
                return ask(str(asked.domid), True)
            except DomainNotFoundError:
                return asked

        several = _Several(_chosen(client, domains))
        alone = len(several.names) == 1 and domains is not None
        several.run(several.names, lambda name: ask(name, wait and alone))
        if wait and not alone:  # all have been asked by now, so they go down side by side
            several.run(list(several.results), await_it)
    return several.print(output)


def _chosen(client: Client, domains: list[str] | None) -> list[str]:
    if domains:
        return list(dict.fromkeys(domains))
    chosen = []
    for guest in client.list():
        if guest.domid and guest.managed:
            chosen.append(str(guest.domid))
        elif guest.domid:
            note(f"{escape(guest.name)} was not created by xtool: left alone")
    return chosen


def _some_or_all(verb: str, domains: list[str] | None, everyone: bool) -> None:
    if everyone == bool(domains):
        raise UsageError(f"{verb} wants a domain, or -a", hint=f"as in: xtool {verb} web")


def _lines(results: list[LifecycleResult]) -> str:
    return "\n".join(describe(result) for result in results)


def describe(result: LifecycleResult) -> str:
    """``web (domain 3): restarted as domain 4``."""
    name = f"{escape(result.name)} (domain {result.domid})" if result.name else f"domain {result.domid}"
    renewed = f" as domain {result.new_domid}" if result.new_domid is not None else ""
    return f"{name}: {result.action}{renewed}"
