"""The churn of ``tests/churn.py`` on the machine in memory: daemon, jobs, commands, zygote and watcher are
real processes, and are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from churn import ABSENT, Churn, Fate, Plan, Seen, command_words, look, planned, processes, workers
from onemachine import Remote

from xtool import paths
from xtool.client.socketclient import SocketClient
from xtool.config import DomainConfig, parse_config
from xtool.config.single import parse_disk
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.watchlink import is_watcher

HERE = Path(__file__).parent
Config = Callable[..., DomainConfig]
LONG = bool(os.environ.get("XTOOL_LONG"))


class Machine:
    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self._config = folder, config
        self.environment = {
            **os.environ,
            "XTOOL_LOG_DIR": str(folder / "log"),
            "PYTHONPATH": os.pathsep.join((str(HERE.parents[1]), *sys.path)),
        }
        self.commands: set[int] = set()
        self._starting = threading.Lock()
        self.children: list[subprocess.Popen[bytes]] = []
        machine = self._start("machine", stdout=subprocess.PIPE)
        assert machine.stdout is not None and machine.stdout.readline() == b"ready\n"
        self.daemon = self.start_daemon()
        self.zygote = self._start("zygote")
        self.remote = Remote(folder, "hv")
        self._watch = Remote(folder, "hv")
        self.clean = self._state()

    def _start(self, what: str, *rest: str, **keys: Any) -> subprocess.Popen[bytes]:
        argv = [sys.executable, str(HERE / "onemachine.py"), what, str(self.folder), *rest]
        log = open(self.folder / f"{what}.log", "ab")  # noqa: SIM115 (closed below)
        with log:
            process = subprocess.Popen(argv, env=self.environment, stderr=log, cwd="/", **keys)
        if what != "command":
            self.children.append(process)
        return process

    def start_daemon(self) -> subprocess.Popen[bytes]:
        read, write = os.pipe()
        process = self._start("daemon", str(write), pass_fds=(write,))
        os.close(write)
        os.read(read, 1)
        os.close(read)
        return process

    def text(self, name: str, **keys: Any) -> dict[str, Any]:
        keys = {"memory": 4, **keys}
        return self._config(keys.pop("kind"), name, **keys).to_dict()

    # --- churn.Site
    def by_daemon(self, verb: str, name: str, **keys: Any) -> None:
        self.start_what_is_missing()
        with SocketClient(str(self.folder / "xtoold.sock")) as client:
            if verb == "create":
                options = CreateOptions(paused=keys.pop("paused"))
                client.create(parse_config(json.dumps(self.text(name, **keys)), "churn", "/"), options)
            elif verb == "attach":
                client.block_attach(name, parse_disk([self._disk(name)]))
            elif verb == "detach":
                client.block_detach(name, "xvdb", force=True, deadline=0.2)
            else:
                getattr(client, verb)(name)

    def by_command(self, verb: str, name: str, **keys: Any) -> None:
        argv = command_words(
            verb, name, keys, self.folder, lambda: self.text(name, **keys), lambda: self._disk(name)
        )
        process = self._start("command", *argv, stdout=subprocess.DEVNULL)
        self.commands.add(process.pid)
        try:
            code = process.wait(120)
        finally:
            self.commands.discard(process.pid)
        if code:
            raise RuntimeError(f"exit status {code}")

    def _disk(self, name: str) -> str:
        file = self.folder / f"{name}.img"
        file.write_bytes(bytes(4096))
        return f"vdev=xvdb,format=raw,target={file}"

    def end(self, domid: int, reason: int) -> None:
        self.remote.ask("end", "", domid, reason)

    def look(self) -> Mapping[str, Seen]:
        return look(self._watch.domains(), self._disks)

    def _disks(self, domid: int) -> list[str]:
        return ["xvdb"] if self._watch.ask("kernel", "in_kernel", domid) else []

    def workers(self) -> set[int]:
        return workers(self.is_ours)

    def start_what_is_missing(self) -> None:
        with self._starting:
            if self.daemon.poll() is not None:
                self.daemon = self.start_daemon()
            if self.zygote.poll() is not None:
                self.zygote = self._start("zygote")

    def repair(self) -> None:
        self.start_what_is_missing()
        with SocketClient(str(self.folder / "xtoold.sock")) as client:
            client.gc()

    def victims(self) -> list[tuple[str, int]]:
        found = [("xtoold", self.daemon.pid)] if self.daemon.poll() is None else []
        found += [("command", pid) for pid in list(self.commands)]
        if self.zygote.poll() is None:
            found.append(("zygote", self.zygote.pid))
        roles = {"xtoold-job": "job", "xtool-act-": "restarter"}
        for pid, name in processes():
            for prefix, role in roles.items():
                if name.startswith(prefix) and name != "xtoold-jobs" and self.is_ours(pid):
                    found.append((role, pid))
        pids = {pid for uuid in journal.uuids() if (pid := journal.keeper_pid(uuid))}
        return found + [("watcher" if is_watcher(pid) else "keeper", pid) for pid in pids]

    # --- for the end
    def is_ours(self, pid: int) -> bool:
        """Another test's processes have other folders."""
        try:
            return f"XTOOL_RUN_DIR={paths.run_dir()}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._watch.ask("state")
        # The folders of backends and the list of VMs stay by custom, as on a real host.
        keep = ("/local/domain/0/backend", "/local/domain/0/error", "/local/domain/0/device-model")
        state["nodes"] = [n for n in state["nodes"] if n.count("/") > 6 or not n.startswith(keep)]
        return state

    def left(self) -> dict[str, tuple[Any, Any]]:
        """What is not as it was: name -> (before, now)."""
        now = self._state()
        found = {key: (self.clean[key], now[key]) for key in now if now[key] != self.clean[key]}
        folder = paths.run_dir() / "domains"
        if files := sorted({file.name for file in folder.iterdir()} - {"names.lock"}):
            found["files"] = ([], files)
        mine = [name for pid, name in processes() if name.startswith("xtool-") and self.is_ours(pid)]
        mine = [name for name in mine if name != "xtool-zygote"]
        if mine:
            found["processes"] = ([], mine)
        return found

    def close(self) -> None:
        for child in reversed(self.children):
            child.kill()
            child.wait()
        for pid, name in processes():
            if name.startswith(("xtool", "python")) and pid != os.getpid() and self.is_ours(pid):
                if os.getpid() == pid:
                    continue
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def machine(tmp_path: Path, config: Config) -> Iterator[Machine]:
    paths.run_dir().mkdir()
    (tmp_path / "log").mkdir()
    os.environ["XTOOL_WARM"] = "0"
    found = Machine(tmp_path, config)
    yield found
    found.close()
    del os.environ["XTOOL_WARM"]


def clean(machine: Machine, churn: Churn) -> None:
    end = time.monotonic() + 20
    while left := machine.left():
        assert time.monotonic() < end, "\n".join([f"left: {left}", *churn.told()])
        machine.repair()
        time.sleep(0.1)


@pytest.mark.timeout(1800)
def test_kill_anything(machine: Machine) -> None:
    """``XTOOL_CHURN=200 XTOOL_SEED=n`` for more, and again. Each state is checked on the way; at the end
    nothing is left."""
    churn = Churn(machine, planned(200 if LONG else 20, pause=0.5))
    churn.run()
    clean(machine, churn)


def test_a_watcher_that_hangs_is_replaced_though_nobody_wants_anything(machine: Machine) -> None:
    machine.by_daemon("create", "calm", kind="pv", paused=False)
    [uuid] = journal.uuids()
    hung = journal.keeper_pid(uuid)
    assert is_watcher(hung)
    os.kill(hung, signal.SIGSTOP)
    end = time.monotonic() + 30
    while journal.keeper_pid(uuid) in (0, hung):
        assert time.monotonic() < end
        time.sleep(0.05)
    machine.by_daemon("destroy", "calm")


def test_without_kills_everything_succeeds(machine: Machine) -> None:
    """Else the other test would allow more than it should."""
    churn = Churn(machine, Plan(seed=11, steps=16, pause=0))
    churn.run()
    clean(machine, churn)
    assert not churn.counts["failed"], "\n".join(churn.told())


class Careless:
    """Forgets every second guest it is to create, and says that it did."""

    def __init__(self) -> None:
        self.guests: dict[str, Seen] = {}
        self.made = 0

    def by_daemon(self, verb: str, name: str, **keys: Any) -> None:
        if verb == "create":
            self.made += 1
            if self.made % 2:
                self.guests[name] = Seen(self.made, "paused" if keys["paused"] else "up", frozenset(), True)
        elif verb == "destroy":
            del self.guests[name]
        elif verb in ("pause", "unpause"):
            word = "paused" if verb == "pause" else "up"
            self.guests[name] = self.guests[name]._replace(state=word)

    by_command = by_daemon

    def end(self, domid: int, reason: int) -> None:
        self.guests = {name: seen for name, seen in self.guests.items() if seen.domid != domid}

    def look(self) -> Mapping[str, Seen]:
        return dict(self.guests)

    def repair(self) -> None:
        pass

    def victims(self) -> list[tuple[str, int]]:
        return []

    def workers(self) -> set[int]:
        return set()


def test_a_guest_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("churn.SETTLE", 0.2)
    with pytest.raises(AssertionError, match=r"is None, but is to be .*'(up|paused)'(?s:.)*XTOOL_SEED=5"):
        Churn(Careless(), Plan(seed=5, steps=40, lanes=1, disks=False, pause=0)).run()


def test_what_a_fate_allows() -> None:
    seen = Seen(7, "up", frozenset(), True)
    assert Fate(frozenset(("up",))).allows(seen) and not Fate(frozenset(("up",))).allows(None)
    assert Fate().allows(None) and not Fate().allows(seen)
    assert not Fate(frozenset(("up",)), before=7).allows(seen)  # not restarted yet
    assert not Fate(frozenset(("up",))).allows(seen._replace(settled=False))
    assert not Fate(frozenset(("up",))).allows(seen._replace(disks=frozenset(("xvdb",))))
    assert Fate(frozenset((ABSENT, "paused"))).allows(seen._replace(state="paused"))
