"""``xtool doctor``: what was left behind on the host, found by comparing two moments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.options import Output
from xtool.cli.output import columns, emit, note
from xtool.errors import HostError, UsageError

if TYPE_CHECKING:
    from xtool.toolstack.leaks import HostSnapshot

doctor_app = typer.Typer(
    help="Find out what was left behind on the host.",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@doctor_app.command()
def snapshot(
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help="Where to; - is standard output.", show_default=False)
    ] = "-",
) -> None:
    """Write down what the host holds: domains, memory, event channels, grants, xenstore, processes, files.

    examples:

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

    examples:

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
