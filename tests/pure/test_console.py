"""The console client on real ptys: one plays xenconsoled's, one the person's terminal.

``attach`` owns signals and the terminal, so it runs in a process of its own.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xtool.devices import console
from xtool.errors import DeadlineError, DomainError, DomainNotFoundError, UsageError
from xtool.fake.store import FakeStoreDaemon
from xtool.xenstore.client import StoreClient
from xtool.xenstore.perms import owned_by

CHILD = """
import os, sys
from xtool.devices import console
console.LOCK_DIR = sys.argv[2]
from xtool.cli.console import attach
from xtool.toolstack.api import ConsoleTarget
life = int(sys.argv[3])
sys.exit(attach(
    ConsoleTarget(domid=5, name="web", kind="pv", tty=sys.argv[1]),
    timeout=float(sys.argv[4]) or None,
    alive_fd=life if life >= 0 else None,
    is_alive=(lambda: False) if life >= 0 else None,
    on_close=lambda: os.write(2, b"on_close"),
))
"""
LIMIT = 60.0  # seconds until a test that waits is called failed


def read_until(fd: int, wanted: bytes) -> bytes:
    """What ``fd`` gives until ``wanted`` is in it."""
    found, end = b"", time.monotonic() + LIMIT
    while wanted not in found:
        assert select.select([fd], [], [], max(end - time.monotonic(), 0))[0], found
        data = os.read(fd, 65536)
        assert data, found
        found += data
    return found


class Console:
    """A guest's console (``guest`` is xenconsoled's side) and the processes attached to it."""

    def __init__(self, tmp_path: Path) -> None:
        self.guest, self.slave = pty.openpty()
        tty.setraw(self.slave)  # as xenconsoled and QEMU do
        self.tty = os.ttyname(self.slave)
        self.locks = str(tmp_path)
        self.children: list[subprocess.Popen[bytes]] = []

    def attach(
        self, stdin: int, stdout: int, *, life: int = -1, timeout: float = 0
    ) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", CHILD, self.tty, self.locks, str(life), str(timeout)]
        child = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[life] if life >= 0 else [],
        )
        self.children.append(child)
        return child

    def attached(self, child: subprocess.Popen[bytes]) -> None:
        """Wait until a terminal's client says so."""
        assert child.stderr is not None
        read_until(child.stderr.fileno(), b"leaves.")

    def hang_up(self) -> None:
        os.close(self.slave)
        os.close(self.guest)
        self.guest = self.slave = -1

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe:
                    pipe.close()
        if self.guest >= 0:
            self.hang_up()


@pytest.fixture
def con(tmp_path: Path) -> Iterator[Console]:
    console = Console(tmp_path)
    yield console
    console.close()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """``(the person's side, the process's side)``"""
    person, process = pty.openpty()
    yield person, process
    os.close(person)
    os.close(process)


def echo_on(fd: int) -> bool:
    return bool(termios.tcgetattr(fd)[3] & termios.ECHO)


class TestTerminal:
    def test_both_ways_and_the_escape_key(self, con: Console, terminal: tuple[int, int]) -> None:
        person, process = terminal
        before = termios.tcgetattr(process)
        child = con.attach(process, process)
        con.attached(child)
        os.write(con.guest, b"login: ")
        read_until(person, b"login: ")
        assert not echo_on(process)
        os.write(person, b"\x03\x1a\r")  # Ctrl-C, Ctrl-Z and Return belong to the guest, as they are
        assert read_until(con.guest, b"\r") == b"\x03\x1a\r"
        os.write(person, b"last\x1dmore")
        assert read_until(con.guest, b"last") == b"last"
        assert child.wait(LIMIT) == 0
        assert termios.tcgetattr(process) == before
        assert not select.select([con.guest], [], [], 0)[0]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_restores_the_terminal(
        self, con: Console, terminal: tuple[int, int], number: signal.Signals
    ) -> None:
        person, process = terminal
        before = termios.tcgetattr(process)
        child = con.attach(process, process)
        con.attached(child)
        os.write(con.guest, b"x")
        read_until(person, b"x")
        assert termios.tcgetattr(process) != before
        child.send_signal(number)
        assert child.wait(LIMIT) == -number
        assert termios.tcgetattr(process) == before

    def test_the_console_ends(self, con: Console, terminal: tuple[int, int]) -> None:
        person, process = terminal
        child = con.attach(process, process)
        con.attached(child)
        os.write(con.guest, b"bye")
        read_until(person, b"bye")
        con.hang_up()
        assert child.wait(LIMIT) == 0
        assert child.stderr is not None and b"has ended.\non_close" in child.stderr.read()
        assert echo_on(process)

    def test_window_size(self, con: Console, terminal: tuple[int, int]) -> None:
        person, process = terminal
        termios.tcsetwinsize(process, (33, 111))
        child = con.attach(process, process)
        con.attached(child)
        os.write(con.guest, b"x")
        read_until(person, b"x")
        assert termios.tcgetwinsize(con.slave) == (33, 111)
        termios.tcsetwinsize(process, (44, 99))
        child.send_signal(signal.SIGWINCH)
        os.write(person, b"y")
        read_until(con.guest, b"y")
        end = time.monotonic() + LIMIT
        while termios.tcgetwinsize(con.slave) != (44, 99):
            assert time.monotonic() < end
            time.sleep(0.001)

    def test_only_one_reader(self, con: Console, terminal: tuple[int, int]) -> None:
        child = con.attach(terminal[1], terminal[1])
        con.attached(child)
        second = con.attach(subprocess.DEVNULL, subprocess.PIPE)
        _, errors = second.communicate(timeout=LIMIT)
        assert second.returncode == 1 and b"the console of domain 5 is in use" in errors
        os.write(terminal[0], b"\x1d")
        assert child.wait(LIMIT) == 0
        assert os.listdir(con.locks) == []


class TestPipes:
    def test_all_of_the_input_arrives_and_its_end_ends_nothing(self, con: Console) -> None:
        child = con.attach(subprocess.PIPE, subprocess.PIPE)
        assert child.stdin is not None and child.stdout is not None
        text = b"".join(b"line %d \x1d\n" % number for number in range(5000))  # no terminal: no escape key
        received = b""
        sent = memoryview(text)
        os.set_blocking(child.stdin.fileno(), False)
        while len(received) < len(text):  # the pty takes a few KiB at a time: partial writes on every side
            writers = [child.stdin] if sent else []
            readers, ready, _ = select.select([con.guest], writers, [], LIMIT)
            assert readers or ready
            if ready:
                sent = sent[os.write(child.stdin.fileno(), sent) :]
                if not sent:
                    child.stdin.close()
            if readers:
                received += os.read(con.guest, 65536)
        assert received == text
        os.write(con.guest, b"still here")
        read_until(child.stdout.fileno(), b"still here")
        assert child.poll() is None
        con.hang_up()
        assert child.wait(LIMIT) == 0

    def test_much_output_through_a_slow_pipe(self, con: Console) -> None:
        child = con.attach(subprocess.DEVNULL, subprocess.PIPE)
        assert child.stdout is not None
        text = bytes(range(1, 255)) * 2000
        sent, received = memoryview(text), b""
        os.set_blocking(con.guest, False)
        while len(received) < len(text):
            readers, writers, _ = select.select([child.stdout], [con.guest] if sent else [], [], LIMIT)
            assert readers or writers
            if writers:
                sent = sent[os.write(con.guest, sent[:3000]) :]
            if readers:
                received += os.read(child.stdout.fileno(), 1000)
        assert received == text

    def test_timeout(self, con: Console) -> None:
        child = con.attach(subprocess.DEVNULL, subprocess.PIPE, timeout=0.05)
        assert child.wait(LIMIT) == DeadlineError.exit_code

    def test_the_reader_of_our_output_leaves(self, con: Console) -> None:
        child = con.attach(subprocess.DEVNULL, subprocess.PIPE)
        assert child.stdout is not None
        os.write(con.guest, b"x")
        read_until(child.stdout.fileno(), b"x")
        child.stdout.close()
        os.write(con.guest, b"y")
        assert child.wait(LIMIT) == 0

    def test_the_domain_goes_before_the_pty(self, con: Console) -> None:
        read, write = os.pipe()
        child = con.attach(subprocess.DEVNULL, subprocess.PIPE, life=read)
        assert child.stdout is not None
        os.write(con.guest, b"one")
        read_until(child.stdout.fileno(), b"one")
        os.write(con.guest, b"two")
        os.write(write, b"!")
        assert read_until(child.stdout.fileno(), b"two") == b"two"
        assert child.wait(LIMIT) == 0
        os.close(read)
        os.close(write)


class TestOpening:
    @pytest.mark.parametrize(
        "name",
        [
            "",
            "/dev/pts/",
            "/dev/pts/../sda",
            "/dev/pts/1/../../sda",
            "/etc/passwd",
            "/dev/pts/1\n",
            "/dev/pts/\u0661",
        ],
    )
    def test_only_ptys(self, name: str) -> None:
        with pytest.raises(DomainError, match="not the name of a pty"):
            console.open_tty(name)

    def test_a_pty_that_is_gone(self, con: Console) -> None:
        con.hang_up()
        with pytest.raises(DomainError, match="cannot open"):
            console.open_tty(con.tty)

    def test_the_multiplexer_is_no_console(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(console, "check_tty_name", lambda name: None)
        with pytest.raises(DomainError, match="is not a pty"):
            console.open_tty("/dev/null")

    def test_opened_raw_and_nothing_printed_before_is_lost(
        self, con: Console, terminal: tuple[int, int]
    ) -> None:
        termios.tcsetattr(con.slave, termios.TCSANOW, termios.tcgetattr(terminal[1]))
        assert echo_on(con.slave)
        os.write(con.guest, b"early\n")
        fd = console.open_tty(con.tty)
        assert not echo_on(fd)
        assert os.read(fd, 100) == b"early\n"
        os.close(fd)


class TestFinding:
    DOMAIN = "/local/domain/5"

    @pytest.fixture
    def daemon(self) -> FakeStoreDaemon:
        return FakeStoreDaemon()

    @pytest.fixture
    def store(self, daemon: FakeStoreDaemon) -> StoreClient:
        store = StoreClient(daemon.connect)
        store.mkdir(self.DOMAIN, perms=owned_by(0, read=[5]))
        return store

    def on_watch(self, daemon: FakeStoreDaemon, action: Callable[[StoreClient], None]) -> None:
        """Do something once the caller waits: it has registered its watch and looked."""
        other, handle, looks = StoreClient(daemon.connect), daemon.handle, []

        def meddle(link: object, packet: object) -> None:
            handle(link, packet)  # type: ignore[arg-type]
            if packet.payload.endswith(b"/tty\0") and not looks:  # type: ignore[attr-defined]
                looks.append(1)
                action(other)

        daemon.handle = meddle  # type: ignore[method-assign, assignment]

    @pytest.mark.parametrize(("kind", "node"), [("pv", "console/tty"), ("serial", "serial/0/tty")])
    def test_there_already(self, store: StoreClient, kind: str, node: str) -> None:
        store.write(f"{self.DOMAIN}/{node}", "/dev/pts/7")
        assert console.wait_for_tty(store, 5, kind, 5) == "/dev/pts/7"

    def test_comes_later(self, daemon: FakeStoreDaemon, store: StoreClient) -> None:
        store.write(f"{self.DOMAIN}/console/tty", "")  # as toolstacks prepare it
        self.on_watch(daemon, lambda other: other.write(f"{self.DOMAIN}/console/tty", "/dev/pts/9"))
        assert console.wait_for_tty(store, 5, "pv", 5) == "/dev/pts/9"

    def test_domain_goes_meanwhile(self, daemon: FakeStoreDaemon, store: StoreClient) -> None:
        self.on_watch(daemon, lambda other: other.rm(self.DOMAIN))
        with pytest.raises(DomainNotFoundError):
            console.wait_for_tty(store, 5, "pv", 5)

    def test_never_comes(self, store: StoreClient) -> None:
        with pytest.raises(DeadlineError) as caught:
            console.wait_for_tty(store, 5, "serial", 0.05)
        assert "serial: pty" in (caught.value.hint or "")

    def test_unknown_domain_and_kind(self, store: StoreClient) -> None:
        with pytest.raises(DomainNotFoundError):
            console.wait_for_tty(store, 6, "pv", 5)
        with pytest.raises(UsageError):
            console.wait_for_tty(store, 5, "vuart", 5)

    @pytest.mark.parametrize("node", ["console", "console/tty"])
    @pytest.mark.parametrize("perms", [("n5",), ("n0", "b5"), ("n0", "w5"), ("w0",)])
    def test_xsa_057_a_name_the_guest_may_write(
        self, store: StoreClient, node: str, perms: tuple[str, ...]
    ) -> None:
        store.write(f"{self.DOMAIN}/console/tty", "/dev/pts/7")
        store.set_perms(f"{self.DOMAIN}/{node}", perms)
        with pytest.raises(DomainError, match="cannot be trusted"):
            console.wait_for_tty(store, 5, "pv", 5)

    def test_a_name_that_is_no_pty(self, store: StoreClient) -> None:
        store.write(f"{self.DOMAIN}/console/tty", "/etc/shadow")
        with pytest.raises(DomainError, match="not the name of a pty"):
            console.wait_for_tty(store, 5, "pv", 5)
