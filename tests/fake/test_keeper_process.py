"""Keepers as real processes. What stands in for Xen is a folder: a file says that the domain has ended; what
its configuration says is carried out by ``lifecycle``, whose tests are elsewhere."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

import xtool.backends.server as server_module
from xtool import paths, warmlink
from xtool.devicemodel import pidfd
from xtool.devices.xenbus import DeviceId
from xtool.toolstack import backends, deathwatch, journal, keeper, keeping
from xtool.toolstack.supervise import Supervisor

DOMID = 31002
DEVICES = [DeviceId(DOMID, "vbd", 51712, "xtool-vbd")]


def until(check: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


class World:
    """``ended(domid)`` is a file; a byte in ``bell`` has every keeper look, as xenstored's announcement
    does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uuid = str(uuid4())
        self.handle = bytes.fromhex(self.uuid.replace("-", ""))
        folder.mkdir()
        journal.write(journal.Entry(self.uuid, "web", "pv", "running", domid=DOMID))
        state = SimpleNamespace(handle=self.handle)
        self.host: Any = SimpleNamespace(real=True, hv=SimpleNamespace(domain=lambda domid: state))

    def eyes(self, domid: int, handle: bytes) -> Eyes:
        return Eyes(self.folder, domid)

    def end(self, domid: int = DOMID) -> None:
        (self.folder / f"ended-{domid}").touch()

    def words(self) -> list[str]:
        path = self.folder / "words"
        return path.read_text().split() if path.exists() else []

    def say(self, word: str) -> None:
        with (self.folder / "words").open("a") as file:
            file.write(f"{word}\n")

    def start(self) -> int:
        assert keeper.ensure(DOMID, self.uuid)
        return int(until(lambda: keeper.pid_of(self.uuid)))


class Eyes:
    def __init__(self, folder: Path, domid: int) -> None:
        self.folder, self.domid = folder, domid

    def fileno(self) -> int:
        return -1

    def drain(self) -> None:
        pass

    def ended(self) -> bool:
        return (self.folder / f"ended-{self.domid}").exists()

    def follow(self, domid: int, handle: bytes) -> None:
        self.domid = domid

    def close(self) -> None:
        pass


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setattr(backends, "RESTART_PAUSE", 0.02)
    monkeypatch.setattr(keeping, "_RESCAN", 0.02)
    monkeypatch.setattr(keeping, "_RETRY", 0.02)
    world = World(tmp_path / "world")
    keep = keeping.keep
    monkeypatch.setattr(keeping, "keep", lambda *args, **keys: keep(*args, eyes=world.eyes, **keys))
    monkeypatch.setattr(deathwatch, "device_model_pid", lambda domid: 0)
    monkeypatch.setattr(keeper, "is_bare", lambda *_: False)  # else the watcher would have it
    yield world
    journal.remove(world.uuid)
    pid = keeper.pid_of(world.uuid)
    if pid:
        os.kill(pid, signal.SIGKILL)
    backends.stop_backends(world.host, DOMID)
    until(lambda: not keeper.pid_of(world.uuid))
    keeper.reap_children()


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_one_keeper_whatever_happens(world: World) -> None:
    pid = world.start()
    until(lambda: comm(pid) == f"xtool-k-{DOMID}")
    assert not keeper.ensure(DOMID, world.uuid) and keeper.missing() == []
    entry = journal.read(world.uuid)
    assert entry is not None and entry.keeper == pid
    for _ in range(5):  # several at once: one stays
        keeper.leave_behind("x", keeper.LOG, lambda: keeper.become_keeper(DOMID, world.uuid, as_daemon=False))
    time.sleep(0.3)
    assert keeper.pid_of(world.uuid) == pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: not keeper.pid_of(world.uuid))
    assert [e.uuid for e in keeper.missing()] == [world.uuid]
    other = world.start()
    assert other != pid and keeper.missing() == []
    os.kill(other, signal.SIGTERM)
    until(lambda: not keeper.pid_of(world.uuid))
    # Not kept: one that stays as it is, one that goes.
    journal.update(world.uuid, settled="preserved")
    assert keeper.missing() == []
    journal.update(world.uuid, settled="", state="destroying")
    assert keeper.missing() == []
    journal.update(world.uuid, then="restart")
    assert len(keeper.missing()) == 1
    with journal.locked(world.uuid):  # somebody is at it
        assert keeper.missing() == []


@pytest.mark.parametrize("left", ["", f"{os.getpid()}\n"], ids=["empty", "stale"])
def test_one_that_is_only_looked_at_starts(world: World, left: str) -> None:
    """Whoever asks for a keeper's pid holds the lock for a moment. A pid in the file may be of a killed one,
    and another process' by now."""
    path = Path(journal.keeper_path(world.uuid))
    path.write_text(left)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert keeper.ensure(DOMID, world.uuid)
        time.sleep(0.1)
    pid = until(lambda: keeper.pid_of(world.uuid))
    until(lambda: comm(pid) == f"xtool-k-{DOMID}")
    assert int(path.read_text()) == pid


def test_one_whose_file_is_removed_meanwhile_makes_another(world: World) -> None:
    """By a keeper that ends, or who forgets the domain of before."""
    path = Path(journal.keeper_path(world.uuid))
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert keeper.ensure(DOMID, world.uuid)
        time.sleep(0.1)
        path.unlink()
    assert until(lambda: keeper.pid_of(world.uuid)) == int(path.read_text())


def test_told_to_look_before_it_can_hear(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pid can be read before it has a handler; the default is to be killed."""
    go = world.folder / "go"
    run = keeping.Keeping.run

    def slow(self: keeping.Keeping, eyes: Callable[[int, bytes], keeping.Eyes]) -> None:
        until(go.exists)
        run(self, eyes)

    monkeypatch.setattr(keeping.Keeping, "run", slow)
    monkeypatch.setattr(server_module, "serve", wait_for_term)
    pid = world.start()
    backends.start_backends(world.host, DOMID, DEVICES)
    go.touch()
    server = until(lambda: backends.server_pid(DOMID))
    assert keeper.pid_of(world.uuid) == pid and backends._pids(DOMID) == [pid, server]


def test_it_ends_with_its_domain(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(domid: int, uuid: str) -> str:
        world.say(f"settled-{domid}")
        journal.remove(uuid)
        return "done"

    monkeypatch.setattr(keeping, "_settle", settle)
    world.start()
    world.end()
    until(lambda: not keeper.pid_of(world.uuid))
    assert world.words() == [f"settled-{DOMID}"]
    until(lambda: list((paths.run_dir() / "domains").iterdir()) == [])


def test_what_happened_while_it_had_no_keeper(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed keeper's successor carries out what is due."""

    def settle(domid: int, uuid: str) -> str:
        world.say("settled")
        return "done"

    monkeypatch.setattr(keeping, "_settle", settle)
    os.kill(world.start(), signal.SIGKILL)
    until(lambda: not keeper.pid_of(world.uuid))
    world.end()
    time.sleep(0.1)
    assert world.words() == []
    keeper.ensure(DOMID, world.uuid)
    until(lambda: world.words() == ["settled"])


def test_it_follows_restarts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(domid: int, uuid: str) -> str:
        world.say(str(domid))
        journal.update(uuid, domid=domid + 1)
        return str(domid + 1)

    monkeypatch.setattr(keeping, "_settle", settle)
    pid = world.start()
    for number in range(3):
        world.end(DOMID + number)
        until(lambda n=number: comm(pid) == f"xtool-k-{DOMID + n + 1}")
    assert world.words() == [str(DOMID + n) for n in range(3)] and keeper.pid_of(world.uuid) == pid


def test_a_child_that_dies_is_followed_by_another(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(domid: int, uuid: str) -> str:
        world.say("tried")
        if len(world.words()) < 4:
            os.kill(os.getpid(), signal.SIGKILL)
        journal.remove(uuid)
        return "done"

    monkeypatch.setattr(keeping, "_settle", settle)
    world.start()
    world.end()
    until(lambda: not keeper.pid_of(world.uuid))
    assert len(world.words()) == 4


def test_a_child_holds_no_lock_of_the_keepers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the domain it creates again could not have a keeper of its own."""

    def settle(domid: int, uuid: str) -> str:
        os.kill(keeper.pid_of(uuid), signal.SIGKILL)
        until(lambda: not keeper.pid_of(uuid))
        world.say(str(sorted(map(int, os.listdir("/proc/self/fd")))).replace(" ", ""))
        return "done"

    monkeypatch.setattr(keeping, "_settle", settle)
    world.start()
    world.end()
    until(world.words)
    assert world.words()[0].startswith("[0,1,2,3,")


def wait_for_term(domid: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True:
        signal.pause()


def test_it_supervises_the_server(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "serve", wait_for_term)
    pid = world.start()
    backends.start_backends(world.host, DOMID, DEVICES)  # told, it looks again
    first = until(lambda: backends.server_pid(DOMID))
    assert backends._pids(DOMID) == [pid, first] and backends.is_running(DOMID)
    assert keeper.pid_of(world.uuid) == pid
    os.kill(first, signal.SIGKILL)
    second = until(lambda: (found := backends.server_pid(DOMID)) and found != first and found)
    # The server goes on without it, and is adopted by the next.
    os.kill(pid, signal.SIGKILL)
    until(lambda: not keeper.pid_of(world.uuid))
    assert backends.server_pid(DOMID) == second
    other = world.start()
    until(lambda: backends._pids(DOMID) == [other, second])
    os.kill(second, signal.SIGKILL)
    third = until(lambda: (found := backends.server_pid(DOMID)) and found != second and found)
    assert backends._pids(DOMID) == [other, third]
    # An upgrade replaces both.
    backends.restart_backends(world.host, DOMID)
    fourth = until(lambda: (found := backends.server_pid(DOMID)) and found != third and found)
    assert until(lambda: keeper.pid_of(world.uuid)) != other
    backends.stop_backends(world.host, DOMID)
    assert not Path(f"/proc/{fourth}/exe").exists() and not backends.is_running(DOMID)
    assert [path.name for path in paths.run_dir().iterdir()] == ["domains"]


def test_replaced_while_it_sees_to_the_server(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of an upgrade ends before its keeper, which is at it, can know that it is to end as well.
    The successor needs what the server wrote."""
    held = world.folder / "held"
    work = Supervisor.work

    def slow(self: Supervisor) -> float | None:
        if (world.folder / "hold").exists() and not held.exists():
            held.touch()
            assert pidfd.wait(self.fileno(), 10)
        return work(self)

    def let_go(domid: int) -> bool:
        told: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
        while not told:
            time.sleep(0.01)
        return False

    monkeypatch.setattr(server_module, "serve", let_go)
    monkeypatch.setattr(Supervisor, "work", slow)
    backends.start_backends(world.host, DOMID, DEVICES)
    first = until(lambda: backends.server_pid(DOMID))
    responses = backends._folder(DOMID) / "responses"
    responses.parent.mkdir(parents=True)
    responses.touch()
    (world.folder / "hold").touch()
    until(held.exists)
    backends.restart_backends(world.host, DOMID)
    until(lambda: backends.server_pid(DOMID) not in (None, first))
    assert responses.exists()


def test_both_killed_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "serve", wait_for_term)
    backends.start_backends(world.host, DOMID, DEVICES)
    server = until(lambda: backends.server_pid(DOMID))
    os.kill(keeper.pid_of(world.uuid), signal.SIGKILL)
    os.kill(server, signal.SIGKILL)
    until(lambda: not backends.is_running(DOMID))
    world.start()
    until(lambda: backends.server_pid(DOMID) not in (None, server))


def test_sigterm_ends_both(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "serve", wait_for_term)
    backends.start_backends(world.host, DOMID, DEVICES)
    server = until(lambda: backends.server_pid(DOMID))
    os.kill(keeper.pid_of(world.uuid), signal.SIGTERM)
    until(lambda: not keeper.pid_of(world.uuid))
    assert not Path(f"/proc/{server}/exe").exists()


def test_a_qemu_that_dies_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    program = [sys.executable, "-IS", "-c", "import time; time.sleep(100)", "-xen-domid"]
    qemu, stranger = subprocess.Popen([*program, str(DOMID)]), subprocess.Popen([*program, "1"])
    pids = [stranger.pid, qemu.pid]

    def died(domid: int, uuid: str) -> str:
        world.say(f"died-{domid}")
        return "watch"

    monkeypatch.setattr(keeping, "_device_model", died)
    monkeypatch.setattr(deathwatch, "device_model_pid", lambda domid: pids[len(world.words()) > 0])
    try:
        world.start()
        time.sleep(0.1)
        stranger.kill()  # a forged or stale number
        stranger.wait()
        time.sleep(0.1)
        assert world.words() == []
        world.say("looked")
        until(lambda: Path(f"/proc/{qemu.pid}/cmdline").read_bytes().endswith(b"%d\0" % DOMID))
        keeper.look_again(DOMID, world.uuid)
        time.sleep(0.2)
        qemu.kill()
        qemu.wait()
        until(lambda: world.words() == ["looked", f"died-{DOMID}"])
        assert keeper.pid_of(world.uuid)
    finally:
        for process in (qemu, stranger):
            process.kill()
            process.wait()


def test_a_dead_qemu_does_not_keep_it_busy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a child waits to restart the domain, for up to a minute."""
    program = [sys.executable, "-IS", "-c", "import time; time.sleep(100)", "-xen-domid", str(DOMID)]
    qemu = subprocess.Popen(program)

    def settle(domid: int, uuid: str) -> str:
        world.say("settling")
        time.sleep(30)
        return "done"

    def used(pid: int) -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    monkeypatch.setattr(keeping, "_RESCAN", 0.2)
    monkeypatch.setattr(keeping, "_settle", settle)
    monkeypatch.setattr(deathwatch, "device_model_pid", lambda domid: qemu.pid)
    try:
        until(lambda: Path(f"/proc/{qemu.pid}/cmdline").read_bytes().endswith(b"%d\0" % DOMID))
        pid = world.start()
        time.sleep(0.3)
        assert any("pidfd" in os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
        world.end()
        until(world.words)
        qemu.kill()
        qemu.wait()
        before = used(pid)
        time.sleep(1.0)
        assert used(pid) - before < 20  # hundredths of a second
    finally:
        qemu.kill()
        qemu.wait()
        acting = [p for p in os.listdir("/proc") if p.isdecimal() and _named(p, f"xtool-act-{DOMID}")]
        for number in acting:
            os.kill(int(number), signal.SIGKILL)


def _named(pid: str, name: str) -> bool:
    try:
        return comm(int(pid)) == name
    except OSError:
        return False


ZYGOTE = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_keeper_process import Eyes
from xtool.toolstack import deathwatch, keeper, keeping
from xtool.daemon import zygote
keeper.is_bare = lambda *a: False
keep = keeping.keep
keeping._RESCAN = 0.02
keeping.keep = lambda *a, **k: keep(*a, eyes=lambda domid, handle: Eyes(Path({world!r}), domid), **k)
deathwatch.device_model_pid = lambda domid: 0
sys.argv[:] = ["zygote"]
zygote.main()
"""


def test_the_zygote_forks_keepers_and_replaces_killed_ones(world: World) -> None:
    program = ZYGOTE.format(tests=str(Path(__file__).parent), world=str(world.folder))
    root = str(Path(__file__).resolve().parents[2])
    zygote = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": root}, cwd="/"
    )
    try:
        # As it starts it looks for domains without one.
        until((paths.run_dir() / "zygote.sock").exists, 60)
        first = until(lambda: keeper.pid_of(world.uuid))
        os.kill(first, signal.SIGKILL)
        second = until(lambda: (pid := keeper.pid_of(world.uuid)) and pid != first and pid)
        os.kill(second, signal.SIGTERM)  # told to end: nobody starts it again
        until(lambda: not keeper.pid_of(world.uuid))
        time.sleep(1.5)
        assert not keeper.pid_of(world.uuid)
        assert warmlink.ask_for_keeper(DOMID, world.uuid)
        third = keeper.pid_of(world.uuid)
        assert third and _parent(third) == zygote.pid
        # It goes on without the zygote, and none of the zygote's files is open in it.
        names = {os.readlink(f"/proc/{third}/fd/{fd}") for fd in os.listdir(f"/proc/{third}/fd")}
        assert not [name for name in names if name.endswith(("zygote.lock", "inotify"))]
        zygote.kill()
        zygote.wait()
        time.sleep(0.1)
        assert keeper.pid_of(world.uuid) == third
    finally:
        zygote.kill()
        zygote.wait()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
