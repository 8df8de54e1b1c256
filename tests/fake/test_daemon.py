"""xtoold on the host in memory: events, access, bounds, and requests that are none."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Running, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtool import paths
from xtool.backends.consolefeed import HELLO_SIZE, Feed, hello
from xtool.backends.consolelog import BOOT, DATA, Record, encode
from xtool.cli import app as cli
from xtool.cli.client import use
from xtool.cli.consolelink import Link
from xtool.client.records import Event
from xtool.client.socketclient import SocketClient
from xtool.config import DomainConfig
from xtool.config.single import parse_disk
from xtool.daemon import http
from xtool.daemon.access import Access, Level, host_access
from xtool.daemon.consoles import open_relay
from xtool.daemon.events import BURST, Events
from xtool.daemon.main import inherited, listen, notify
from xtool.daemon.operations import Operations, TooBusyError, Work
from xtool.errors import DomainError, DomainNotFoundError, HostError, PrivilegeError, UsageError
from xtool.fake.hypervisor import FakeHypervisor
from xtool.toolstack.api import ConsoleTarget, CreateOptions
from xtool.toolstack.create import create
from xtool.toolstack.host import Host
from xtool.xenstore import paths as nodes

Config = Callable[..., DomainConfig]
RUN = CreateOptions()
#: No user of this host is in it.
GROUP, READ_GROUP = 54321, 54322


@pytest.fixture
def daemon(host: Host, tmp_path: Path) -> Iterator[Running]:
    paths.run_dir().mkdir()
    with running(host, tmp_path) as found:
        yield found


def until(client: SocketClient, kind: str, *, name: str = "", seconds: float = 20) -> list[Event]:
    """The events up to one of that kind."""
    end, seen = time.monotonic() + seconds, []
    while time.monotonic() < end:
        seen = [e for e in client.events(since=0, follow=False) if not name or e.name == name]
        if any(event.kind == kind for event in seen):
            return seen
        time.sleep(0.05)
    raise AssertionError(f"no {kind}; seen: {[event.kind for event in seen]}")


# --- events ---------------------------------------------------------------------------------------------
def test_the_life_of_a_domain_as_events(daemon: Running, config: Config, tmp_path: Path) -> None:
    client = daemon.client()
    made = client.create(config("pv", name="web"), CreateOptions(paused=True))
    until(client, "domain.created")
    client.unpause("web")
    until(client, "domain.started")
    client.pause("web")
    until(client, "domain.paused")
    client.unpause("web")
    until(client, "domain.unpaused")
    (tmp_path / "a.img").write_bytes(bytes(4096))
    client.block_attach("web", parse_disk([f"vdev=xvda,format=raw,target={tmp_path / 'a.img'}"]))
    until(client, "device.state")
    client.block_detach("web", "xvda", force=True, deadline=0.2)
    until(client, "device.detached")
    daemon.host.store.write(f"{nodes.domain(made.domid)}/name", "shop")
    until(client, "domain.renamed")
    client.destroy("shop")
    seen = [
        event for event in until(client, "domain.destroyed") if event.kind.startswith(("domain", "device"))
    ]
    kinds = [event.kind for event in seen]
    assert [kind for kind in kinds if kind.startswith("domain")] == [
        f"domain.{what}" for what in ("created", "started", "paused", "unpaused", "renamed", "destroyed")
    ]
    assert kinds.index("device.attached") < kinds.index("device.state") < kinds.index("device.detached")
    assert {(event.domid, event.uuid, event.managed) for event in seen} == {(made.domid, made.uuid, True)}
    renamed = next(event for event in seen if event.kind == "domain.renamed")
    assert (renamed.name, renamed.details) == ("shop", {"old_name": "web"})


def test_domains_of_others_and_why_they_ended(daemon: Running, config: Config) -> None:
    """Made without the daemon and without an entry in the journal, as by xl."""
    made = create(daemon.host, config("pv", name="theirs"), RUN)
    for file in (paths.run_dir() / "domains").glob("*.json"):
        file.unlink()
    client = daemon.client()
    until(client, "domain.started", name="theirs")
    assert isinstance(daemon.host.hv, FakeHypervisor)
    daemon.host.hv.shutdown_domain(made.domid, 3)  # crash
    daemon.host.hv.gone(made.domid)
    seen = until(client, "domain.shutdown", name="theirs")
    assert seen[-1].details == {"reason": "crash"}
    client.gc()
    assert client.list("theirs")[0].state == "crashed"  # nobody has touched it


def test_what_was_there_before_is_no_news(host: Host, config: Config, tmp_path: Path) -> None:
    paths.run_dir().mkdir(exist_ok=True)
    create(host, config("pv", name="old"), RUN)
    with running(host, tmp_path) as daemon:
        client = daemon.client()
        client.pause("old")
        seen = until(client, "domain.paused", name="old")
        assert [e.kind for e in seen if e.kind.startswith("d")] == ["domain.paused"]


def test_listeners_go_on_where_they_were(daemon: Running) -> None:
    client = daemon.client()
    got: list[Event] = []
    ready = threading.Event()

    def listen_() -> None:
        for event in daemon.client().events():
            got.append(event)
            ready.set()
            if len(got) == 3:
                return

    thread = threading.Thread(target=listen_)
    thread.start()
    end = time.monotonic() + 20
    while daemon.daemon.server.connections < 1 and time.monotonic() < end:
        time.sleep(0.01)
    while not ready.wait(0.05):
        daemon.daemon.events.publish("test", name="a")
    while thread.is_alive():
        daemon.daemon.events.publish("test", name="b")
        time.sleep(0.01)
    again = list(client.events(after=got[0].id, follow=False))
    assert [event.id for event in again[:2]] == [event.id for event in got[1:3]]
    lost = next(iter(client.events(after="0badc0de-5", follow=False)))
    assert lost.kind == "lost" and lost.details == {"count": None}
    (only,) = {e.name for e in client.events("b", since=0, follow=False)}
    assert only == "b"


def test_a_slow_listener_is_told_how_many_it_lost() -> None:
    events = Events(size=10)
    follow = events.follow(since=0, live=False)
    events.publish("first")
    first = next(follow)
    assert first is not None and first.kind == "first"
    for _ in range(25):
        events.publish("more")
    found = [event for event in follow if event is not None]
    assert found[0].kind == "lost" and found[0].details == {"count": 15} and len(found) == 11


def test_a_guest_cannot_drown_the_others() -> None:
    now = 0.0
    events = Events(size=1000, clock=lambda: now)
    for _ in range(10_000):
        events.publish("device.state", domid=3)
    events.publish("device.state", domid=4)
    events.publish("domain.destroyed", domid=5)
    kept = [event for event in events.follow(since=0, live=False) if event]
    assert len([event for event in kept if event.domid == 3]) == BURST
    assert [event.domid for event in kept[-2:]] == [4, 5]
    now = 1.0
    events.publish("device.state", domid=3)
    told = [event for event in events.follow(after=kept[-1].id, live=False) if event]
    assert [event.kind for event in told] == ["suppressed", "device.state"]
    assert told[0].details == {"count": 10_000 - BURST}


# --- access ---------------------------------------------------------------------------------------------
def as_user(path: Path, uid: int, gid: int, groups: list[int], requests: list[tuple[str, str, bytes | None]]):  # type: ignore[no-untyped-def]
    """What a process of that user gets: ``(status, body)`` of each request, or the name of an error."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        found: list[object] = []
        try:
            os.setgroups(groups)
            os.setgid(gid)
            os.setuid(uid)
            import http.client

            for method, target, body in requests:
                link = socket.socket(socket.AF_UNIX)
                link.connect(str(path))
                connection = http.client.HTTPConnection("x")
                connection.sock = link
                headers = {
                    "X-Remote-User": "root",
                    "X-Forwarded-User": "root",
                    "Authorization": "Basic cm9vdDo=",
                }
                connection.request(method, target, body, headers)
                answer = connection.getresponse()
                found.append([answer.status, json.loads(answer.read())])
        except BaseException as error:
            found.append(type(error).__name__)
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        raw = file.read()
    os.waitpid(pid, 0)
    return json.loads(raw)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes other users")
def test_who_may_do_what(host: Host, config: Config, tmp_path: Path) -> None:
    folder = Path("/tmp") / f"xtool-access-{os.getpid()}"  # pytest's is closed to others
    folder.mkdir(mode=0o755)
    paths.run_dir().mkdir()
    create(host, config("pv", name="web"), RUN)
    body = json.dumps({"config": {"name": "x"}, "options": {}}).encode()
    looks = [("GET", "/v1/domains", None), ("GET", "/v1/status", None), ("POST", "/v1/host/dmesg", b"{}"),
             ("GET", "/v1/events?follow=false&since=0", None)]  # fmt: skip
    changes = [
        ("POST", "/v1/host/dmesg", b'{"clear": true}'),
        ("POST", "/v1/domains", body),
        ("POST", "/v1/dry-run", body),
        ("DELETE", "/v1/domains/web", None),
        ("POST", "/v1/domains/web/pause", b"{}"),
        ("DELETE", "/v1/operations/x", None),
        ("POST", "/v1/gc", b"{}"),
        ("POST", "/v1/domains/web/console-stream", None),
    ]
    try:
        with running(host, folder, Access(GROUP, READ_GROUP)) as daemon:
            path = daemon.path
            nobody = as_user(path, 65534, 65534, [], [*looks[:3], *changes])
            assert {status for status, _ in nobody} == {403}
            assert "may not use xtoold" in nobody[0][1]["detail"] and "group xtool" in nobody[0][1]["hint"]
            for gid, groups in ((65534, [READ_GROUP]), (READ_GROUP, [])):
                answers = as_user(path, 65534, gid, groups, [*looks[:3], *changes])
                assert [status for status, _ in answers] == [200] * 3 + [403] * len(changes)
                assert "may only look" in answers[-1][1]["detail"]
                assert answers[1][1]["access"] == "read-only"
            answers = as_user(path, 65534, 65534, [GROUP], [looks[0], changes[4], changes[3]])
            assert [status for status, _ in answers] == [200, 200, 200]
            assert daemon.client().list() == []
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes other users")
def test_without_groups_only_root_reaches_the_socket(host: Host) -> None:
    folder = Path("/tmp") / f"xtool-access-{os.getpid()}"
    folder.mkdir(mode=0o755)
    paths.run_dir().mkdir()
    try:
        with running(host, folder) as daemon:
            assert daemon.path.stat().st_mode & 0o777 == 0o600
            assert as_user(daemon.path, 65534, 65534, [], [("GET", "/v1/domains", None)]) == [
                "PermissionError"
            ]
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_levels() -> None:
    access = Access(GROUP, READ_GROUP)
    assert access.level(0, set()) is Level.FULL and access.level(os.geteuid(), set()) is Level.FULL
    assert access.level(65534, {GROUP, READ_GROUP}) is Level.FULL
    assert access.level(65534, {READ_GROUP}) is Level.READ
    assert access.level(65534, {1, 2}) is Level.NOTHING
    assert Access().level(65534, {0, 1}) is Level.NOTHING  # no such group: nobody is in it
    assert isinstance(host_access(), Access)


# --- bounds ---------------------------------------------------------------------------------------------
def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        def start(self, work: Work, done: Callable[[], None]) -> None:
            works.append((work, done))

        def close(self) -> None:
            pass

    works: list[tuple[Work, Callable[[], None]]] = []
    monkeypatch.setattr("xtool.daemon.operations.RUNNING_MAX", 2)
    monkeypatch.setattr("xtool.daemon.operations.QUEUED_MAX", 3)
    monkeypatch.setattr("xtool.daemon.operations.HISTORY", 4)
    operations = Operations(Never())
    submitted = [operations.submit("gc", {}) for _ in range(5)]
    assert len(works) == 2 and operations.counts() == (2, 3)
    with pytest.raises(TooBusyError):
        operations.submit("gc", {})
    assert operations.cancel(submitted[4]).state == "cancelled" and operations.counts() == (2, 2)
    for number in range(20):  # each one that ends makes room for the next
        work, done = works[number]
        work.succeeded(None)
        done()
        if operations.counts()[1] < 3:
            operations.submit("gc", {})
    assert len([o for o in operations.list() if o.ended]) <= 4 + 2


def until_connections(daemon: Running, count: int) -> None:
    end = time.monotonic() + 20
    while daemon.daemon.server.connections != count:
        assert time.monotonic() < end, f"{daemon.daemon.server.connections} connections, not {count}"
        time.sleep(0.01)


def test_connections_are_bounded(daemon: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTIONS", 3)
    client = daemon.client()
    client.status()
    links = [daemon.connect() for _ in range(3)]
    assert links[-1].recv(4096).startswith(b"HTTP/1.1 429 ")
    links[-1].close()
    until_connections(daemon, 3)
    for link in links:
        link.close()
    until_connections(daemon, 1)
    assert daemon.client().list() == []


def test_a_request_that_is_slow_or_endless_is_ended(daemon: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_TIME", 0.4)
    monkeypatch.setattr(http, "BODY_TIME", 0.4)
    for head in (
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        b"POST /v1/gc HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{",
    ):
        with daemon.connect() as link:
            link.sendall(head)
            began = time.monotonic()
            answer = b""
            while time.monotonic() - began < 10:  # a byte now and then does not help
                try:
                    link.sendall(b"X")
                except OSError:
                    break
                link.settimeout(0.1)
                try:
                    answer += (data := link.recv(4096))
                    if not data:
                        break
                except TimeoutError:
                    pass
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /" + b"a" * 30000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", 431),
        (b"POST /v1/gc HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 1_100_000, 413),
        (
            b"POST /v1/gc HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"fff\r\n" + b"x" * 70,
            408,
        ),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\xa5\x01\x00", 400),
        (b"GET\r\n\r\n", 400),
        (b"BREW /v1/domains HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET /v1/domains/%ff/disks HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /v1/domains?x=%ff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /v1/domains?domain=a&domain=b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /v1/domains?nonsense HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /v1/domains//disks HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"POST /v1/gc HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n" + b'"\\ud800"x', 400),
        (b"POST /v1/gc HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + b"[" * 3000, 400),
        (b"POST /v1/domains/a/console-stream HTTP/1.1\r\nHost: x\r\n\r\n", 426),
    ],
)
def test_requests_that_are_none(
    daemon: Running, monkeypatch: pytest.MonkeyPatch, raw: bytes, status: int
) -> None:
    monkeypatch.setattr(http, "BODY_TIME", 0.5)
    monkeypatch.setattr(http, "HEAD_TIME", 0.5)
    with daemon.connect() as link:
        try:
            link.sendall(raw)
        except OSError:
            pass  # it had read enough
        answer = link.recv(65536)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert daemon.client().status().pid


PATHS = [b"v1/domains", b"v1/operations/", b"docs", b"v1/events?follow=false"]
HEADERS = [
    b"",
    b"Content-Length: 4\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: Upgrade\r\nUpgrade: xtool-console\r\n",
]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    raw=st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda *words: b"%s /%s HTTP/1.1\r\nHost: x\r\n%s\r\n%s" % words,
            st.sampled_from([b"GET", b"POST", b"DELETE", b"PUT", b"PATCH", b"HEAD", b"OPTIONS", b"CONNECT"]),
            st.sampled_from(PATHS) | st.binary(max_size=60),
            st.sampled_from(HEADERS) | st.binary(max_size=60),
            st.binary(max_size=100),
        ),
    ),
    pieces=st.integers(1, 5),
)  # fmt: skip
def test_any_bytes(daemon: Running, raw: bytes, pieces: int) -> None:
    """Whatever comes, in whatever pieces: an answer below 500 or none, and the daemon goes on."""
    with daemon.connect() as link:
        size = max(1, len(raw) // pieces)
        try:
            for at in range(0, len(raw), size):
                link.sendall(raw[at : at + size])
            link.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = link.recv(65536)
    assert not answer or answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), answer[:300]


# --- consoles -------------------------------------------------------------------------------------------
def test_a_console_through_the_daemon(
    daemon: Running, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes go both ways through the upgraded connection, to a pty as xenconsoled has it."""
    import pty

    ours, guest = pty.openpty()
    name = os.ttyname(guest)
    made = daemon.client().create(config("pv", name="web"), RUN)
    tty = f"{nodes.console(made.domid)}/tty"
    daemon.host.store.write(tty, name, perms=("n0", f"r{made.domid}"))
    daemon.host.store.set_perms(nodes.console(made.domid), ("n0", f"r{made.domid}"))
    monkeypatch.setattr("xtool.devices.console.LOCK_DIR", str(daemon.path.parent))
    client = daemon.client()
    target = client.console("web", "pv")
    assert (target.tty, target.via) == (name, str(daemon.path))
    link = Link(target)
    os.write(ours, b"hello from the guest")
    seen = b""
    while b"guest" not in seen:
        select.select([link.fd], [], [], 20)
        seen += link.read(100) or b""
    assert seen == b"hello from the guest"
    data = os.urandom(3000).replace(b"\0", b"x")
    os.write(link.fd, data)
    got = b""
    while len(got) < len(data):
        assert select.select([ours], [], [], 20)[0]
        got += os.read(ours, 4096)
    assert got == data
    with pytest.raises(DomainError, match="in use"):  # one reader of a pty only
        daemon.client().open_console("web")
    link.close()
    end = time.monotonic() + 20
    while (daemon.path.parent / f"xenconsole.{made.domid}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    daemon.client().open_console("web")[0].close()
    with pytest.raises(DomainNotFoundError):
        daemon.client().open_console("none")
    os.close(ours)
    os.close(guest)


def test_a_feed_through_the_daemon(daemon: Running, config: Config, tmp_path: Path) -> None:
    """A console of ours is kept: the viewer speaks the feed's protocol end to end."""
    said = b"line one\r\nline two\r\n"
    made = daemon.client().create(config("pv", name="web"), RUN)
    listener = socket.socket(socket.AF_UNIX)
    path = paths.run_dir() / "feed"
    listener.bind(str(path))
    listener.listen()
    heard: list[bytes] = []

    def serve() -> None:
        link, _ = listener.accept()
        heard.append(link.recv(HELLO_SIZE))
        link.sendall(encode(Record(BOOT, 1.0, 0, b"")) + encode(Record(DATA, 1.1, len(said), said)))
        heard.append(link.recv(100))
        link.close()

    thread = threading.Thread(target=serve)
    thread.start()
    relay = open_relay(ConsoleTarget(made.domid, "web", "pv", "", "unused", 0, str(path)))
    assert relay.form == "feed"
    near, far = socket.socketpair()
    copying = threading.Thread(target=relay.run, args=(far, b""))
    copying.start()
    feed = Feed()
    near.sendall(feed.connected())
    seen = b""
    near.settimeout(20)
    while seen != said:
        seen += feed.receive(near.recv(4096))
    near.sendall(b"typed")
    copying.join(20)
    thread.join()
    assert heard == [hello(None), b"typed"] and not copying.is_alive()
    near.close()
    far.close()
    listener.close()


# --- starting -------------------------------------------------------------------------------------------
def test_a_stale_socket_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "xtoold.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.listen()
    dead.close()
    with pytest.raises(HostError, match="nobody listens"):
        SocketClient(str(path)).list()
    with listen(path, Access()) as fresh:  # in its place
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(path))
        link.close()
        fresh.accept()[0].close()


def test_the_client_starts_the_daemon_and_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    use(None)  # what a test before this one left
    monkeypatch.setenv("XTOOL_CONNECT", "fake:")
    assert cli.main(["daemon", "status"]) == 1
    assert cli.main(["daemon", "run", "-b"]) == 0
    try:
        monkeypatch.setenv("XTOOL_CONNECT", "unix:")
        assert cli.main(["daemon", "status", "-o", "json"]) == 0
        found = json.loads(capsys.readouterr().out.partition("\n")[2])
        assert found["running"] and found["host"] == "fake:" and found["pid"] != os.getpid()
        assert cli.main(["list", "-o", "json"]) == 0 and json.loads(capsys.readouterr().out) == []
        assert cli.main(["domid", "none"]) == 9
        path = paths.run_dir() / "xtoold.sock"
        assert cli.main(["-H", f"unix:{path}", "info"]) == 0
        assert "4.17.0-fake" in capsys.readouterr().out
        assert cli.main(["events", "--since", "1h", "--no-follow", "-o", "json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[0])["kind"] == "operation"
        assert cli.main(["block-serve", "web", "xvda"]) == UsageError.exit_code
    finally:
        assert cli.main(["daemon", "stop"]) == 0
    assert not path.exists() and cli.main(["daemon", "stop"]) == 0
    assert cli.main(["-H", f"unix:{path}", "list"]) == HostError.exit_code


def test_a_daemon_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xtool.client import start

    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setenv("XTOOL_RUN_DIR", "/dev/null/run")
    with pytest.raises(HostError, match=r"xtoold did not start: .*Not a directory"):
        start.start("fake:")


@pytest.mark.skipif(os.path.exists("/dev/xen/privcmd"), reason="there is Xen here")
def test_without_xen_there_is_no_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    use(None)  # what a test before this one left
    monkeypatch.setenv("XTOOL_CONNECT", "unix:")
    assert cli.main(["list"]) == HostError.exit_code
    assert "xtoold did not start: xtoold:" in capsys.readouterr().err
    assert not (paths.run_dir() / "xtoold.sock").exists()


def test_sockets_from_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inherited() == []
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = b"no"
        try:
            made = socket.socket(socket.AF_UNIX)
            made.bind(str(tmp_path / "s"))
            made.listen()
            os.dup2(write, 9)
            os.dup2(made.fileno(), 3)
            os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
            (found,) = inherited()
            code = (
                b"ok" if found.getsockname() == str(tmp_path / "s") and not os.get_inheritable(3) else b"bad"
            )
        finally:
            os.write(9, code)
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 9) == b"ok"
    os.close(read)
    os.close(write)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert systemd.recv(100) == b"READY=1"


# --- over ssh ------------------------------------------------------------------------------------------
#: Takes ssh's place: forwards a socket to one of this machine, looks at this machine's files, or says what
#: it would have run.
SSH = """#!{python}
import os, socket, subprocess, sys, threading
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(words) + chr(10))
def copy(a, b):
    while data := a.recv(65536):
        b.sendall(data)
    b.shutdown(socket.SHUT_WR)
def pair(near, far):
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(far)
    except OSError:
        return near.close()
    for a, b in ((near, link), (link, near)):
        threading.Thread(target=copy, args=(a, b), daemon=True).start()
if "relay" in words:
    near, far = words[1:]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(near)
    listener.listen()
    print("up", flush=True)
    while True:
        pair(listener.accept()[0], far)
elif "-O" in words:
    what = words[words.index("-O") + 1]
    if what == "forward":
        near, far = words[words.index("-L") + 1].split(":")
        child = subprocess.Popen([sys.executable, __file__, "relay", near, far], stdout=subprocess.PIPE)
        child.stdout.readline()
        open({log!r} + ".pid", "w").write(str(child.pid))
    elif what == "cancel":
        os.kill(int(open({log!r} + ".pid").read()), 15)
elif "-fNT" not in words:
    if words[-1].startswith("test -S"):
        sys.exit(0 if os.path.exists(words[-1].split()[-1]) else 1)
    if words[-1] == "xtool daemon run -b":
        os.execv("/bin/sh", ["sh", {log!r} + ".start"])
    if "xtool " not in words[-1]:  # a look at files
        os.execv("/bin/sh", ["sh", "-c", words[-1]])
    print("ran there:", words[-1])
"""


def test_another_hosts_daemon_over_ssh(
    daemon: Running,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    log = tmp_path / "ssh.log"
    ssh.write_text(SSH.format(python=sys.executable, log=str(log)))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("xtool.cli.forward.SOCKET", str(daemon.path))
    daemon.client().create(config("pv", name="web"), RUN)
    assert cli.main(["-H", "ssh://root@far", "list", "-o", "json"]) == 0
    assert [d["name"] for d in json.loads(capfd.readouterr().out)] == ["web"]
    assert cli.main(["-H", "ssh://root@far", "destroy", "web"]) == 0
    assert cli.main(["-H", "ssh://root@far", "domid", "web"]) == DomainNotFoundError.exit_code
    assert daemon.client().list() == []
    said = log.read_text()
    assert said.count("-O forward") == said.count("-O cancel") == 3 and f":{daemon.path}" in said
    assert not list(tmp_path.glob("xtool-*"))  # nothing is left of the forwarded sockets
    capfd.readouterr()
    assert cli.main(["-H", "ssh://root@far", "check", "--help"]) == 0  # needs no daemon
    monkeypatch.setattr("xtool.cli.forward.SOCKET", str(tmp_path / "none"))
    assert cli.main(["-H", "ssh://root@far", "list", "-o", "json"]) == 0
    monkeypatch.setenv("XTOOL_FORWARD", "0")
    monkeypatch.setattr("xtool.cli.forward.SOCKET", str(daemon.path))
    assert cli.main(["-H", "ssh://root@far", "list"]) == 0
    out = capfd.readouterr().out
    assert "ran there: " in out and out.count("xtool list") == 2


def test_a_daemon_that_does_not_run_there_is_started(
    daemon: Running,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """For verbs that read files here, so that nothing but a daemon there can carry them out."""
    (tmp_path / "bin").mkdir()
    ssh, log, start = tmp_path / "bin" / "ssh", tmp_path / "ssh.log", tmp_path / "ssh.log.start"
    ssh.write_text(SSH.format(python=sys.executable, log=str(log)))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = tmp_path / "place"
    monkeypatch.setattr("xtool.cli.forward.SOCKET", str(place))
    file = tmp_path / "web.yaml"
    file.write_text("name: web\ntype: pv\nmemory: 16\nkernel: k\n")
    kernel = Path(config("pv").kernel or "").read_bytes()
    (tmp_path / "k").write_bytes(kernel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    apply = ["-H", "ssh://root@far", "apply", str(file), "--jobs", "1"]

    def refused(script: str) -> str:
        start.write_text(script)
        assert cli.main(apply) == HostError.exit_code
        return capfd.readouterr().err

    assert "it did not start: there is no Xen" in refused("echo error: there is no Xen >&2; exit 5")
    assert "has no xtool to run" in refused("exit 127")
    assert "does not answer this user" in refused("true")
    start.write_text(f"ln -s {daemon.path} {place}")
    assert cli.main([*apply, "-o", "json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["domains"][0]["result"] == "done"
    assert "starting the daemon of ssh://root@far" in said.err
    assert [d.name for d in daemon.client().list()] == ["web"]
    [sent] = (tmp_path / "cache/xtool/sent").iterdir()
    assert sent.read_bytes() == kernel and daemon.client().config("web")[0].config["kernel"] == str(sent)
    assert cli.main([*apply, "-o", "json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["domains"][0]["result"] == "unchanged"
    assert "starting" not in said.err


# --- what crosses the wire --------------------------------------------------------------------------------
def test_many_clients_at_once(daemon: Running, config: Config) -> None:
    """Creates, looks and destroys from many threads: each gets its own answer."""
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            client = daemon.client()
            name = f"guest-{number}"
            made = client.create(config("pv", name=name, memory=4), RUN)
            assert client.list(name)[0].domid == made.domid
            assert any(d.name == name for d in client.list())
            assert client.destroy(name).domid == made.domid
            with pytest.raises(DomainNotFoundError):
                client.list(name)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and daemon.client().list() == []


def test_one_name_from_many_sides(daemon: Running, config: Config) -> None:
    results: list[object] = []

    def work() -> None:
        try:
            results.append(daemon.client().create(config("pv", name="one", memory=4), RUN).domid)
        except BaseException as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results))[1:] == ["DomainExistsError"] * 9
    assert len(daemon.client().list()) == 1


def test_a_socket_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "closed"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    path.chmod(0)
    if os.getuid():
        with pytest.raises(PrivilegeError):
            SocketClient(str(path)).list()
    listener.close()
