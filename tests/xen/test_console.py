"""Our console backend on real Xen: small guests and Linux on it, viewers, kills, the log, channels."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from time import monotonic, sleep

import pytest

from guests import LINUX_READY, READY, console_carries, guest
from guests import linux as debian
from xtool.backends.consolelog import log_path, older, read_log
from xtool.config import DomainConfig
from xtool.errors import DeviceError
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.backends import server_pid
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

PAUSED = CreateOptions(paused=True)


def linux(kind: str, name: str, **keys: object) -> DomainConfig:
    ours: dict[str, object] = {"cmdline": "console=hvc0 quiet", "console_backend": "xtool"}
    return debian(kind, name, **ours | keys)


class Viewer:
    """One more who looks."""

    def __init__(self, client: LocalClient, domain: str, number: int = 0) -> None:
        path = client.console(domain, "pv", number=number).socket
        until = monotonic() + 30
        while True:
            self.link = socket.socket(socket.AF_UNIX)
            try:
                self.link.connect(path)
                break
            except OSError:
                self.link.close()
                assert monotonic() < until, f"nobody listens at {path}"
                sleep(0.1)
        self.seen = b""

    def wait_for(self, text: str, deadline: float = 300.0) -> bytes:
        until = monotonic() + deadline
        while text.encode() not in self.seen:
            left = until - monotonic()
            ready = left > 0 and select.select([self.link], [], [], left)[0]
            assert ready, f"no {text!r} within {deadline} s; seen: {self.seen[-2000:]!r}"
            data = self.link.recv(65536)
            assert data, f"the console ended; seen: {self.seen[-2000:]!r}"
            self.seen += data
        return self.seen

    def send(self, text: str) -> None:
        self.link.sendall(text.encode())

    def ask(self, command: str, deadline: float = 120.0) -> bytes:
        self.seen = b""
        # The quotes keep the echo of the command line from being taken for its end.
        self.link.sendall(f"{command}; echo EN''D=$?=\n".encode())
        return self.wait_for("END=", deadline)

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()


def uuid_of(client: LocalClient, domain: str) -> str:
    return client.list(domain)[0].uuid


def kept(uuid: str) -> bytes:
    return b"".join(record.data for record in read_log(log_path(uuid)))


@pytest.fixture(autouse=True)
def no_logs_left(no_leaks: None, client: LocalClient) -> Iterator[None]:
    """Logs outlive their domain by intent; those of the tests' guests do not."""
    folder = log_path("x").parent
    before = set(folder.glob("*")) if folder.exists() else set()
    yield
    for path in set(folder.glob("*")) - before if folder.exists() else ():
        path.unlink()


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_nothing_is_missed_and_several_look(client: LocalClient, xen_host: Host, kind: str) -> None:
    config = guest(kind, "con", console_backend="xtool")
    client.create(config, CreateOptions())
    domid = client.list(config.name)[0].domid
    with Viewer(client, config.name) as first, Viewer(client, config.name) as second:
        # Both connected after the guest ran; the replay gives them its first line.
        assert (
            first.wait_for(READY, 60).partition(READY.encode())[0]
            == second.wait_for(READY, 60).partition(READY.encode())[0]
        )
        tty = xen_host.store.get(f"/local/domain/{domid}/console/tty")
        assert tty and tty.startswith("/dev/pts/")
    assert READY.encode() in kept(uuid_of(client, config.name))
    assert any(READY in record.text for record in client.console_log(config.name))
    client.destroy(config.name)


@pytest.mark.cell("console", backend="xtool", frontend="linux", guest="$kind")
@pytest.mark.parametrize("kind", ["pv", "pvh", pytest.param("hvm", marks=pytest.mark.long)])
def test_a_shell_on_our_console(client: LocalClient, kind: str) -> None:
    config = linux(kind, "shell")
    client.create(config, CreateOptions())
    with Viewer(client, config.name) as viewer:
        viewer.wait_for(LINUX_READY)
        assert b"4711" in viewer.ask("echo $((4700 + 11))")
        # Longer than the input ring, in one go (the guest's shell takes lines of 1024 at most).
        answer = viewer.ask(f"echo {'x' * 700} | wc -c\necho {'y' * 700} | wc -c")
        assert answer.count(b"701") == 2
        console_carries(viewer)
    client.destroy(config.name)


def test_a_killed_backend_loses_no_byte(client: LocalClient) -> None:
    """kill -9 again and again while the guest prints numbered lines: each is kept, once, in order."""
    config = linux("pvh", "kill")
    client.create(config, CreateOptions())
    domid, uuid = client.list(config.name)[0].domid, uuid_of(client, config.name)
    with Viewer(client, config.name) as viewer:
        viewer.wait_for(LINUX_READY)
        viewer.ask("stty -echo -opost")
        viewer.link.sendall(b"i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo N$i.; done; echo AL''L\n")
    for _ in range(4):  # five within a minute, and it would be parked
        sleep(2)
        pid = server_pid(domid)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
    until = monotonic() + 300
    while b"ALL" not in kept(uuid):
        assert monotonic() < until, kept(uuid)[-200:]
        sleep(1)
    words = kept(uuid).partition(b"N1.")[2].partition(b"ALL")[0].replace(b"\r", b"").split()
    assert words == [b"N%d." % number for number in range(2, 4001)]
    client.destroy(config.name)


@pytest.mark.long
def test_hf35_a_flood_is_bounded_and_others_answer(client: LocalClient) -> None:
    loud, quiet = linux("pvh", "loud"), linux("pvh", "quiet")
    for config in (loud, quiet):
        client.create(config, CreateOptions())
    uuid = uuid_of(client, loud.name)
    with Viewer(client, loud.name) as flood, Viewer(client, quiet.name) as other:
        flood.wait_for(LINUX_READY)
        other.wait_for(LINUX_READY)
        flood.link.sendall(b"head -c 100000000 /dev/zero | tr '\\0' '\\033'\n")  # and is never read
        worst = 0.0
        for _ in range(20):
            start = monotonic()
            other.ask("true", 60)
            worst = max(worst, monotonic() - start)
        assert worst < 10
    sizes = [path.stat().st_size for path in (log_path(uuid), older(log_path(uuid))) if path.exists()]
    assert sum(sizes) <= 9 << 20
    for config in (loud, quiet):
        client.destroy(config.name)


def test_a_channel(client: LocalClient, xen_host: Host) -> None:
    config = linux("pv", "chan", channel="[{name: org.xtool.test, connection: socket}]")
    client.create(config, CreateOptions())
    domid = client.list(config.name)[0].domid
    with Viewer(client, config.name) as viewer:
        viewer.wait_for(LINUX_READY)
        until = monotonic() + 60
        while xen_host.store.get(f"/local/domain/0/backend/xtool-console/{domid}/1/state") != "4":
            assert monotonic() < until, "the guest's driver did not connect"
            sleep(0.2)
        with Viewer(client, config.name, 1) as channel:
            viewer.ask("stty -F /dev/hvc1 raw -echo; echo from-guest > /dev/hvc1")
            channel.wait_for("from-guest", 30)
            channel.link.sendall(b"to-guest\n")
            assert b"to-guest" in viewer.ask("head -n1 < /dev/hvc1", 30)
    with pytest.raises(DeviceError):
        client.console(config.name, number=2)
    client.destroy(config.name)


def test_xenconsoled_keeps_its_hands_off(client: LocalClient, xen_host: Host) -> None:
    """Two readers of one ring would each get half: with ours, xenconsoled has no pty of the domain."""
    config = guest("pv", "hands", console_backend="xtool")
    client.create(config, PAUSED)
    domid = client.list(config.name)[0].domid
    with Viewer(client, config.name):
        pass
    tty = xen_host.store.get(f"/local/domain/{domid}/console/tty") or ""
    pid = server_pid(domid)
    assert pid is not None
    subprocess.run(["pidof", "xenconsoled"], check=True, capture_output=True)
    opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert tty in opened  # our process made that very pty, and keeps it open
    client.destroy(config.name)
