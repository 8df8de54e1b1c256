"""A real lab of its own, driven from outside: start, reach, crash, interrupt, stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xtool.lab.image import image_folder
from xtool.lab.machine import Lab
from xtool.lab.processes import process_start_ticks

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
XTOOL = (sys.executable, "-m", "xtool.cli.app")
NAME = f"test-{os.getpid()}"


def xtool(*args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*XTOOL, *args], input=stdin, capture_output=True, check=False, timeout=600)


def ok(*args: str, stdin: bytes = b"") -> bytes:
    done = xtool(*args, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if not image_folder().is_dir():
        pytest.skip("the lab's image is not built: run scripts/setup")
    lab = Lab(NAME)
    ok("lab", "up", NAME)
    yield lab
    ok("lab", "remove", NAME)
    assert not lab.folder.exists()


@pytest.fixture
def up(lab: Lab) -> Lab:
    ok("lab", "up", NAME)
    return lab


def test_it_is_a_xen_host(up: Lab) -> None:
    assert b"xen_version            : 4.17" in ok("lab", "exec", NAME, "--", "xl", "info")
    listed = ok("-H", f"lab:{NAME}", "list")
    assert b"Domain-0" in listed
    clock = int(ok("lab", "exec", NAME, "--", "date", "+%s"))
    assert abs(clock - time.time()) < 60, "a restored lab has the time of its snapshot"


def test_input_output_and_exit_status_pass(up: Lab) -> None:
    data = os.urandom(300_000)
    assert ok("lab", "exec", NAME, "--", "cat", stdin=data) == data
    done = xtool("lab", "exec", NAME, "--", "sh", "-c", "echo 'a  b'; echo err >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"a  b\n", b"err\n")
    assert xtool("-H", f"lab:{NAME}", "domid", "no-such-domain").returncode == 9


def test_up_again_and_sync_again_do_nothing(up: Lab) -> None:
    before = up.require_running()
    ok("lab", "up", NAME)
    assert up.require_running().instance == before.instance
    ok("lab", "sync", NAME)
    assert b"nothing changed" in xtool("lab", "sync", NAME).stderr


def test_two_ups_at_once_start_one(up: Lab) -> None:
    ok("lab", "down", NAME)
    both = [subprocess.Popen([*XTOOL, "lab", "up", NAME], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(600) for process in both] == [0, 0]
    assert len(qemus(up)) == 1


def test_a_killed_qemu_is_told_and_replaced(up: Lab) -> None:
    record = up.require_running()
    os.kill(record.pid, signal.SIGKILL)
    while process_start_ticks(record.pid) == record.start_ticks:
        time.sleep(0.01)
    done = xtool("-H", f"lab:{NAME}", "list")
    assert done.returncode == 12 and b"has crashed" in done.stderr and b"xtool lab up" in done.stderr
    ok("lab", "up", NAME)
    assert ok("lab", "exec", NAME, "--", "echo", "back") == b"back\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_up_leaves_nothing_or_is_mended(up: Lab, number: signal.Signals) -> None:
    ok("lab", "down", NAME)
    process = subprocess.Popen([*XTOOL, "lab", "up", NAME], stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if b"connecting" in line:
            break
    process.send_signal(number)
    process.stderr.read()
    assert process.wait(60) != 0
    if number == signal.SIGINT:
        assert qemus(up) == [] and up.record() is None
    ok("lab", "up", NAME)
    assert len(qemus(up)) == 1


def test_status_and_a_lab_that_is_down(up: Lab) -> None:
    assert b"up" in ok("lab", "status", NAME)
    ok("lab", "down", NAME)
    assert xtool("lab", "status", NAME).returncode == 1
    done = xtool("lab", "exec", NAME, "--", "true")
    assert done.returncode == 12 and f"xtool lab up {NAME}".encode() in done.stderr


def qemus(lab: Lab) -> list[int]:
    """Process ids of the QEMUs that hold this lab's disk."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(str(lab.folder / "disk.qcow2").encode() in word for word in words):
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("kind", ["pv", "pvh", "hvm"])
def test_a_dry_run_of_each_example_needs_no_xen(kind: str) -> None:
    """An HVM guest's hvmloader and SeaBIOS come out of the lab's image."""
    config = Path(__file__).parents[2] / "configs" / f"{kind}.yaml"
    out = ok("create", str(config), "--dry-run").decode()
    assert f"{kind}: {kind}, 256 MiB, entry 0x" in out and "Memory map" in out
