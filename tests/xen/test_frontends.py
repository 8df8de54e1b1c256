"""Frontends for people on real Xen: a disk as a file and over NBD, what a killed server leaves, viewers."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from guests import LINUX_READY, boot, linux, wait_state
from xtool.config.single import parse_disk
from xtool.frontends.file import DiskFile
from xtool.proto import nbd
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.backends import server_pid
from xtool.toolstack.dom0 import ROOT
from xtool.toolstack.dom0disk import attached
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

XTOOL = [sys.executable, "-m", "xtool.cli.app"]
SIZE = 8 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.mark.parametrize("backend", ["phy", "xtool"])
def test_a_disk_as_a_file(xen_host: Host, image: Path, backend: str) -> None:
    before = image.read_bytes()
    wanted = parse_disk([f"{image},raw,xvda,backendtype={backend}"])
    with attached(xen_host, wanted) as disk, io.BufferedRandom(DiskFile(disk), 1 << 20) as file:  # type: ignore[arg-type]
        assert file.read() == before
        file.seek(12345)
        file.write(b"written")
    assert image.read_bytes() == before[:12345] + b"written" + before[12352:]


def serve(*words: str) -> tuple[subprocess.Popen[str], Path]:
    """``xtool block-serve``, and where it listens."""
    child = subprocess.Popen([*XTOOL, "block-serve", *words], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    url = child.stdout.readline().strip()
    assert url.startswith("nbd+unix:///?socket="), url
    return child, Path(url.partition("=")[2])


def exported(path: Path) -> Iterator[bytes]:
    """The size field of the export, then its first and its last sector."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(60)
        link.connect(str(path))

        def take(count: int) -> bytes:
            return link.recv(count, socket.MSG_WAITALL)

        take(nbd.GREETING.size)
        link.sendall((nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES).to_bytes(4, "big"))
        link.sendall(nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.OPT_EXPORT_NAME, 0))
        size, flags = nbd.EXPORT.unpack(take(nbd.EXPORT.size))
        yield f"{size} {'ro' if flags & nbd.READ_ONLY else 'rw'}".encode()
        for offset in (0, size - 512):
            link.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 1, offset, 512))
            assert nbd.REPLY.unpack(take(nbd.REPLY.size))[1] == 0
            yield take(512)


@pytest.mark.parametrize("backend", ["phy", "xtool"])
@pytest.mark.parametrize("ending", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_block_serve_until_it_is_told(
    image: Path, tmp_path: Path, backend: str, ending: signal.Signals
) -> None:
    data = image.read_bytes()
    words = [f"{image},raw,backendtype={backend}", "-r", "-k", str(tmp_path / "s")]
    child, path = serve(*words)
    for _ in range(2):
        assert list(exported(path)) == [f"{SIZE} ro".encode(), data[:512], data[-512:]]
    again = subprocess.run([*XTOOL, "block-serve", f"{image},raw"], capture_output=True, text=True)
    assert again.returncode == 15 and "has it open" in again.stderr
    child.send_signal(ending)
    assert child.wait(60) == (0 if ending == signal.SIGINT else 128 + ending)
    assert not path.exists()


@pytest.mark.parametrize("backend", [pytest.param("phy", marks=pytest.mark.long), "xtool"])
def test_a_killed_server_is_cleaned_up_after(
    client: LocalClient, xen_host: Host, image: Path, tmp_path: Path, backend: str
) -> None:
    child, path = serve(f"{image},raw,backendtype={backend}", "-k", str(tmp_path / "s"))
    assert next(iter(exported(path))) == f"{SIZE} rw".encode()
    child.kill()
    child.wait()
    assert xen_host.store.exists(ROOT)
    assert [result.name for result in client.gc()] == ["vbd 51712"]
    assert not xen_host.store.exists(ROOT)


def test_the_disk_of_a_running_guest(client: LocalClient, image: Path, tmp_path: Path) -> None:
    data = image.read_bytes()
    config = linux("pvh", "served", disk=f"['{image},raw,xvda,backendtype=xtool']")
    with boot(client, config):
        wait_state(client, config.name, "xvda", "connected")
        refused = subprocess.run(
            [*XTOOL, "block-serve", f"{config.name}:xvda"], capture_output=True, text=True
        )
        assert refused.returncode == 15 and "--force-share" in refused.stderr
        child, path = serve(f"{config.name}:xvda", "-U", "-k", str(tmp_path / "s"))
        assert list(exported(path)) == [f"{SIZE} ro".encode(), data[:512], data[-512:]]
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0
    client.destroy(config.name)


def test_a_viewer_outlives_its_backend(client: LocalClient, tmp_path: Path) -> None:
    """kill -9 while the guest counts: ``xtool console`` goes on, and shows each number once."""
    config = linux("pvh", "viewed", cmdline="console=hvc0 quiet", console_backend="xtool")
    client.create(config, CreateOptions())
    domid = client.list(config.name)[0].domid
    out = tmp_path / "out"
    with out.open("wb") as file:
        viewer = subprocess.Popen(
            [*XTOOL, "console", config.name], stdin=subprocess.PIPE, stdout=file, stderr=subprocess.DEVNULL
        )
    assert viewer.stdin is not None

    def shows(text: bytes, deadline: float = 300.0) -> None:
        until = monotonic() + deadline
        while text not in out.read_bytes():
            assert monotonic() < until and viewer.poll() is None, out.read_bytes()[-500:]
            sleep(0.2)

    shows(LINUX_READY.encode())
    viewer.stdin.write(
        b"stty -echo -opost; i=0; while [ $i -lt 5000 ]; do i=$((i+1)); echo N$i.; done; echo AL''L\n"
    )
    viewer.stdin.flush()
    for _ in range(4):  # five within a minute, and it would be parked
        sleep(2)
        pid = server_pid(domid)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
    shows(b"ALL\n")
    words = out.read_bytes().partition(b"N1.")[2].partition(b"ALL\n")[0].split()
    assert words == [b"N%d." % number for number in range(2, 5001)]
    client.destroy(config.name)
    assert viewer.wait(60) == 0
    viewer.stdin.close()


@pytest.mark.long
def test_a_viewer_follows_a_reboot(client: LocalClient, tmp_path: Path) -> None:
    config = linux("pvh", "reboot", cmdline="console=hvc0 quiet", console_backend="xtool")
    client.create(config, CreateOptions())
    out = tmp_path / "out"
    with out.open("wb") as file:
        viewer = subprocess.Popen(
            [*XTOOL, "console", config.name], stdin=subprocess.PIPE, stdout=file, stderr=subprocess.DEVNULL
        )
    assert viewer.stdin is not None
    until = monotonic() + 600
    for count in (1, 2):
        while out.read_bytes().count(LINUX_READY.encode()) < count:
            assert monotonic() < until and viewer.poll() is None, out.read_bytes()[-500:]
            sleep(0.2)
        if count == 1:
            viewer.stdin.write(b"reboot\n")
            viewer.stdin.flush()
    client.destroy(config.name)
    assert viewer.wait(60) == 0
    viewer.stdin.close()
