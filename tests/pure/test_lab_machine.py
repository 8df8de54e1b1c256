"""A lab's settings and records, and QMP with a real QEMU that runs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from xtool.errors import LabError, UsageError
from xtool.lab import spec as spec_module
from xtool.lab.machine import Lab, Record
from xtool.lab.processes import process_start_ticks
from xtool.lab.qmp import Qmp
from xtool.lab.spec import SPARE_CPU0, LabSpec, Paths, nested_kvm_works, qemu_argv

AT = Paths(Path("/i"), Path("/d"), Path("/log"), Path("/con"), Path("/qmp"))


def test_flags_of_the_emulated_machine() -> None:
    argv = qemu_argv(LabSpec(), AT, 2222, None)
    assert argv[argv.index("-cpu") + 1] == "max,-smap,-smep,-rdtscp,-xsave"
    assert argv[argv.index("-m") + 1] == "8192M"
    assert "-incoming" not in argv and "-icount" not in argv
    assert any("hostfwd=tcp:127.0.0.1:2222-:22" in word for word in argv), "on loopback only"
    fixed = qemu_argv(LabSpec(deterministic=True), AT, 1, Path("/a b/state"))
    assert fixed[fixed.index("-icount") + 1] == "shift=0,sleep=off,align=off"
    assert fixed[fixed.index("-cpu") + 1].endswith("-erms,-fsrm")
    assert fixed[-3:] == ["-incoming", "exec:cat '/a b/state'", "-S"]
    assert "host" in qemu_argv(LabSpec(accel="kvm"), AT, 1, None)


def test_guests_stay_off_cpu_0_where_qemu_has_its_race() -> None:
    def spares(spec: LabSpec) -> bool:
        return any(SPARE_CPU0 in word for word in qemu_argv(spec, AT, 1, None))

    assert spares(LabSpec()) and spares(LabSpec(cpus=4))
    assert not any(map(spares, (LabSpec(cpus=1), LabSpec(deterministic=True), LabSpec(accel="kvm"))))
    rc = (Path(spec_module.__file__).parent / "files/rc").read_text()
    assert f"grep -qw {SPARE_CPU0} /proc/cmdline" in rc


@pytest.mark.parametrize(
    ("flags", "nested", "device", "works"),
    [
        ("fpu vmx", "Y\n", True, True),
        ("fpu svm", "1", True, True),
        ("fpu vmx", "N", True, False),
        ("fpu", "Y", True, False),
        ("fpu vmx", "Y", False, False),
        ("fpu novmx", "1", True, False),
    ],
)
def test_kvm_only_where_it_can_nest(flags: str, nested: str, device: bool, works: bool) -> None:
    assert nested_kvm_works(f"model name : x\nflags\t\t: {flags}\n", nested, device) is works


@pytest.mark.parametrize("wrong", [{"accel": "hax"}, {"memory": 1 << 30}, {"cpus": 0}])
def test_impossible_labs_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(LabError):
        LabSpec(**wrong)  # type: ignore[arg-type]
    with pytest.raises(LabError, match="counts instructions"):
        LabSpec(accel="kvm", deterministic=True)


@pytest.mark.parametrize("name", ["", "../x", "A", "-x", "a" * 41, "a b"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Lab(name)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    lab = Lab("one")
    lab.folder.mkdir(parents=True)
    return lab


def write_record(lab: Lab, pid: int, ticks: int) -> None:
    record = Record(pid, ticks, 1, "x", "/i", None, asdict(LabSpec()), time.time(), ready=True)
    (lab.folder / "lab.json").write_text(json.dumps(asdict(record)))


def test_a_record_of_another_process_is_stale(lab: Lab) -> None:
    assert lab.record() is None and not lab.crashed()
    ticks = process_start_ticks(os.getpid())
    assert ticks is not None
    write_record(lab, os.getpid(), ticks)
    assert lab.record() is not None
    write_record(lab, os.getpid(), ticks - 1)  # the pid was given to another process since
    assert lab.record() is None and lab.crashed()
    (lab.folder / "lab.json").write_text('{"pid": 1')  # the disk was full while it was written
    assert lab.record() is None


def test_a_crashed_lab_says_what_qemu_said(lab: Lab) -> None:
    process = subprocess.Popen(["sleep", "100"])
    ticks = process_start_ticks(process.pid)
    assert ticks is not None
    write_record(lab, process.pid, ticks)
    assert lab.require_running().pid == process.pid
    process.kill()
    process.wait()
    (lab.folder / "qemu.log").write_text("warning\nqemu: out of memory\n")
    with pytest.raises(LabError, match="has crashed: qemu: out of memory") as caught:
        lab.require_running()
    assert "xtool lab up one" in str(caught.value.hint)
    assert lab.down() is False and not lab.crashed()
    with pytest.raises(LabError, match="is not up"):
        lab.require_running()


def test_long_folders_get_short_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("x" * 120)))
    socket = Lab("one")._socket("ssh")
    assert len(str(socket)) < 90 and socket != Lab("two")._socket("ssh")


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    path = tmp_path / "qmp"
    argv = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S"]
    try:
        process = subprocess.Popen([*argv, "-qmp", f"unix:{path},server=on,wait=off"])
    except FileNotFoundError:
        pytest.skip("no QEMU here")
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield path, process
    process.kill()
    process.wait()


def test_qmp_with_a_real_qemu(qemu: tuple[Path, subprocess.Popen[bytes]]) -> None:
    path, process = qemu
    with Qmp(path, timeout=20) as qmp:
        assert qmp.command("query-status")["running"] is False
        with pytest.raises(LabError, match="refused no-such-command"):
            qmp.command("no-such-command")
        qmp.command("quit")
    assert process.wait(20) == 0
    with pytest.raises(LabError, match="does not answer"):
        Qmp(path)
