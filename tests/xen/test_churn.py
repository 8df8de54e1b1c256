"""The churn of ``tests/churn.py`` on real Xen, and many creates at once. The ``no_leaks`` fixture says
whether anything is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from churn import Churn, Seen, command_words, look, planned, processes, workers, zygote_pid
from test_daemon import Daemon
from test_daemon import start as start_daemon

from guests import guest
from xtool import paths
from xtool.client.socketclient import SocketClient
from xtool.config.single import parse_disk
from xtool.daemon.hosts import hosts_of
from xtool.devicemodel.pidfd import serves
from xtool.errors import DeadlineError, DomainExistsError, XtoolError
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.local import LocalClient
from xtool.toolstack.watchlink import is_watcher

pytestmark = pytest.mark.unproven

PAUSED = CreateOptions(paused=True)
MANY = int(os.environ.get("XTOOL_MANY") or 50)


class Xen:
    """``churn.Site``: this host. Disks are served by processes of ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts = hosts_of("xen:")
        self.commands: set[int] = set()
        self._starting = threading.Lock()
        self._zygote = bool(zygote_pid())
        self._others = self._domids()
        self.daemon = start_daemon(folder / "xtoold.sock")

    def _domids(self) -> set[int]:
        with self.hosts.client() as client:
            return {state.domid for state in client.host.hv.domains()}

    def start_what_is_missing(self) -> None:
        with self._starting:
            if self.daemon.process.poll() is not None:
                self.daemon = start_daemon(self.daemon.path)
            if self._zygote and not zygote_pid():
                argv = [sys.executable, "-m", "xtool.daemon.zygote"]
                subprocess.Popen(argv, start_new_session=True, cwd="/", stdin=subprocess.DEVNULL)
                end = time.monotonic() + 60
                while not zygote_pid() and time.monotonic() < end:
                    time.sleep(0.1)

    def _keys(self, name: str, keys: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(keys)
        short = name.removeprefix("xtool-test-")
        return guest(given.pop("kind"), short, **given).to_dict()

    def by_daemon(self, verb: str, name: str, **keys: Any) -> None:
        self.start_what_is_missing()
        with self.daemon.client() as client:
            if verb == "create":
                paused = keys.pop("paused")
                short = name.removeprefix("xtool-test-")
                client.create(guest(keys.pop("kind"), short, **keys), CreateOptions(paused=paused))
            elif verb == "attach":
                client.block_attach(name, parse_disk([self._disk(name)]))
            elif verb == "detach":
                client.block_detach(name, "xvdb", force=True, deadline=1.0)
            else:
                getattr(client, verb)(name)

    def by_command(self, verb: str, name: str, **keys: Any) -> None:
        argv = command_words(
            verb, name, keys, self.folder, lambda: self._keys(name, keys), lambda: self._disk(name)
        )
        process = subprocess.Popen(
            ["xtool", *argv],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "XTOOL_CONNECT": "xen:"},
        )
        self.commands.add(process.pid)
        try:
            _, said = process.communicate(timeout=300)
        finally:
            self.commands.discard(process.pid)
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode}: {said.decode()[-300:]}")

    def _disk(self, name: str) -> str:
        file = self.folder / f"{name}.img"
        if not file.exists():
            file.write_bytes(bytes(1 << 20))
        return f"vdev=xvdb,format=raw,backendtype=xtool,target={file}"

    def end(self, domid: int, reason: int) -> None:
        with self.hosts.client() as client:
            client.host.hv.shutdown_domain(domid, reason)

    def look(self) -> Mapping[str, Seen]:
        with self.hosts.client() as client:
            store = client.host.store

            def disks(domid: int) -> list[str]:
                return (
                    ["xvdb"]
                    if store.list_many([f"/local/domain/0/backend/xtool-vbd/{domid}"]).popitem()[1]
                    else []
                )

            return look(client.host.hv.domains(), disks, self._others)

    def repair(self) -> None:
        self.start_what_is_missing()
        with self.daemon.client() as client:
            client.gc()  # a job does it: it forks, and we have threads

    def victims(self) -> list[tuple[str, int]]:
        found = [("command", pid) for pid in list(self.commands)]
        if self.daemon.process.poll() is None:
            found.append(("xtoold", self.daemon.process.pid))
        if self._zygote and (zygote := zygote_pid()):
            found.append(("zygote", zygote))
        domids = {seen.domid for seen in self.look().values()}
        for pid, name in processes():
            if name == "xtoold-job":
                found.append(("job", pid))
            elif name.startswith("xtool-act-"):
                found.append(("restarter", pid))
            elif name.startswith("xtool-be-"):
                found.append(("backend", pid))
            elif name.startswith("qemu") and any(serves(pid, domid) for domid in domids):
                found.append(("qemu", pid))
        pids = {pid for uuid in journal.uuids() if (pid := journal.keeper_pid(uuid))}
        return found + [("watcher" if is_watcher(pid) else "keeper", pid) for pid in pids]

    def workers(self) -> set[int]:
        return workers()

    def close(self) -> None:
        self.start_what_is_missing()
        self.daemon.stop()
        (paths.run_dir() / "xtoold.lock").unlink(missing_ok=True)
        self.hosts.close()


@pytest.fixture
def xen(tmp_path: Path, client: LocalClient) -> Iterator[Xen]:
    found = Xen(tmp_path)
    yield found
    found.close()


def _churn(site: Xen, steps: int) -> None:
    # A fault that ends a create of an HVM guest costs seconds each: a third of the guests are.
    churn = Churn(site, planned(steps, kinds=("pv", "pvh", "hvm"), pause=1.0))
    churn.run()


@pytest.mark.timeout(1800)
def test_kill_anything(xen: Xen) -> None:
    """B4 1, 2, 12, 13: states are checked on the way, leaks at the end. XTOOL_CHURN, XTOOL_SEED."""
    _churn(xen, 20)


@pytest.mark.long
@pytest.mark.timeout(6 * 3600)
def test_kill_anything_for_long(xen: Xen) -> None:
    """B4 1, 2, 12, 13: 240 steps."""
    _churn(xen, 240)


@pytest.fixture
def daemon(tmp_path: Path, client: LocalClient) -> Iterator[Daemon]:
    found = start_daemon(tmp_path / "xtoold.sock")
    yield found
    found.stop()
    (paths.run_dir() / "xtoold.lock").unlink(missing_ok=True)


def at_once(count: int, work: Any) -> list[Any]:
    """What ``work(n)`` gave or raised, of each n, all at the same time."""
    outcome: list[Any] = [None] * count

    def run(number: int) -> None:
        try:
            outcome[number] = work(number)
        except BaseException as error:
            outcome[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_creates_at_once_by_daemon_and_by_command(daemon: Daemon, tmp_path: Path) -> None:
    """B4 16: half through the daemon, half as commands; all are there, and the same process looks after
    all."""

    def create(number: int) -> str:
        config = guest("pv", f"many-{number}", memory=8)
        if number % 2:
            with daemon.client() as link:
                return link.create(config, PAUSED).name
        file = tmp_path / f"{number}.yaml"
        file.write_text(json.dumps(config.to_dict()))
        env = {**os.environ, "XTOOL_CONNECT": "xen:"}
        subprocess.run(["xtool", "create", str(file), "--paused"], check=True, capture_output=True, env=env)
        return config.name

    found = at_once(MANY, create)
    assert sorted(map(str, found)) == sorted(f"xtool-test-many-{n}" for n in range(MANY))
    entries = {entry.name: entry for entry in journal.entries()}
    assert {entries[name].state for name in found} == {"running"}
    assert len({entries[name].domid for name in found}) == MANY
    pids = {entries[name].keeper for name in found}
    assert len(pids) == 1 and is_watcher(pids.pop())
    for name in found:
        daemon.client().destroy(name)


def test_one_name_from_many_sides(daemon: Daemon, client: LocalClient) -> None:
    """B4 16: exactly one wins, the others are told that the name is taken; so for a uuid."""
    uuid = "5a1f9d0e-7a0c-4c58-9a7e-3a8f6f0c1d2e"

    def create(number: int) -> object:
        name, keys = ("race", {}) if number < 6 else (f"race-{number}", {"uuid": uuid})
        return daemon.client().create(guest("pv", name, memory=8, **keys), PAUSED)

    found = at_once(12, create)
    for half in (found[:6], found[6:]):
        errors = [one for one in half if isinstance(one, BaseException)]
        assert len(errors) == 5, half
        assert all(isinstance(error, DomainExistsError) for error in errors), errors
    names = {d.name for d in client.list() if d.name.startswith("xtool-test-race")}
    assert len(names) == 2


@pytest.mark.timeout(900)
def test_a_shutdown_that_is_ignored_delays_nobody(daemon: Daemon, client: LocalClient) -> None:
    """B4 23, R25: one guest ignores the request for its whole deadline, then is destroyed with ``--force``;
    every other verb on another guest takes as long as it does without that."""
    for name in ("deaf", "other"):
        daemon.client().create(guest("pv", name, memory=8), PAUSED if name == "deaf" else CreateOptions())
    alone = latencies(daemon)
    waited: list[BaseException] = []

    def ask() -> None:
        try:
            daemon.client().shutdown("xtool-test-deaf", wait=True, deadline=45)
        except XtoolError as error:
            waited.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    end = time.monotonic() + 30
    while not any(o.method == "shutdown" and o.state == "running" for o in daemon.client().operations()):
        assert time.monotonic() < end
        time.sleep(0.05)
    meanwhile = latencies(daemon)
    print("seconds alone", alone, "meanwhile", meanwhile)
    assert not waited, "the shutdown ended before the others were measured: a longer deadline is needed"
    for verb, taken in meanwhile.items():
        assert taken < 2 * alone[verb] + 0.2, (verb, alone, meanwhile)
    thread.join()
    assert isinstance(waited[0], DeadlineError)
    assert "xtool-test-deaf" in {d.name for d in client.list()}
    argv = ["xtool", "shutdown", "xtool-test-deaf", "--force", "--timeout", "1"]
    env = {**os.environ, "XTOOL_CONNECT": f"unix:{daemon.path}"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "xtool-test-deaf" not in {d.name for d in client.list()}


def latencies(daemon: Daemon, rounds: int = 5) -> dict[str, float]:
    """Median seconds of verbs on the guest ``other``, and of making and ending a further one."""
    link: SocketClient = daemon.client()
    taken: dict[str, list[float]] = {}

    def timed(verb: str, *arguments: Any, **keys: Any) -> None:
        began = time.monotonic()
        getattr(link, verb)(*arguments, **keys)
        taken.setdefault(verb, []).append(time.monotonic() - began)

    for _ in range(rounds):
        timed("list")
        timed("pause", "xtool-test-other")
        timed("unpause", "xtool-test-other")
        timed("create", guest("pv", "further", memory=8), PAUSED)
        timed("destroy", "xtool-test-further")
    with suppress(Exception):
        link.close()
    return {verb: median(times) for verb, times in taken.items()}
