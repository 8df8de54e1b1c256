"""Verbs that carry a domain file out, or judge it: create, check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.options import Output
from xtool.cli.output import MIB, columns, emit, escape
from xtool.config.problems import problems_of
from xtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xtool.errors import ConfigError
    from xtool.toolstack.api import CreateResult, DryRun, Span

File = Annotated[str, typer.Argument(metavar="FILE", help="The domain file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Put this in the file's place; may be repeated.",
        show_default=False,
    ),
]


VarsFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--vars-file", metavar="FILE", help="Variables for its jinja2; may be repeated.", show_default=False
    ),
]
Only = Annotated[
    str | None,
    typer.Option("--only", metavar="NAME", help="This domain of the file alone.", show_default=False),
]


def create(
    file: File,
    paused: Annotated[bool, typer.Option("-p", "--paused", help="Leave it paused.")] = False,
    console: Annotated[bool, typer.Option("-c", "--console", help="Attach to its console.")] = False,
    overrides: Overrides = None,
    vars_files: VarsFiles = None,
    only: Only = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build it in memory only, on any machine, and show the layout.")
    ] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Show what each stage took.")] = False,
    output: Output = "table",
) -> int:
    """Start the domain, or the domains, of a file.

    Those of a file with several documents are started in its order; what fails ends it, and leaves those
    already started running.

    \b
    Examples:
      xtool create configs/pvh.yaml -c
      xtool create web.yaml --set memory=2GiB --set 'disk[0].target=other.img'
    """
    if dry_run and (paused or console):
        raise UsageError("--dry-run starts nothing: it excludes -p and -c")
    if console and output != "table":
        raise UsageError("-c shows the console: it excludes -o")
    from xtool.config.load import Inputs, load_all, single

    loaded = load_all(file, Inputs(overrides or (), vars_files or ()), only)
    if dry_run or console:
        single(loaded)
    if dry_run:
        return _dry_run(loaded[0].config, output, timings)
    from xtool.cli.progress import progress
    from xtool.toolstack.api import CreateOptions

    options = CreateOptions(paused=paused or console)
    state = "paused" if paused else "running"
    results: list[CreateResult] = []
    with connect() as client:
        try:
            for one in loaded:
                with progress() as listener:
                    results.append(client.create(one.config, options, listener))
                if output == "table":
                    emit(None, output, lambda: _created(results[-1], state, timings))
        finally:
            if output != "table" and results:
                emit(results[0] if len(loaded) == 1 else results, output, str)
        if not console:
            return 0
        from xtool.cli.attach import follow_from_start

        result = results[0]
        return follow_from_start(client, result.domid, result.name, result.uuid, paused=paused)


def check(
    file: File,
    overrides: Overrides = None,
    vars_files: VarsFiles = None,
    only: Only = None,
    output: Output = "table",
) -> int:
    """Say whether a domain file is right; everything that is wrong with it if not.

    With -o json, what is wrong is a list too, each with file, line and column, for editors.

    \b
    Examples:
      xtool check web.yaml
      xtool check web.yaml -o json
    """
    from xtool.config.load import Inputs, load_all
    from xtool.errors import ConfigError

    try:
        loaded = load_all(file, Inputs(overrides or (), vars_files or ()), only)
    except ConfigError as error:
        if output == "table":
            raise
        emit({"problems": [_problem(each) for each in problems_of(error)]}, output, str)
        return error.exit_code
    plain = [one.config.to_dict() for one in loaded]
    emit(plain[0] if len(plain) == 1 else plain, output, lambda: "ok")
    return 0


def _problem(error: ConfigError) -> dict[str, object]:
    """One thing that is wrong, for an editor; lines and columns count from 1, 0 is unknown."""
    names = ("file", "line", "column", "key", "message", "hint", "source")
    return {name: getattr(error, name) for name in names}


def _created(result: CreateResult, state: str, timings: bool) -> str:
    text = (
        f"{escape(result.name)}: domain {result.domid}, {result.type}, {state}, "
        f"built in {result.build_time:.2f} s"
    )
    return f"{text}\n\n{spans(result.timings)}" if timings else text


def spans(timings: Sequence[Span]) -> str:
    """The stages as a table; times in milliseconds."""
    header = ["Stage", "Begin (ms)", "Took (ms)", "Hypercalls"]
    rows = [[s.name, f"{s.start * 1e3:.1f}", f"{s.duration * 1e3:.1f}", s.hypercalls] for s in timings]
    return columns(header, rows, header[1:])


def _dry_run(config: object, output: str, timings: bool) -> int:
    """Build against the fake host; whatever host this is, nothing of it is touched."""
    from xtool.config.model import DomainConfig
    from xtool.toolstack.local import open_client

    assert isinstance(config, DomainConfig)
    client = open_client("fake:")
    try:
        built = client.dry_run(config)
    finally:
        client.close()
    emit(built, output, lambda: _layout(built, timings))
    return 0


def _layout(built: DryRun, timings: bool) -> str:
    parts = [
        f"{escape(built.name)}: {built.type}, {built.memory // MIB} MiB, entry {built.entry:#x}, "
        f"{built.pages_populated} pages populated, {built.page_table_pages} of them page tables",
        columns(
            ["Region", "Start", "End", "Virtual", "Note"],
            [
                [
                    r.name,
                    f"{r.start:#x}",
                    f"{r.start + r.size:#x}",
                    "" if r.virtual is None else f"{r.virtual:#x}",
                    r.note,
                ]
                for r in built.regions
            ],
            ["Start", "End", "Virtual"],
        ),
    ]
    if built.e820:
        rows = [[kind, f"{start:#x}", f"{start + size:#x}"] for start, size, kind in built.e820]
        parts.append(columns(["Memory map", "Start", "End"], rows, ["Start", "End"]))
    if built.devicemodel_argv:
        parts.append("Device model:\n  " + escape(" ".join(built.devicemodel_argv)))
    if built.notes:
        parts.append("\n".join(f"{escape(name)}: {escape(text)}" for name, text in built.notes.items()))
    if timings:
        parts.append(spans(built.timings))
    return "\n\n".join(parts)
