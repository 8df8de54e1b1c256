"""The console verb and ``create -c`` on real ptys, from the guest's first byte to its end."""

from __future__ import annotations

import os
import socket
import threading
import tty
from dataclasses import replace
from pathlib import Path

import pytest

from xtool.backends.consolefeed import HELLO_SIZE, Position, Since, parse_hello
from xtool.backends.consolelog import BOOT, DATA, Record, encode, micros, parse
from xtool.cli import app
from xtool.config import DomainConfig
from xtool.errors import DeadlineError, DomainNotFoundError
from xtool.progress import SILENT, Progress
from xtool.toolstack import api


class Guest:
    """A domain whose console is a pty of ours: it prints ``says`` once it runs, and has shut down then."""

    def __init__(self, domid: int, says: bytes, *, running: bool) -> None:
        self.master, slave = os.openpty()
        tty.setraw(slave)  # as xenconsoled does
        self.tty = os.ttyname(slave)
        os.close(slave)
        self.says = says
        self.info = api.DomainInfo(domid, "web", "u-1", "pv", "paused", "", 1 << 20, 1 << 20, 1, 0.0, True)
        if running:
            self.run()

    def run(self) -> None:
        os.write(self.master, self.says)
        self.info = replace(self.info, state="shutdown", reason="reboot")


class PtyClient:
    """Guests one after the other: ``settle`` puts the next in the place of one that asked for a reboot."""

    def __init__(self, guests: list[Guest]) -> None:
        self.guests = guests
        self.calls: list[str] = []
        self.no_console = False

    def create(
        self, config: DomainConfig, options: api.CreateOptions, progress: Progress = SILENT
    ) -> api.CreateResult:
        self.calls.append("create paused" if options.paused else "create")
        return api.CreateResult("web", self.guests[0].info.domid, "u-1", "pv", 0.1)

    def list(self, domain: str) -> list[api.DomainInfo]:
        info = self.guests[0].info
        if domain not in (str(info.domid), info.name):
            raise DomainNotFoundError(f"there is no domain {domain}")
        return [info]

    def console(
        self, domain: str, kind: str | None = None, *, number: int = 0, deadline: float = 10.0
    ) -> api.ConsoleTarget:
        if self.no_console:
            raise DeadlineError("the domain has no pv console yet", hint="is xenconsoled running?")
        guest = self.guests[0]
        assert domain == str(guest.info.domid)
        return api.ConsoleTarget(guest.info.domid, "web", kind or "pv", guest.tty)

    def unpause(self, domain: str) -> api.LifecycleResult:
        self.calls.append("unpause")
        self.guests[0].run()
        return api.LifecycleResult(int(domain), "web", "unpaused")

    def settle(self, domid: int, uuid: str, progress: Progress = SILENT) -> api.LifecycleResult | None:
        guest = self.guests[0]
        assert (domid, uuid) == (guest.info.domid, "u-1")
        if guest.info.state != "shutdown":
            return None
        self.calls.append(f"settle {domid}")
        if len(self.guests) == 1:
            return api.LifecycleResult(domid, "web", "destroyed")
        self.guests.pop(0)
        return api.LifecycleResult(domid, "web", "restarted", self.guests[0].info.domid)

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "web.yaml"
    path.write_text("name: web\ntype: pv\nmemory: 64\nkernel: k\n")
    return str(path)


def test_create_c_shows_the_first_line_and_follows_a_reboot(
    config: str, capfd: pytest.CaptureFixture[str]
) -> None:
    client = PtyClient([Guest(5, b"first\r\n", running=False), Guest(6, b"second\r\n", running=True)])
    assert app.main(["create", config, "-c"], opener=lambda: client) == 0  # type: ignore[arg-type, return-value]
    out, err = capfd.readouterr()
    assert out.splitlines()[1:] == ["first", "second"]
    assert "web (domain 5): restarted as domain 6\n" in err and "web (domain 6): destroyed\n" in err
    assert client.calls == ["create paused", "unpause", "settle 5", "settle 6", "close"]


def test_create_c_p_leaves_it_paused(config: str, capfd: pytest.CaptureFixture[str]) -> None:
    guest = Guest(5, b"never\r\n", running=False)
    client = PtyClient([guest])
    os.close(guest.master)  # the console ends at once, else -c would stay attached for ever
    guest.master = -1
    code = app.main(["create", config, "-c", "-p"], opener=lambda: client)  # type: ignore[arg-type, return-value]
    assert code == 8 and client.calls == ["create paused", "close"]
    assert "never" not in capfd.readouterr().out


def test_a_domain_runs_even_if_its_console_cannot_be_had(
    config: str, capfd: pytest.CaptureFixture[str]
) -> None:
    client = PtyClient([Guest(5, b"", running=False)])
    client.no_console = True
    code = app.main(["create", config, "-c"], opener=lambda: client)  # type: ignore[arg-type, return-value]
    assert code == DeadlineError.exit_code
    assert client.calls == ["create paused", "unpause", "close"]
    assert "hint: is xenconsoled running?" in capfd.readouterr().err


def test_console_of_a_running_domain(capfd: pytest.CaptureFixture[str]) -> None:
    client = PtyClient([Guest(7, b"hello\r\n", running=True)])
    assert app.main(["console", "web"], opener=lambda: client) == 0  # type: ignore[arg-type, return-value]
    assert capfd.readouterr().out == "hello\r\n"
    assert client.calls == ["settle 7", "close"]


class FeedGuest:
    """A domain whose console our backend serves: a process that prints, dies at a byte, and is followed by
    another; then the domain asks for a reboot."""

    def __init__(self, domid: int, folder: Path, says: bytes, die_at: int) -> None:
        self.info = api.DomainInfo(domid, "web", "u-1", "pv", "running", "", 1 << 20, 1 << 20, 1, 0.0, True)
        self.feed = folder / f"{domid}.feed"
        self.greetings: list[Position | None] = []
        self._raw = encode(Record(BOOT, float(domid), 100))
        for at in range(0, len(says), 4):
            part = says[at : at + 4]
            self._raw += encode(Record(DATA, float(domid), 100 + at + len(part), part))
        self._die_at = die_at
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for rest in (False, True):
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(self.feed))
                listening.listen()
                peer, _ = listening.accept()
                with peer:
                    position = parse_hello(peer.recv(HELLO_SIZE, socket.MSG_WAITALL))
                    self.greetings.append(position)
                    if not rest:
                        peer.sendall(self._raw[: self._die_at])
                    else:
                        boots = {micros(self.info.domid)}
                        since = Since(position, boots) if position else encode
                        peer.sendall(b"".join(map(since, parse(self._raw)[0])))
                self.feed.unlink()
        self.info = replace(self.info, state="shutdown", reason="reboot")


class FeedClient(PtyClient):
    def __init__(self, guests: list[FeedGuest]) -> None:
        super().__init__(guests)  # type: ignore[arg-type]

    def console(
        self, domain: str, kind: str | None = None, *, number: int = 0, deadline: float = 10.0
    ) -> api.ConsoleTarget:
        guest = self.guests[0]
        assert isinstance(guest, FeedGuest) and domain == str(guest.info.domid)
        return api.ConsoleTarget(guest.info.domid, "web", "pv", "", "unused", number, str(guest.feed))


@pytest.mark.parametrize("die_at", [0, 7, 20, 44, 60, 500])
def test_a_viewer_outlives_backends_and_reboots(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, die_at: int
) -> None:
    first = FeedGuest(5, tmp_path, b"one two three four\r\n", die_at)
    second = FeedGuest(6, tmp_path, b"five six seven\r\n", die_at)
    client = FeedClient([first, second])
    assert app.main(["console", "web"], opener=lambda: client) == 0  # type: ignore[arg-type, return-value]
    out, err = capfd.readouterr()
    assert out.replace("\r", "") == "one two three four\nfive six seven\n"
    assert "web (domain 5): restarted as domain 6\n" in err
    assert client.calls == ["settle 5", "settle 6", "close"]
    # A new domain's console is shown from its boot on, a new process's from where the old one was.
    for guest in (first, second):
        assert len(guest.greetings) == 2 and guest.greetings[0] is None


def test_console_timeout(capfd: pytest.CaptureFixture[str]) -> None:
    client = PtyClient([Guest(7, b"", running=False)])
    code = app.main(["console", "--timeout", "0.1", "web"], opener=lambda: client)  # type: ignore[arg-type, return-value]
    assert code == DeadlineError.exit_code
    assert client.calls == ["close"]
