"""Verbs that carry a domain file out, or judge it: create, check."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect, libvirt_uri
from xtool.cli.options import Output
from xtool.cli.output import MIB, columns, emit, escape, note
from xtool.config.problems import problems_of, raise_problems
from xtool.errors import ConfigError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xtool.config.load import Loaded
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
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write down every hypercall, xenstore request and the like, as JSON for Perfetto.",
            show_default=False,
        ),
    ] = None,
    trace_format: Annotated[
        str,
        typer.Option(
            metavar="chrome|otlp", help="Without it, by the name: FILE.otlp is OTLP.", show_default=False
        ),
    ] = "",
    trace_wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="How long to wait for the guest's first byte and packet.", min=0
        ),
    ] = 30.0,
) -> int:
    """Start the domain, or the domains, of a file.

    Those of a file with several documents are started in its order; what fails ends it, and leaves those
    already started running.

    \b
    Examples:
      xtool create configs/pvh.yaml -c
      xtool create web.yaml --set memory=2GiB --trace web.json
    """
    if trace_format and trace is None:
        raise UsageError("--trace-format is for --trace FILE")
    if trace is not None:
        from xtool.toolstack.traceformat import format_of

        trace_format = format_of(trace, trace_format)
        if dry_run:
            raise UsageError("--dry-run starts nothing that could be traced")
    if dry_run and (paused or console):
        raise UsageError("--dry-run starts nothing: it excludes -p and -c")
    if console and output != "table":
        raise UsageError("-c shows the console: it excludes -o")
    from xtool.config.load import Inputs, load_all, single

    loaded = load_all(file, Inputs(overrides or (), vars_files or ()), only)
    if dry_run or console:
        single(loaded)
    if trace is not None and len(loaded) > 1:
        names = ", ".join(escape(one.config.name) for one in loaded)
        raise UsageError(
            f"--trace is for one domain, {file} has {len(loaded)}: {names}",
            hint="choose one with --only NAME",
        )
    if dry_run and libvirt_uri():
        raise UnsupportedError(
            "xtool create --dry-run needs Xen's own driver: libvirt builds nothing before it starts it",
            hint="xtool config export shows the XML, xtool check whether the driver can honour the file",
        )
    if dry_run:
        return _dry_run(loaded[0].config, output, timings)
    from xtool.cli.progress import progress
    from xtool.toolstack.api import CreateOptions

    _driver_can(loaded)  # before the first of several is started
    options = CreateOptions(paused=paused or console, trace=None if trace is None else trace_wait)
    state = "paused" if paused else "running"
    results: list[CreateResult] = []
    with connect() as client:
        try:
            for one in loaded:
                try:
                    with progress() as listener:
                        result = client.create(one.config, options, listener)
                except ConfigError as error:  # the driver cannot honour something: show where it stands
                    raise one.place(error) from None
                if trace is not None:
                    _write_trace(result, trace, trace_format)
                    result = replace(result, trace=())
                results.append(result)
                if one.config.vnc:
                    words = "it has the password of the domain file; " if one.config.vncpasswd else ""
                    note(f"{words}xtool vncviewer {escape(result.name)} shows its display")
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


def _driver_can(loaded: Sequence[Loaded]) -> None:
    """Raises all that libvirt's driver, if one was chosen, cannot honour, each with its place."""
    if not libvirt_uri():
        return
    from xtool.drivers.libvirt import check_config

    refused: list[ConfigError] = []
    for one in loaded:
        try:
            check_config(one.config, libvirt_uri())
        except ConfigError as error:
            refused += problems_of(one.place(error))
    raise_problems(refused)


def _write_trace(result: CreateResult, file: str, form: str) -> None:
    from xtool.toolstack.traceformat import render

    try:
        with open(file, "w") as out:
            out.write(render(result.trace, form))
    except OSError as error:
        note(f"{escape(result.name)} was created; its trace cannot be written: {file}: {error.strerror}")


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
      xtool -H qemu: check web.yaml -o json
    """
    from xtool.config.load import Inputs, load_all

    try:
        loaded = load_all(file, Inputs(overrides or (), vars_files or ()), only)
        _driver_can(loaded)
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
