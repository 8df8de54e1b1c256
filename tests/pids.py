"""Whether processes run, for tests that end some of others'."""

from __future__ import annotations

import time
from pathlib import Path


def runs(pid: int) -> bool:
    """Whether there is such a process; one that ended, and that nobody has collected yet, is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int, deadline: float = 30.0) -> bool:
    """Whether it has ended before the deadline, seconds: what a signal ended with others may die last."""
    end = time.monotonic() + deadline
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not runs(pid)
