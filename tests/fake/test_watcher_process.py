"""The watcher as a real process. What stands in for Xen is a folder (``halls``); what a domain's
configuration says is carried out by ``lifecycle``, whose tests are elsewhere."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from halls import Eyes, Hall, KeeperEyes, comm, running, until

import xtool.backends.server as server_module
from xtool import paths, warmlink
from xtool.devices.xenbus import DeviceId
from xtool.toolstack import (
    backends,
    deathwatch,
    journal,
    keeper,
    keeping,
    lifecycle,
    watchdesk,
    watching,
    watchlink,
)
from xtool.toolstack import host as host_module
from xtool.toolstack.api import LifecycleResult

Settle = Callable[[int, str], str]


@pytest.fixture
def hall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hall]:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setenv("XTOOL_WARM", "0")
    paths.run_dir().mkdir()
    hall = Hall(tmp_path / "hall")
    for name, value in {"_RESCAN": 0.05, "_RETRY": 0.05, "_GONE": 0.05}.items():
        monkeypatch.setattr(watching, name, value)
    watch, keep = watching.watch, keeping.keep
    monkeypatch.setattr(watching, "watch", lambda *args: watch(*args, lambda: Eyes(hall.folder)))
    eyes = lambda *domain: KeeperEyes(hall.folder, *domain)  # noqa: E731
    monkeypatch.setattr(keeping, "keep", lambda *args: keep(*args, eyes))
    monkeypatch.setattr(keeping, "_RESCAN", 0.05)
    monkeypatch.setattr(deathwatch, "device_model_pid", lambda domid: 0)
    monkeypatch.setattr(deathwatch, "device_models", lambda domids: set())
    yield hall
    for uuid in journal.uuids():
        pid = keeper.pid_of(uuid)
        journal.remove(uuid)
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for domid in hall.uuids:
        backends.stop_backends(hall.host, domid)
    if pid := watchlink.pid():
        os.kill(pid, signal.SIGKILL)
        until(lambda: gone(pid))
    keeper.reap_children()


def settled_by(hall: Hall, monkeypatch: pytest.MonkeyPatch, settle: Settle) -> None:
    monkeypatch.setattr(watching, "_settle", settle)


def destroys(hall: Hall) -> Settle:
    def settle(domid: int, uuid: str) -> str:
        hall.forget(domid, uuid)
        hall.say(str(domid))
        return "done"

    return settle


def gone(pid: int) -> bool:
    keeper.reap_children()
    return not watchlink.is_watcher(pid)


def the_watcher(hall: Hall) -> int:
    """It has all there are."""
    [pid] = hall.pids()
    assert watchlink.is_watcher(pid) and watchlink.pid() == pid
    return pid


# --- who looks after whom
def test_one_process_for_all(hall: Hall) -> None:
    made = hall.make(5)
    assert len(keeper.missing()) == 5
    assert keeper.ensure(*made[0])
    pid = the_watcher(hall)  # it took up all there were, before that came back
    assert not any(keeper.ensure(*one) for one in made) and keeper.missing() == []
    new = hall.make(1)[0]
    assert keeper.ensure(*new) and keeper.pid_of(new[1]) == pid
    assert watchlink.take(*new, lambda: pytest.fail("there is one"))
    # Killed, it is missed by all; who looks after one starts another for all.
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid))
    assert len(keeper.missing()) == 6
    assert keeper.ensure(*made[3])
    other = the_watcher(hall)
    assert other != pid and keeper.missing() == []
    os.kill(other, signal.SIGTERM)  # told to end: nobody starts one at once
    until(lambda: gone(other))
    assert hall.pids() == {0} and not Path(watchlink.socket_path()).exists()


def test_several_that_start_it_at_once(hall: Hall) -> None:
    """Each sees its own domain looked after when it comes back, and there is one watcher."""
    made = hall.make(8)
    held, go = os.pipe()
    children = []
    for domid, uuid in made:
        if not (child := os.fork()):
            code = 1
            try:
                os.close(go)
                os.read(held, 1)  # until all are there
                keeper.ensure(domid, uuid)
                code = 0 if watchlink.is_watcher(keeper.pid_of(uuid)) else 2
            finally:
                os._exit(code)
        children.append(child)
    os.close(held)
    os.close(go)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    the_watcher(hall)


def test_a_domain_that_has_a_keeper_keeps_it(hall: Hall) -> None:
    """As after an upgrade."""
    (first, second) = hall.make(2)
    keeper.start_own(*first)
    own = until(lambda: keeper.pid_of(first[1]))
    until(lambda: comm(own) == f"xtool-k-{first[0]}")
    keeper.ensure(*first)
    keeper.ensure(*second)
    assert keeper.pid_of(first[1]) == own and watchlink.is_watcher(keeper.pid_of(second[1]))
    assert watchlink.ask(watchlink.TAKE, *first) == watchlink.YES and keeper.pid_of(first[1]) == own
    assert comm(own) == f"xtool-k-{first[0]}"


def test_it_ends_with_the_last_domain(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    settled_by(hall, monkeypatch, destroys(hall))
    (first, second) = hall.make(2)
    keeper.ensure(*first)
    pid = the_watcher(hall)
    hall.end(first[0])
    until(lambda: journal.uuids() == [second[1]])
    until(lambda: not Path(journal.keeper_path(first[1])).exists())
    assert the_watcher(hall) == pid
    hall.forget(*second)  # destroyed by somebody else: no child is needed
    until(lambda: gone(pid))
    assert hall.words() == [str(first[0])]
    assert [path.name for path in (paths.run_dir() / "domains").iterdir()] == []
    assert sorted(path.name for path in paths.run_dir().iterdir()) == ["domains", "watcher.lock"]


def test_one_that_nobody_asks_for_anything_ends(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_FIRST", 0.2)
    keeper.start_watcher()
    pid = until(watchlink.pid)
    until(lambda: gone(pid))


# --- ends
def test_restarts_are_followed(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(domid: int, uuid: str) -> str:
        hall.put(domid, uuid)
        hall.put(domid + 1000, uuid, "up")
        journal.update(uuid, domid=domid + 1000)
        hall.say(str(domid))
        return str(domid + 1000)

    settled_by(hall, monkeypatch, settle)
    domid, uuid = hall.make(1)[0]
    keeper.ensure(domid, uuid)
    pid = the_watcher(hall)
    for number in range(3):
        hall.put(domid + 1000 * number, uuid, "ended")
        until(lambda n=number: len(hall.words()) == n + 1)
    assert hall.words() == [str(domid + 1000 * n) for n in range(3)] and the_watcher(hall) == pid


def test_what_came_back_by_somebody_elses_hand(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """Destroyed and created anew under the same uuid: the watcher has it as it did, without a child."""
    settled_by(hall, monkeypatch, destroys(hall))
    domid, uuid = hall.make(1)[0]
    keeper.ensure(domid, uuid)
    pid = the_watcher(hall)
    hall.put(domid + 1000, uuid, "up")
    journal.update(uuid, domid=domid + 1000)
    hall.put(domid, uuid)
    time.sleep(0.3)
    assert hall.words() == [] and the_watcher(hall) == pid
    hall.put(domid + 1000, uuid, "ended")
    until(lambda: hall.words() == [str(domid + 1000)])


def test_what_happened_while_there_was_none(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    settled_by(hall, monkeypatch, destroys(hall))
    made = hall.make(3)
    keeper.ensure(*made[0])
    pid = the_watcher(hall)
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid))
    hall.end(made[0][0])
    hall.put(*made[1])  # gone altogether
    time.sleep(0.1)
    assert hall.words() == []
    keeper.ensure(*made[2])
    until(lambda: sorted(hall.words()) == [str(made[0][0]), str(made[1][0])])
    assert journal.uuids() == [made[2][1]]


def test_killed_with_its_children_at_work(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart it had begun is carried through by the next, once."""

    def settle(domid: int, uuid: str) -> str:
        with journal.locked(uuid):
            entry = journal.read(uuid)
            assert entry is not None
            if entry.domid != domid:
                return str(entry.domid)
            if entry.state == "running":
                journal.update(uuid, state="destroying", then="restart")
                hall.say(f"begun-{domid}")
                time.sleep(30)
            hall.put(domid, uuid)
            hall.put(domid + 1000, uuid, "up")
            journal.update(uuid, state="running", then="", domid=domid + 1000)
            hall.say(f"restarted-{domid}")
        return str(domid + 1000)

    settled_by(hall, monkeypatch, settle)
    made = hall.make(3)
    keeper.ensure(*made[0])
    pid = the_watcher(hall)
    for domid, _ in made[:2]:
        hall.end(domid)
    until(lambda: len(hall.words()) == 2)
    children = [pid for domid, _ in made[:2] for pid in running(f"xtool-act-{domid}")]
    assert len(children) == 2
    os.kill(pid, signal.SIGKILL)
    for child in children:
        os.kill(child, signal.SIGKILL)
    until(lambda: gone(pid))
    keeper.ensure(*made[2])
    until(lambda: len(hall.words()) == 4)
    assert sorted(hall.words()[2:]) == [f"restarted-{domid}" for domid, _ in made[:2]]
    other = the_watcher(hall)
    until(lambda: {e.domid for e in journal.entries()} == {made[0][0] + 1000, made[1][0] + 1000, made[2][0]})
    assert the_watcher(hall) == other


def test_a_child_that_dies_is_followed_by_another(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(domid: int, uuid: str) -> str:
        hall.say("tried")
        if len(hall.words()) < 4:
            os.kill(os.getpid(), signal.SIGKILL)
        hall.forget(domid, uuid)
        return "done"

    settled_by(hall, monkeypatch, settle)
    domid, uuid = hall.make(1)[0]
    keeper.ensure(domid, uuid)
    hall.end(domid)
    until(lambda: journal.uuids() == [])
    assert len(hall.words()) == 4


def test_a_child_has_nothing_of_the_watchers(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock, however many there are, and the limit of descriptors of everybody else."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def settle(domid: int, uuid: str) -> str:
        hall.say(",".join(sorted(os.listdir("/proc/self/fd"), key=int)))
        hall.say(str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
        return destroys(hall)(domid, uuid)

    settled_by(hall, monkeypatch, settle)
    made = hall.make(40)
    keeper.ensure(*made[0])
    pid = the_watcher(hall)
    assert len(os.listdir(f"/proc/{pid}/fd")) > 40
    hall.end(made[39][0])
    descriptors, limit, _ = until(lambda: len(words := hall.words()) == 3 and words)
    assert descriptors in ("0,1,2,3", "0,1,2,3,4") and int(limit) == before


def test_many_that_end_at_once_have_few_children(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_AT_ONCE", 4)

    def settle(domid: int, uuid: str) -> str:
        hall.say("begin")
        time.sleep(0.1)
        hall.say("end")
        hall.forget(domid, uuid)
        return "done"

    settled_by(hall, monkeypatch, settle)
    made = hall.make(100)
    keeper.ensure(*made[0])
    pid = the_watcher(hall)
    os.kill(pid, signal.SIGSTOP)
    for domid, _ in made:
        hall.end(domid)
    os.kill(pid, signal.SIGCONT)
    until(lambda: journal.uuids() == [], 60)
    at_work = most = 0
    for word in hall.words():
        at_work += 1 if word == "begin" else -1
        most = max(most, at_work)
    assert len(hall.words()) == 200 and 2 <= most <= 4
    until(lambda: gone(pid))


def test_those_that_hang_hold_up_nobody(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_AT_ONCE", 2)
    monkeypatch.setattr(watching, "_LONG", 0.2)
    made = hall.make(6)
    hang = {domid for domid, _ in made[:5]}

    def settle(domid: int, uuid: str) -> str:
        if domid in hang:
            hall.say("hangs")
            time.sleep(3)
        return destroys(hall)(domid, uuid)

    settled_by(hall, monkeypatch, settle)
    keeper.ensure(*made[0])
    for domid, _ in made:
        hall.end(domid)
    until(lambda: str(made[5][0]) in hall.words(), 2.5)
    until(lambda: journal.uuids() == [])


@pytest.fixture
def rests(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> Hall:
    """``lifecycle.settle`` waits before it restarts a domain, for as long as ``hall/rest`` says in s."""

    def settle(host: Any, domid: int, uuid: str, pause: Callable[[float], None]) -> LifecycleResult:
        state = hall.folder / "domains" / f"{domid}.{uuid}"
        rested = hall.folder / f"rested-{domid}"
        if state.exists() and (hall.folder / "rest").exists() and not rested.exists():
            rested.touch()
            pause(float((hall.folder / "rest").read_text()))
        hall.forget(domid, uuid)
        hall.say(f"{domid}")
        return LifecycleResult(domid, "", "destroyed")

    monkeypatch.setattr(lifecycle, "settle", settle)
    monkeypatch.setattr(host_module, "open_host", lambda: None)
    return hall


def test_a_pause_of_a_reboot_loop_takes_no_child(rests: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_AT_ONCE", 1)
    made = rests.make(6)
    (rests.folder / "rest").write_text("1.5")
    keeper.ensure(*made[0])
    began = time.monotonic()
    for domid, _ in made[:4]:
        rests.end(domid)
    until(lambda: len(list(rests.folder.glob("rested-*"))) == 4)
    (rests.folder / "rest").unlink()
    rests.end(made[4][0])
    until(lambda: rests.words() == [str(made[4][0])])
    rests.forget(*made[0])  # while it waits it can be destroyed
    assert time.monotonic() - began < 1.5, "the machine is too slow for what is to be seen"
    until(lambda: len(rests.words()) == 4)
    assert time.monotonic() - began >= 1.5
    assert sorted(rests.words()[1:]) == [str(domid) for domid, _ in made[1:4]]
    assert journal.uuids() == [made[5][1]]


# --- a domain that is bare no more
DISK = "xtool-vbd"


def devices(domid: int) -> list[DeviceId]:
    return [DeviceId(domid, "vbd", 51712, DISK)]


def wait_for_term(domid: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True:
        signal.pause()


def test_handed_over_with_its_first_server(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "serve", wait_for_term)
    (first, second) = hall.make(2)
    keeper.ensure(*first)
    watcher = the_watcher(hall)
    backends.start_backends(hall.host, first[0], devices(first[0]))
    server = until(lambda: backends.server_pid(first[0]))
    own = keeper.pid_of(first[1])
    assert comm(own) == f"xtool-k-{first[0]}" and backends._pids(first[0]) == [own, server]
    assert keeper.pid_of(second[1]) == watcher
    # The watcher takes it no more, nor does the next.
    os.kill(own, signal.SIGKILL)
    os.kill(watcher, signal.SIGKILL)
    until(lambda: gone(watcher) and not keeper.pid_of(first[1]))
    assert watchlink.ask(watchlink.TAKE, *first) == b""
    keeper.ensure(*second)
    assert keeper.pid_of(first[1]) == 0
    assert watchlink.ask(watchlink.TAKE, *first) == watchlink.NO
    keeper.ensure(*first)
    assert comm(until(lambda: keeper.pid_of(first[1]))) == f"xtool-k-{first[0]}"


def test_handed_over_with_its_first_qemu(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    domid, uuid = hall.make(1)[0]
    keeper.ensure(domid, uuid)
    watcher = the_watcher(hall)
    keeper.look_again(domid, uuid)
    assert keeper.pid_of(uuid) == watcher  # it has none
    monkeypatch.setattr(deathwatch, "device_model_pid", lambda domid: 1)
    monkeypatch.setattr(deathwatch, "device_models", lambda domids: set(domids))
    keeper.look_again(domid, uuid)
    until(lambda: comm(keeper.pid_of(uuid)) == f"xtool-k-{domid}")
    until(lambda: gone(watcher))
    # A watcher that takes up what it finds leaves it alone.
    os.kill(keeper.pid_of(uuid), signal.SIGKILL)
    until(lambda: not keeper.pid_of(uuid))
    monkeypatch.setattr(watching, "_FIRST", 0.3)
    keeper.start_watcher()
    other = until(watchlink.pid)
    until(lambda: gone(other))
    assert keeper.pid_of(uuid) == 0


def test_handed_over_while_it_is_restarted(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes back with a disk of ours: the child that restarts it waits for the server, so it must have a
    keeper while the child is at work. What the child says afterwards is no business of the watcher's."""
    monkeypatch.setattr(server_module, "serve", wait_for_term)
    (first, second) = hall.make(2)

    def settle(domid: int, uuid: str) -> str:
        with journal.locked(uuid):
            hall.put(domid, uuid)
            hall.put(domid + 1000, uuid, "up")
            journal.update(uuid, domid=domid + 1000)
            backends.start_backends(hall.host, domid + 1000, devices(domid + 1000))
            until(lambda: backends.server_pid(domid + 1000))
            hall.say(comm(keeper.pid_of(uuid)))
        return str(domid + 1000)

    settled_by(hall, monkeypatch, settle)
    keeper.ensure(*first)
    watcher = the_watcher(hall)
    hall.end(first[0])
    until(lambda: hall.words() == [f"xtool-k-{first[0] + 1000}"])
    hall.uuids[first[0] + 1000] = first[1]
    time.sleep(0.3)
    assert comm(keeper.pid_of(first[1])) == f"xtool-k-{first[0] + 1000}"
    assert keeper.pid_of(second[1]) == watcher


def test_it_sleeps_while_a_child_works(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when that child's domain, its last one, has a keeper by now."""
    monkeypatch.setattr(watching, "_RESCAN", 30)

    def settle(domid: int, uuid: str) -> str:
        keeper.start_own(domid, uuid)
        until(lambda: comm(keeper.pid_of(uuid)).startswith("xtool-k-"))
        hall.say("given")
        time.sleep(1.5)
        return "watch"

    def used() -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    settled_by(hall, monkeypatch, settle)
    domid, uuid = hall.make(1)[0]
    keeper.ensure(domid, uuid)
    pid = the_watcher(hall)
    hall.end(domid)
    os.kill(pid, signal.SIGUSR1)  # as an announcement
    until(hall.words)
    before = used()
    time.sleep(1.0)
    assert watchlink.is_watcher(pid) and used() - before < 10  # hundredths of a second
    until(lambda: gone(pid))


def test_told_by_an_xtool_that_knows_keepers_only(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_RESCAN", 30)
    monkeypatch.setattr(server_module, "serve", wait_for_term)
    (first, second) = hall.make(2)
    keeper.ensure(*first)
    watcher = the_watcher(hall)
    backends._lock(first[0]).touch()
    os.kill(watcher, signal.SIGUSR1)
    until(lambda: comm(keeper.pid_of(first[1])) == f"xtool-k-{first[0]}")
    until(lambda: backends.server_pid(first[0]))
    assert keeper.pid_of(second[1]) == watcher


# --- what may go wrong
def test_one_that_hangs_is_replaced(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchlink, "PATIENCE", 0.5)
    made = hall.make(3)
    keeper.ensure(*made[0])
    pid = the_watcher(hall)
    os.kill(pid, signal.SIGSTOP)
    new = hall.make(1)[0]
    assert keeper.ensure(*new)
    until(lambda: gone(pid))
    until(lambda: keeper.missing() == [])
    assert the_watcher(hall) != pid


def test_one_that_is_full_refuses(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a domain gets a keeper, as one that is not bare."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    monkeypatch.setattr(watching, "_DESCRIPTORS", before)
    monkeypatch.setattr(watching, "_SPARE", before - 2)
    made = hall.make(3)
    for one in made:
        keeper.ensure(*one)
    pids = [until(lambda u=uuid: keeper.pid_of(u)) for _, uuid in made]
    names = sorted(until(lambda p=pid: (n := comm(p)).startswith("xtool-") and n)[:8] for pid in pids)
    assert names == ["xtool-k-", "xtool-wa", "xtool-wa"]


def test_who_talks_nonsense_or_nothing(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdesk, "_LINK_TIME", 0.3)
    monkeypatch.setattr(watchdesk, "_LINKS", 4)
    made = hall.make(1)
    keeper.ensure(*made[0])
    pid = the_watcher(hall)
    assert Path(watchlink.socket_path()).stat().st_mode & 0o777 == 0o600
    silent = []
    for _ in range(6):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.connect(watchlink.socket_path())
        silent.append(link)
    uuid = made[0][1]
    for words in (
        b"\xff" * 300,
        b"XW1 take 1 ../../../../etc/passwd",
        b"XW1 take -1 " + uuid.encode(),
        b"XW2 take 1 " + uuid.encode(),
        b"XW1 take x " + uuid.encode(),
        b"XW1 take 5 " + uuid.replace("-", "").encode() + b"----",
        b"XW1 sing 5 " + uuid.encode(),
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
            link.settimeout(10)
            link.connect(watchlink.socket_path())
            link.send(words)
            assert link.recv(8) in (b"", watchlink.NO)
    new = hall.make(1)[0]
    assert keeper.ensure(*new) and the_watcher(hall) == pid
    for link in silent:
        link.close()
    assert len(os.listdir(paths.run_dir() / "domains")) == 4  # two entries, two locks


def test_a_stranger_with_an_old_number_is_left_alone(hall: Hall) -> None:
    """Who has just taken the lock has not yet written its pid over the one before, which may by now be any
    process'; SIGUSR1 would end it."""
    domid, uuid = hall.make(1)[0]
    stranger = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(100)"])
    try:
        with open(journal.keeper_path(uuid), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{stranger.pid}\n")
            file.flush()
            keeper.look_again(domid, uuid)
            time.sleep(0.1)
            assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


# --- the zygote, and memory
def open_in(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # it closes some all the time
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


ZYGOTE = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from halls import Eyes
from xtool.toolstack import deathwatch, watching
from xtool.daemon import zygote
watch = watching.watch
watching._RESCAN = 0.05
watching.watch = lambda *args: watch(*args, eyes=lambda: Eyes(Path({hall!r})))
deathwatch.device_model_pid = lambda domid: 0
deathwatch.device_models = lambda domids: set()
sys.argv[:] = ["zygote"]
zygote.main()
"""


def pss(pid: int) -> int:
    """Bytes that are no file's: of files' pages other Pythons on this machine take a share, or not."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in text.splitlines()[1:]}
    return sizes["Pss_Anon"]


@pytest.fixture
def zygote(hall: Hall) -> Iterator[subprocess.Popen[bytes]]:
    program = ZYGOTE.format(tests=str(Path(__file__).parent), hall=str(hall.folder))
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": root}, cwd="/"
    )
    yield process
    process.kill()
    process.wait()


def test_the_zygote_forks_it_and_replaces_it(hall: Hall, zygote: subprocess.Popen[bytes]) -> None:
    made = hall.make(3)
    until((paths.run_dir() / "zygote.sock").exists, 60)
    until(lambda: keeper.missing() == [])  # as it starts it looks
    first = the_watcher(hall)
    children = Path(f"/proc/{zygote.pid}/task/{zygote.pid}/children")
    # Who asked for it has his answer: else he would start another himself.
    until(lambda: children.read_text().split() == [str(first)])
    os.kill(first, signal.SIGKILL)
    until(lambda: not watchlink.is_watcher(first))
    until(lambda: keeper.missing() == [])
    second = the_watcher(hall)
    until(lambda: children.read_text().split() == [str(second)])
    os.kill(second, signal.SIGTERM)
    until(lambda: not watchlink.is_watcher(second))
    time.sleep(1.5)
    assert hall.pids() == {0}  # told to end: nobody starts one
    assert warmlink.ask_for_watcher()
    third = the_watcher(hall)
    assert warmlink.ask_for_watcher() and the_watcher(hall) == third  # there is one
    names = open_in(third)
    assert any(name.endswith("watcher.lock") for name in names)
    assert not [name for name in names if name.endswith(("zygote.lock", "inotify"))]
    zygote.kill()
    zygote.wait()
    assert not keeper.ensure(*made[0]) and the_watcher(hall) == third


def test_memory_of_a_further_domain(hall: Hall, zygote: subprocess.Popen[bytes]) -> None:
    """PSS of the watcher and the zygote for each further domain, from 10 to 60; the goal is 0.2 MiB."""
    until((paths.run_dir() / "zygote.sock").exists, 60)
    for one in hall.make(10):
        keeper.ensure(*one)
    pid = the_watcher(hall)
    time.sleep(0.5)
    before = pss(pid) + pss(zygote.pid)
    for one in hall.make(50):
        keeper.ensure(*one)
    assert the_watcher(hall) == pid
    time.sleep(0.5)
    now = pss(pid) + pss(zygote.pid)
    each = (now - before) / 50
    print(
        f"watcher {pss(pid) >> 10} KiB, zygote {pss(zygote.pid) >> 10} KiB; {each / 1024:.2f} KiB per domain"
    )
    assert each < 0.2 * (1 << 20) / 10, "a tenth of the goal: Xen and xenstored take their part"
