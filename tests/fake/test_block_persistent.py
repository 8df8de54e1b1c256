"""Persistent grants: our backend keeps a frontend's pages mapped, whatever the frontend does with them."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from splitdrivers import GUEST, XVDA, Rig

from xtool.abi import io
from xtool.backends import blockio, blockpages
from xtool.backends.blockpages import page_limit
from xtool.devices.vbd import Vbd
from xtool.devices.xenbus import DeviceId
from xtool.errors import GrantError
from xtool.frontends.block import BlockFrontend
from xtool.proto.blkif import X86_64, Response, build_indirect, build_segments, build_transfer, parse_response

SIZE = 4 << 20
OKAY, ERROR = io.BLKIF_RSP_OKAY, io.BLKIF_RSP_ERROR


def ask(rig: Rig, front: BlockFrontend, *slots: bytes) -> list[Response]:
    queue = front._queues[0]
    for slot in slots:
        queue.ring.push(slot)
    queue.ring.publish()
    front._events.notify(queue.port)
    rig.turns(3)
    return [parse_response(slot, X86_64) for slot in queue.ring.take_responses()]


def one(rig: Rig, front: BlockFrontend, operation: int, ref: int, sector: int = 0) -> int:
    [answer] = ask(rig, front, build_transfer(operation, 1, sector, [(ref, 0, 4096)]))
    return answer.status


def told(rig: Rig) -> dict[str, Any]:
    [found] = rig.describe()
    persistent: dict[str, Any] = found["persistent"]  # type: ignore[assignment]
    return persistent


def page_of(rig: Rig, ref: int) -> bytes:
    frame = rig.machine.guests[GUEST].grants[ref].frame
    return os.pread(rig.machine.file, 4096, frame * 4096)


def test_each_page_is_mapped_once_and_none_is_copied(rig: Rig, device: DeviceId, image: Path) -> None:
    content = image.read_bytes()
    with rig.frontend(device, persistent=True, data_pages=96) as front:
        assert rig.guest.get(f"{device.frontend}/feature-persistent") == "1"
        before = rig.grants.maps
        for _ in range(3):
            assert front.pread(SIZE, 0) == content
        front.pwrite(content[::-1], 0)
        assert rig.grants.copies == 0 and rig.grants.maps - before <= 96
        assert told(rig) == {"mapped": rig.grants.maps - before, "limit": page_limit(32), "copied": 0}
    assert image.read_bytes() == content[::-1]
    assert not rig.grants.live


def test_adjacent_requests_are_one_access(
    rig: Rig, device: DeviceId, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = os.preadv

    def counted(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        calls.append(len(buffers))
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", counted)
    front = rig.frontend(device, persistent=True)
    slots = [
        build_transfer(
            io.BLKIF_OP_READ,
            number,
            number * 80,
            [(front._pool.refs[number * 10 + n], 0, 4096) for n in range(10)],
        )
        for number in range(20)
    ]
    assert {answer.status for answer in ask(rig, front, *slots)} == {OKAY}
    assert calls == [200]
    got = bytearray(200 * 4096)
    front._pool.drain(list(range(200)), memoryview(got))
    assert got == image.read_bytes()[: 200 * 4096]


def test_without_both_saying_so_nothing_is_mapped(rig: Rig, image: Path) -> None:
    """An older blkfront says it without our offer, and takes its grants back each time. A successor that
    would offer them goes by what was offered."""
    disk = Vbd("xvda", XVDA, str(image), kind="xtool")
    device = rig.add_disk(disk, {"xtool-persistent": "0"})
    front = rig.frontend(device, persistent=True)
    assert not front.persistent and rig.toolstack.get(f"{device.backend}/feature-persistent") == "0"
    rig.guest.write(f"{device.frontend}/feature-persistent", "1")
    rig.toolstack.rm(f"{device.backend}/xtool-persistent")
    for _ in range(2):
        assert front.pread(SIZE, 0) == image.read_bytes()
        assert told(rig) is None
        rig.kill()
        rig.start()
    front.close()


def test_a_successor_maps_again(rig: Rig, device: DeviceId, image: Path) -> None:
    with rig.frontend(device, persistent=True) as front:
        assert front.pread(SIZE, 0) == image.read_bytes() and told(rig)["mapped"]
        rig.kill()
        assert not any(grant.users for grant in rig.machine.guests[GUEST].grants.values())
        rig.start()
        assert front.pread(SIZE, 0) == image.read_bytes()
        assert told(rig)["mapped"] and not told(rig)["copied"] and not rig.grants.copies


def test_a_grant_that_is_revoked_while_it_is_mapped(rig: Rig, device: DeviceId, image: Path) -> None:
    """The page is the guest's still, and mapped: it goes on, and nobody else is hurt."""
    front = rig.frontend(device, persistent=True)
    ref = front._pool.refs[0]
    assert one(rig, front, io.BLKIF_OP_READ, ref) == OKAY
    rig.machine.revoke(GUEST, ref)
    assert one(rig, front, io.BLKIF_OP_READ, ref, 8) == OKAY
    assert page_of(rig, ref) == image.read_bytes()[4096:8192]
    assert one(rig, front, io.BLKIF_OP_WRITE, ref, 16) == OKAY
    assert image.read_bytes()[8192:12288] == image.read_bytes()[4096:8192]
    # One that was never mapped is refused, and the device goes on.
    other = front._pool.refs[1]
    rig.machine.revoke(GUEST, other)
    assert one(rig, front, io.BLKIF_OP_READ, other) == ERROR
    assert one(rig, front, io.BLKIF_OP_READ, front._pool.refs[2]) == OKAY
    front.close()
    assert not rig.grants.live and rig.state(device) == "6"


def test_more_grants_than_the_bound(
    rig: Rig, device: DeviceId, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockpages, "MOST_PAGES", 20)
    model = bytearray(image.read_bytes())
    rng = random.Random(1)
    with rig.frontend(device, persistent=True, segments=256) as front:
        before, since = rig.grants.maps, rig.clock.now
        for _ in range(40):
            offset, length = rng.randrange(0, SIZE // 2, 512), rng.randrange(1, SIZE // 2)
            data = rng.randbytes(length)
            front.pwrite(data, offset)
            model[offset : offset + length] = data
            assert front.pread(length, offset) == data
            assert told(rig)["mapped"] <= 20
        assert told(rig)["copied"] > 1000
        # No thrashing: a page goes only when it was not used for a while.
        assert rig.grants.maps - before <= 20 * (2 + (rig.clock.now - since) / blockpages.IDLE)
        # A guest that changes over to other pages has those mapped, a second later.
        rig.turn(blockpages.IDLE + 0.1)
        before = rig.grants.maps
        copied = told(rig)["copied"]
        for _ in range(5):
            for ref in front._pool.refs[100:120]:
                assert one(rig, front, io.BLKIF_OP_READ, ref) == OKAY
        assert rig.grants.maps - before == 20 and told(rig)["copied"] == copied
    assert image.read_bytes() == model and not rig.grants.live


def test_grants_that_do_not_serve(rig: Rig, device: DeviceId, image: Path) -> None:
    """Each is answered as by a copy: an error for that request alone."""
    machine = rig.machine
    machine.add_domain(9)
    front = rig.frontend(device, persistent=True)
    machine.grant(9, 0, machine.new_frame(), ref=900)  # domain 9's own: no grant of this guest
    other = machine.grant(GUEST, 9, machine.new_frame())  # the guest's, for domain 9
    readonly = machine.grant(GUEST, 0, machine.new_frame(), readonly=True)
    before = image.read_bytes()
    for ref in (0, 900, 3000, 0xFFFF_FFFF, other, readonly):
        slots = [
            build_transfer(io.BLKIF_OP_READ, 1, 8, [(ref, 0, 4096)]),
            build_transfer(io.BLKIF_OP_READ, 2, 0, [(front._pool.refs[0], 0, 4096), (ref, 0, 4096)]),
            build_transfer(io.BLKIF_OP_READ, 3, 0, [(front._pool.refs[0], 0, 4096)]),
        ]
        assert [a.status for a in ask(rig, front, *slots)] == [ERROR, ERROR, OKAY], ref
        assert page_of(rig, front._pool.refs[0]) == before[:4096]
    for ref in (0, 900, other):
        assert one(rig, front, io.BLKIF_OP_WRITE, ref) == ERROR
    assert image.read_bytes() == before and page_of(rig, readonly) == bytes(4096)
    # A page that may be read from is good enough for a write.
    assert one(rig, front, io.BLKIF_OP_WRITE, readonly, 16) == OKAY
    assert image.read_bytes() == before[:8192] + bytes(4096) + before[12288:]
    assert rig.state(device) == "4"
    front.close()


def test_refused_mappings_are_not_tried_for_ever(rig: Rig, device: DeviceId, image: Path) -> None:
    front = rig.frontend(device, persistent=True)
    good, late = front._pool.refs[:2]
    assert one(rig, front, io.BLKIF_OP_READ, good) == OKAY
    before = rig.grants.maps
    for number in range(200):
        assert one(rig, front, io.BLKIF_OP_READ, 4000 + number) == ERROR
    assert rig.grants.maps - before == blockpages.REFUSALS
    copies = rig.grants.copies
    assert one(rig, front, io.BLKIF_OP_READ, good, 8) == OKAY and rig.grants.copies == copies
    assert one(rig, front, io.BLKIF_OP_READ, late, 16) == OKAY and rig.grants.copies == copies + 1
    assert page_of(rig, late) == image.read_bytes()[8192:12288]
    front.close()


def test_no_room_for_mappings(
    rig: Rig, device: DeviceId, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Xen has no room for another mapping of domain 0: data are copied."""
    front = rig.frontend(device, persistent=True)

    def full(*_: object, **__: object) -> None:
        raise GrantError("mapping", 12)

    with monkeypatch.context() as patch:
        patch.setattr(rig.grants, "map", full)
        assert front.pread(SIZE, 0) == image.read_bytes()
        assert told(rig)["mapped"] == 0
    front.close()


def test_a_segment_list_that_changes_once_it_was_read(
    rig: Rig, device: DeviceId, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked is what is done: the mapped page is looked at once."""
    front = rig.frontend(device, persistent=True)
    refs = front._pool.refs
    segments = [(ref, 0, 4096) for ref in refs[:12]]
    front._pool.fill([20], memoryview(build_segments(segments)))
    real = blockio.parse_indirect

    def late(request: Any, pages: bytes, limits: Any) -> Any:
        front._pool.fill([20], memoryview(b"\xff" * 4096))
        assert isinstance(pages, bytes)
        return real(request, pages, limits)

    monkeypatch.setattr(blockio, "parse_indirect", late)
    [answer] = ask(rig, front, build_indirect(io.BLKIF_OP_READ, 1, 8, 12, [refs[20]]))
    assert answer.status == OKAY and rig.grants.copies == 0
    got = bytearray(12 * 4096)
    front._pool.drain(list(range(12)), memoryview(got))
    assert got == image.read_bytes()[4096 : 13 * 4096]
    front.close()


def test_the_image_fails_half_way(rig: Rig, device: DeviceId, image: Path) -> None:
    with rig.frontend(device, persistent=True) as front:
        os.truncate(image, SIZE // 2)
        with pytest.raises(OSError):
            front.pread(65536, SIZE // 2 - 4096)
        assert front.pread(4096, 0) == image.read_bytes()[:4096]
        os.truncate(image, SIZE)
        assert front.pread(4096, SIZE - 4096) == bytes(4096)


def test_the_domain_dies_with_its_pages_mapped(rig: Rig, device: DeviceId, image: Path) -> None:
    front = rig.frontend(device, persistent=True)
    assert front.pread(SIZE, 0) == image.read_bytes() and told(rig)["mapped"]
    queue = front._queues[0]
    queue.ring.push(build_transfer(io.BLKIF_OP_READ, 1, 0, [(front._pool.refs[0], 0, 4096)]))
    queue.ring.publish()
    front._events.notify(queue.port)
    rig.machine.remove_domain(GUEST)
    rig.turns(3)
    rig.remove(device)
    rig.turns()
    assert rig.describe() == [] and not rig.grants.live


def test_a_frontend_that_closes_and_begins_anew(rig: Rig, device: DeviceId, image: Path) -> None:
    """Its old references mean other pages now."""
    for pages in (90, 64, 77):
        with rig.frontend(device, persistent=True, data_pages=pages) as front:
            assert front.pread(SIZE, 0) == image.read_bytes()
        assert not rig.grants.live
        rig.guest.write(f"{device.frontend}/state", "1")
        rig.turns()
