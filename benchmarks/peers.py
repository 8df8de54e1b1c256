"""Where ``load`` runs: in this host, in one of its network namespaces, or in a Linux guest."""

from __future__ import annotations

import gzip
import select
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from benchmarks.contest import BenchError, parse_load
from tests.xen.guests import GUESTS, Console, ask
from xtool.lab.cpio import CpioArchive

LOAD = GUESTS / "load"
#: How long one run may take beside the time it is told to, seconds of the machine's clock.
DEADLINE = 120.0
_LISTENING = "LOAD LISTENING"


class Peer(Protocol):
    def run(self, *arguments: object) -> dict[str, Any]:
        """Run ``load`` to its end; its numbers. Raises ``BenchError``, ``AssertionError`` with what a
        guest's console showed."""

    def listen(self, *arguments: object) -> Callable[[], dict[str, Any]]:
        """Start a ``load`` that listens, and return when it does; the result waits for its end."""


class Here:
    """This host, or what ``prefix`` (``ip netns exec NAME``) leads to."""

    def __init__(self, *prefix: str) -> None:
        self._argv = (*prefix, str(LOAD))

    def run(self, *arguments: object) -> dict[str, Any]:
        return self._end(self._start(*arguments))

    def _start(self, *arguments: object) -> subprocess.Popen[str]:
        argv = [*self._argv, *map(str, arguments)]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def _end(self, process: subprocess.Popen[str], before: str = "") -> dict[str, Any]:
        try:
            said, _ = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise BenchError(f"{process.args!r} did not end within {DEADLINE:g} s") from None
        return parse_load(before + said)

    def listen(self, *arguments: object) -> Callable[[], dict[str, Any]]:
        process = self._start(*arguments)
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], DEADLINE)[0]:
            process.kill()
            process.communicate()
            raise BenchError(f"{process.args!r} did not listen within {DEADLINE:g} s")
        first = process.stdout.readline()
        if _LISTENING not in first:
            self._end(process, first)
            raise BenchError(f"{process.args!r} did not listen")
        return lambda: self._end(process)


class Guest:
    """A Linux guest, by the shell on its console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def run(self, *arguments: object) -> dict[str, Any]:
        try:
            return parse_load(ask(self.console, _command(*arguments), DEADLINE))
        except AssertionError:
            with suppress(OSError):
                self.console.send("\x03")  # for the next one to find a shell
            raise

    def listen(self, *arguments: object) -> Callable[[], dict[str, Any]]:
        self.console.seen = b""
        self.console.send(f"{_command(*arguments)}; echo EN''D=$?=\n")
        if _LISTENING not in self.console.wait_for("LOAD ", DEADLINE):
            # To its end in any case: what it still prints would be taken for the next one's.
            found = parse_load(self.console.wait_for("END=", DEADLINE))
            raise BenchError(f"load did not listen in the guest: {found}")
        return lambda: parse_load(self.console.wait_for("END=", DEADLINE))

    def ask(self, command: str) -> str:
        """Raises ``BenchError`` when the command fails."""
        said = ask(self.console, command, DEADLINE)
        if "END=0=" not in said:
            raise BenchError(f"{command!r} failed in the guest: {said[-2000:]!r}")
        return said


def _command(*arguments: object) -> str:
    return "load " + " ".join(map(str, arguments))


def make_ramdisk(path: Path) -> Path:
    """The test guests' initramfs with ``load`` in it, uncompressed: inflating costs an emulated guest dear.

    Linux takes several archives one after the other. Raises ``BenchError`` when something was not built.
    """
    for needed in (LOAD, GUESTS / "initramfs.cpio.gz"):
        if not needed.exists():
            raise BenchError(f"{needed} is missing: scripts/setup builds it, xtool lab sync brings it here")
    archive = CpioArchive()
    archive.file("bin/load", LOAD.read_bytes(), 0o755)
    path.write_bytes(gzip.decompress((GUESTS / "initramfs.cpio.gz").read_bytes()) + archive.to_bytes())
    return path
