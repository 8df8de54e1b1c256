"""Our block frontend served over NBD, with QEMU's tools as the clients."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
from splitdrivers import XVDA, Rig

from xtool.devices.vbd import Vbd
from xtool.frontends.nbd import NbdServer
from xtool.proto import nbd

SIZE = 4 << 20

needs_tools = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils is not installed")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(6).randbytes(SIZE))
    return path


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[NbdServer]:
    (tmp_path / "run").mkdir()
    rig = Rig(tmp_path / "run")
    device = rig.add_disk(Vbd("xvda", XVDA, str(image), kind="xtool"))
    with rig.frontend(device) as front:
        found = NbdServer(front, tmp_path / "nbd.sock", relax=rig.turn)
        yield found
        found.close()


def served(server: NbdServer, *command: str) -> str:
    """Run a program while the disk is served."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        end = monotonic() + 60
        while child.poll() is None:
            assert monotonic() < end
            server.step(0.01)
        assert child.stdout is not None
        said = child.stdout.read()
    assert child.returncode == 0, said
    return said


@needs_tools
def test_qemu_reads_writes_and_trims(server: NbdServer, tmp_path: Path, image: Path) -> None:
    url = f"nbd+unix:///?socket={tmp_path}/nbd.sock"
    copy = tmp_path / "copy.img"
    served(server, "qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(copy))
    assert copy.read_bytes() == image.read_bytes()
    steps = ("write -P 0x5a 512 200k", "read -P 0x5a 1024 4k", "flush", "discard 1M 64k", "read -P 0 1M 64k")
    said = served(server, "qemu-io", "-f", "raw", *[word for step in steps for word in ("-c", step)], url)
    assert "failed" not in said
    assert image.read_bytes()[512 : 512 + 204800] == b"\x5a" * 204800
    assert (tmp_path / "nbd.sock").stat().st_mode & 0o777 == 0o600


def talk(server: NbdServer, path: Path, data: bytes) -> bytes:
    """Send bytes as they are; what comes back until the server hangs up, or says no more."""
    got = b""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(path))
        link.setblocking(False)
        link.send(data)
        for _ in range(30):
            server.step(0.001)
            try:
                part = link.recv(1 << 16)
            except (BlockingIOError, ConnectionResetError):
                continue
            if not part:
                break
            got += part
    for _ in range(3):
        server.step(0.001)
    return got


def test_clients_that_talk_nonsense_end_alone(server: NbdServer, tmp_path: Path) -> None:
    path, rng = tmp_path / "nbd.sock", random.Random(7)
    hello = bytes(3) + b"\x03"
    go = nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.OPT_GO, 6) + bytes(6)

    def request(command: int, offset: int, length: int) -> bytes:
        return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, command, 9, offset, length)

    for case in (
        rng.randbytes(300),
        hello + rng.randbytes(300),
        hello + nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.OPT_GO, 1 << 31),
        hello + go + rng.randbytes(300),
        hello + go + request(nbd.CMD_WRITE, 0, 1 << 31),
        hello + go + request(nbd.CMD_WRITE, 0, 4096),  # and no data
    ):
        talk(server, path, case)
    for command, offset, length in (
        (nbd.CMD_READ, SIZE, 512),
        (nbd.CMD_READ, (1 << 64) - 512, 512),
        (nbd.CMD_READ, 1, 512),
        (nbd.CMD_TRIM, SIZE - 512, 1 << 31),
        (77, 0, 0),
    ):
        got = talk(server, path, hello + go + request(command, offset, length))
        assert nbd.REPLY.unpack(got[-16:])[1:] == (22, 9), command
    got = talk(server, path, hello + go + request(nbd.CMD_READ, 512, 512))
    assert nbd.REPLY.unpack(got[-528:-512])[1:] == (0, 9)
