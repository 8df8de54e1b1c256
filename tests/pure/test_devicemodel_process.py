"""Starting, awaiting, finding and ending the device model.

A real QEMU runs where there is one, with its own CPU emulation in place of Xen; small scripts stand in
where QEMU has to misbehave.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xtool.devicemodel import pidfd
from xtool.devicemodel.process import (
    LOG_LIMIT,
    DeviceModel,
    _spawned,
    find,
    log_path,
    qmp_path,
    reap_ended,
    spawn,
)
from xtool.devicemodel.qmp import query
from xtool.devicemodel.spec import MIB, DeviceModelSpec, EmulatedDisk, VncSpec
from xtool.errors import DeadlineError, DeviceModelError, LocalProtocolError

UUID = "6b1c1b9e-7c3c-4f6a-9b55-0d4c5f1f2a10"
DOMID = 31999
SPEC = DeviceModelSpec(name="guest/1", uuid=UUID, memory=64 * MIB, vga="none", videoram=0)

#: Runs an ordinary QEMU with the words meant for the one under Xen.
WITHOUT_XEN = """#!/bin/sh
n=$#
while [ $n -gt 0 ]; do
    word=$1; shift; n=$((n - 1))
    case "$word" in
        -xen-domid) shift; n=$((n - 1)); continue ;;
        pc,accel=xen*|xenfv*) word=pc,accel=tcg ;;
    esac
    set -- "$@" "$word"
done
exec qemu-system-x86_64 "$@"
"""

needs_qemu = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no QEMU on this machine")

Script = Callable[[str], str]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of our own; afterwards no process, descriptor or socket may be left."""
    monkeypatch.setenv("XTOOL_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    before = os.listdir("/proc/self/fd")
    yield tmp_path
    assert os.listdir("/proc/self/fd") == before
    assert not qmp_path(DOMID).exists()
    left = find(DOMID)
    if left is not None:
        left.stop()  # a failed test's: the next ones look for such processes
    assert left is None
    with pytest.raises(ChildProcessError):  # neither children nor zombies
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def make(text: str) -> str:
        path = tmp_path / "device-model"
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    return make


def python(body: str) -> str:
    return f"#!{sys.executable} -IS\nimport os, signal, sys, time\n{body}\n"


SLEEPER = python("signal.pause()")


@needs_qemu
def test_a_life(script: Script, tmp_path: Path) -> None:
    disk = tmp_path / "a,b.img"
    disk.write_bytes(bytes(MIB))
    spec = DeviceModelSpec(
        name="guest/1",
        uuid=UUID,
        memory=64 * MIB,
        serial=("pty", "null"),
        vnc=VncSpec(display=40, password=True),
        disks=(
            EmulatedDisk(0, str(disk)),
            EmulatedDisk(3, None, cdrom=True),
            EmulatedDisk(2, str(disk), bus="scsi", readonly=True),
        ),
        usbdevices=("tablet",),
        extra=("-global", "ide-hd.share-rw=on", "-global", "scsi-hd.share-rw=on"),
    )
    model = spawn(spec, DOMID, binary=script(WITHOUT_XEN))
    ready = model.wait_ready(60, vnc_password="secret")
    assert Path(ready.serial[0]).is_char_device() and list(ready.serial) == [0]
    assert ready.vnc and ready.vnc.host == "127.0.0.1" and int(ready.vnc.port) >= 5940
    with socket.create_connection((ready.vnc.host, int(ready.vnc.port)), timeout=10) as vnc:
        assert vnc.recv(12).startswith(b"RFB")

    blocks = {block["device"]: block for block in query(qmp_path(DOMID), "query-block", deadline=30)}
    image = blocks["drive-ide0"]["inserted"]
    assert (image["file"], image["drv"], image["ro"]) == (str(disk), "raw", False)
    assert blocks["drive-scsi2"]["inserted"]["ro"] is True
    assert "inserted" not in blocks["drive-ide3"]

    assert os.getsid(model.pid) == model.pid and os.readlink(f"/proc/{model.pid}/cwd") == "/"
    assert qmp_path(DOMID).stat().st_mode & 0o777 == 0o600
    assert model.alive()
    model.stop()
    model.stop()
    assert not model.alive()


@needs_qemu
def test_qemu_dying_at_start_tells_why(script: Script) -> None:
    spec = DeviceModelSpec(
        name="g", uuid=UUID, memory=64 * MIB, disks=(EmulatedDisk(0, "/nonexistent/disk"),)
    )
    model = spawn(spec, DOMID, binary=script(WITHOUT_XEN))
    with pytest.raises(DeviceModelError, match=r"ended with status 1 .*/nonexistent/disk.*No such file") as e:
        model.wait_ready(60)
    assert str(log_path("g")) in (e.value.hint or "")
    model.stop()


def test_killed_while_starting(script: Script) -> None:
    model = spawn(SPEC, DOMID, binary=script(python("os.kill(os.getpid(), signal.SIGSEGV)")))
    with pytest.raises(DeviceModelError, match="was killed by SIGSEGV as it started"):
        model.wait_ready(60)
    model.stop()


def test_exit_status_zero_is_a_failure_too(script: Script) -> None:
    body = "print('char device redirected'); print('out of luck', file=sys.stderr)"
    model = spawn(SPEC, DOMID, binary=script(python(body)))
    with pytest.raises(DeviceModelError, match="ended with status 0 as it started"):
        model.wait_ready(60)
    model.stop()
    assert "out of luck" in log_path(SPEC.name).read_text()


def test_never_answering_meets_the_deadline_and_is_stopped(script: Script) -> None:
    model = spawn(SPEC, DOMID, binary=script(SLEEPER))
    with pytest.raises(DeadlineError, match=f"domain {DOMID} was not ready within 0.2 s"):
        model.wait_ready(0.2)
    with pytest.raises(LocalProtocolError):
        model.wait_ready(0.2)
    model.stop()


def test_closing_qmp_without_dying(script: Script) -> None:
    model = spawn(SPEC, DOMID, binary=script(python("os.close(3); signal.pause()")))
    with pytest.raises(DeviceModelError, match="closed its control connection"):
        model.wait_ready(60)
    model.stop()


@pytest.mark.parametrize("body", ["os.kill(os.getpid(), signal.SIGSTOP)", "signal.pause()"])
def test_what_does_not_heed_sigterm_is_killed(script: Script, body: str) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(2, b'x')\n"
    model = spawn(SPEC, DOMID, binary=script(python(ignore + body)))
    log = log_path(SPEC.name)
    wait_for(lambda: log.read_bytes() == b"x")
    model.stop(grace=0.1)


def wait_for(condition: Callable[[], bool]) -> None:
    """The log is written by another process: look again until it says so (the test's timeout ends it)."""
    while not condition():
        select.select([], [], [], 0.01)


def test_not_a_program(script: Script) -> None:
    with pytest.raises(DeviceModelError, match="cannot be started: Exec format error"):
        spawn(SPEC, DOMID, binary=script("no program at all"))


def test_spawn_undoes_what_it_began(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = script(SLEEPER)
    monkeypatch.setenv("PATH", "/nonexistent")  # the log's writer cannot be started
    with pytest.raises(DeviceModelError, match="cannot be started: No such file"):
        spawn(SPEC, DOMID, binary=binary)


def test_xsa_180_output_is_capped_and_never_blocks(script: Script) -> None:
    body = """
for n in range(60000):
    try: os.write(2, b'noise from a guest, again and again and again\\n')
    except BlockingIOError: time.sleep(0.001)
    except BrokenPipeError: os._exit(7)
"""
    model = spawn(SPEC, DOMID, binary=script(python("signal.signal(signal.SIGPIPE, signal.SIG_IGN)" + body)))
    with pytest.raises(DeviceModelError, match="ended with status 7"):
        model.wait_ready(60)
    model.stop()
    assert 0 < log_path(SPEC.name).stat().st_size <= LOG_LIMIT


def test_a_stuck_log_does_not_block(script: Script) -> None:
    body = """
try:
    while True: os.write(2, bytes(4096))
except BlockingIOError: os._exit(5)
"""
    model = spawn(SPEC, DOMID, binary=script(python(f"signal.pause\nos.read(0, 1)\ntime.sleep(0.2){body}")))
    assert model._pump
    os.kill(model._pump[0], signal.SIGSTOP)
    assert pidfd.wait(model.fileno(), 60)
    os.kill(model._pump[0], signal.SIGCONT)
    model.stop()
    assert model._status == "ended with status 5"


def test_log_of_the_run_before_is_kept(script: Script) -> None:
    for text in ("first", "second"):
        model = spawn(SPEC, DOMID, binary=script(python(f"os.write(2, b'{text}')")))
        assert pidfd.wait(model.fileno(), 60)
        assert model.last_words() == text
        model.stop()
    log = log_path(SPEC.name)
    assert log.name == "qemu-guest_1.log" and log.stat().st_mode & 0o777 == 0o600
    assert (log.read_text(), log.with_name(log.name + ".1").read_text()) == ("second", "first")


def test_no_descriptor_of_ours_is_inherited(script: Script) -> None:
    stray = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(stray, True)
    model = spawn(SPEC, DOMID, binary=script(SLEEPER))
    try:
        kinds = [os.readlink(f"/proc/{model.pid}/fd/{n}").split(":")[0] for n in range(4)]
        assert kinds == ["/dev/null", "pipe", "pipe", "socket"]
        inherited = {int(n) for n in os.listdir(f"/proc/{model.pid}/fd")}
        assert stray not in inherited
    finally:
        os.close(stray)
        model.stop()


def test_works_with_standard_descriptors_closed(script: Script, tmp_path: Path) -> None:
    code = f"""
import os
for fd in (0, 1, 2): os.close(fd)
from test_devicemodel_process import SPEC, DOMID, spawn
model = spawn(SPEC, DOMID, binary={script(SLEEPER)!r})
kinds = [os.readlink(f"/proc/{{model.pid}}/fd/{{n}}").split(":")[0] for n in range(4)]
model.stop()
os._exit(0 if kinds == ["/dev/null", "pipe", "pipe", "socket"] else 9)
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


def start_elsewhere(binary: str) -> int:
    """Start a device model in a process that ends at once; returns the device model's pid."""
    code = f"""
from test_devicemodel_process import SPEC, DOMID, spawn
print(spawn(SPEC, DOMID, binary={binary!r}).pid)
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        timeout=60,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(done.stdout)


def test_outlives_its_starter_and_is_found(script: Script) -> None:
    pid = start_elsewhere(script(SLEEPER))
    found: list[DeviceModel | None] = [
        find(DOMID, uuid=UUID, pid=pid),
        find(DOMID),
        find(DOMID, uuid=UUID, pid=os.getpid()),  # a pid that has become another process
        find(DOMID, pid=2**22 + 1),  # a pid that cannot be
        find(DOMID, pid=-1),
    ]
    for model in found:
        assert model and model.pid == pid and model.alive()
    assert find(DOMID, uuid="00000000-0000-4000-8000-000000000000", pid=pid) is None
    assert find(DOMID + 1, pid=pid) is None
    for model in found:
        assert model
        model.stop()


def test_a_device_model_that_has_ended_is_not_found(script: Script) -> None:
    model = spawn(SPEC, DOMID, binary=script(SLEEPER))
    os.kill(model.pid, signal.SIGKILL)
    assert pidfd.wait(model.fileno(), 60)  # a zombie now
    assert find(DOMID, pid=model.pid) is None
    model.stop()


def test_one_that_others_ended_leaves_no_zombie(script: Script) -> None:
    """A guest that restarts while its creator lives: the keeper ends our child, and we never stop it."""
    model = spawn(SPEC, DOMID, binary=script(SLEEPER))
    model._hang_up()
    os.kill(model.pid, signal.SIGKILL)
    pidfd.wait(model.fileno(), 10)
    assert Path(f"/proc/{model.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    end = time.monotonic() + 10
    while _spawned and time.monotonic() < end:  # its dd ends with it
        reap_ended()
        time.sleep(0.01)
    assert not _spawned and not Path(f"/proc/{model.pid}").exists()
    model.stop()  # what it was ended by is still known
    assert model._status == "was killed by SIGKILL"
    qmp_path(DOMID).unlink(missing_ok=True)
