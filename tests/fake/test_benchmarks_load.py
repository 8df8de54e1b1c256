"""The load program and those who drive it, without Xen: a shell on a pty stands for a guest's console,
loopback for its network, the host in memory for its disk."""

from __future__ import annotations

import os
import pty
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from splitdrivers import XVDA, Rig

from benchmarks import consolebench, netbench, peers
from benchmarks.bench import last_words
from benchmarks.blockbench import CASES, drive
from benchmarks.consolebench import Line
from benchmarks.contest import BenchError, parse_load
from benchmarks.cpu import Meter
from benchmarks.netbench import End
from benchmarks.peers import Guest, Here
from xtool.devices.vbd import Vbd
from xtool.fake.hypervisor import FakeHypervisor
from xtool.frontends.block import BlockFrontend
from xtool.lab.cpio import CpioArchive, write_initramfs

SOURCE = Path(__file__).parents[2] / "guests/load/load.c"
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    path = tmp_path_factory.mktemp("load") / "load"
    subprocess.run(["gcc", "-std=gnu11", "-Wall", "-Werror", str(SOURCE), "-o", str(path)], check=True)
    return path


@pytest.fixture
def here(program: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setattr(peers, "LOAD", program)
    return Here()


@pytest.fixture
def meter() -> Meter:
    return Meter(FakeHypervisor(), [os.getpid()])


def shell(program: Path) -> Line:
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"
        os.environ["PS1"] = "# "
        os.execvp("sh", ["sh", "-i"])
    return Line(fd)


@pytest.fixture
def line(program: Path) -> Iterator[Line]:
    with closing(shell(program)) as line:
        yield line


@pytest.fixture
def other(program: Path) -> Iterator[Line]:
    with closing(shell(program)) as line:
        yield line


def test_errors_of_load_arrive(here: Here, line: Line, tmp_path: Path) -> None:
    file = tmp_path / "no-device"
    file.write_bytes(bytes(1 << 20))
    for words in (
        ("block", file, "read", "seq", 4096, 1, 10),
        ("nonsense",),
        ("push", "tcp", HOST, 1, 10, 10),
    ):
        for peer in (here, Guest(line)):
            with pytest.raises(BenchError, match="load failed"):
                peer.run(*words)
    with pytest.raises(BenchError, match="load failed"):
        here.listen("sink", "tcp", "192.0.2.1", 5000)
    with pytest.raises(BenchError, match="load failed"):
        Guest(line).listen("sink", "tcp", "192.0.2.1", 5000)
    assert "END=0=" in Guest(line).ask("true")
    with pytest.raises(BenchError, match="'false' failed"):
        Guest(line).ask("false")


@pytest.mark.parametrize("case", netbench.CASES, ids=lambda case: case.name)
def test_net_cases_over_loopback(here: Here, line: Line, meter: Meter, case: netbench.Case) -> None:
    end = End(Guest(line), "", "", HOST, HOST, meter)
    found = netbench.measure(end, case, 50)
    assert found.value > 0 and found.ops > 0 and found.cpu["backend"] >= 0
    if case.kind == "tcp":
        assert found.bytes > 1 << 20  # more than socket buffers hold
    if case.kind == "ping":
        assert found.ops == 100 and 0 < found.p50 <= found.p99


def test_a_sender_that_fails_does_not_leave_the_guest_listening(
    here: Here, line: Line, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(line)
    arrived = guest.listen("sink", "udp", HOST, 5190)

    def fails() -> dict[str, object]:
        here.run("push", "udp", HOST, 5190, 18, 10)  # the listener ends with it
        raise BenchError("push failed")

    with pytest.raises(BenchError, match="push failed"):
        netbench._both(arrived, fails)
    assert "END=0=" in guest.ask("true")


def test_drain_and_echo(line: Line, other: Line, meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolebench, "FLOOD", 64 << 10)
    for each in (line, other):
        Guest(each).ask("true")
    found = consolebench.flood(line, meter, "/dev/tty")
    assert found.bytes == 64 << 10 and found.value > 0
    echo = consolebench.keystrokes(line)
    assert echo.ops == consolebench.KEYS and 0 < echo.value < 1e6
    monkeypatch.setattr(consolebench, "LONG_FLOOD", 1 << 30)
    assert consolebench.beside_a_flood(line, other, "/dev/tty").value > 0
    monkeypatch.setattr(consolebench, "LONG_FLOOD", 64)
    with pytest.raises(BenchError, match="too short"):
        consolebench.beside_a_flood(line, other, "/dev/tty")
    assert "END=0=" in Guest(line).ask("true") and "END=0=" in Guest(other).ask("true")


def test_every_error_shows_the_console(line: Line) -> None:
    Guest(line).ask("true")
    line.send("echo Oo''ps\n")
    line.wait_for("Oops", 30)
    with pytest.raises(BenchError, match=r"AssertionError: \['connecting'\]; seen: .*Oops"), last_words(line):
        raise AssertionError(["connecting"])
    with pytest.raises(BenchError, match=r"^load printed no result; seen: 'x'$"), last_words(line):
        parse_load("x")


def test_a_load_that_hangs_leaves_a_shell(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(line)
    guest.ask("true")
    monkeypatch.setattr(peers, "DEADLINE", 0.5)
    with pytest.raises(AssertionError, match="END="):
        guest.run("sink", "udp", HOST, 5191)
    monkeypatch.setattr(peers, "DEADLINE", 30.0)
    assert "END=0=" in guest.ask("true")


def test_a_console_that_ends_shows_its_last_words(line: Line, meter: Meter) -> None:
    line.send("echo last wo''rds; exit\n")
    with pytest.raises(BenchError, match="last words"):
        line.wait_end("NEVER", 30)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_cases_by_our_frontend(tmp_path: Path, case: object) -> None:
    image, folder = tmp_path / "disk.img", tmp_path / "run"
    image.write_bytes(random.Random(1).randbytes(8 << 20))
    folder.mkdir()
    rig = Rig(folder)
    device = rig.add_disk(Vbd(target=str(image), vdev="xvda", devid=XVDA, kind="xtool"))
    with rig.frontend(device) as front:

        def wait(disk: BlockFrontend) -> None:
            rig.turn()
            disk.events_came()

        found = drive(front, case, 0.05, wait)  # type: ignore[arg-type]
        told = rig.describe()[0]["counters"]
        assert found["bytes"] == found["ops"] * case.size and found["ops"] >= 1  # type: ignore[attr-defined]
        moved = told["written_bytes"] if case.operation != "read" else told["read_bytes"]  # type: ignore
        assert moved == found["bytes"]
        assert 0 < found["p50"] <= found["p99"] <= found["ns"]


def test_a_disk_that_does_not_answer(tmp_path: Path) -> None:
    image, folder = tmp_path / "disk.img", tmp_path / "run"
    image.write_bytes(bytes(1 << 20))
    folder.mkdir()
    rig = Rig(folder)
    device = rig.add_disk(Vbd(target=str(image), vdev="xvda", devid=XVDA, kind="xtool"))
    front = rig.frontend(device)
    with pytest.raises(BenchError, match="without an answer"):
        drive(front, CASES[0], 0.01, lambda disk: None, deadline=0.05)
    rig.turns()
    front.close()


def test_the_ramdisk_has_load_in_it(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LOAD", program)
    monkeypatch.setattr(peers, "GUESTS", tmp_path)
    with pytest.raises(BenchError, match="is missing"):
        peers.make_ramdisk(tmp_path / "out")
    archive = CpioArchive()
    archive.file("bin/busybox", b"#!", 0o755)
    write_initramfs(archive, tmp_path / "initramfs.cpio.gz")
    data = peers.make_ramdisk(tmp_path / "out").read_bytes()
    assert data.startswith(archive.to_bytes()) and data.count(b"TRAILER!!!") == 2
    assert program.read_bytes() in data and len(archive.to_bytes()) % 4 == 0
