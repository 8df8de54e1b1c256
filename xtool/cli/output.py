"""What verbs print: tables for people, JSON and YAML for programs; names escaped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xtool.errors import UsageError

FORMATS = ("table", "json", "yaml")
MIB = 1 << 20


def escape(text: str) -> str:
    """``text`` with everything that could steer a terminal written out: a guest may have chosen it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escape_lines(text: str) -> str:
    """The same for text of several lines; tabs and line ends stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else escape(c) for c in text)


def emit(records: Any, form: str, table: Callable[[], str]) -> None:
    """Print ``records`` (dataclasses, or lists of them, or plain data) as ``form``; ``table`` makes the
    people's version. Keys are the dataclass's field names."""
    if form == "table":
        write(table())
    elif form == "json":
        import json

        write(json.dumps(plain(records), indent=2))
    elif form == "yaml":
        import yaml

        write(yaml.safe_dump(plain(records), sort_keys=False, allow_unicode=False).rstrip("\n"))
    else:
        raise UsageError(f"unknown output format {form!r}", hint=f"it is one of {', '.join(FORMATS)}")


def check_format(form: str) -> str:
    """Refuse a wrong ``-o`` before anything is done. Raises ``UsageError``."""
    if form not in FORMATS:
        raise UsageError(f"unknown output format {form!r}", hint=f"it is one of {', '.join(FORMATS)}")
    return form


def plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def write(text: str) -> None:
    """Print to standard output, nothing for no text."""
    if text:
        print(text, flush=True)


def note(text: str) -> None:
    """A remark beside the output, on standard error."""
    print(text, file=sys.stderr, flush=True)


def columns(header: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[str] = ()) -> str:
    """A table with aligned columns; those named in ``right`` are right-aligned."""
    cells = [list(header), *([escape(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [name in set(right) for name in header]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    )


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """``name : value`` lines, as ``xl info`` has them."""
    listed = [(name, escape(str(value))) for name, value in rows]
    width = max((len(name) for name, _ in listed), default=0)
    return "\n".join(f"{name:<{width}} : {value}" for name, value in listed)
