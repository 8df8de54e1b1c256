"""Attacks on the block and the net backend that are the same for both, or that need more than a ring: odd
grants, exhausted tables, full directories, guests that die or come again and again.

By the numbers of the hostile-frontend list (HF) and of the requirements (R); ``docs/hostile.md`` has all.
"""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from splitdrivers import GUEST, XVDA, Rig
from test_block_hostile import ask, assert_closed, page, read_one, status, view_of
from test_net_backend import FRONT, MAC, OTHER, World, _responses, drive, plain, raw_tx
from test_net_backend import GUEST as NET_GUEST
from test_net_backend import ref as net_ref

from xtool.abi import io
from xtool.abi.grant import STATUS_NAMES
from xtool.backends.frame import FOLDERS
from xtool.devices.vbd import Vbd
from xtool.devices.xenbus import DeviceId
from xtool.errors import HostError, XtoolError
from xtool.frontends import block
from xtool.frontends.block import BlockFrontend
from xtool.proto.blkif import build_discard, build_transfer
from xtool.proto.netif import TX_REQUEST

SIZE = 1 << 20
#: What Linux's blkback allows itself by default for one ring, and the ring: any backend can live with it.
MOST_HELD = 1056 + 1


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.add()
    world.start()
    yield world
    world.server.close()
    assert not world.grants.live
    world.host._close()
    world.loop.close()
    for closing in (world.events, world.guest_events, world.own_store, world.store):
        closing.close()


def held(rig: Rig) -> int:
    """Pages of guests that the backend's domain has mapped."""
    return sum(len(pages.grants) for pages in rig.grants.live)


# --- grants
@pytest.mark.parametrize("code", sorted(set(STATUS_NAMES) - {0}))
def test_hf_14_whatever_xen_says_of_a_grant(rig: Rig, device: DeviceId, image: Path, code: int) -> None:
    """Transitive and sub-page grants, a table that changes its version under a batch: for us they are a
    status, and each one that Xen has is an error of that request alone."""
    front = rig.frontend(device)
    odd = page(front, 3)
    rig.machine.refused[GUEST, odd] = code
    write = build_transfer(io.BLKIF_OP_WRITE, 2, 0, [(odd, 0, 4096)])
    answers = ask(rig, front, read_one(front), read_one(front, odd), write, read_one(front, page(front, 4)))
    assert [answer.status for answer in answers] == [0, -1, -1, 0]
    # In the middle of the batch: the first grants were good.
    rig.machine.refused.clear()
    seen: list[int] = []

    def switch(domid: int, ref: int) -> None:
        seen.append(ref)
        if len(seen) == 3:
            rig.machine.refused |= {(GUEST, other): code for other in front._pool.refs}

    rig.machine.before_copy = switch
    answers = ask(rig, front, *[read_one(front, page(front, n)) for n in range(6)])
    assert [answer.status for answer in answers] == [0, 0, -1, -1, -1, -1]
    rig.machine.before_copy = lambda domid, ref: None
    rig.machine.refused.clear()
    assert front.pread(SIZE, 0) == image.read_bytes() and rig.state(device) == "4"


def test_hf_14_on_an_interface(world: World) -> None:
    port = world.connect()
    gref = net_ref(port, plain(60))
    for code in sorted(set(STATUS_NAMES) - {0}):
        world.machine.refused[NET_GUEST, gref] = code
        raw_tx(world, port, TX_REQUEST.pack(gref, 0, 0, 1, 60))
        assert world.host.sent() == [] and world.state() == "4"
        assert [int.from_bytes(raw[2:4], "little", signed=True) for raw in _responses(port)] == [-1]
    world.machine.refused.clear()
    bad = set(port.pairs[0].rx_pages.refs)
    world.machine.refused |= {(NET_GUEST, other): -1 for other in bad}
    world.host.give(plain(100, 1, OTHER))
    world.until(lambda: world.counters.rx_failed == 1)
    world.machine.refused.clear()
    port.poll()
    assert port.rx_errors == 1
    raw_tx(world, port, TX_REQUEST.pack(gref, 0, 0, 1, 60))
    assert [frame for _, frame in world.host.sent()] == [plain(60)]


def test_hf_15_more_pages_than_can_be_mapped(
    rig: Rig, device: DeviceId, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frontend that says its grants are persistent names thousands of them: what is kept mapped stays
    bounded, and with no room left in the table of mappings it is served, or refused, all the same."""
    real = block.frontend_nodes
    with monkeypatch.context() as patch:
        patch.setattr(block, "frontend_nodes", lambda wanted: {**real(wanted), "feature-persistent": "1"})
        front = rig.frontend(device)
    assert rig.guest.get(f"{device.frontend}/feature-persistent") == "1"
    machine = rig.machine
    frame = machine.new_frame()
    refs = [machine.grant(GUEST, 0, frame) for _ in range(3000)]
    for start in range(0, len(refs), 16):
        answers = ask(rig, front, *[read_one(front, ref) for ref in refs[start : start + 16]])
        assert all(answer.status == io.BLKIF_RSP_OKAY for answer in answers)
        assert held(rig) <= MOST_HELD
    machine.maptrack = held(rig)  # nothing more can be mapped
    fresh = [machine.grant(GUEST, 0, frame) for _ in range(64)]
    for ref in fresh:
        assert status(rig, front, read_one(front, ref)) in (io.BLKIF_RSP_OKAY, io.BLKIF_RSP_ERROR)
    second = rig.add_disk(Vbd("xvdb", XVDA + 16, str(image), kind="xtool"))
    with pytest.raises(HostError, match="did not connect"):
        rig.frontend(second)
    assert "GNTST_no_device_space" in (rig.toolstack.get(f"{second.error}/error") or "")
    assert rig.state(device) == "4" and front.pread(512, 0) == image.read_bytes()[:512]
    machine.maptrack = 1 << 20
    rig.guest.write(f"{second.frontend}/state", "6")
    rig.turns(150)
    rig.guest.write(f"{second.frontend}/state", "1")
    rig.turns(150)
    with rig.frontend(second) as other:
        assert other.pread(512, 0) == image.read_bytes()[:512]


def test_hf_8_the_ring_s_own_page_as_data(rig: Rig, device: DeviceId, image: Path) -> None:
    """What is read lands in the ring: its indexes are nonsense then, and that device is closed."""
    front = rig.frontend(device)
    second = rig.add_disk(Vbd("xvdb", XVDA + 16, str(image), kind="xtool"))
    with rig.frontend(second) as other:
        own = front._queues[0].shared.refs[0]
        front._queues[0].ring.push(read_one(front, own))
        front._queues[0].ring.publish()
        front._events.notify(front._queues[0].port)
        rig.turns(3)
        front._events.notify(front._queues[0].port)
        rig.turns(3)
        assert rig.state(device) == "5" and "req_prod" in (rig.toolstack.get(f"{device.error}/error") or "")
        assert other.pread(SIZE, 0) == image.read_bytes()


def test_r4_each_element_of_a_batch_has_its_own_answer(rig: Rig, device: DeviceId, image: Path) -> None:
    front = rig.frontend(device)
    dice = random.Random(4)
    good = [dice.random() < 0.5 for _ in range(30)]
    slots = [read_one(front, None if ok else 4000, request_id=n) for n, ok in enumerate(good)]
    answers = ask(rig, front, *slots)
    assert [(a.id, a.status) for a in answers] == [(n, 0 if ok else -1) for n, ok in enumerate(good)]
    assert held(rig) == 1  # the ring


@pytest.mark.parametrize("end", ["closing", "closed", "gone", "removed", "killed", "upgrade", "dead"])
def test_r5_nothing_stays_mapped(rig: Rig, device: DeviceId, end: str) -> None:
    front = rig.frontend(device, queues=2, ring_order=1)
    ask(rig, front, *[read_one(front, page(front, n)) for n in range(8)])
    assert held(rig) >= 4
    if end in ("closing", "closed"):
        rig.guest.write(f"{device.frontend}/state", "5" if end == "closing" else "6")
        rig.turns()
        if end == "closing":
            assert held(rig) >= 4  # served on until it lets go
            rig.guest.write(f"{device.frontend}/state", "6")
    elif end == "gone":
        rig.guest.rm(device.frontend)
    elif end == "removed":
        rig.remove(device)
    elif end == "killed":
        rig.kill()
        assert not rig.grants.live
        rig.guest.write(f"{device.frontend}/state", "6")
        rig.start()
    elif end == "upgrade":
        rig.stop()
        assert not rig.grants.live
        rig.guest.write(f"{device.frontend}/state", "6")
        rig.start()
    else:
        rig.machine.remove_domain(GUEST)
        rig.toolstack.rm(f"/local/domain/{GUEST}")
    rig.turns(60)
    assert not rig.grants.live and not rig.machine.guests[0].ports


def test_r3_responses_are_whole_slots(rig: Rig, device: DeviceId) -> None:
    front = rig.frontend(device)
    view = view_of(front)
    slots = [read_one(front), build_discard(5, 0, 8), bytes([77]) * 112]
    ask(rig, front, *slots)
    for number in range(3):
        slot = bytes(view[64 + 112 * number : 64 + 112 * (number + 1)])
        # 8 bytes of id, operation, padding, status; zeroes from there on.
        assert slot[9:10] == b"\0" and slot[12:] == bytes(100)


def test_r10_a_guest_is_given_its_sectors_and_nothing_else(
    rig: Rig, device: DeviceId, image: Path, tmp_path: Path
) -> None:
    """The buffer has held another disk's data; a read of one sector, or one that fails, shows none of it."""
    secret = tmp_path / "secret.img"
    secret.write_bytes(b"SECRET!!" * (SIZE // 8))
    front = rig.frontend(device)
    with rig.frontend(rig.add_disk(Vbd("xvdb", XVDA + 16, str(secret), kind="xtool"))) as other:
        assert other.pread(SIZE, 0) == secret.read_bytes()
    assert front.pread(SIZE, 0) == image.read_bytes()
    canary = b"\xcc" * 4096
    front._pool.fill([0], memoryview(canary))
    one = build_transfer(io.BLKIF_OP_READ, 1, 3, [(page(front), 1024, 512)])
    assert status(rig, front, one) == io.BLKIF_RSP_OKAY
    got = bytearray(4096)
    front._pool.drain([0], memoryview(got))
    assert got == canary[:1024] + image.read_bytes()[3 * 512 : 4 * 512] + canary[1536:]
    os.truncate(image, SIZE // 2 + 100)
    front._pool.fill([0], memoryview(canary))
    assert status(rig, front, read_one(front, sector=SIZE // 2 // 512)) == io.BLKIF_RSP_ERROR
    front._pool.drain([0], memoryview(got))
    assert got == canary


# --- logs and texts
def test_r19_a_guest_cannot_fill_our_log(
    rig: Rig, device: DeviceId, caplog: pytest.LogCaptureFixture
) -> None:
    front = rig.frontend(device)
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            ask(rig, front, *[read_one(front, 4000)] * 32)
    assert 1 <= len(caplog.records) <= 6
    [told] = rig.describe()
    assert told["complaints"] == 3200 and str(device) in caplog.records[0].getMessage()


def test_hf_34_texts_that_would_steer_a_terminal(
    rig: Rig, device: DeviceId, caplog: pytest.LogCaptureFixture
) -> None:
    front = rig.frontend(device, connect=False)
    shared = front._allocator.share(0, 1)
    nodes = {"ring-ref": str(shared.refs[0]), "event-channel": "1", "protocol": "\x1b[2J\n\r\x07" + "é" * 900}
    with caplog.at_level(logging.INFO):
        for name, value in {**nodes, "state": "3"}.items():
            rig.guest.write(f"{device.frontend}/{name}", value)
        assert_closed(rig, device, "protocol")
    texts = [rig.toolstack.get(f"{device.error}/error") or "", str(rig.describe())]
    texts += [record.getMessage() for record in caplog.records]
    for text in texts:
        assert text.isascii() and text.isprintable() and len(text) < 2000


# --- directories, storms
def test_hf_32_a_full_directory_and_its_watches(rig: Rig, image: Path) -> None:
    """A guest at the limits of its quota: 1000 nodes of 2 KiB, 100 watches on what we write."""
    first = rig.add_disk(Vbd("xvda", XVDA, str(image), kind="xtool"))
    watches = [rig.guest.watch(f"{first.backend}/state") for _ in range(100)]
    for number in range(1000):
        name = f"queue-{number}" if number % 2 else f"n{number:0100d}"
        rig.guest.write(f"{first.frontend}/{name}", "x" * 2000)
    front = rig.frontend(first)
    assert front.pread(SIZE, 0) == image.read_bytes()
    # Another disk comes, the first one goes.
    with rig.frontend(rig.add_disk(Vbd("xvdb", XVDA + 16, str(image), kind="xtool"))) as other:
        assert other.pread(512, 0) == image.read_bytes()[:512]
    rig.toolstack.write(f"{first.backend}/online", "0")
    rig.toolstack.write(f"{first.backend}/state", "5")
    front.close()
    rig.turns()
    assert rig.state(first) == "6"
    rig.remove(first)
    rig.turns()
    assert not rig.toolstack.exists(first.frontend)
    for watch in watches:
        watch.close()


def test_r7_a_storm_on_one_disk_costs_another_nothing(rig: Rig, device: DeviceId, image: Path) -> None:
    """10,000 writes a second to nodes of one device: the other's requests are answered in the same round."""
    second = rig.add_disk(Vbd("xvdb", XVDA + 16, str(image), kind="xtool"))
    rig.frontend(device)
    other = rig.frontend(second)
    queue = other._queues[0]
    assert rig.server is not None
    for number in range(2000):
        for name in ("state", "feature-persistent", "x"):
            rig.guest.write(f"{device.frontend}/{name}", str(number))
        queue.ring.push(read_one(other))
        queue.ring.publish()
        other._events.notify(queue.port)
        rig.clock.now += 0.0003
        rig.server.step(0)
        assert len(queue.ring.take_responses()) == 1
        other.events_came()
    waiting = sum(len(watch.pending()) for watch in rig.server._watches.values())
    assert waiting <= 8  # one path for each node


# --- lives
POINTS: list[tuple[str, Callable[[Rig, DeviceId, BlockFrontend], object]]] = [
    ("waiting", lambda rig, device, front: None),
    ("half its nodes", lambda rig, device, front: rig.guest.write(f"{device.frontend}/state", "3")),
    ("connected", lambda rig, device, front: front.connect()),
    ("busy", lambda rig, device, front: (front.connect(), _leave_requests(front))),
    ("closing", lambda rig, device, front: (front.connect(), _state(rig, device, "5"))),
    ("closed", lambda rig, device, front: (front.connect(), _state(rig, device, "6"), rig.turns(5))),
]


def _state(rig: Rig, device: DeviceId, state: str) -> None:
    rig.guest.write(f"{device.frontend}/state", state)


def _leave_requests(front: BlockFrontend) -> None:
    queue = front._queues[0]
    for _ in range(16):
        queue.ring.push(read_one(front))
    queue.ring.publish()
    front._events.notify(queue.port)


@pytest.mark.parametrize("nodes_go", ["with it", "later"])
@pytest.mark.parametrize(("name", "point"), POINTS, ids=[name for name, _ in POINTS])
def test_hf_39_the_domain_dies_at_any_step(
    rig: Rig, device: DeviceId, name: str, point: Callable[..., object], nodes_go: str
) -> None:
    front = rig.frontend(device, connect=False)
    rig.turns(3)
    point(rig, device, front)
    rig.machine.remove_domain(GUEST)
    if nodes_go == "later":
        rig.turns(3)
    rig.toolstack.rm(f"/local/domain/{GUEST}")
    rig.turns(50)  # a second
    assert rig.state(device) == "6"
    assert not rig.grants.live and not rig.machine.guests[0].ports
    rig.remove(device)
    rig.turns(5)
    assert rig.describe() == [] and list(rig.folder.iterdir()) == []


def test_hf_39_in_the_middle_of_a_batch(rig: Rig, device: DeviceId) -> None:
    front = rig.frontend(device)
    copies: list[int] = []

    def die(domid: int, ref: int) -> None:
        copies.append(ref)
        if len(copies) == 5:
            rig.machine.remove_domain(GUEST)

    rig.machine.before_copy = die
    _leave_requests(front)
    rig.turns(3)
    rig.toolstack.rm(f"/local/domain/{GUEST}")
    rig.turns(50)
    assert len(copies) >= 5 and rig.state(device) == "6" and not rig.grants.live


def test_hf_39_a_guest_with_an_interface_dies(world: World) -> None:
    port = world.connect()
    for n in range(30):
        assert port.try_send(plain(2000, n))
        world.host.give(plain(2000, n, OTHER))
    port.kick()
    world.machine.remove_domain(NET_GUEST)
    world.step(5)
    world.store.rm(f"/local/domain/{NET_GUEST}")
    world.until(lambda: world.state() == "6")
    assert not world.grants.live and not world.machine.guests[0].ports


def test_hf_40_coming_and_going_without_end(rig: Rig, device: DeviceId, image: Path) -> None:
    """Sixty connections: no page, port, descriptor or object stays behind."""

    def life() -> None:
        with rig.frontend(device, queues=2) as front:
            assert front.pread(512, 0) == image.read_bytes()[:512]
            events, allocator = front._events, front._allocator
        rig.turns(2)
        rig.guest.write(f"{device.frontend}/state", "1")
        rig.turns(2)
        events.close()
        allocator.close()  # type: ignore[attr-defined]
        rig.clock.now += 20  # no flapping

    def counted() -> tuple[int, int, int, int]:
        gc.collect()
        fds = len(os.listdir("/proc/self/fd"))
        return fds, rig.machine.frames_used, len(rig.machine.guests[0].ports), len(rig.grants.live)

    for _ in range(5):
        life()
    before, objects = counted(), len(gc.get_objects())
    for _ in range(60):
        life()
    assert counted() == before
    assert len(gc.get_objects()) - objects < 400


def test_hf_7_the_port_of_an_interface_is_taken_away(world: World) -> None:
    port = world.connect()
    pair = port.pairs[0]
    world.guest_events.unbind(pair.rx_port)
    for n in range(5):
        world.host.give(plain(100, n, OTHER))
        world.step(3)
    assert world.state() == "4"
    world.guest_events.unbind(pair.tx_port)
    world.store.write(f"{FRONT}/state", "6")
    world.until(lambda: world.state() == "6")
    assert not world.grants.live


def test_hf_27_ten_thousand_addresses(world: World) -> None:
    """None of them reaches the bridge, whose table of addresses stays as it was."""
    port = world.connect()
    good = plain(60)
    frames = [plain(60, 0, (0x02 << 40 | n).to_bytes(6, "big")) for n in range(10_000)]
    got = drive(world, port, [*frames, good])
    assert [frame for _, frame in got] == [good]
    assert world.counters.tx_refused == len(frames)
    assert {frame[6:12] for _, frame in got} == {MAC}


def test_r20_the_format_is_what_domain_0_said(rig: Rig, device: DeviceId, image: Path) -> None:
    """A guest that writes another format's header into its raw disk, naming a file of the host as the base,
    reads that header again, also when the image is opened anew."""
    header = b"QFI\xfb" + (3).to_bytes(4, "big") + (104).to_bytes(8, "big") + (11).to_bytes(4, "big")
    block = (header + bytes(84) + b"/etc/passwd").ljust(512, b"\0")
    with rig.frontend(device) as front:
        front.pwrite(block, 0)
    rig.stop()
    rig.start()
    rig.guest.write(f"{device.frontend}/state", "1")
    rig.turns(150)
    with rig.frontend(device) as front:
        assert front.pread(512, 0) == block and front.size == SIZE


def test_hf_42_a_backend_elsewhere_is_refused() -> None:
    """Devices are served by domain 0 alone: no other domain's nodes decide about anything."""
    from xtool.config.single import parse_disk, parse_vif
    from xtool.toolstack.deviceplan import plan_disk, plan_vif

    with pytest.raises(XtoolError, match="driver"):
        plan_disk(parse_disk(["/a.img,raw,xvda,backend=driver"]), {})
    with pytest.raises(XtoolError, match="driver"):
        plan_vif(parse_vif(["backend=driver"]), "x", 0, "pv")


def test_hf_37_38_there_is_no_9p_backend() -> None:
    """Once there is one, these two need tests of their own."""
    assert {kind for kind, _, _ in FOLDERS.values()} == {"vbd", "vif", "console"}
