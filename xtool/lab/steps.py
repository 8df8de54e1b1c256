"""Running the tools a build needs, and building folders that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from xtool.errors import LabError
from xtool.progress import Progress

#: How much of a failed tool's output is shown.
_TAIL_LINES = 12


def require_tools(tools: dict[str, str]) -> None:
    """Raise LabError unless each tool (name -> Debian package) is installed."""
    search = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = {package for tool, package in tools.items() if shutil.which(tool, path=search) is None}
    if missing:
        names = " ".join(sorted(missing))
        raise LabError(
            f"these Debian packages are missing: {names}",
            hint=f"run scripts/setup, or: apt-get install --no-install-recommends {names}",
        )


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise LabError unless the file system of ``folder`` has ``needed`` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LabError(
            f"not enough disk space for {what}: {needed >> 20} MiB needed, {free >> 20} MiB free in {folder}",
            hint="free some space, or set XDG_CACHE_HOME and XDG_STATE_HOME to a larger file system",
        )


def run(
    argv: Sequence[str | Path],
    what: str,
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    stdin: bytes | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run a tool to its end and return what it printed (stdout and stderr together).

    The tool gets its own process group, so that an interrupted build leaves no process behind.
    Raises LabError with the last lines of the output when it fails.
    """
    environment = dict(os.environ if env is None else env)
    environment["PATH"] = environment.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    environment["LC_ALL"] = "C"
    command = [str(part) for part in argv]
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise LabError(f"{what}: {command[0]} is not installed", hint="run scripts/setup") from error
    lines: list[str] = []
    try:
        assert process.stdout is not None
        if stdin is not None:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its own message says why it left early
                process.stdin.write(stdin)
            process.stdin.close()
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            lines.append(line)
            if on_line is not None:
                on_line(line)
        status = process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if status != 0:
        raise _failed(what, command[0], status, lines)
    return "\n".join(lines)


def _failed(what: str, tool: str, status: int, lines: list[str]) -> LabError:
    tail = "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])
    full = any("No space left on device" in line for line in lines)
    hint = (
        "the disk is full: free some space, or move XDG_CACHE_HOME to a larger file system"
        if full
        else "the lines above are the tool's own; run again with the network up, or see docs/lab.md"
    )
    return LabError(f"{what} failed: {tool} ended with status {status}\n{tail}", hint=hint)


@contextlib.contextmanager
def locked(path: Path, progress: Progress, what: str) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; says so when another process holds it and waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            progress.step(f"waiting: another xtool is {what}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_folder(final: Path, what: str, progress: Progress, build: Callable[[Path], None]) -> bool:
    """Make the folder ``final`` by ``build(temporary)`` unless it exists; true when it was built now.

    It is built beside its place and renamed when whole, so a half-built one is never used; what an
    interrupted build left is removed first.
    """
    if final.is_dir():
        return False
    with locked(final.parent / f".{final.name}.lock", progress, what):
        if final.is_dir():
            return False
        for leftover in final.parent.glob(f".building-{final.name}-*"):
            progress.step(f"removing a half-built {leftover.name.removeprefix('.building-')}")
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = final.parent / f".building-{final.name}-{os.getpid()}"
        temporary.mkdir()
        try:
            build(temporary)
            os.rename(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LabError(
                    f"{what}: the disk is full ({final.parent})",
                    hint="free some space, or move XDG_CACHE_HOME to a larger file system",
                ) from error
            raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return True
