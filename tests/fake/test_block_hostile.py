"""A lying block frontend against our block backend, by the numbers of the hostile-frontend list (HF)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splitdrivers import GUEST, XVDA, Rig

from xtool.abi import io
from xtool.devices.vbd import Vbd
from xtool.devices.xenbus import DeviceId
from xtool.frontends.block import BlockFrontend
from xtool.proto import shm
from xtool.proto.blkif import (
    X86_64,
    Response,
    build_discard,
    build_indirect,
    build_segments,
    build_transfer,
    parse_response,
)

SIZE = 1 << 20
SECTORS = SIZE // 512
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = 0, 4, 8, 12


def view_of(front: BlockFrontend) -> memoryview:
    return front._queues[0].shared.view


def ask(rig: Rig, front: BlockFrontend, *slots: bytes) -> list[Response]:
    """Put raw requests on the ring; the responses."""
    queue = front._queues[0]
    for slot in slots:
        queue.ring.push(slot)
    queue.ring.publish()
    front._events.notify(queue.port)
    rig.turns(3)
    return [parse_response(slot, X86_64) for slot in queue.ring.take_responses()]


def status(rig: Rig, front: BlockFrontend, slot: bytes) -> int:
    [answer] = ask(rig, front, slot)
    return answer.status


def page(front: BlockFrontend, number: int = 0) -> int:
    return front._pool.refs[number]


def read_one(front: BlockFrontend, ref: int | None = None, sector: int = 0, request_id: int = 7) -> bytes:
    segment = (page(front) if ref is None else ref, 0, 4096)
    return build_transfer(io.BLKIF_OP_READ, request_id, sector, [segment])


def assert_closed(rig: Rig, device: DeviceId, reason: str) -> None:
    """The device is closing, with a reason that can be read, and everything of the guest's is let go."""
    rig.turns()
    assert rig.state(device) in ("5", "6")
    assert reason in (rig.toolstack.get(f"{device.error}/error") or "")
    assert not rig.grants.live and not rig.machine.guests[0].ports


def assert_comes_back(rig: Rig, device: DeviceId, image: Path) -> None:
    """A frontend that closes and begins anew is served."""
    for state, wanted in (("6", "6"), ("1", "2")):
        rig.guest.write(f"{device.frontend}/state", state)
        rig.turns(150)
        assert rig.state(device) == wanted
    with rig.frontend(device) as front:
        assert front.pread(8192, 4096) == image.read_bytes()[4096:12288]


@pytest.mark.parametrize("ahead", [33, 0x8000_0000, 0xFFFF_FFFF])
def test_hf_1_2_indexes_out_of_range(rig: Rig, device: DeviceId, image: Path, ahead: int) -> None:
    """More than a ring ahead: stopped, closed with the reason, and free to come again (R2)."""
    front = rig.frontend(device)
    assert front.pread(512, 0) == image.read_bytes()[:512]
    shm.store32(view_of(front), REQ_PROD, 1 + ahead)
    front._events.notify(front._queues[0].port)
    assert_closed(rig, device, "req_prod")
    assert_comes_back(rig, device, image)


def test_hf_3_a_slot_that_changes_under_our_hands(rig: Rig, device: DeviceId, image: Path) -> None:
    """What is done is what was validated, whatever the slot says by then (R1)."""
    front = rig.frontend(device)
    segments = [(page(front, n), 0, 4096) for n in range(12)]
    front._pool.fill([20], memoryview(build_segments(segments)))
    slot = build_indirect(io.BLKIF_OP_READ, 1, 8, 12, [page(front, 20)])
    flips = []

    def flip(domid: int, ref: int) -> None:
        # Between the check and the copy: another operation, beyond the end, another segment list.
        flips.append(ref)
        view_of(front)[64 : 64 + 112] = b"\xff" * 112
        front._pool.fill([20], memoryview(b"\xff" * 4096)) if len(flips) > 1 else None

    rig.machine.before_copy = flip
    [answer] = ask(rig, front, slot)
    assert (answer.id, answer.operation, answer.status) == (1, io.BLKIF_OP_READ, io.BLKIF_RSP_OKAY)
    got = bytearray(12 * 4096)
    front._pool.drain(list(range(12)), memoryview(got))
    assert got == image.read_bytes()[4096 : 13 * 4096] and len(flips) == 13


def test_hf_4_indexes_that_are_not_the_guests_own(rig: Rig, device: DeviceId, image: Path) -> None:
    front = rig.frontend(device)
    ask(rig, front, *[read_one(front)] * 3)
    shm.store32(view_of(front), REQ_EVENT, 0x7777_7777)
    front._queues[0].ring.push(read_one(front))
    front._queues[0].ring.publish()
    shm.store32(view_of(front), RSP_PROD, 0x1234)
    front._events.notify(front._queues[0].port)
    rig.turns(3)
    assert shm.load32(view_of(front), RSP_PROD) == 4  # its own count, stored over the lie
    shm.store32(view_of(front), REQ_PROD, 2)
    front._events.notify(front._queues[0].port)
    assert_closed(rig, device, "req_prod")


def test_hf_5_6_responses_not_taken_and_notifications_without_requests(rig: Rig, device: DeviceId) -> None:
    front = rig.frontend(device)
    queue = front._queues[0]
    for _ in range(queue.ring.size):
        queue.ring.push(read_one(front))
    queue.ring.publish()
    called = 0
    for _ in range(2000):
        front._events.notify(queue.port)
        assert rig.server is not None
        rig.clock.now += 0.0001
        before = rig.grants.copies
        rig.server.step(0)
        called += rig.grants.copies - before
    [told] = rig.describe()
    assert called == 1 and told["queues"][0]["unanswered"] == 0  # type: ignore[index]
    assert len(queue.ring.take_responses()) == queue.ring.size


def test_hf_7_its_port_is_gone_or_another_device_s(rig: Rig, device: DeviceId, image: Path) -> None:
    front = rig.frontend(device)
    taken = front._queues[0].port
    second = rig.add_disk(Vbd("xvdb", XVDA + 16, str(image), kind="xtool"))
    other = rig.frontend(second, connect=False)
    shared = other._allocator.share(0, 1)
    for name, value in (("ring-ref", shared.refs[0]), ("event-channel", taken), ("state", 3)):
        rig.guest.write(f"{second.frontend}/{name}", str(value))
    rig.turns()
    assert rig.state(second) == "5" and "event channel" in (rig.toolstack.get(f"{second.error}/error") or "")
    assert front.pread(512, 0) == image.read_bytes()[:512]
    front._events.unbind(taken)
    rig.turns(3)
    assert rig.state(device) == "4"
    rig.guest.write(f"{device.frontend}/state", "6")
    rig.turns()
    assert rig.state(device) == "6" and not rig.grants.live


@pytest.mark.parametrize(
    "nodes",
    [
        *({"ring-ref": text} for text in ("0", "4294967295", "-1", "ref", "9" * 1000, "", "8 ", "٣")),
        {"ring-page-order": "31"},
        {"ring-page-order": "1"},  # without ring-ref0
        {"multi-queue-num-queues": "65535"},
        {"multi-queue-num-queues": "0"},
        {"multi-queue-num-queues": "2"},  # without queue-0
        {"protocol": "arm-abi"},
        {"event-channel": "0"},
        {"event-channel": "99999999"},
        {"ring-ref": "2000"},  # not granted
    ],
)
def test_hf_8_9_nodes_that_make_no_sense(
    rig: Rig, device: DeviceId, image: Path, nodes: dict[str, str]
) -> None:
    front = rig.frontend(device, connect=False)
    shared = front._allocator.share(0, 1)
    port = front._events.bind_unbound(0)
    right = {"ring-ref": str(shared.refs[0]), "event-channel": str(port)}
    before = rig.grants.maps
    for name, value in {**right, **nodes, "state": "3"}.items():
        rig.guest.write(f"{device.frontend}/{name}", value)
    assert_closed(rig, device, "")
    assert rig.toolstack.get(f"{device.error}/error")
    assert rig.grants.maps - before <= 1  # refused before anything is mapped, but for a bad reference
    for name in nodes:
        rig.guest.rm(f"{device.frontend}/{name}")
    assert_comes_back(rig, device, image)


def test_hf_10_features_flipped_while_connected(rig: Rig, device: DeviceId, image: Path) -> None:
    with rig.frontend(device) as front:
        for name, value in (("protocol", "x86_32-abi"), ("feature-persistent", "1"), ("ring-ref", "1")):
            rig.guest.write(f"{device.frontend}/{name}", value)
        rig.turns(3)
        assert front.pread(4096, 512) == image.read_bytes()[512:4608]


def test_hf_11_12_13_grants_that_do_not_serve(rig: Rig, device: DeviceId, image: Path) -> None:
    machine = rig.machine
    machine.add_domain(9)
    front = rig.frontend(device)
    foreign = machine.grant(9, 0, machine.new_frame())
    other = machine.grant(GUEST, 9, machine.new_frame())
    readonly = machine.grant(GUEST, 0, machine.new_frame(), readonly=True)
    revoked = machine.grant(GUEST, 0, machine.new_frame())
    machine.revoke(GUEST, revoked)
    for ref in (0, 3000, 0xFFFF_FFFF, other, readonly, revoked):
        good, bad = ask(rig, front, read_one(front), read_one(front, ref))
        assert (good.status, bad.status) == (io.BLKIF_RSP_OKAY, io.BLKIF_RSP_ERROR), ref
    assert foreign != other
    # Taken back between two segments of one request.
    late = machine.grant(GUEST, 0, machine.new_frame())
    machine.before_copy = lambda domid, ref: machine.revoke(GUEST, late) if ref == late else None
    assert status(rig, front, read_one(front, late)) == io.BLKIF_RSP_ERROR
    machine.before_copy = lambda domid, ref: None
    # A page that may be read from is good enough for a write.
    write = build_transfer(io.BLKIF_OP_WRITE, 1, 16, [(readonly, 0, 4096)])
    assert status(rig, front, write) == io.BLKIF_RSP_OKAY
    assert image.read_bytes()[16 * 512 : 24 * 512] == bytes(4096)
    # Eleven segments in one page: the last one stays.
    same = build_transfer(io.BLKIF_OP_READ, 1, 0, [(page(front), 0, 4096)] * 11)
    assert status(rig, front, same) == io.BLKIF_RSP_OKAY
    got = bytearray(4096)
    front._pool.drain([0], memoryview(got))
    assert got == image.read_bytes()[40960:45056]


def raw(op: int, count: int, sector: int, first: int = 0, last: int = 7, ref: int = 8) -> bytes:
    head = bytes([op, count, 0, 0]) + bytes(4) + (5).to_bytes(8, "little") + sector.to_bytes(8, "little")
    return (head + (ref.to_bytes(4, "little") + bytes([first, last, 0, 0])) * 11)[:112]


@pytest.mark.parametrize(
    ("slot", "expected"),
    [
        *((raw(io.BLKIF_OP_READ, count, 0), io.BLKIF_RSP_ERROR) for count in (0, 12, 255)),
        (raw(io.BLKIF_OP_READ, 1, 0, 5, 4), io.BLKIF_RSP_ERROR),
        (raw(io.BLKIF_OP_WRITE, 1, 0, 0, 8), io.BLKIF_RSP_ERROR),
        *(
            (raw(op, 1, sector), io.BLKIF_RSP_ERROR)
            for op in (io.BLKIF_OP_READ, io.BLKIF_OP_WRITE)
            for sector in (SECTORS - 7, SECTORS, 1 << 63, (1 << 64) - 1, (1 << 64) - 8)
        ),
        *(
            (build_indirect(io.BLKIF_OP_WRITE, 5, 0, count, [8]), io.BLKIF_RSP_ERROR)
            for count in (0, 257, 65535)
        ),
        (build_indirect(io.BLKIF_OP_WRITE, 5, 0, 12, [4000]), io.BLKIF_RSP_ERROR),
        (build_indirect(io.BLKIF_OP_INDIRECT, 5, 0, 12, [8]), io.BLKIF_RSP_ERROR),
        *((raw(op, 1, 0), io.BLKIF_RSP_EOPNOTSUPP) for op in (4, 7, 77, 255)),
        (build_discard(5, 0, 8, secure=True), io.BLKIF_RSP_EOPNOTSUPP),
        (build_discard(5, SECTORS, 1), io.BLKIF_RSP_ERROR),
        (build_discard(5, 8, (1 << 64) - 8), io.BLKIF_RSP_ERROR),
    ],
)
def test_hf_16_to_19_requests_that_make_no_sense(
    rig: Rig, device: DeviceId, image: Path, slot: bytes, expected: int
) -> None:
    before = image.read_bytes()
    front = rig.frontend(device)
    wrong, right = ask(rig, front, slot, read_one(front, request_id=6))
    assert (wrong.id, wrong.status) == (5, expected) and (right.id, right.status) == (6, io.BLKIF_RSP_OKAY)
    assert image.read_bytes() == before and rig.state(device) == "4"


def test_hf_19_a_read_only_disk(rig: Rig, image: Path) -> None:
    before = image.read_bytes()
    front = rig.frontend(rig.add_disk(Vbd("xvda", XVDA, str(image), kind="xtool", readonly=True)))
    segment = [(page(front), 0, 4096)]
    for op in (io.BLKIF_OP_WRITE, io.BLKIF_OP_WRITE_BARRIER, io.BLKIF_OP_FLUSH_DISKCACHE):
        assert status(rig, front, build_transfer(op, 1, 0, segment)) == io.BLKIF_RSP_ERROR
    assert status(rig, front, build_discard(1, 0, 8)) != io.BLKIF_RSP_OKAY
    assert status(rig, front, read_one(front)) == io.BLKIF_RSP_OKAY
    assert front.offer.readonly and image.read_bytes() == before


def test_hf_20_ids_are_echoed(rig: Rig, device: DeviceId) -> None:
    front = rig.frontend(device)
    ids = [3, 3, 3, 0, (1 << 64) - 1]
    answers = ask(rig, front, *[read_one(front, request_id=number) for number in ids])
    assert [answer.id for answer in answers] == ids


def test_hf_22_a_million_discards_are_work_in_small_pieces(rig: Rig, device: DeviceId) -> None:
    """A ringful of the smallest ones is one bounded round, and a second disk is served in the same one."""
    front = rig.frontend(device, ring_order=4)
    size = front._queues[0].ring.size
    for number in range(size):
        front._queues[0].ring.push(build_discard(number, number % SECTORS, 1))
    front._queues[0].ring.publish()
    front._events.notify(front._queues[0].port)
    assert rig.server is not None
    rig.server.step(0)
    done = shm.load32(view_of(front), RSP_PROD)
    assert 0 < done <= 64 < size
    rig.turns(20)
    assert all(parse_response(slot).status == 0 for slot in front._queues[0].ring.take_responses())


def test_hf_30_31_33_nodes_deleted_rewritten_and_stormed(rig: Rig, device: DeviceId, image: Path) -> None:
    front = rig.frontend(device)
    rig.guest.write(f"{device.frontend}/backend", "/local/domain/0/backend/xtool-vbd/9/1")
    assert rig.server is not None
    reads = 0
    get = rig.store.get

    def counted(path: str, *rest: object) -> object:
        nonlocal reads
        reads += path == f"{device.frontend}/state"
        return get(path, *rest)

    rig.store.get = counted  # type: ignore[method-assign, assignment]
    for number in range(5000):  # half a second of 10,000 writes a second
        rig.guest.write(f"{device.frontend}/state", "4" if number % 2 else "\x1b[2Jnonsense")
        rig.clock.now += 0.0001
        rig.server.step(0)
    assert reads <= 55  # one look each LOOK_GAP (R7)
    assert front.pread(512, 512) == image.read_bytes()[512:1024]
    rig.guest.rm(device.frontend)
    rig.turns()
    assert rig.state(device) == "6" and not rig.grants.live


_STATES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "99", "", "-1", "x" * 2000)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(_STATES), st.integers(0, 3)), max_size=25))
def test_hf_29_any_sequence_of_states(tmp_path: Path, moves: list[tuple[str, int]]) -> None:
    """The frontend's nodes are right, its states arbitrary; in the end it behaves and is served."""
    (tmp_path / "run").mkdir(exist_ok=True)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(range(256)) * 256)
    rig = Rig(tmp_path / "run")
    device = rig.add_disk(Vbd("xvda", XVDA, str(image), kind="xtool"))
    front = rig.frontend(device, connect=False)
    shared = front._allocator.share(0, 1)
    for state, turns in moves:
        rig.guest.write(f"{device.frontend}/ring-ref", str(shared.refs[0]))
        rig.guest.write(f"{device.frontend}/event-channel", str(front._events.bind_unbound(0)))
        rig.guest.write(f"{device.frontend}/state", state)
        for _ in range(turns):
            rig.turn(0.05)
    rig.turns(150)
    assert_comes_back(rig, device, image)
    rig.stop()


def test_r6_a_frontend_that_flaps_is_slowed_down(rig: Rig, device: DeviceId) -> None:
    front = rig.frontend(device, connect=False)
    shared = front._allocator.share(0, 1)
    port = front._events.bind_unbound(0)
    for name, value in (("ring-ref", shared.refs[0]), ("event-channel", port)):
        rig.guest.write(f"{device.frontend}/{name}", str(value))
    before = rig.grants.maps
    assert rig.server is not None
    for _ in range(10_000):  # ten seconds of a thousand flips each
        rig.guest.write(f"{device.frontend}/state", "4")
        rig.clock.now += 0.0005
        rig.server.step(0)
        rig.guest.write(f"{device.frontend}/state", "1")
        rig.clock.now += 0.0005
        rig.server.step(0)
    assert rig.grants.maps - before < 20
