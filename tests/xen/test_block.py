"""Our block backend and frontend on real Xen: each against the kernel's other end, and against each other.

Every test is followed by the leak check.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import pytest

from guests import ask, boot, linux, wait_state
from xtool.abi.io import BLKIF_OP_READ, BLKIF_OP_WRITE
from xtool.backends.control import ask as ask_backend
from xtool.config import DomainConfig
from xtool.config.single import parse_disk
from xtool.errors import DeadlineError, HostError
from xtool.frontends.block import BlockFrontend
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.backends import restart_backends, server_pid
from xtool.toolstack.dom0disk import attached
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

PAUSED = CreateOptions(paused=True)
SIZE = 16 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(4).randbytes(SIZE))
    return path


def config(kind: str, name: str, image: Path, more: str = "") -> DomainConfig:
    return linux(kind, name, disk=f"['{image},raw,xvda,backendtype=xtool{more}']")


#: A disk under load may keep the guest's shell waiting.
run = partial(ask, deadline=300.0)


def exercise(disk: BlockFrontend, image: Path, rounds: int, seed: int) -> bytearray:
    """Random sizes and offsets against a copy in memory."""
    rng = random.Random(seed)
    model = bytearray(image.read_bytes())
    for _ in range(rounds):
        length = rng.choice((1, 512, 4096, 65536, rng.randrange(1, 2 << 20)))
        offset = rng.randrange(0, SIZE - length)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            disk.pwrite(data, offset)
            model[offset : offset + length] = data
        else:
            assert disk.pread(length, offset) == model[offset : offset + length]
    disk.flush()
    assert hashlib.sha256(disk.pread(SIZE, 0)).digest() == hashlib.sha256(model).digest()
    return model


@pytest.mark.cell("block", backend="$backend", frontend="xtool", guest="dom0")
@pytest.mark.parametrize("backend", ["phy", "xtool"])
@pytest.mark.parametrize(("order", "queues"), [(0, 1), (2, 2)])
def test_our_frontend_in_domain_0(xen_host: Host, image: Path, backend: str, order: int, queues: int) -> None:
    wanted = parse_disk([f"{image},raw,xvda,backendtype={backend}"])
    with attached(xen_host, wanted, ring_order=order, queues=queues) as disk:
        assert disk.size == SIZE
        model = exercise(disk, image, 60, order)
        disk.discard(1 << 20, 1 << 20)
    assert image.read_bytes()[2 << 20 :] == model[2 << 20 :]


def test_a_backend_that_cannot_serve_says_why(xen_host: Host, image: Path) -> None:
    wanted = parse_disk([f"{image},raw,xvda,backendtype=xtool,ro"])
    with attached(xen_host, wanted) as disk:
        assert disk.offer.readonly
        with pytest.raises(OSError):
            disk.pwrite(bytes(512), 0)
    with pytest.raises(HostError), attached(xen_host, parse_disk([f"{image}.none,raw,xvda"])):
        pass


def verified_load(disk: BlockFrontend, seconds: float, during: Iterator[None]) -> int:
    """Write and verify with many requests under way until ``during`` ends, then all: how many it was."""
    rng = random.Random(5)
    part = 256 << 10
    model: dict[int, bytes] = {}
    busy: set[int] = set()
    checked = 0

    def start(number: int) -> None:
        nonlocal checked
        busy.add(number)
        if number in model and rng.random() < 0.5:
            got = bytearray(part)

            def verified(error: OSError | None) -> None:
                nonlocal checked
                assert error is None and got == model[number]
                busy.discard(number)
                checked += 1

            disk.submit(BLKIF_OP_READ, number * part, memoryview(got), verified)
            return
        data = rng.randbytes(part)

        def written(error: OSError | None) -> None:
            assert error is None
            model[number] = data
            busy.discard(number)

        disk.submit(BLKIF_OP_WRITE, number * part, memoryview(data), written)

    end = monotonic() + seconds
    running = True
    while busy or running:
        assert monotonic() < end, "the disk stands still"
        running = running and next(during, "over") is None
        while running and len(busy) < 16:
            start(rng.choice([n for n in range(24) if n not in busy]))
        disk.poll()
        disk._sleep(0.05)
        disk.poll()
    for number, data in model.items():
        assert disk.pread(part, number * part) == data
    return checked + len(model)


def kills(count: int, gap: float) -> Iterator[None]:
    """kill -9 our server ``count`` times, each after ``gap`` seconds; the supervisor starts the next."""
    for number in range(count):
        until = monotonic() + gap
        while monotonic() < until:
            yield None
        pid = None
        while pid is None:
            pid = server_pid(0)
            yield None
        os.kill(pid, signal.SIGKILL)
        if number % 4 == 3 and number + 1 < count:  # five within a minute, and the device is parked
            until = monotonic() + 61
            while monotonic() < until:
                yield None


def test_killed_under_a_verifying_load_of_our_frontend(xen_host: Host, image: Path) -> None:
    with attached(xen_host, parse_disk([f"{image},raw,xvda,backendtype=xtool"])) as disk:
        assert verified_load(disk, 300, kills(4, 2.0)) > 10


def test_replaced_under_a_verifying_load(xen_host: Host, image: Path) -> None:
    def upgrades() -> Iterator[None]:
        for _ in range(6):
            while server_pid(0) is None:  # on a slow host it takes longer to start than it may serve
                yield None
            until = monotonic() + 2.0
            while monotonic() < until:
                yield None
            restart_backends(xen_host, 0)
        restart_backends(xen_host, 0)  # the last one has hardly begun

    with attached(xen_host, parse_disk([f"{image},raw,xvda,backendtype=xtool"])) as disk:
        assert verified_load(disk, 300, upgrades()) > 10


def test_parked_after_five_deaths_in_a_minute(xen_host: Host, image: Path) -> None:
    with attached(xen_host, parse_disk([f"{image},raw,xvda,backendtype=xtool"])) as disk:
        for _ in range(5):
            until = monotonic() + 30
            while (pid := server_pid(0)) is None:
                assert monotonic() < until
                sleep(0.05)
            os.kill(pid, signal.SIGKILL)
            sleep(0.5)
        until = monotonic() + 30
        while xen_host.store.get(f"{disk.place.backend}/state") != "6":
            assert monotonic() < until
            sleep(0.1)
        error = disk.place.backend.replace("/domain/0/backend/", "/domain/0/error/backend/")
        assert "died 5 times" in (xen_host.store.get(f"{error}/error") or "")


@pytest.mark.cell("block", backend="xtool", frontend="linux", guest="$kind")
@pytest.mark.parametrize(
    "kind", ["pv", pytest.param("pvh", marks=pytest.mark.long), pytest.param("hvm", marks=pytest.mark.long)]
)
def test_a_linux_guest_on_our_backend(client: LocalClient, image: Path, kind: str) -> None:
    wanted = config(kind, "ours", image)
    before = hashlib.md5(image.read_bytes()).hexdigest()
    with boot(client, wanted, "serial" if kind == "hvm" else None) as console:
        wait_state(client, wanted.name, "xvda", "connected", 120)
        assert before in run(console, "md5sum /dev/xvda")
        run(console, f"dd if=/dev/zero of=/dev/xvda bs=64k count={SIZE >> 17}; sync")
        [info] = client.block_list(wanted.name)
        [told] = ask_backend(info.domid)
        assert told["counters"]["written_bytes"] >= SIZE // 2 and not told["counters"]["errors"]
    client.destroy(wanted.name)
    data = image.read_bytes()
    assert not any(data[: SIZE // 2]) and any(data[SIZE // 2 :])


def test_a_read_only_disk_of_ours(client: LocalClient, image: Path) -> None:
    before = image.read_bytes()
    wanted = config("pvh", "ours-ro", image, ",ro")
    with boot(client, wanted) as console:
        wait_state(client, wanted.name, "xvda", "connected")
        assert "END=1=" in run(console, "dd if=/dev/zero of=/dev/xvda bs=4k count=1")
    client.destroy(wanted.name)
    assert image.read_bytes() == before


def test_attaching_and_detaching_ours(client: LocalClient, image: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.img"
    second.write_bytes(os.urandom(1 << 20))
    wanted = config("pvh", "ours-live", image)
    with boot(client, wanted) as console:
        client.block_attach(wanted.name, parse_disk([f"{second},raw,xvdb,backendtype=xtool"]))
        wait_state(client, wanted.name, "xvdb", "connected")
        assert hashlib.md5(second.read_bytes()).hexdigest() in run(console, "md5sum /dev/xvdb")
        client.block_detach(wanted.name, "xvdb", deadline=30)
        assert "END=1=" in run(console, "ls /dev/xvdb")
        wait_state(client, wanted.name, "xvda", "connected")
    client.destroy(wanted.name)


def test_a_linux_guest_whose_backend_is_killed(client: LocalClient, image: Path) -> None:
    """kill -9 under writes: the guest sees a pause, no error, and what it wrote is there."""
    wanted = config("pvh", "ours-kill", image)
    with boot(client, wanted) as console:
        wait_state(client, wanted.name, "xvda", "connected")
        [info] = client.block_list(wanted.name)
        run(console, "dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null")
        console.seen = b""
        console.send(
            "for n in 1 2 3 4 5 6; do dd if=/tmp/data of=/dev/xvda bs=64k conv=fsync 2>/dev/null"
            " || echo FAI''LED; done; echo DO''NE\n"
        )
        for _ in range(4):
            sleep(1.0)
            pid = server_pid(info.domid)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        seen = console.wait_for("DONE", 300)
        assert "FAILED" not in seen
        run(console, "echo 3 > /proc/sys/vm/drop_caches")
        assert "END=0=" in run(console, "dd if=/dev/xvda bs=64k count=64 2>/dev/null | cmp - /tmp/data")
        assert "I/O error" not in run(console, "dmesg")
    client.destroy(wanted.name)


def test_online_resize(client: LocalClient, xen_host: Host, image: Path) -> None:
    wanted = config("pvh", "ours-size", image)
    with boot(client, wanted) as console:
        wait_state(client, wanted.name, "xvda", "connected")
        [info] = client.block_list(wanted.name)
        os.truncate(image, 2 * SIZE)
        node = f"/local/domain/0/backend/xtool-vbd/{info.domid}/{info.devid}/xtool-resized"
        xen_host.store.write(node, "1")
        until = monotonic() + 30
        while str(2 * SIZE // 512) not in run(console, "cat /sys/block/xvda/size"):
            assert monotonic() < until
    client.destroy(wanted.name)


def test_a_supervisor_that_is_killed_harms_nobody(xen_host: Host, image: Path) -> None:
    from xtool.toolstack.backends import _pids, is_running

    with attached(xen_host, parse_disk([f"{image},raw,xvda,backendtype=xtool"])) as disk:
        parent, server = _pids(0)
        os.kill(parent, signal.SIGKILL)
        sleep(0.2)
        assert disk.pread(4096, 0) == image.read_bytes()[:4096]
        assert is_running(0) and server_pid(0) == server


def test_a_deadline_when_nobody_serves(xen_host: Host, image: Path) -> None:
    with attached(xen_host, parse_disk([f"{image},raw,xvda,backendtype=xtool"])) as disk:
        pid = server_pid(0)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        disk._deadline = 2.0
        with pytest.raises(DeadlineError):
            disk.pread(512, 0)
        os.kill(pid, signal.SIGCONT)
        disk._deadline = 60.0
        assert disk.pread(512, 0) == image.read_bytes()[:512]
