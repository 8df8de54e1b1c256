"""Our backend's process under Python's profiler during one case: where its time goes."""

from __future__ import annotations

import io
import os
import pstats
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contest import BenchError
from xtool.backends.profiling import VARIABLE


@contextmanager
def profiling(folder: Path) -> Iterator[None]:
    """Backends that are started within are profiled into ``folder``."""
    folder.mkdir(exist_ok=True)
    os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def text(folder: Path, lines: int = 30) -> str:
    """The functions with most time of their own, of all profiles in the folder. Waiting for events is among
    them as ``poll``. Raises ``BenchError`` when there is no profile."""
    files = sorted(folder.glob("backend-*.prof"))
    if not files:
        raise BenchError(
            f"no profile in {folder}: the backend's process was killed, or another served the device"
            " (see /var/log/xtool/backends.log)"
        )
    out = io.StringIO()
    stats = pstats.Stats(*map(str, files), stream=out)
    stats.sort_stats("tottime").print_stats(lines)
    stats.sort_stats("cumulative").print_stats(lines // 2)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
