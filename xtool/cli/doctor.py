"""``xtool doctor``: is this host fit to run guests; and what was left behind, by comparing two moments."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.options import Output
from xtool.cli.output import columns, emit, escape, note
from xtool.errors import HostError, UsageError, XtoolError

if TYPE_CHECKING:
    from xtool.toolstack.everydayrecords import CheckResult
    from xtool.toolstack.fitness import Look
    from xtool.toolstack.leaks import HostSnapshot

doctor_app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@doctor_app.callback(invoke_without_command=True)
def doctor(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only what is not well.")] = False,
    output: Output = "table",
) -> None:
    """Say whether this host is fit to run guests, and what to do about each thing that is not.

    The exit status is 1 if anything failed; warnings are no failure.

    \b
    Examples:
      xtool doctor
      xtool doctor -q -o json
    """
    if context.invoked_subcommand is not None:
        return
    from xtool.toolstack.fitness import diagnose, worst

    look = _look()
    try:
        results = diagnose(look)
    finally:
        if look.host is not None:
            look.host.close()
    shown = [r for r in results if not quiet or r.status in ("warn", "fail")]
    emit(shown, output, lambda: _checks(shown) or "all is well")
    if worst(results) == "fail":
        raise typer.Exit(1)


def _look() -> Look:
    from xtool.toolstack.fitness import Look
    from xtool.toolstack.host import open_host

    try:
        return Look(host=open_host(os.environ.get("XTOOL_CONNECT") or "xen:"))
    except XtoolError as error:
        return Look(trouble=error)


def _checks(results: list[CheckResult]) -> str:
    lines = []
    width = max((len(r.name) for r in results), default=0)
    for r in results:
        lines.append(f"{r.status:<4}  {r.name:<{width}}  {escape(r.found)}")
        lines += [
            f"{'':<4}  {'':<{width}}  {text}" for text in (r.why, f"do: {r.do}" if r.do else "") if text
        ]
    return "\n".join(lines)


@doctor_app.command()
def snapshot(
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help="Where to; - is standard output.", show_default=False)
    ] = "-",
) -> None:
    """Write down what the host holds: domains, memory, event channels, grants, xenstore, processes, files.

    \b
    Examples:
      xtool doctor snapshot before.json
      xtool -H lab doctor snapshot > before.json
    """
    taken = _take()
    for probe, why in taken.missing.items():
        note(f"not looked at: {probe}: {why}")
    if file == "-":
        print(taken.to_json())
        return
    try:
        Path(file).write_text(taken.to_json() + "\n")
    except OSError as error:
        raise HostError(f"cannot write {file}: {error.strerror}") from None


@doctor_app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="FILE", help="A snapshot; - is standard input.")],
    after: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A later one; without it, now.", show_default=False)
    ] = None,
    output: Output = "table",
) -> None:
    """Show what is different; exit status 1 when something was left behind.

    \b
    Examples:
      xtool doctor diff before.json
      xtool doctor diff before.json after.json -o json
    """
    from xtool.toolstack import leaks

    old = _load(before)
    new = _take() if after is None else _load(after)
    found = leaks.diff(old, new)
    for probe, why in leaks.incomparable(old, new).items():
        note(f"not compared: {probe}: {why}")

    def table() -> str:
        if not found:
            return "Nothing was left behind."
        rows = [(leak.probe, leak.kind, leak.key, leak.before, leak.after) for leak in found]
        return columns(("Where", "Change", "What", "Before", "After"), rows)

    emit(found, output, table)
    if found:
        raise typer.Exit(1)


def _take() -> HostSnapshot:
    from xtool.toolstack.host import open_host
    from xtool.toolstack.leaks import snapshot as take

    host = open_host()
    try:
        return take(host)
    finally:
        host.close()


def _load(file: str) -> HostSnapshot:
    from xtool.toolstack.leaks import HostSnapshot

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the snapshot {file}: {error}") from None
    return HostSnapshot.from_json(text, file)
