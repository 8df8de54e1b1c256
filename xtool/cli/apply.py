"""Domain files and what runs: plan, diff, apply."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xtool.cli.client import connect, placed, shared
from xtool.cli.create import Overrides, VarsFiles
from xtool.cli.options import Domain, Output
from xtool.cli.output import emit, escape, note
from xtool.errors import UsageError

if TYPE_CHECKING:
    from xtool.apply.records import DomainChange, Plan

#: There is something to change, or something was changed.
CHANGED = 20
Paths = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="Domain files, or folders of them.", show_default=False),
]
Prune = Annotated[
    bool, typer.Option("--prune", help="End what an earlier apply made and these paths no longer have.")
]
_SIGNS = {"create": "+", "update": "~", "recreate": "!", "destroy": "-", "conflict": "?", "unchanged": " "}
_COLOURS = {"create": 32, "update": 33, "recreate": 35, "destroy": 31, "conflict": 31}


def plan(
    paths: Paths,
    overrides: Overrides = None,
    vars_files: VarsFiles = None,
    prune: Prune = False,
    output: Output = "table",
) -> int:
    """Say what apply would do: what differs, and whether it changes live, at the next reboot or by re-creation.

    Ends with 0 when there is nothing to do, with 20 when there is.

    \b
    Examples:
      xtool plan site/
      xtool plan web.yaml db.yaml -o json
    """  # noqa: E501
    from xtool.apply.described import read
    from xtool.apply.planning import make_plan
    from xtool.config.load import Inputs

    described = placed(read(paths, Inputs(overrides or (), vars_files or ())), send=False)
    with connect() as client:
        found = make_plan(client, described, paths, prune=prune)
    emit(found, output, lambda: shown(found))
    return CHANGED if found.changed else 0


def diff(
    domain: Domain,
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="Without: the file apply made it from.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    vars_files: VarsFiles = None,
    output: Output = "table",
) -> int:
    """Say how a running domain differs from its file. Ends with 0 when it does not, with 20 when it does.

    \b
    Examples:
      xtool diff web web.yaml
      xtool diff web -o json
    """
    from xtool.apply.described import read, source_of
    from xtool.apply.planning import make_plan
    from xtool.apply.planning import whole as counted
    from xtool.config.load import Inputs

    with connect() as client:
        [info] = client.config(domain)
        if file is None:
            file = info.source.partition(":")[2]
            if not file or source_of(file) != info.source:
                raise UsageError(
                    f"{info.name}: no file of this machine is known for it",
                    hint=f"xtool diff {info.name} FILE",
                )
        described = placed(read([file], Inputs(overrides or (), vars_files or ())), send=False)
        if all(one.name != info.name for one in described):
            raise UsageError(f"{file} describes no domain {info.name}")
        whole = make_plan(client, described)
    found = counted([one for one in whole.domains if one.name == info.name])
    emit(found, output, lambda: shown(found))
    return CHANGED if found.changed else 0


def apply(
    paths: Paths,
    overrides: Overrides = None,
    vars_files: VarsFiles = None,
    prune: Prune = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask before guests are lost.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="End a guest that does not shut down in time.")
    ] = False,
    deadline: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a guest may take to shut down.", min=0)
    ] = 60.0,
    wait: Annotated[
        str | None,
        typer.Option(
            "--wait", metavar="healthy", help="Wait until what was changed is ready.", show_default=False
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("-j", "--jobs", metavar="N", help="How many domains at a time.", min=1)
    ] = 4,
    detailed: Annotated[
        bool, typer.Option("--detailed-exitcode", help="End with 20 when something was changed.")
    ] = False,
    output: Output = "table",
) -> int:
    """Make what runs what the files say: create what is missing, change what differs, what others need first.

    Domains that do not depend on each other are brought there at the same time, --jobs of them.

    What is re-created or ended loses what it runs: it is told before, and wants a yes. A second run changes
    nothing; one that was interrupted is finished by the next.

    \b
    Examples:
      xtool apply site/
      xtool apply site/ --prune --yes --wait healthy
      xtool apply site/ --jobs 8
    """
    if wait not in (None, "healthy"):
        raise UsageError(f"--wait {wait}: it is healthy")
    from xtool.apply.carry import Manner
    from xtool.apply.children import Children
    from xtool.apply.described import read
    from xtool.apply.planning import make_plan
    from xtool.apply.records import CONFLICT, UNCHANGED
    from xtool.apply.run import InTurn, carry_out
    from xtool.cli.progress import LineProgress, progress
    from xtool.config.load import Inputs

    described = placed(read(paths, Inputs(overrides or (), vars_files or ())), send=False)
    by_name = {one.name: one for one in described}
    manner = Manner(deadline, force, wait == "healthy")
    done: Plan | None = None
    with connect() as client:
        found = make_plan(client, described, paths, prune=prune)
        lost = [one for one in found.domains if one.action in ("recreate", "destroy")]
        if lost and not yes:
            _consent(found, lost)
        changing = {one.name for one in found.domains if one.action not in (UNCHANGED, CONFLICT)}
        placed([one for one in described if one.name in changing], send=True)
        if not shared(client):
            with progress() as listener:
                done = carry_out(found, by_name, InTurn(client, manner, listener), listener)
    if done is None:  # this client is closed: each step has its own
        lines = LineProgress(sys.stderr)
        done = carry_out(found, by_name, Children(connect, manner, lines, jobs), lines)
    emit(done, output, lambda: shown(done))
    for one in done.domains:
        if one.error is not None and output == "table":
            note(f"error: {escape(one.name)}: {escape(one.error.message)}")
            if one.error.hint:
                note(f"hint: {escape(one.error.hint)}")
    failed = [one.error.exit_code for one in done.domains if one.error is not None]
    if failed:
        return failed[0]
    return CHANGED if detailed and done.changed else 0


def _consent(found: Plan, lost: Sequence[DomainChange]) -> None:
    names = ", ".join(escape(one.name) for one in lost)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"this ends running guests: {names}", hint="xtool plan shows why; --yes does it")
    note(shown(found))
    typer.confirm(f"End {names}, and lose what they run?", abort=True, err=True)


def shown(found: Plan) -> str:
    """For people: a line a domain and one for each key; coloured on a terminal."""
    lines = [line for one in found.domains for line in _lines(one)]
    count = ", ".join(f"{number} {action}" for action, number in found.summary.items())
    return "\n".join([*lines, count or "nothing is described"])


def _lines(one: DomainChange) -> list[str]:
    head = f"{_SIGNS[one.action]} {escape(one.name)}: {one.result or one.action}"
    if one.why:
        head += f" ({escape(one.why)})"
    if one.waiting:
        head += f" (waits for a reboot: {', '.join(map(escape, one.waiting))})"
    if sys.stdout.isatty() and one.action in _COLOURS:
        head = f"\033[{_COLOURS[one.action]}m{head}\033[0m"
    return [
        head,
        *(
            f"    {escape(c.key)}: {_value(c.before)} -> {_value(c.after)}  [{c.when}: {escape(c.why)}]"
            for c in one.changes
        ),
    ]


def _value(value: Any) -> str:
    return "-" if value is None else escape(value if isinstance(value, str) else json.dumps(value))
