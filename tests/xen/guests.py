"""What the tests on real Xen share: domain files for small guests, and reading their consoles."""

from __future__ import annotations

import os
import re
import select
from base64 import b64decode, b64encode
from hashlib import md5
from pathlib import Path
from time import monotonic, sleep
from typing import Protocol

import yaml

from xtool.config import DomainConfig, parse_config
from xtool.devices.console import open_tty
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.local import LocalClient

ROOT = Path(__file__).resolve().parents[2]
GUESTS = ROOT / "build" / "guest"
READY = "XTOOL-TINY-READY"
LINUX_READY = "XTOOL-GUEST-READY"


def guest(kind: str, name: str, **keys: object) -> DomainConfig:
    """A small guest: our tiny kernel for PV and PVH, a bare SeaBIOS for HVM. Keys override.

    The host's defaults hold too: the lab's keep guests off the CPU where QEMU can lose them (docs/lab.md)."""
    given: dict[str, object] = {"name": f"xtool-test-{name}", "type": kind, "memory": 16}
    if kind == "hvm":
        given |= {"memory": 64, "serial": "pty", "vga": "stdvga"}
    else:
        given["kernel"] = str(GUESTS / f"tiny-{kind}.elf")
    whole = _host_defaults() | given | keys
    lines = [f"{key}: {value}" for key, value in whole.items() if value is not None]
    return parse_config("\n".join(lines), "test.yaml", "/")


def _host_defaults() -> dict[str, object]:
    at = Path("/etc/xtool/defaults.yaml")
    return yaml.safe_load(at.read_text()) or {} if at.exists() else {}


def linux(kind: str, name: str, **keys: object) -> DomainConfig:
    """Debian's cloud kernel with the small initramfs. Keys override."""
    given: dict[str, object] = {
        "memory": 256,
        "kernel": GUESTS / "vmlinuz",
        "ramdisk": GUESTS / "initramfs.cpio.gz",
        "cmdline": f"console={'ttyS0' if kind == 'hvm' else 'hvc0'} quiet",
    }
    return guest(kind, name, **given | keys)


class Console:
    """A guest's console, opened before the guest runs, so that nothing is missed."""

    def __init__(self, client: LocalClient, domain: str, kind: str | None = None) -> None:
        self.fd = open_tty(client.console(domain, kind, deadline=60).tty)
        self.seen = b""

    def wait_for(self, text: str, deadline: float = 120.0) -> str:
        """Everything up to the line with ``text``; fails with what was seen."""
        until = monotonic() + deadline
        while text.encode() not in self.seen or b"\n" not in self.seen.split(text.encode(), 1)[1]:
            left = until - monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                raise AssertionError(f"no {text!r} within {deadline} s; seen: {self.seen[-2000:]!r}")
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                data = b""
            if not data:
                raise AssertionError(f"the console ended; seen: {self.seen[-2000:]!r}")
            self.seen += data
        return self.seen.decode("utf-8", "replace")

    def line(self, text: str, deadline: float = 120.0) -> str:
        whole = self.wait_for(text, deadline)
        return next(line for line in whole.splitlines() if text in line)

    def send(self, data: str) -> None:
        left = data.encode()
        while left:
            select.select([], [self.fd], [])
            left = left[os.write(self.fd, left[:512]) :]

    def close(self) -> None:
        os.close(self.fd)
        print(self.seen.decode("utf-8", "replace"))  # pytest shows it where a test fails, or is asked to

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(client: LocalClient, config: DomainConfig, kind: str | None = None) -> Console:
    """Create paused, open the console, let it run."""
    client.create(config, CreateOptions(paused=True))
    console = Console(client, config.name, kind)
    client.unpause(config.name)
    return console


def boot(client: LocalClient, config: DomainConfig, kind: str | None = None) -> Console:
    """The same up to Debian's shell."""
    console = start(client, config, kind)
    console.wait_for(LINUX_READY, 300)
    return console


def ask(console: Console, command: str, deadline: float = 120.0) -> str:
    """Run a command in the guest's shell; what it printed."""
    console.seen = b""
    # The quotes keep the echo of the command line from being taken for its end.
    console.send(f"{command}; echo EN''D=$?=\n")
    return console.wait_for("END=", deadline)


class Terminal(Protocol):
    """What ``Console`` and other viewers have."""

    seen: bytes

    def send(self, data: str, /) -> None: ...
    def wait_for(self, text: str, deadline: float = ..., /) -> object: ...


def console_carries(console: Terminal, lines: int = 1000) -> None:
    """Random bytes both ways through the console that the guest's shell is on, compared by checksum.

    As base64, since a terminal takes some bytes for itself: 57 bytes make a line of 76."""
    listed = _asked(console, f"head -c {57 * lines} /dev/urandom > /tmp/c; md5sum < /tmp/c")
    text = _asked(console, "base64 /tmp/c")
    came = re.findall(rb"(?m)^[A-Za-z0-9+/]{76}\r?$", text)
    assert len(came) == lines
    assert md5(b64decode(b"".join(came))).hexdigest().encode() in listed
    typed = os.urandom(57 * 100)
    console.seen = b""
    console.send("stty -echo; echo GO''ON; head -n 100 | base64 -d | md5sum; stty echo; echo EN''D=$?=\n")
    console.wait_for("GOON", 60)
    raw = b64encode(typed).decode()
    console.send("".join(raw[at : at + 76] + "\n" for at in range(0, len(raw), 76)))
    console.wait_for("END=", 120)
    assert md5(typed).hexdigest().encode() in console.seen


def _asked(console: Terminal, command: str) -> bytes:
    console.seen = b""
    console.send(f"{command}; echo EN''D=$?=\n")
    console.wait_for("END=", 300)
    return console.seen


def wait_state(client: LocalClient, domain: str, vdev: str, state: str, deadline: float = 60.0) -> None:
    """Until the domain's disk is in that state."""
    until = monotonic() + deadline
    while (found := [d.state for d in client.block_list(domain) if d.vdev == vdev]) != [state]:
        assert monotonic() < until, found
        sleep(0.1)
