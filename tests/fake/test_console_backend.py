"""Our console backend in its process's frame, on the machine in memory: a guest prints, types and lies.

HF 35 and 36 of the list of hostile frontends; R17 and R19.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from xtool.backends import consolelog
from xtool.backends.console import ConsoleBackend
from xtool.backends.consolelog import BOOT, DATA, SKIPPED, ConsoleLog, log_path, older, parse, read_log
from xtool.backends.frame import BackendContext
from xtool.backends.loop import Loop
from xtool.backends.server import Server
from xtool.backends.viewers import BACKLOG, INPUT_MAX, PTY_BACKLOG, Viewers, socket_path
from xtool.fake.machine import FakeMachine
from xtool.fake.store import FakeStoreDaemon
from xtool.frontends.console import ConsoleDevice
from xtool.proto.consolering import INDEXES_AT
from xtool.xenstore.client import StoreClient

GUEST, UUID = 7, "11111111-2222-3333-4444-555555555555"
HOME = f"/local/domain/{GUEST}"
BACK = f"/local/domain/0/backend/xtool-console/{GUEST}"


class World:
    """A host, a guest with console 0 (its page under the reserved grant), and our process, which can die."""

    def __init__(self, run: Path) -> None:
        self.machine = FakeMachine()
        self.machine.add_domain(GUEST)
        self.daemon = FakeStoreDaemon()
        self.store = StoreClient(self.daemon.connect)
        self.guest_events = self.machine.events(GUEST)
        self.console = self.new_console()
        self.machine.grant(GUEST, 0, self.console._shared._frames[0], ref=0)  # type: ignore[attr-defined]
        self.store.write(f"{HOME}/vm", f"/vm/{UUID}")
        self.store.write(f"{HOME}/console/port", self.console.nodes["port"])
        self.store.write(f"{HOME}/console/state", "4")
        self.add(0, f"{HOME}/console")
        self.run = run
        self.start()

    def new_console(self) -> ConsoleDevice:
        return ConsoleDevice(self.machine.allocator(GUEST), self.guest_events, 0)

    def add(self, number: int, frontend: str, **nodes: str) -> None:
        with self.store.batch() as batch:
            for name, value in {
                **nodes,
                "frontend": frontend,
                "frontend-id": str(GUEST),
                "online": "1",
                "state": "1",
            }.items():
                batch.write(f"{BACK}/{number}/{name}", value)

    def start(self) -> None:
        self.events, self.grants = self.machine.events(0), self.machine.grants(0)
        self.loop = Loop(self.events)
        self.own_store = StoreClient(self.daemon.connect)
        context = BackendContext(GUEST, self.own_store, self.events, self.grants, self.loop, self.run)
        self.server = Server(context, folders=["xtool-console"])
        self.step(4)

    def step(self, count: int = 1, timeout: float = 0.02) -> None:
        for _ in range(count):
            self.server.step(timeout)

    def until(self, ready: Callable[[], object], deadline: float = 5.0) -> None:
        end = time.monotonic() + deadline
        while not ready():
            assert time.monotonic() < end, "it did not come to that"
            self.server.step(0.01)

    def backend(self, number: int = 0) -> ConsoleBackend:
        found = self.server.devices["xtool-console", number].backend
        assert isinstance(found, ConsoleBackend)
        return found

    def state(self, number: int = 0) -> str | None:
        return self.store.get(f"{BACK}/{number}/state")

    def kill(self) -> None:
        """As kill -9 does it: the kernel lets go of everything, nothing of ours runs any more."""
        for device in self.server.devices.values():
            backend = device._backend
            if isinstance(backend, ConsoleBackend):
                if backend._ring is not None:
                    backend._ring.release()
                os.close(backend.log._fd)
                backend.log._fd = -1
                for viewer in backend.viewers._viewers.values():
                    viewer.close()
                backend.viewers._viewers.clear()
                for sock, _ in backend.viewers._listening.values():
                    sock.close()
        self.grants.close()
        self.events.close()
        self.own_store.close()

    def viewer(self, number: int = 0) -> socket.socket:
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(socket_path(GUEST, number)))
        link.setblocking(False)
        count = len(self.backend(number).viewers)
        self.until(lambda: len(self.backend(number).viewers) > count)
        return link

    def kept(self) -> bytes:
        return b"".join(record.data for record in read_log(log_path(UUID)))


def received(link: socket.socket) -> bytes:
    data = b""
    while True:
        try:
            more = link.recv(1 << 20)
        except BlockingIOError:
            return data
        if not more:
            return data + b"<end>"
        data += more


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("XTOOL_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    world = World(tmp_path)
    yield world
    world.server.close()
    world.loop.close()
    assert not world.grants.live


def test_output_is_kept_and_shown_and_input_arrives(world: World) -> None:
    assert world.state() == "4"
    tty = world.store.get(f"{HOME}/console/tty")
    assert tty and tty.startswith("/dev/pts/")
    world.console.write(b"booting\r\n\x1b[31mred\x00\xff")
    world.step(2)
    first, second = world.viewer(), world.viewer()
    world.console.write(b"more\n")
    world.step(2)
    whole = b"booting\r\n\x1b[31mred\x00\xffmore\n"
    # Since the boot, byte for byte: to both, to the pty, into the log.
    assert received(first) == received(second) == whole
    fd = os.open(tty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    assert os.read(fd, 4096) == whole
    assert world.kept() == whole
    first.send(b"ls\n")
    world.until(lambda: world.backend().describe()["written"] == 3)
    os.write(fd, b"pwd\n")
    world.until(lambda: world.backend().describe()["written"] == 7)
    assert world.console.read(1) == b"ls\npwd\n"
    os.close(fd)
    # A viewer that only says it will type no more keeps looking; one that leaves is forgotten.
    first.shutdown(socket.SHUT_WR)
    second.close()
    world.until(lambda: len(world.backend().viewers) == 2)  # the pty is one
    world.console.write(b"end")
    world.step(2)
    assert received(first) == b"end"
    assert oct(os.stat(socket_path(GUEST)).st_mode)[-3:] == "600"
    assert oct(os.stat(log_path(UUID)).st_mode)[-3:] == "600"


def test_a_stuck_viewer_slows_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConsoleBackend, "drain_rate", 1 << 40)
    stuck, reader, seen, sent = world.viewer(), world.viewer(), sha256(), sha256()
    for round_ in range(2 * BACKLOG // 2000):
        line = b"%06d" % round_ * 300
        assert world.console.write(line) == len(line)
        sent.update(line)
        world.step(1, 0)
        seen.update(received(reader))
    world.step(3, 0)
    seen.update(received(reader))
    assert seen.digest() == sent.digest()
    assert world.backend().viewers.cut == 1 and len(world.backend().viewers) == 2
    assert received(stuck).endswith(b"<end>")


def test_hf35_a_flood_stays_bounded(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 MB: two files of bounded size, one line in our log, what is left out is counted."""
    monkeypatch.setattr(ConsoleBackend, "drain_rate", 1 << 40)
    block = bytes(range(256)) * 8
    with caplog.at_level(logging.WARNING):
        for _ in range(100_000_000 // 2048):
            assert world.console.write(block) == 2048
            world.server.step(0)
            if world.console.ring.free() != 2048:
                world.server.step(0)
    backend = world.backend()
    log = log_path(UUID)
    assert log.stat().st_size + older(log).stat().st_size <= 2 * consolelog.FILE_LIMIT
    assert sorted(os.listdir(log.parent)) == [f"{UUID}.log", f"{UUID}.log.1"]
    lines = [r for r in caplog.records if "more than is kept" in r.getMessage()]
    assert 1 <= len(lines) <= 6
    backend.log.note_missing()
    described = backend.describe()
    assert described["read"] == 100_000_000 // 2048 * 2048 and described["not_kept"] > 50_000_000
    assert sum(r.skipped for r in read_log(log)) > 0
    tty_viewer = next(iter(backend.viewers._viewers.values()))
    assert len(tty_viewer.live) <= PTY_BACKLOG


def test_a_flooding_console_is_slowed_down_and_another_is_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConsoleBackend, "drain_rate", 100_000)
    monkeypatch.setattr(ConsoleBackend, "drain_burst", 10_000)
    backend = world.backend()
    backend._credit = 10_000
    other = world.new_console()
    front = f"{HOME}/device/console/1"
    world.store.write(f"{front}/state", "1")
    world.add(1, front, connection="socket", name="org.test")
    world.until(lambda: world.state(1) == "2")
    connect(world, other, front)
    end, slowest = time.monotonic() + 1.0, 0.0
    before = backend.describe()["read"]
    while time.monotonic() < end:
        world.console.write(b"x" * 2048)
        start = time.monotonic()
        other.write(b"tick")
        world.step(1, 0)
        slowest = max(slowest, time.monotonic() - start)
    assert backend.describe()["read"] - before < 250_000
    world.until(lambda: world.backend(1).describe()["read"] > 0)
    assert slowest < 0.5
    other.close()


def connect(world: World, console: ConsoleDevice, front: str) -> None:
    with world.store.batch() as batch:
        for name, value in console.nodes.items():
            batch.write(f"{front}/{name}", value)
        batch.write(f"{front}/state", "3")
    world.until(lambda: world.state(1) == "4")


def test_a_channel_by_xenbus(world: World) -> None:
    front = f"{HOME}/device/console/1"
    world.store.write(f"{front}/state", "1")
    world.add(1, front, connection="socket", name="org.test")
    world.until(lambda: world.state(1) == "2")
    channel = world.new_console()
    connect(world, channel, front)
    with world.viewer(1) as link:
        channel.write(b"hello")
        world.step(2)
        assert received(link) == b"hello"
        link.send(b"x" * 5000)
        got = b""
        end = time.monotonic() + 5
        while len(got) < 5000 and time.monotonic() < end:
            world.step()
            assert len(world.backend(1).viewers.input) <= INPUT_MAX
            got += channel.take()
        assert got == b"x" * 5000
    assert world.store.get(f"{BACK}/1/tty") is None
    world.store.write(f"{front}/state", "6")
    world.until(lambda: world.state(1) == "6")
    channel.close()
    world.store.rm(f"{BACK}/1")
    world.until(lambda: len(world.server.devices) == 1)
    assert not socket_path(GUEST, 1).exists()


@pytest.mark.parametrize(
    "nodes", [{"ring-ref": "0"}, {"ring-ref": "99999999999"}, {"port": "-1"}, {"port": ""}]
)
def test_hf8_nodes_of_a_channel_that_make_no_sense(world: World, nodes: dict[str, str]) -> None:
    front = f"{HOME}/device/console/1"
    channel = world.new_console()
    with world.store.batch() as batch:
        for name, value in {**channel.nodes, **nodes, "state": "3"}.items():
            batch.write(f"{front}/{name}", value)
    world.add(1, front)
    world.until(lambda: world.state(1) in ("5", "6"))
    assert "frontend's" in (
        world.store.get(f"/local/domain/0/error/backend/xtool-console/{GUEST}/1/error") or ""
    )
    assert world.state() == "4"
    channel.close()


@pytest.mark.parametrize("word", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [0x8000_0000, 5000, 0xFFFF_0000])
def test_hf35_corrupt_indexes_close_that_console_alone(world: World, word: int, value: int) -> None:
    world.console.write(b"before")
    world.step(2)
    view = world.console._shared.view
    place = INDEXES_AT + 4 * word
    backend = world.backend()
    with view[place : place + 4] as part, part.cast("I") as index:
        index[0] = value
    world.guest_events.notify(int(world.console.nodes["port"]))
    with world.viewer() as link:
        try:
            link.send(b"x")
        except OSError:
            pass
        for _ in range(10):
            world.step()
    if word in (1, 2):  # our own words: what the guest writes there is not looked at
        assert world.state() == "4"
        return
    assert world.state() in ("5", "6"), backend.describe()
    reason = world.store.get(f"/local/domain/0/error/backend/xtool-console/{GUEST}/0/error")
    assert reason and "index" in reason
    assert not world.grants.live
    assert world.kept() == b"before"


def test_hf36_the_page_cannot_be_mapped(world: World) -> None:
    world.kill()
    world.machine.revoke(GUEST, 0)
    world.start()
    world.until(lambda: world.state() in ("5", "6"))
    world.console.write(b"nobody listens")
    world.step(3)


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_backend_loses_nothing(world: World, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two steps of log, consume and show, again and again: each byte is kept once."""
    rng = random.Random(seed)
    sent, armed = bytearray(), True

    class Killed(BaseException):
        pass

    def at_random(name: str, holder: type) -> None:
        real = getattr(holder, name)

        def step(*args: object) -> object:
            if armed and rng.random() < 0.02:
                raise Killed
            done = real(*args)
            if armed and rng.random() < 0.02:
                raise Killed
            return done

        monkeypatch.setattr(holder, name, step)

    from xtool.proto.consolering import ConsoleEnd

    at_random("add", ConsoleLog)
    at_random("consume", ConsoleEnd)
    at_random("show", Viewers)
    kills = 0
    while len(sent) < 200_000:
        data = bytes(rng.randbytes(rng.randrange(1, 1500)))
        sent += data[: world.console.write(data)]
        try:
            world.step(1, 0)
        except Killed:
            kills += 1
            world.kill()
            if rng.random() < 0.3:
                with open(log_path(UUID), "ab") as torn:
                    torn.write(b"xCD\x00\x10\x00\x00\x00")
            armed = False
            world.start()
            armed = True
            assert world.state() == "4"
    armed = False
    world.until(lambda: world.console.ring.free() == 2048)
    assert kills > 3
    assert world.kept() == sent


def test_a_reboot_begins_a_new_replay(world: World) -> None:
    world.console.write(b"first life")
    world.step(2)
    world.server.devices["xtool-console", 0].backend.disconnect()
    world.server.devices["xtool-console", 0].backend.connect({"port": world.console.nodes["port"]})
    world.console.write(b"second")
    world.step(3)
    with world.viewer() as link:
        world.step()
        assert received(link) == b"second"
    assert world.kept() == b"first lifesecond"


def test_the_log_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.log"
    clock = [0.0]
    log = ConsoleLog(path, limit=4096, rate=1000, burst=3000, clock=lambda: clock[0], now=lambda: 1e9)
    log.boot(5)
    assert log.add(b"a" * 2000, 2005) and not log.add(b"b" * 2000, 4005) and log.add(b"c" * 900, 4905)
    assert [r.kind for r in read_log(path)] == [BOOT, DATA, SKIPPED, DATA]
    assert [r.skipped for r in read_log(path)] == [0, 0, 2000, 0]
    clock[0] += 10
    assert log.add(b"d" * 2000, 6905)
    clock[0] += 10
    assert log.add(b"e" * 1000, 7905)
    # A full file moved aside: the two together say it all, in order.
    assert older(path).exists() and log.last_end == 7905
    assert b"".join(r.data for r in read_log(path)) == b"a" * 2000 + b"c" * 900 + b"d" * 2000 + b"e" * 1000
    pieces = log.since_boot()
    assert [os.pread(p.fd, p.stop - p.start, p.start)[:2] for p in pieces] == [b"xC", b"xC"]
    for piece in pieces:
        os.close(piece.fd)
    log.close()
    # What is no log is not taken for one, and parsing any bytes ends.
    for raw in (b"", b"xC", b"xCZ\0" + bytes(16), b"xCD\0\xff\xff\xff\xff" + bytes(12), os.urandom(500)):
        assert parse(raw) == ([], 0)
    path.write_bytes(b"junk")
    log = ConsoleLog(path, limit=4096)
    assert path.stat().st_size == 0 and log.last_end == 4905
    log.close()


def test_a_full_disk_costs_the_log_and_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if fd == world.backend().log._fd:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(consolelog.os, "write", full)
    with world.viewer() as link:
        world.console.write(b"lost")
        world.step(2)
        assert received(link) == b"lost"
        monkeypatch.setattr(consolelog.os, "write", real)
        world.console.write(b"kept")
        world.step(2)
    assert world.state() == "4"
    assert [(r.skipped, r.data) for r in read_log(log_path(UUID))][-2:] == [(4, b""), (0, b"kept")]
