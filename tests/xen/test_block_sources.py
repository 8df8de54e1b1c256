"""Images that are not raw, and an NBD server's disk, on real Xen, under our frontend and under Linux."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest

from guests import ask, boot, linux, wait_state
from xtool.backends.control import ask as ask_backend
from xtool.config.single import parse_disk
from xtool.frontends.block import BlockFrontend
from xtool.toolstack.backends import server_pid
from xtool.toolstack.dom0disk import attached
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

SIZE = 16 << 20
QEMU_NAMES = {"qcow2": "qcow2", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx"}


def make(path: Path, form: str) -> bytes:
    """An image with random content, which is returned as qemu-img sees it."""
    raw = path.with_suffix(".source")
    raw.write_bytes(random.Random(4).randbytes(SIZE))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", QEMU_NAMES[form], raw, path], check=True)
    raw.unlink()
    return content(path, form)


def content(path: Path, form: str) -> bytes:
    raw = path.with_suffix(".content")
    subprocess.run(["qemu-img", "convert", "-f", QEMU_NAMES[form], "-O", "raw", path, raw], check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data


def exercise(disk: BlockFrontend, data: bytes, rounds: int) -> bytearray:
    """Random sizes and offsets against a copy in memory."""
    rng = random.Random(rounds)
    model = bytearray(data)
    for _ in range(rounds):
        length = rng.choice((1, 512, 4096, 65536, rng.randrange(1, 1 << 20)))
        offset = rng.randrange(0, len(model) - length)
        if rng.random() < 0.5:
            part = rng.randbytes(length)
            disk.pwrite(part, offset)
            model[offset : offset + length] = part
        else:
            assert disk.pread(length, offset) == model[offset : offset + length]
    disk.flush()
    assert hashlib.sha256(disk.pread(len(model), 0)).digest() == hashlib.sha256(model).digest()
    return model


def qemu_nbds(target: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"qemu-nbd") and any(os.fsencode(target) in word for word in words):
            found.append(int(entry.parent.name))
    return found


def gone(target: Path) -> None:
    """Wait until nobody serves it any more."""
    end = monotonic() + 30
    while qemu_nbds(target):
        assert monotonic() < end
        sleep(0.05)


@pytest.mark.parametrize(
    "form", ["qcow2", *(pytest.param(form, marks=pytest.mark.long) for form in ("vmdk", "vhd", "vhdx"))]
)
def test_an_image_in_domain_0(xen_host: Host, tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.img"
    data = make(path, form)
    wanted = parse_disk([f"{path},{form},xvda,backendtype=xtool"])
    with attached(xen_host, wanted) as disk:
        assert disk.size == len(data) // 512 * 512
        model = exercise(disk, data, 30)
    gone(path)
    assert content(path, form) == model


@pytest.mark.long
def test_processes_are_killed_under_an_image(xen_host: Host, tmp_path: Path) -> None:
    """qemu-nbd and our server by turns: a pause, no error, nothing answered is lost."""
    path = tmp_path / "a.img"
    data = make(path, "qcow2")
    with attached(xen_host, parse_disk([f"{path},qcow2,xvda,backendtype=xtool"])) as disk:
        for number in range(4):  # with five deaths of the server in a minute the device is closed
            data = bytes(exercise(disk, data, 10))
            part = os.urandom(8192)
            disk.pwrite(part, 4096 * number)  # not flushed
            data = data[: 4096 * number] + part + data[4096 * number + 8192 :]
            end = monotonic() + 30
            victims = qemu_nbds(path) if number % 2 else [pid for pid in [server_pid(0)] if pid]
            assert victims and monotonic() < end
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
        assert disk.pread(len(data), 0) == data
    gone(path)
    assert content(path, "qcow2") == data


@contextmanager
def nbd_server(image: Path, sock: Path) -> Iterator[None]:
    command = ["qemu-nbd", "--persistent", "--shared=2", "-f", "qcow2", f"--socket={sock}", str(image)]
    with subprocess.Popen(command) as server:
        try:
            end = monotonic() + 30
            while not sock.exists():
                assert server.poll() is None and monotonic() < end
                sleep(0.05)
            yield
        finally:
            server.terminate()


def test_an_nbd_servers_disk_in_domain_0(xen_host: Host, tmp_path: Path) -> None:
    path, sock = tmp_path / "a.img", tmp_path / "nbd.sock"
    data = make(path, "qcow2")
    url = f"nbd+unix:///?socket={sock}"
    with nbd_server(path, sock):
        wanted = parse_disk([f"target={url}", "vdev=xvda"])
        with attached(xen_host, wanted) as disk:
            model = exercise(disk, data, 20)
    assert content(path, "qcow2") == model


@pytest.mark.parametrize("kind", [pytest.param("pv", marks=pytest.mark.long), "pvh"])
def test_a_linux_guest_on_a_qcow2(client: LocalClient, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.img"
    data = make(path, "qcow2")
    wanted = linux(kind, "qcow2", disk=f"['{path},qcow2,xvda,backendtype=xtool']")
    with boot(client, wanted) as console:
        wait_state(client, wanted.name, "xvda", "connected", 120)
        assert hashlib.md5(data).hexdigest() in ask(console, "md5sum /dev/xvda", deadline=300.0)
        ask(console, f"dd if=/dev/zero of=/dev/xvda bs=64k count={SIZE >> 17}; sync", deadline=300.0)
        [info] = client.block_list(wanted.name)
        [told] = ask_backend(info.domid)
        assert told["counters"]["written_bytes"] >= SIZE // 2 and not told["counters"]["errors"]
        assert told["image"]["helper"] == "qemu-nbd"
    client.destroy(wanted.name)
    gone(path)
    after = content(path, "qcow2")
    assert not any(after[: SIZE // 2]) and after[SIZE // 2 :] == data[SIZE // 2 :]
