"""Verbs around domain files that touch no host: explain, schema, convert."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.create import File, Only, Overrides, VarsFiles
from xtool.cli.options import Output
from xtool.cli.output import columns, emit, escape, escape_lines, note, pairs
from xtool.errors import UsageError

if TYPE_CHECKING:
    from xtool.config.explain import Explained

_WIDE = 60


def explain(
    file: File,
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="This key alone.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    vars_files: VarsFiles = None,
    only: Only = None,
    everything: Annotated[
        bool, typer.Option("-a", "--all", help="Also the keys that are at their built-in values.")
    ] = False,
    output: Output = "table",
) -> None:
    """Say where each value of a domain file comes from, and what it does.

    \b
    Examples:
      xtool explain web.yaml
      xtool explain web.yaml memory
    """
    from xtool.config.explain import explain as explained
    from xtool.config.load import Inputs, load_all

    loaded = load_all(file, Inputs(overrides or (), vars_files or ()), only)
    found = {one.config.name: explained(one, key, everything=everything) for one in loaded}
    if output == "table":
        tables = [_table(keys, key is not None) for keys in found.values()]
        titles = [f"{escape(name)}:\n" if len(found) > 1 else "" for name in found]
        text = "\n\n".join(title + table for title, table in zip(titles, tables, strict=True))
        emit(None, output, lambda: text)
    else:
        emit(found if len(found) > 1 else next(iter(found.values())), output, str)


def _table(keys: list[Explained], alone: bool) -> str:
    if not alone:
        listed = [[each.key, _short(_value(each)), each.origin] for each in keys]
        return columns(["Key", "Value", "From"], listed)
    each = keys[0]
    rows: list[tuple[str, str]] = [
        ("key", each.key),
        ("value", _short(_value(each), 1000)),
        ("from", each.origin),
    ]
    rows += [("instead of", text) for text in each.replaced]
    guests = ", ".join(each.guests)
    rows += [("meaning", each.meaning), ("default", each.default), ("guests", guests)]
    return pairs((name, text) for name, text in rows if text)


def _value(each: Explained) -> object:
    """What is not given shows as what happens then."""
    return each.default if each.value is None or each.value == [] else each.value


def _short(value: object, width: int = _WIDE) -> str:
    if isinstance(value, (list, dict)):
        import json

        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def schema(
    template: Annotated[
        bool, typer.Option("--template", help="For files that others extend: nothing is required.")
    ] = False,
) -> None:
    """Print the JSON Schema of domain files, for editors.

    A first line "# yaml-language-server: $schema=xtool.schema.json" makes an editor complete and check keys.

    \b
    Examples:
      xtool schema > xtool.schema.json
      xtool schema --template > xtool-template.schema.json
    """
    from xtool.config.schema import schema_text

    sys.stdout.write(schema_text(template=template))


def convert(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="An xl.cfg; with --to xl, a domain file.", show_default=False),
    ],
    to: Annotated[str, typer.Option("--to", metavar="yaml|xl", help="What to write.")] = "yaml",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if anything could not be carried over.")
    ] = False,
    overrides: Overrides = None,
    vars_files: VarsFiles = None,
    only: Only = None,
) -> int:
    """Make a domain file of an xl.cfg, or the other way round.

    What could not be carried over is told on standard error, a line for each, and in comments of the file.

    \b
    Examples:
      xtool convert /etc/xen/web.cfg > web.yaml
      xtool convert --to xl web.yaml > web.cfg
    """
    if to == "yaml":
        from xtool.config.fromxl import convert_file

        if overrides or vars_files or only:
            raise UsageError("--set, --vars-file and --only are for domain files: use them with --to xl")
        made = convert_file(file)
        text, notes, whole = made.text, made.notes, made.config is not None
    elif to == "xl":
        from xtool.config.load import Inputs, load_all, single
        from xtool.config.toxl import to_xl

        loaded = single(load_all(file, Inputs(overrides or (), vars_files or ()), only))
        text, notes, whole = *to_xl(loaded.config, file), True
    else:
        raise UsageError(f"--to {to}: it is yaml or xl")
    sys.stdout.write(text)
    sys.stdout.flush()
    for line in notes:
        note(escape_lines(line))
    if not whole:
        note("warning: what was written is no whole domain file yet: see its first lines")
    return 3 if strict and (notes or not whole) else 0
