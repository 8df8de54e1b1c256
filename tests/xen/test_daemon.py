"""xtoold on real Xen: jobs in processes, adoption, events of domains that xl made, and who may do what."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from guests import GUESTS, guest
from xtool import paths
from xtool.client.records import CANCELLED, Event
from xtool.client.socketclient import SocketClient
from xtool.daemon.adopt import has_keeper
from xtool.daemon.hosts import hosts_of
from xtool.errors import DomainNotFoundError, XtoolError
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.keeper import pid_of
from xtool.toolstack.local import LocalClient

PAUSED = CreateOptions(paused=True)
#: Of no user of this host.
GROUP, READ_GROUP = 54321, 54322
DEADLINE = 120.0


class Daemon(NamedTuple):
    process: subprocess.Popen[bytes]
    path: Path

    def client(self) -> SocketClient:
        return SocketClient(str(self.path))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE)


def start(path: Path, *before: str) -> Daemon:
    """Over the same /run/xtool as everything else; ``before`` are Python lines that are run first."""
    read, write = os.pipe()
    lines = [*before, "import sys", "from xtool.daemon.__main__ import main", "sys.exit(main())"]
    argv = [sys.executable, "-c", "\n".join(lines), "--socket", str(path), "--ready-fd", str(write)]
    process = subprocess.Popen(argv, pass_fds=(write,))
    os.close(write)
    ready = os.read(read, 1)
    os.close(read)
    assert ready == b"1", f"the daemon did not come up: status {process.wait(DEADLINE)}"
    return Daemon(process, path)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user can pass: pytest's cannot."""
    found = Path(f"/tmp/xtool-test-daemon-{os.getpid()}")
    found.mkdir(mode=0o755)
    yield found
    shutil.rmtree(found)


@pytest.fixture
def daemon(folder: Path, client: LocalClient) -> Iterator[Daemon]:
    """``client`` cleans up behind it."""
    found = start(folder / "xtoold.sock")
    yield found
    found.stop()
    (paths.run_dir() / "xtoold.lock").unlink(missing_ok=True)


def until(client: SocketClient, name: str, kind: str) -> list[Event]:
    """The events of one domain up to one of that kind; waits for it on the stream."""
    seen: list[Event] = []

    def give_up() -> None:
        raise AssertionError(f"no {kind} of {name}; seen: {[event.kind for event in seen]}")

    timer = threading.Timer(DEADLINE, client.close)
    timer.start()
    try:
        for event in client.events(name, since=0):
            seen.append(event)
            if event.kind == kind:
                return seen
    except XtoolError:
        pass
    finally:
        timer.cancel()
    give_up()
    return seen


def wait(what: str, check: Any) -> None:
    end = time.monotonic() + DEADLINE
    while not check():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.1)


def test_a_domain_through_the_socket(daemon: Daemon) -> None:
    client = daemon.client()
    made = client.create(guest("pv", "socket"), PAUSED)
    (found,) = client.list(made.name)
    assert found.managed and found.state == "paused"
    wait("its keeper", lambda: has_keeper(made.uuid))
    client.unpause(made.name)
    with client.open_console(made.name)[0] as link:
        link.settimeout(DEADLINE)
        seen = b""
        while b"XTOOL-TINY-READY" not in seen:
            data = link.recv(4096)
            assert data, f"the console ended: {seen!r}"
            seen += data
    client.destroy(made.name)
    kinds = [event.kind for event in until(daemon.client(), made.name, "domain.destroyed")]
    assert [k for k in kinds if k.startswith("domain.")] == [
        "domain.created",
        "domain.started",
        "domain.destroyed",
    ]


@pytest.mark.long
def test_an_hvm_domain_through_the_socket(daemon: Daemon) -> None:
    client = daemon.client()
    made = client.create(guest("hvm", "socket-hvm"), PAUSED)
    assert client.list(made.name)[0].type == "hvm"
    assert client.destroy(made.name).action == "destroyed"


@pytest.mark.long
def test_a_create_is_cancelled(daemon: Daemon) -> None:
    """While QEMU comes up, which takes a while here: nothing is left (the leak check of this folder)."""
    client = daemon.client()
    config = guest("hvm", "cancelled")
    body = json.dumps({"config": config.to_dict(), "options": {"paused": True}}).encode()
    number = client._ask("POST", "/v1/domains", body)["id"]
    wait("its first step", lambda: client._ask("GET", f"/v1/operations/{number}")["lines"])
    client.cancel(number)
    assert client._ask("GET", f"/v1/operations/{number}?wait=120")["state"] == CANCELLED
    with pytest.raises(DomainNotFoundError):
        client.list(config.name)


@pytest.mark.long
def test_a_guest_that_does_not_listen_blocks_nobody(daemon: Daemon) -> None:
    """Our tiny guest ignores a request to shut down; others are created and destroyed meanwhile."""
    client = daemon.client()
    client.create(guest("pv", "stuck"), PAUSED)  # paused: it cannot even hear it
    outcome: list[object] = []

    def ask() -> None:
        try:
            outcome.append(daemon.client().shutdown("xtool-test-stuck", wait=True, deadline=600))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait(
        "the shutdown",
        lambda: any(o.method == "shutdown" and o.state == "running" for o in client.operations()),
    )
    made = client.create(guest("pv", "meanwhile"), PAUSED)
    assert client.destroy(made.name).domid == made.domid and not outcome
    client.destroy("xtool-test-stuck")
    thread.join(DEADLINE)
    assert len(outcome) == 1


@pytest.mark.long
def test_fifty_creates_at_once(daemon: Daemon) -> None:
    outcome: list[object] = []

    def create(number: int) -> None:
        try:
            outcome.append(daemon.client().create(guest("pv", f"many-{number % 48}", memory=8), PAUSED).name)
        except BaseException as error:
            outcome.append(type(error).__name__)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcome)).count("DomainExistsError") == 2, outcome
    client = daemon.client()
    names = [d.name for d in client.list() if d.name.startswith("xtool-test-many-")]
    assert sorted(names) == sorted(f"xtool-test-many-{n}" for n in range(48))
    for name in names:
        client.destroy(name)


def test_the_daemon_is_killed_amid_operations(daemon: Daemon, client: LocalClient) -> None:
    """Creates that have begun go on by themselves, and the next daemon knows all of them."""
    outcome: list[object] = []

    def entered() -> set[str]:
        return {e.name for e in journal.entries() if e.name.startswith("xtool-test-kill-")}

    def create(number: int) -> None:
        try:
            outcome.append(daemon.client().create(guest("pv", f"kill-{number}"), PAUSED))
        except XtoolError as error:
            outcome.append(error)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait("some domains", lambda: len(entered()) >= 2)
    begun = entered()
    daemon.kill()
    for thread in threads:
        thread.join(DEADLINE)
    wait("the jobs", lambda: not any(e.state == "creating" for e in journal.entries()))
    again = start(daemon.path.with_name("again.sock"))
    try:
        found = {d.name: d for d in again.client().list() if d.name.startswith("xtool-test-kill-")}
        assert begun <= set(found) and all(d.managed for d in found.values())
        for domain in found.values():
            wait("its keeper", lambda domain=domain: has_keeper(domain.uuid))
            again.client().destroy(domain.name)
    finally:
        again.stop()


def test_a_killed_keeper_is_replaced(folder: Path, client: LocalClient) -> None:
    """By the daemon as it starts; and one that runs already notices."""
    made = client.create(guest("pv", "keeper"), PAUSED)
    wait("its keeper", lambda: has_keeper(made.uuid))
    kill_keeper(made.uuid)
    daemon = start(folder / "xtoold.sock")
    try:
        wait("another keeper", lambda: has_keeper(made.uuid))
        kill_keeper(made.uuid)
        wait("a third keeper", lambda: has_keeper(made.uuid))
        daemon.client().destroy(made.name)
    finally:
        daemon.stop()
        (paths.run_dir() / "xtoold.lock").unlink(missing_ok=True)


def kill_keeper(uuid: str) -> None:
    """Or the watcher, whoever looks after it."""
    pid = pid_of(uuid)
    handle = os.pidfd_open(pid)
    signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    wait("its end", lambda: pid_of(uuid) != pid)


@pytest.mark.skipif(shutil.which("xl") is None, reason="no xl on this host")
@pytest.mark.long
def test_events_of_a_domain_that_xl_made(daemon: Daemon, folder: Path) -> None:
    """Shown, marked as not ours, and never touched."""
    config = folder / "xl.cfg"
    config.write_text(f'name="xtool-test-xl"\ntype="pv"\nmemory=16\nvcpus=1\nkernel="{GUESTS}/tiny-pv.elf"\n')
    client = daemon.client()
    subprocess.run(["xl", "create", "-p", str(config)], check=True)
    try:
        (created,) = [
            e for e in until(client, "xtool-test-xl", "domain.created") if e.kind == "domain.created"
        ]
        assert not created.managed
        (info,) = client.list("xtool-test-xl")
        assert not info.managed and info.uuid == created.uuid
        assert client.gc() == []
        subprocess.run(["xl", "unpause", "xtool-test-xl"], check=True)
        until(daemon.client(), "xtool-test-xl", "domain.started")
        subprocess.run(["xl", "rename", "xtool-test-xl", "xtool-test-xl2"], check=True)
        until(daemon.client(), "xtool-test-xl2", "domain.renamed")
    finally:
        subprocess.run(["xl", "destroy", str(client.list(created.uuid)[0].domid)], check=False)
    until(daemon.client(), "xtool-test-xl2", "domain.destroyed")


@pytest.mark.long
def test_who_may_do_what(folder: Path, client: LocalClient) -> None:
    """By the kernel's word: the users' groups are set on the process, the daemon's are two of no name."""
    lines = (
        "from xtool.daemon import access, main",
        f"main.host_access = lambda: access.Access({GROUP}, {READ_GROUP})",
    )
    daemon = start(folder / "xtoold.sock", *lines)
    try:
        made = client.create(guest("pv", "access"), PAUSED)
        nobody = pwd.getpwnam("nobody").pw_uid
        asked = [
            ("GET", "/v1/domains"),
            ("POST", f"/v1/domains/{made.domid}/pause"),
            ("DELETE", f"/v1/domains/{made.domid}"),
            ("POST", f"/v1/domains/{made.domid}/console-stream"),
            ("POST", "/v1/gc"),
        ]
        assert statuses(daemon.path, nobody, [], asked) == [403] * 5
        assert statuses(daemon.path, nobody, [READ_GROUP], asked) == [200, 403, 403, 403, 403]
        assert client.list(made.name)[0].state == "paused"
        assert statuses(daemon.path, nobody, [GROUP], asked[:3]) == [200, 200, 200]
        with pytest.raises(DomainNotFoundError):
            client.list(made.name)
    finally:
        daemon.stop()
        (paths.run_dir() / "xtoold.lock").unlink(missing_ok=True)


def statuses(path: Path, uid: int, groups: list[int], asked: list[tuple[str, str]]) -> list[int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        found: list[int] = []
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            for method, target in asked:
                with socket.socket(socket.AF_UNIX) as link:
                    link.connect(str(path))
                    link.sendall(
                        f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
                    )
                    found.append(int(link.recv(100).split()[1]))
        finally:
            os.write(write, json.dumps(found).encode())
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        raw = file.read()
    os.waitpid(pid, 0)
    found = json.loads(raw)
    assert isinstance(found, list)
    return found


def test_hosts_are_used_again(client: LocalClient) -> None:
    """Looks do not open a connection each: Xen and xenstored are asked over those that are there."""
    hosts = hosts_of("xen:")
    with hosts.client() as first:
        one = first.host
        first.list()
    with hosts.client() as second:
        assert second.host is one
        second.list()
    hosts.close()
