"""Persistent grants and limits of our block backend on real Xen.

Every test is followed by the leak check.
"""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from time import monotonic, sleep

import pytest
from test_block import SIZE, exercise, image, kills, verified_load

from guests import ask, boot, linux, wait_state
from xtool.backends.control import ask as ask_backend
from xtool.config.single import parse_disk
from xtool.frontends.block import BlockFrontend
from xtool.toolstack.backends import server_pid
from xtool.toolstack.dom0disk import attached
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

__all__ = ["image"]  # a fixture


@pytest.mark.parametrize(("order", "queues"), [(2, 2)])
def test_our_persistent_frontend(xen_host: Host, image: Path, order: int, queues: int) -> None:
    wanted = parse_disk([f"{image},raw,xvda,backendtype=xtool"])
    with attached(xen_host, wanted, ring_order=order, queues=queues, persistent=True) as disk:
        assert disk.persistent
        model = exercise(disk, image, 60, order)
        [told] = ask_backend(0)
        assert told["persistent"]["mapped"] > 0 and not told["persistent"]["copied"]
        assert not told["counters"]["errors"] and not told["counters"]["bad"]
    assert image.read_bytes() == model


def test_a_disk_that_does_not_offer_it(xen_host: Host, image: Path) -> None:
    wanted = parse_disk([f"{image},raw,xvda,backendtype=xtool"])
    with attached(xen_host, wanted) as disk:
        assert not disk.persistent
        exercise(disk, image, 10, 1)
        [told] = ask_backend(0)
        assert told["persistent"] is None


def _mapped(disk: BlockFrontend) -> int:
    until = monotonic() + 30
    while True:
        if (found := ask_backend(0)) and found[0]["persistent"]:
            return int(found[0]["persistent"]["mapped"])
        assert monotonic() < until, found
        disk._sleep(0.1)


def test_killed_with_pages_mapped(xen_host: Host, image: Path) -> None:
    wanted = parse_disk([f"{image},raw,xvda,backendtype=xtool"])
    with attached(xen_host, wanted, persistent=True) as disk:
        assert verified_load(disk, 300, kills(4, 2.0)) > 10
        assert disk.pread(4096, 0) and _mapped(disk) > 0


@pytest.mark.parametrize("kind", ["pvh"])
def test_a_linux_guest_with_persistent_grants(
    client: LocalClient, xen_host: Host, image: Path, kind: str
) -> None:
    """Debian's blkfront says it too, its pages stay mapped, and what it reads and writes is right. kill -9
    in between."""
    wanted = linux(kind, "persistent", disk=f"['{image},raw,xvda,backendtype=xtool,persistent=1']")
    before = hashlib.md5(image.read_bytes()).hexdigest()
    with boot(client, wanted, "serial" if kind == "hvm" else None) as console:
        wait_state(client, wanted.name, "xvda", "connected", 120)
        [info] = client.block_list(wanted.name)
        back = f"/local/domain/0/backend/xtool-vbd/{info.domid}/{info.devid}"
        front = f"/local/domain/{info.domid}/device/vbd/{info.devid}"
        for root in (back, front):
            assert xen_host.store.get(f"{root}/feature-persistent") == "1"
        assert before in ask(console, "md5sum /dev/xvda", 300.0)
        [info] = client.block_list(wanted.name)
        assert info.live["persistent"]["mapped"] > 0 and info.live["counters"]["read_bytes"] >= SIZE
        pid = server_pid(info.domid)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        command = f"dd if=/dev/zero of=/dev/xvda bs=64k count={SIZE >> 17} conv=fsync 2>/dev/null"
        assert "END=0=" in ask(console, command, 300.0)
        assert "I/O error" not in ask(console, "dmesg", 300.0)
        until = monotonic() + 30
        while not (live := client.block_list(wanted.name)[0].live) and monotonic() < until:
            sleep(0.2)
        assert live["persistent"]["mapped"] > 0 and not live["counters"]["errors"]
    client.destroy(wanted.name)
    data = image.read_bytes()
    assert not any(data[: SIZE // 2]) and any(data[SIZE // 2 :])


@pytest.mark.long
def test_limits_of_a_linux_guest(client: LocalClient, image: Path) -> None:
    """16 MiB at 2 MiB/s; lifted while it runs, the same is read at once."""
    spec = f"['{image},raw,xvda,bytes-per-second=2MiB']"
    wanted = linux("pvh", "limits", disk=spec)
    with boot(client, wanted) as console:
        wait_state(client, wanted.name, "xvda", "connected", 120)
        [info] = client.block_list(wanted.name)
        assert (info.backend, info.bytes_per_second) == ("xtool", 2 << 20)
        fresh = "echo 3 > /proc/sys/vm/drop_caches"
        command = f"{fresh}; dd if=/dev/xvda of=/dev/null bs=64k count=256 2>/dev/null"
        began = monotonic()
        assert "END=0=" in ask(console, command, 120.0)
        limited = monotonic() - began
        assert limited > 7.0  # 8 s, less a burst
        client.block_limit(wanted.name, "xvda", bytes_per_second=0)
        began = monotonic()
        assert "END=0=" in ask(console, command, 120.0)
        assert monotonic() - began < limited / 2
        client.block_limit(wanted.name, "xvda", ops_per_second=100)
        [info] = client.block_list(wanted.name)
        assert (info.bytes_per_second, info.ops_per_second) == (None, 100)
        assert info.live["ops_per_second"] == 100
    client.destroy(wanted.name)
