"""``xtool doctor``: is this host fit to run guests, and what to do about each thing that is not.

Each check is a small function of what ``Look`` gives it: a host (or why there is none), and a root below
which ``/proc``, ``/sys``, ``/dev`` and the rest are looked for, so that tests give their own. The checks
themselves are in ``fitness_checks``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xtool.errors import XtoolError
from xtool.toolstack.everydayrecords import CheckResult

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

#: How bad, worst last.
STATUSES = ("skip", "ok", "warn", "fail")


@dataclass
class Look:
    """What the checks may look at. ``host`` is None where Xen cannot be reached; ``trouble`` says why."""

    host: Host | None = None
    trouble: XtoolError | None = None
    root: Path = Path("/")
    path: str = field(default_factory=lambda: os.environ.get("PATH", os.defpath))

    def at(self, path: str) -> Path:
        """``/proc/xen`` below the root."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str:
        """A file's text without surrounding blanks; "" if it cannot be read."""
        try:
            return self.at(path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.at(path))

    def first(self, paths: Iterable[str]) -> str:
        """The first of these files that there is, or ""."""
        return next((path for path in paths if self.at(path).is_file()), "")

    def program(self, *names: str) -> str:
        """The first of these programs in PATH, below the root; or ""."""
        folders = os.pathsep.join(str(self.at(folder)) for folder in self.path.split(os.pathsep) if folder)
        found = next((where for name in names if (where := shutil.which(name, path=folders))), "")
        return "/" + os.path.relpath(found, self.root) if found else ""

    def processes(self) -> dict[int, str]:
        """pid -> name, of every process."""
        found = {}
        try:
            names = os.listdir(self.at("/proc"))
        except OSError:
            return {}
        for name in names:
            if name.isdecimal() and (comm := self.read(f"/proc/{name}/comm")):
                found[int(name)] = comm
        return found

    def module(self, name: str) -> bool:
        """Whether a kernel module is there, loaded or built in."""
        folder = name.replace("-", "_")
        if self.exists(f"/sys/module/{folder}"):
            return True
        release = self.read("/proc/sys/kernel/osrelease")
        built_in = self.read(f"/lib/modules/{release}/modules.builtin").replace("-", "_")
        return f"/{folder}.ko" in built_in


Check = Callable[[Look], Iterable[CheckResult]]


def diagnose(look: Look, checks: Iterable[tuple[str, Check]] | None = None) -> list[CheckResult]:
    """Every check's results. One that fails itself is reported as such and stops nothing."""
    if checks is None:
        from xtool.toolstack.fitness_checks import CHECKS

        checks = CHECKS
    found: list[CheckResult] = []
    for name, check in checks:
        try:
            found += check(look)
        except (XtoolError, OSError, ValueError) as error:
            words = error.message if isinstance(error, XtoolError) else str(error)
            found.append(CheckResult(name, "skip", f"could not be looked at: {words}"))
    return found


def worst(results: Iterable[CheckResult]) -> str:
    """``fail``, ``warn`` or ``ok``."""
    return max((r.status for r in results), key=STATUSES.index, default="ok")


def ok(name: str, found: str) -> CheckResult:
    return CheckResult(name, "ok", found)


def bad(name: str, found: str, why: str, do: str, *, warn: bool = False) -> CheckResult:
    return CheckResult(name, "warn" if warn else "fail", found, why, do)
