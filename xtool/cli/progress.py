"""Progress on standard error: one bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from xtool.cli.output import escape
from xtool.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

#: A bar appears only for work that lasts, so that quick work pays nothing for it. Seconds.
PATIENCE = 0.5


class LineProgress:
    """A line per step."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def step(self, text: str) -> None:
        print(f"  {escape(text)}", file=self._stream, flush=True)

    def advance(self, done: int, total: int | None = None) -> None:
        pass


class BarProgress:
    """One bar, or a spinner while no total is known, drawn by rich."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begin = time.monotonic()
        self._text = ""
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def step(self, text: str) -> None:
        self._text = escape(text)
        self._update(0, None)

    def advance(self, done: int, total: int | None = None) -> None:
        self._update(done, total)

    def _update(self, done: int, total: int | None) -> None:
        if self._bar is None:
            if time.monotonic() - self._begin < PATIENCE:
                return
            self._start()
        assert self._bar is not None and self._task is not None
        self._bar.update(self._task, description=self._text, completed=done, total=total)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bars

        text = TextColumn("{task.description}", markup=False)
        self._bar = Bars(
            SpinnerColumn(), text, BarColumn(), console=Console(file=self._stream), transient=True
        )
        self._task = self._bar.add_task(self._text, total=None)
        self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """A listener for one piece of work, on ``stream`` (standard error); its bar is gone afterwards."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield LineProgress(stream)
        return
    bar = BarProgress(stream)
    try:
        yield bar
    finally:
        bar.close()
