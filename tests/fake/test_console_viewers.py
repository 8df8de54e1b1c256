"""Viewers that come back: the console's process is killed and replaced, and no byte is missing or doubled."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_console_backend import BACK, GUEST, HOME, UUID, World, world

from xtool.backends import consolelog
from xtool.backends.console import ConsoleBackend
from xtool.backends.consolefeed import (
    HELLO_SIZE,
    Feed,
    Position,
    Since,
    feed_path,
    hello,
    parse_hello,
    shown,
)
from xtool.backends.consolelog import BOOT, DATA, SKIPPED, ConsoleLog, Record, log_path, micros, parse
from xtool.backends.viewers import MOST_VIEWERS, socket_path
from xtool.cli.consolelink import Link
from xtool.errors import RemoteProtocolError
from xtool.proto.shm import MASK32
from xtool.toolstack.api import ConsoleTarget

__all__ = ["world"]  # a fixture


class Returning:
    """A viewer that connects again, as ``xtool console`` does; ``seen`` is what it showed."""

    def __init__(self) -> None:
        self.feed = Feed()
        self.seen = b""
        self.link: socket.socket | None = None

    def look(self) -> None:
        if self.link is None:
            link = socket.socket(socket.AF_UNIX)
            try:
                link.connect(str(feed_path(GUEST)))
            except OSError:
                link.close()
                return
            link.sendall(self.feed.connected())
            link.setblocking(False)
            self.link = link
        try:
            while data := self.link.recv(4096):
                self.seen += self.feed.receive(data)
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None


@pytest.fixture
def viewer() -> Iterator[Returning]:
    found = Returning()
    yield found
    found.close()


def test_killed_and_replaced_again_and_again(world: World, viewer: Returning) -> None:
    dice, sent = random.Random(11), b""
    for round_ in range(120):
        line = b"%06d" % round_ + dice.randbytes(dice.randrange(1, 1500)) + b"\n"
        wrote = world.console.write(line)
        sent += line[:wrote]
        for _ in range(dice.randrange(3)):
            world.step(1, 0)
            if dice.random() < 0.5:
                viewer.look()
        if round_ % 10 == 9:
            if dice.random() < 0.5:
                world.kill()
            else:
                world.server.close()
                world.grants.close()
                world.events.close()
                world.own_store.close()
            if dice.random() < 0.5:
                viewer.look()  # while nobody is there
            world.start()
    world.until(lambda: viewer.look() or len(viewer.seen) >= len(sent))
    assert viewer.seen == sent
    assert len(sent) > 50_000


def test_a_record_that_came_in_part_comes_again(world: World, viewer: Returning) -> None:
    world.console.write(b"x" * 1000)
    world.step(2)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(feed_path(GUEST)))
        link.sendall(viewer.feed.connected())
        world.step(3)
        viewer.seen += viewer.feed.receive(link.recv(700))
    assert viewer.seen == b""
    world.until(lambda: viewer.look() or viewer.seen)
    assert viewer.seen == b"x" * 1000


def test_input_goes_to_the_guest_after_the_greeting(world: World) -> None:
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(feed_path(GUEST)))
        for byte in hello(None) + b"ls\n":  # byte by byte
            link.sendall(bytes([byte]))
            world.step(2, 0)
        world.until(lambda: world.backend().describe()["written"] == 3)
        assert world.console.read(1) == b"ls\n"


def test_the_slowest_viewer_catches_up(
    world: World, viewer: Returning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off with a megabyte waiting for it, it comes back to the log."""
    monkeypatch.setattr(ConsoleBackend, "drain_rate", 1 << 40)
    viewer.look()
    world.step(2)
    sent = b""
    while not world.backend().viewers.cut:
        line = b"%07d" % len(sent) * 250
        assert world.console.write(line) == len(line)
        sent += line
        world.step(1, 0)
    world.until(lambda: viewer.look() or len(viewer.seen) >= len(sent))
    assert viewer.seen == sent


def test_what_is_kept_no_more_is_counted(
    world: World, viewer: Returning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConsoleBackend, "drain_rate", 1 << 40)
    world.console.write(b"first")
    world.until(lambda: viewer.look() or viewer.seen == b"first")
    world.backend().log._limit = 20_000
    viewer.close()
    for number in range(200):
        world.console.write(b"%04d" % number * 100)
        world.step(1, 0)
    world.step(2)
    world.until(lambda: viewer.look() or viewer.seen.endswith(b"0199"))
    notice, _, rest = viewer.seen[5:].partition(b"kept]\r\n")
    missing = int(notice.split()[0].strip(b"["))
    assert missing and missing + len(rest) == 200 * 400
    assert rest == b"".join(b"%04d" % n * 100 for n in range(200))[missing:]


def test_another_boot_is_shown_from_its_beginning(world: World, viewer: Returning) -> None:
    """A channel whose frontend comes back with a new ring: its indexes begin at 0 again."""
    from test_console_backend import connect

    front = f"{HOME}/device/console/1"
    console = world.new_console()
    world.store.write(f"{front}/state", "1")
    world.add(1, front, connection="socket", name="org.test")
    world.until(lambda: world.state(1) == "2")
    connect(world, console, front)
    link = socket.socket(socket.AF_UNIX)
    link.connect(str(feed_path(GUEST, 1)))
    link.sendall(viewer.feed.connected())
    link.settimeout(5)
    console.write(b"before")
    seen = b""
    while seen != b"before":
        world.step(1)
        seen += viewer.feed.receive(link.recv(1 << 16)) if select.select([link], [], [], 0)[0] else b""
    link.close()
    console.write(b", unseen")
    world.step(3)
    world.store.write(f"{front}/state", "6")
    world.until(lambda: world.state(1) == "6")
    world.store.write(f"{BACK}/1/state", "1")
    world.store.write(f"{front}/state", "1")
    world.until(lambda: world.state(1) == "2")
    again = world.new_console()
    connect(world, again, front)
    again.write(b"after")
    world.step(3)
    with socket.socket(socket.AF_UNIX) as back:
        back.connect(str(feed_path(GUEST, 1)))
        back.sendall(viewer.feed.connected())
        while not seen.endswith(b"after"):
            world.step(1)
            seen += viewer.feed.receive(back.recv(1 << 16)) if select.select([back], [], [], 0)[0] else b""
    assert seen == b"before, unseenafter"
    console.close()
    again.close()


def test_who_talks_nonsense_is_sent_away(world: World) -> None:
    for raw in (bytes(HELLO_SIZE), b"GET / HTTP/1.1\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(feed_path(GUEST)))
            link.sendall(raw)
            link.settimeout(5)
            world.step(4)
            try:
                assert link.recv(100) == b""
            except ConnectionResetError:
                pass
    silent = [socket.socket(socket.AF_UNIX) for _ in range(MOST_VIEWERS + 2)]
    for link in silent:
        link.connect(str(feed_path(GUEST)))
        world.step(1)
    assert len(world.backend().viewers) <= MOST_VIEWERS
    for link in silent:
        link.close()
    world.step(3)
    assert len(world.backend().viewers) == 1  # the pty
    assert oct(os.stat(feed_path(GUEST)).st_mode)[-3:] == "600"


# --- the command line's viewer, a process of its own
CHILD = """
import sys
from xtool.cli.console import attach
from xtool.toolstack.api import ConsoleTarget
flag = sys.argv[2]
import os
sys.exit(attach(
    ConsoleTarget(7, "web", "pv", "", "unused", 0, sys.argv[1]),
    is_alive=lambda: not os.path.exists(flag),
))
"""


def start_viewer(flag: Path, stdout: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(feed_path(GUEST)), str(flag)],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def test_xtool_console_goes_on(world: World, tmp_path: Path) -> None:
    """Its backend is killed with kill -9, stopped, and started again; then the domain ends."""
    out, flag, sent = tmp_path / "out", tmp_path / "gone", b""
    with out.open("wb") as file:
        child = start_viewer(flag, file.fileno())
    assert child.stdin is not None
    try:
        for round_ in range(6):
            for number in range(20):
                line = b"round %d line %d\r\n" % (round_, number)
                assert world.console.write(line) == len(line)
                sent += line
                world.step(1, 0)
            if round_ < 3:  # in the others it may be anywhere
                world.until(lambda: out.stat().st_size >= len(sent), 30)  # noqa: B023
                assert out.read_bytes() == sent
            world.kill()
            assert child.poll() is None
            world.console.write(b"while nobody was there\r\n")
            sent += b"while nobody was there\r\n"
            world.start()
        world.until(lambda: out.read_bytes() == sent, 30)
        # What is typed reaches the guest through the new process.
        child.stdin.write(b"typed\n")
        child.stdin.flush()
        typed = b""
        end = time.monotonic() + 20
        while typed != b"typed\n":
            assert time.monotonic() < end
            world.step(1)
            typed += world.console.take()
        world.kill()
        flag.touch()
        assert child.wait(20) == 0
        assert out.read_bytes() == sent
    finally:
        child.kill()
        child.communicate()
        world.start()


def test_xtool_console_can_be_left_while_nobody_serves(world: World, tmp_path: Path) -> None:
    world.console.write(b"hello")
    world.step(2)
    child = start_viewer(tmp_path / "gone", subprocess.PIPE)
    assert child.stdout is not None
    try:
        world.until(lambda: select.select([child.stdout], [], [], 0)[0], 20)
        world.kill()
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == -signal.SIGTERM
    finally:
        child.kill()
        child.communicate()
        world.start()


def test_a_backend_without_a_feed(world: World) -> None:
    world.console.write(b"hello")
    world.step(2)
    os.unlink(feed_path(GUEST))
    link = Link(ConsoleTarget(GUEST, "web", "pv", "", str(socket_path(GUEST)), 0, str(feed_path(GUEST))))
    world.until(lambda: select.select([link.fd], [], [], 0)[0])
    assert link.read(100) == b"hello" and link.final
    link.close()


# --- the parts by themselves
@st.composite
def prints(draw: st.DrawFn) -> tuple[int, list[Record]]:
    """A boot's records, from any index on: output, and what was too much."""
    start = end = draw(st.sampled_from([0, 5, MASK32 - 20]))
    records = []
    for size in draw(st.lists(st.integers(1, 9), max_size=12)):
        end = (end + size) & MASK32
        if draw(st.booleans()):
            records.append(
                Record(
                    DATA, 5.0, end, bytes(draw(st.lists(st.integers(97, 122), min_size=size, max_size=size)))
                )
            )
        else:
            records.append(Record(SKIPPED, 5.0, end, skipped=size))
    return start, records


@settings(deadline=None)
@given(prints(), st.integers(0, 120), st.booleans())
def test_since_passes_on_exactly_the_rest(printed: tuple[int, list[Record]], at: int, kept: bool) -> None:
    start, records = printed
    whole = b"".join(r.data if r.kind == DATA else b"?" * r.skipped for r in records)
    at = min(at, len(whole))
    later = [Record(BOOT, 9.0, 0), Record(DATA, 9.0, 3, b"abc")]
    boot = [Record(BOOT, 5.0, start)] if kept else []
    before = [Record(BOOT, 1.0, 0), Record(DATA, 1.0, 4, b"old.")] if kept else []
    boots = {micros(r.time) for r in (*before, *boot, *later) if r.kind == BOOT}
    since = Since(Position(micros(5.0), (start + at) & MASK32), boots)
    passed = b"".join(map(since, [*before, *boot, *records, *later]))
    found, size = parse(passed)
    assert size == len(passed)
    rest = b"".join(r.data if r.kind == DATA else b"?" * r.skipped for r in found)
    assert rest == whole[at:] + b"abc"
    assert found[-1].end == 3


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_greetings(raw: bytes) -> None:
    for position in (None, Position(0, 0), Position(1 << 60, MASK32)):
        assert parse_hello(hello(position)) == position
    if len(raw) == HELLO_SIZE and not raw.startswith(b"xC"):
        with pytest.raises(RemoteProtocolError):
            parse_hello(raw)


def test_a_feed_that_is_none() -> None:
    with pytest.raises(RemoteProtocolError):
        Feed().receive(bytes(1 << 18))


def test_skipped_bytes_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path))
    log = ConsoleLog(log_path(UUID), burst=10, rate=0)
    log.boot(0)
    log.add(b"12345", 5)
    log.add(b"x" * 50, 55)
    log.note_missing()
    pieces, boots = log.whole()
    raw = b"".join(os.pread(p.fd, p.stop - p.start, p.start) for p in pieces)
    feed = Feed()
    assert feed.receive(raw) == b"12345\r\n[50 bytes were printed too fast to be kept]\r\n"
    assert feed.position is not None and {feed.position.boot} == boots and feed.position.end == 55
    assert shown(parse(raw)[0][0]) == b""
    for piece in pieces:
        os.close(piece.fd)
    log.close()
    assert consolelog.read_log(log_path(UUID))
