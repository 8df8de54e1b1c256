"""The backend process and its parent, as real processes; what they serve is left out."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import xtool.backends.server as server_module
from xtool import paths
from xtool.backends import control
from xtool.backends.loop import Loop
from xtool.devices.xenbus import DeviceId
from xtool.fake.machine import FakeMachine
from xtool.fake.store import FakeStoreDaemon
from xtool.toolstack import backends, keeper
from xtool.toolstack.supervise import Supervisor
from xtool.xenstore.client import StoreClient

DOMID = 31001
#: No domain of ours, so its server gets a parent of its own.
HOST: Any = SimpleNamespace(real=True, hv=SimpleNamespace(domain=lambda domid: None))
DEVICES = [DeviceId(DOMID, "vbd", 51712, "xtool-vbd")]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setattr(backends, "RESTART_PAUSE", 0.02)
    yield
    backends.stop_backends(HOST, DOMID)
    keeper.reap_children()


def until(check: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def wait_for_term(domid: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pause()


def test_a_server_that_dies_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "serve", wait_for_term)
    backends.start_backends(HOST, DOMID, DEVICES)
    first = until(lambda: backends.server_pid(DOMID))
    assert backends.is_running(DOMID)
    backends.start_backends(HOST, DOMID, DEVICES)  # there is one
    assert backends.server_pid(DOMID) == first
    os.kill(first, signal.SIGKILL)
    second = until(lambda: (pid := backends.server_pid(DOMID)) and pid != first and pid)
    time.sleep(0.1)
    backends.restart_backends(HOST, DOMID)
    third = until(lambda: (pid := backends.server_pid(DOMID)) and pid != second and pid)
    # The parent gone, the server goes on and is found.
    os.kill(backends._pids(DOMID)[0], signal.SIGKILL)
    time.sleep(0.1)
    assert backends.server_pid(DOMID) == third and backends.is_running(DOMID)
    time.sleep(0.1)
    backends.stop_backends(HOST, DOMID)
    assert not backends.is_running(DOMID) and not Path(f"/proc/{third}/exe").exists()
    assert [path.name for path in paths.run_dir().iterdir()] == []


def test_replaced_while_it_is_only_starting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a slow host the one of the last replacement may not even have its lock yet."""
    held, go = tmp_path / "held", tmp_path / "go"
    begin, stop = Supervisor.begin, backends._stop

    def slow(self: Supervisor) -> bool:
        if not go.exists():
            held.touch()
            until(go.exists)
        return begin(self)

    def stop_it(domid: int) -> bool:
        found = stop(domid)
        go.touch()
        until(lambda: backends.server_pid(DOMID))
        return found

    monkeypatch.setattr(server_module, "serve", wait_for_term)
    monkeypatch.setattr(Supervisor, "begin", slow)
    backends.start_backends(HOST, DOMID, DEVICES)
    until(held.exists)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_stop", stop_it)
        backends.restart_backends(HOST, DOMID)
    keeper.reap_children()
    time.sleep(0.3)  # the second finds the first
    server = backends.server_pid(DOMID)
    assert server and backends._pids(DOMID)[1:] == [server]
    backends.restart_backends(HOST, DOMID)
    until(lambda: backends.server_pid(DOMID) not in (None, server))


def test_one_that_is_only_looked_at_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks whether there is a server holds the lock for a moment."""
    monkeypatch.setattr(server_module, "serve", wait_for_term)
    paths.run_dir().mkdir()
    lock = os.open(backends._lock(DOMID), os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    backends._start(HOST, DOMID)
    time.sleep(0.1)
    os.close(lock)
    until(lambda: backends.server_pid(DOMID))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> StoreClient:
    """Of a host in memory, on which real servers run: each child has its copy of it. The domain is there."""
    machine, daemon = FakeMachine(), FakeStoreDaemon()
    monkeypatch.setattr("xtool.evtchn.device.EventDevice", lambda: machine.events(0))
    monkeypatch.setattr("xtool.grant.device.GrantDevice", lambda: machine.grants(0))
    monkeypatch.setattr("xtool.xenstore.client.open_store", lambda deadline: StoreClient(daemon.connect))
    client = StoreClient(daemon.connect)
    client.write("/local/domain/0/backend", "")
    client.write(f"/local/domain/{DOMID}", "")
    return client


def test_one_whose_domain_is_gone_leaves_nothing(store: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_ROUND", 0.1)
    store.rm(f"/local/domain/{DOMID}")
    backends._folder(DOMID).mkdir(parents=True)
    (backends._folder(DOMID) / "responses").touch()
    backends.start_backends(HOST, DOMID, DEVICES)
    until(lambda: list(paths.run_dir().iterdir()) == [])


def test_one_that_is_told_to_end_has_a_successor(store: StoreClient) -> None:
    """By whoever it was, and not its parent: its domain runs, and the successor needs what it wrote."""
    backends.start_backends(HOST, DOMID, DEVICES)
    until(lambda: control.socket_path(DOMID).exists())
    first = until(lambda: backends.server_pid(DOMID))
    responses = backends._folder(DOMID) / "responses"
    responses.touch()
    os.kill(first, signal.SIGTERM)
    until(lambda: backends.server_pid(DOMID) not in (None, first))
    assert responses.exists() and backends.is_running(DOMID)


def test_a_server_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(domid: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)

    monkeypatch.setattr(server_module, "serve", deaf)
    monkeypatch.setattr(backends, "LET_GO_TIME", 0.3)
    backends.start_backends(HOST, DOMID, DEVICES)
    pid = until(lambda: backends.server_pid(DOMID))
    time.sleep(0.1)
    backends.stop_backends(HOST, DOMID)
    assert not Path(f"/proc/{pid}/exe").exists() and not backends.is_running(DOMID)


def test_one_that_dies_all_the_time_is_parked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parked, count = tmp_path / "parked", tmp_path / "count"

    def dies(domid: int) -> None:
        with count.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(server_module, "serve", dies)
    monkeypatch.setattr(backends, "_park", lambda domid: parked.write_text(str(domid)))
    backends.start_backends(HOST, DOMID, DEVICES)
    until(parked.exists)
    assert count.read_text() == "x" * backends.CRASHES
    until(lambda: not backends.is_running(DOMID))


def test_the_control_socket(tmp_path: Path) -> None:
    """Asked from another process, with one that asks nothing and one that asks nonsense beside it."""
    import socket
    import threading

    def answer(word: str) -> list[dict[str, Any]]:
        known: dict[str, list[dict[str, Any]]] = {"describe": [{"a": 1}, {"b": "\x1b"}]}
        return known[word]

    def turn() -> bool:
        loop.run_once(0.01)
        return len(answers) == 2

    loop = Loop(FakeMachine().events(0))
    path = control.socket_path(DOMID)
    server = control.ControlSocket(loop, path, answer)
    assert path.stat().st_mode & 0o777 == 0o600
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(str(path))
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda w=word: answers.append(control.ask(DOMID, w)))
        for word in ("describe", "nonsense")
    ]
    for thread in threads:
        thread.start()
    until(turn)
    assert [{"a": 1}, {"b": "\x1b"}] in answers and [{"error": "what?"}] in answers
    for thread in threads:
        thread.join()
    silent.close()
    server.close()
    loop.close()
    assert control.ask(DOMID) == [] and not path.exists()


def test_what_a_killed_writer_left_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOOL_RUN_DIR", str(tmp_path))
    for name in (".backend-7.pid.698", ".backend-7.sock.698", "backend-7.pid", ".backend-70.pid.698"):
        (tmp_path / name).write_text("1")
    backends._remove_files(7)
    assert [path.name for path in tmp_path.iterdir()] == [".backend-70.pid.698"]
