"""How errors look on a terminal: what failed, where, and what to do next."""

from __future__ import annotations

import sys
from typing import TextIO

from xtool.cli.output import escape
from xtool.errors import ConfigError, XtoolError

_WINDOW = 100  # columns of a source line that are shown


def report(error: XtoolError, stream: TextIO | None = None) -> None:
    """Print ``error`` to ``stream`` (standard error)."""
    text = "\n".join(describe(error))
    print(text, file=stream or sys.stderr)


def describe(error: XtoolError) -> list[str]:
    """The lines ``report`` prints."""
    if not isinstance(error, ConfigError):
        return [f"error: {escape(error.message)}", *_hint(error)]
    from xtool.config.problems import problems_of

    lines = []
    for problem in problems_of(error):
        place = ":".join([problem.file, *(str(n) for n in (problem.line, problem.column) if problem.line)])
        lines.append(
            f"error: {escape(place)}: {escape(problem.message)}"
            if problem.line
            else (f"error: {escape(problem.message)}")
        )
        lines += caret_block(problem)
        lines += _hint(problem)
    return lines


def _hint(error: XtoolError) -> list[str]:
    return [f"hint: {escape(error.hint)}"] if error.hint else []


def caret_block(problem: ConfigError) -> list[str]:
    """The source line and a caret below the column, nothing if the place is not known."""
    if problem.source is None or not problem.line:
        return []
    column = min(max(problem.column, 1), len(problem.source) + 1)
    first = max(0, column - 1 - _WINDOW * 3 // 4)
    source = "".join(c if c.isprintable() else " " for c in problem.source[first : first + _WINDOW])
    gutter = " " * len(str(problem.line))
    before = source[: column - 1 - first]
    return [f"  {problem.line} | {source}", f"  {gutter} | {' ' * _width(before)}^"]


def _width(text: str) -> int:
    """Terminal columns of ``text``: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


def report_bug(error: Exception, stream: TextIO | None = None) -> None:
    text = escape(f"{type(error).__name__}: {error}")
    print(f"error: this is a bug in xtool: {text}\nhint: xtool -v ... shows where", file=stream or sys.stderr)
