"""Limits of our block backend, also while it is under load."""

from __future__ import annotations

from pathlib import Path

import pytest
from splitdrivers import XVDA, Rig

from xtool.abi import io
from xtool.devices.vbd import Vbd
from xtool.devices.xenbus import DeviceId
from xtool.frontends.block import BlockFrontend
from xtool.proto.blkif import build_transfer

SIZE = 4 << 20


def limited(rig: Rig, image: Path, size: int = 0, ops: int = 0) -> DeviceId:
    disk = Vbd("xvda", XVDA, str(image), kind="xtool")
    nodes = {"xtool-bytes-per-second": str(size), "xtool-ops-per-second": str(ops)}
    return rig.add_disk(disk, nodes)


def fill(front: BlockFrontend, number: int, pages: int = 1) -> None:
    """Reads until the queue's ring is full."""
    queue = front._queues[number]
    while queue.ring.free():
        segments = [(ref, 0, 4096) for ref in front._pool.refs[:pages]]
        queue.ring.push(build_transfer(io.BLKIF_OP_READ, 1, 0, segments))
    queue.ring.publish()
    front._events.notify(queue.port)


def taken(front: BlockFrontend, number: int) -> int:
    return len(front._queues[number].ring.take_responses())


@pytest.mark.parametrize("persistent", [False, True])
def test_the_rate_is_right_and_nothing_is_lost(rig: Rig, image: Path, persistent: bool) -> None:
    with rig.frontend(limited(rig, image, 1_000_000), persistent=persistent) as front:
        before = rig.clock.now
        assert front.pread(SIZE, 0) == image.read_bytes()
        took = rig.clock.now - before
        # Less one burst, and the last request, which is not waited for.
        assert SIZE - 100_000 - 32 * 4096 - 5000 < took * 1_000_000 < SIZE + 10_000


def test_a_burst_of_large_requests_is_bounded(rig: Rig, image: Path) -> None:
    """A ring full of them is 1.4 MB; at 100 kB/s one is let through, then each when it is its time."""
    front = rig.frontend(limited(rig, image, 100_000))
    fill(front, 0, pages=11)
    rig.turn()
    assert taken(front, 0) == 1
    rig.turn(0.2)
    assert taken(front, 0) == 0
    rig.turn(9.8)
    assert 21 <= taken(front, 0) <= 23  # 10 s of 100 kB/s, 45 kB each
    rig.turn(10)
    assert 8 <= taken(front, 0) <= 10
    front.close()


def test_small_requests_share_a_burst(rig: Rig, image: Path) -> None:
    front = rig.frontend(limited(rig, image, ops=100))
    fill(front, 0)
    rig.turn()
    assert 10 <= taken(front, 0) <= 12
    rig.turn(0.1)
    assert 9 <= taken(front, 0) <= 11
    front.close()


def test_no_queue_starves(rig: Rig, image: Path) -> None:
    front = rig.frontend(limited(rig, image, ops=200), queues=4)
    answered = [0] * 4
    for _ in range(600):
        for number in range(4):
            answered[number] += taken(front, number)
            fill(front, number)
        rig.turn(0.01)
    assert 1150 < sum(answered) < 1250  # six seconds
    assert min(answered) > 0.6 * max(answered)
    front.close()


def test_limits_change_while_requests_wait(rig: Rig, image: Path) -> None:
    device = limited(rig, image, ops=1)
    front = rig.frontend(device)
    fill(front, 0)
    rig.turn()
    assert taken(front, 0) == 1
    [told] = rig.describe()
    assert told["waiting"] and told["ops_per_second"] == 1
    assert told["queues"][0]["held"] == 31  # type: ignore[index]
    rig.toolstack.write(f"{device.backend}/xtool-ops-per-second", "0")
    rig.turn()
    assert taken(front, 0) == 31
    rig.toolstack.write(f"{device.backend}/xtool-ops-per-second", "10")
    rig.turn()
    fill(front, 0)
    rig.turn(1.0)
    assert 10 <= taken(front, 0) <= 12
    front.close()


def test_a_limited_disk_does_not_hold_up_another(rig: Rig, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(image.read_bytes())
    slow = rig.frontend(limited(rig, image, 100_000))
    fill(slow, 0, pages=11)
    with rig.frontend(rig.add_disk(Vbd("xvdb", XVDA + 16, str(other), kind="xtool"))) as front:
        before = rig.clock.now
        assert front.pread(SIZE, 0) == image.read_bytes()
        assert rig.clock.now - before < 1.0
    slow.close()


def test_killed_while_requests_wait(rig: Rig, image: Path) -> None:
    """What was taken and held is on the ring still: the successor carries it out, at the same rate."""
    front = rig.frontend(limited(rig, image, ops=10))
    fill(front, 0)
    rig.turn()
    done = taken(front, 0)
    for end in (rig.kill, rig.stop):
        end()
        rig.start()
        rig.turn(0.5)
        done += taken(front, 0)
        assert done < 32
    rig.turn(5)
    assert done + taken(front, 0) == 32
    front.close()
