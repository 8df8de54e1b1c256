"""``apply --jobs`` as a real process whose children are real ones: on the machine in memory that processes
share, in its own processes and through a daemon. A domain whose ``ready:`` has not come true holds its
step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_churn import HERE, Machine
from test_churn import machine as machine  # a fixture

from xtool.toolstack import journal
from xtool.xenstore.client import open_store

TINY = HERE.parents[1] / "build" / "guest" / "tiny-pv.elf"
HELD = "ready: {xenstore: data/go=1, timeout: 60s}"
READY = 30.0


class Applied:
    """A site of one file, and ``xtool apply`` of it, which is a process; ``way`` is ``xen`` or ``daemon``."""

    def __init__(self, site: Machine, folder: Path, way: str) -> None:
        self.machine, self.file, self.errors = site, folder / "site.yaml", folder / "errors"
        self._out = folder / "out"
        self._way = way

    def write(self, *domains: str) -> None:
        head = f"type: pv\nkernel: {TINY}\nmemory: 4\n"
        self.file.write_text("---\n".join(f"{head}{domain}\n" for domain in domains))

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        argv = ["apply", str(self.file), "-o", "json", *more]
        if self._way == "xen":
            line = [str(HERE / "onemachine.py"), "command", str(self.machine.folder), *argv]
            environment = self.machine.environment
        else:
            line = ["-m", "xtool.cli.app", *argv]
            socket = self.machine.folder / "xtoold.sock"
            environment = {**self.machine.environment, "XTOOL_CONNECT": f"unix:{socket}"}
        with open(self._out, "wb") as out, open(self.errors, "wb") as errors:
            return subprocess.Popen(
                [sys.executable, *line], env=environment, stdout=out, stderr=errors, cwd="/"
            )

    def ended(self, process: subprocess.Popen[bytes], code: int) -> dict[str, Any]:
        assert process.wait(60) == code, self.errors.read_text()
        found = self._out.read_text()
        return {one["name"]: one for one in json.loads(found)["domains"]} if found else {}

    def run(self, code: int, *more: str) -> dict[str, Any]:
        return self.ended(self.start(*more), code)

    def held(self, *names: str) -> None:
        """Returns when apply waits for all of these."""
        until(lambda: all(f"waiting until {name} is ready" in self.errors.read_text() for name in names))

    def go(self, name: str) -> None:
        [domid] = [entry.domid for entry in journal.entries() if entry.name == name]
        with open_store(str(self.machine.folder / "store")) as store:
            store.write(f"/local/domain/{domid}/data/go", "1")

    def names(self) -> set[str]:
        return {entry.name for entry in journal.entries() if entry.state == "running"}


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + READY
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """Also when it is a zombie that nobody has seen off yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(params=["xen", "daemon"])
def applied(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest) -> Applied:
    return Applied(machine, tmp_path, request.param)


def test_independent_domains_at_once_and_order_kept(applied: Applied) -> None:
    """Both wait at the same time, the third for the first only; no more than --jobs at a time."""
    applied.write(
        f"name: a\n{HELD}", f"name: b\n{HELD}", "name: c\ndepends_on: a", f"name: d\n{HELD}\ndepends_on: c"
    )
    process = applied.start("--wait", "healthy", "--jobs", "2")
    applied.held("a", "b")
    assert applied.names() == {"a", "b"} and len(children_of(process.pid)) == 2
    applied.go("a")
    applied.held("d")
    assert applied.names() == {"a", "b", "c", "d"}
    applied.go("b")
    applied.go("d")
    done = applied.ended(process, 0)
    assert [(name, one["result"]) for name, one in done.items()] == [(n, "done") for n in "abcd"]
    assert "a: done" in applied.errors.read_text()
    assert applied.run(0, "--detailed-exitcode")["a"]["result"] == "unchanged"


def test_a_child_that_is_killed_is_a_failure_of_its_domain(applied: Applied) -> None:
    applied.write(f"name: a\n{HELD}", "name: b", "name: c\ndepends_on: a")
    process = applied.start("--wait", "healthy")
    applied.held("a")
    until(lambda: "b: done" in applied.errors.read_text())
    [child] = children_of(process.pid)
    os.kill(child, signal.SIGKILL)
    done = applied.ended(process, 5)
    assert {n: one["result"] for n, one in done.items()} == {"a": "failed", "b": "done", "c": "skipped"}
    assert "was killed (SIGKILL)" in done["a"]["error"]["message"] and done["a"]["error"]["hint"]
    applied.go("a")
    assert {n: one["result"] for n, one in applied.run(0).items()} == {
        "a": "unchanged",
        "b": "unchanged",
        "c": "done",
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_its_children_and_says_what_is_left(applied: Applied, number: int) -> None:
    applied.write(f"name: a\n{HELD}", f"name: b\n{HELD}", "name: c", "name: d\ndepends_on: a")
    process = applied.start("--wait", "healthy")
    applied.held("a", "b")
    until(lambda: "c: done" in applied.errors.read_text())
    children = children_of(process.pid)
    process.send_signal(number)
    applied.ended(process, 128 + number)
    assert len(children) == 2 and not any(Path(f"/proc/{child}").exists() for child in children)
    said = applied.errors.read_text()
    assert "unfinished: a, b" in said and "not begun: d" in said and "done: c" in said
    applied.go("a")
    applied.go("b")
    assert applied.run(0, "--wait", "healthy")["d"]["result"] == "done"
    assert applied.names() == {"a", "b", "c", "d"}


def test_killed_in_the_middle_and_the_next_finishes(applied: Applied) -> None:
    applied.write(f"name: a\n{HELD}", f"name: b\n{HELD}", "name: c\ndepends_on: [a, b]")
    process = applied.start()
    applied.held("a", "b")
    children = children_of(process.pid)
    process.kill()
    process.wait(20)
    assert len(children) == 2
    until(lambda: all(gone(child) for child in children))
    applied.go("a")
    applied.go("b")
    done = applied.run(0)
    assert {n: one["result"] for n, one in done.items()} == {"a": "unchanged", "b": "unchanged", "c": "done"}
    assert applied.run(0)["c"]["result"] == "unchanged"
