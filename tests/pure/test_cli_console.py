"""The console verb and ``create -c`` on real ptys, from the guest's first byte to its end."""

from __future__ import annotations

import os
import tty
from dataclasses import replace
from pathlib import Path

import pytest

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


def test_console_timeout(capfd: pytest.CaptureFixture[str]) -> None:
    client = PtyClient([Guest(7, b"", running=False)])
    code = app.main(["console", "--timeout", "0.1", "web"], opener=lambda: client)  # type: ignore[arg-type, return-value]
    assert code == DeadlineError.exit_code
    assert client.calls == ["close"]
