"""Our net backend in its process's frame and our net frontend, on the machine in memory.

HF 1, 2, 4 to 9 as far as they are about vifs, 23 to 31, 33; R2, R5, R6, R8, R9. The host's end is a tap
device whose other side is a socket, or the stream that passt speaks.
"""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from xtool.abi import io
from xtool.abi.grant import GNTCOPY_source_gref
from xtool.abi.linux import GntdevGrantCopySegment
from xtool.abi.tun import VIRTIO_NET_HDR_F_NEEDS_CSUM
from xtool.backends import net, netqueue, vnethdr
from xtool.backends.frame import BackendContext
from xtool.backends.link import Link, LinkGoneError, LinkSource
from xtool.backends.loop import Loop
from xtool.backends.net import NetBackend
from xtool.backends.nettx import Counters
from xtool.backends.passt import StreamLink
from xtool.backends.server import Server
from xtool.backends.tap import HEAD, Tap
from xtool.errors import HostError, RingError
from xtool.fake.machine import FakeMachine
from xtool.fake.store import FakeStoreDaemon
from xtool.frontends.net import Frame, NetPort
from xtool.frontends.netnodes import NetDevice
from xtool.grant.copy import SEGMENT_SIZE
from xtool.proto.netfeatures import NetOffer
from xtool.proto.netif import EXTRA, TX_REQUEST, TX_RESPONSE, TX_SLOT_SIZE, Gso
from xtool.proto.shm import store32
from xtool.xenstore.client import StoreClient

GUEST = 7
FRONT = f"/local/domain/{GUEST}/device/vif/0"
BACK = f"/local/domain/0/backend/xtool-vif/{GUEST}/0"
MAC = bytes.fromhex("00163e000001")
OTHER = bytes.fromhex("00163e0000ff")
NEAR_WRAP = 0xFFFF_FFF0


class PairTap(Tap):
    """A tap device without a kernel: a socket that keeps frames apart."""

    def __init__(self, sock: socket.socket) -> None:
        self.name = "vif7.0"
        sock.setblocking(False)
        self._fd = sock.detach()
        self.deleted = False
        self.offload_flags: tuple[bool, bool, bool] | None = None

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        self.offload_flags = (csum, tso4, tso6)

    def receive(self, room: memoryview) -> int:
        if self.deleted:
            raise LinkGoneError("the interface vif7.0 is gone")
        return super().receive(room)

    def send(self, frames: object) -> int:
        if self.deleted:
            raise LinkGoneError("the interface vif7.0 is gone")
        return super().send(frames)  # type: ignore[arg-type]


class Host(LinkSource):
    """The other side: ``sent`` gives what the guest sent, ``give`` sends to it."""

    def __init__(self, stream: bool = False, queues: int = 1) -> None:
        self.stream, self.queues = stream, queues
        self.ends: list[socket.socket] = []
        self.links: list[Link] = []
        self.missing = False
        self.opened = 0
        self.for_good: bool | None = None
        self._left = b""

    def open(self, count: int) -> list[Link]:
        if self.missing:
            raise HostError("this host has no bridge xenbr0")
        self.opened += 1
        self._close()
        for _ in range(count):
            kind = socket.SOCK_STREAM if self.stream else socket.SOCK_SEQPACKET
            ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
            theirs.setblocking(False)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            self.ends.append(theirs)
            self.links.append(StreamLink(ours) if self.stream else PairTap(ours))
        return list(self.links)

    def accept(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        for link in self.links:
            if isinstance(link, PairTap):
                link.set_offload(csum=csum, tso4=tso4, tso6=tso6)

    def _close(self) -> None:
        for end in (*self.ends, *self.links):
            end.close()
        self.ends, self.links = [], []

    def close(self, *, for_good: bool) -> None:
        self.for_good = for_good
        self._close()

    def sent(self, queue: int = 0) -> list[tuple[bytes, bytes]]:
        """(head, frame) of all that came from the guest."""
        found = []
        while True:
            try:
                data = self.ends[queue].recv(1 << 17)
            except BlockingIOError:
                return found
            if not data:
                return found
            if not self.stream:
                found.append((data[:HEAD], data[HEAD:]))
                continue
            data = self._left + data
            while len(data) >= 4 and len(data) >= 4 + (size := int.from_bytes(data[:4], "big")):
                found.append((data[:4], data[4 : 4 + size]))
                data = data[4 + size :]
            self._left = data

    def give(self, frame: bytes, head: bytes | None = None, queue: int = 0) -> bool:
        if head is None:
            head = len(frame).to_bytes(4, "big") if self.stream else vnethdr.PLAIN
        try:
            self.ends[queue].sendall(head + frame)
        except BlockingIOError:
            return False
        return True


class World:
    """A host and a guest with one interface, and our process, which can die."""

    def __init__(self, run: Path) -> None:
        self.machine = FakeMachine()
        self.machine.add_domain(GUEST)
        self.daemon = FakeStoreDaemon()
        self.store = StoreClient(self.daemon.connect)
        self.host = Host()
        self.run = run
        self.guest_events = self.machine.events(GUEST)
        self.guest_pages = self.machine.allocator(GUEST)
        self.now = 0.0

    def clock(self) -> float:
        return time.monotonic() + self.now

    def add(self, **nodes: str) -> None:
        with self.store.batch() as batch:
            for name, value in {"backend": BACK, "backend-id": "0", "handle": "0", "state": "1"}.items():
                batch.write(f"{FRONT}/{name}", value)
            for name, value in {
                "frontend": FRONT,
                "frontend-id": str(GUEST),
                "online": "1",
                "mac": MAC.hex(":"),
                "bridge": "xenbr0",
                **nodes,
                "state": "1",
            }.items():
                batch.write(f"{BACK}/{name.replace('_', '-')}", value)

    def start(self) -> None:
        self.events, self.grants = self.machine.events(0), self.machine.grants(0)
        self.loop = Loop(self.events, clock=self.clock)
        self.own_store = StoreClient(self.daemon.connect)
        context = BackendContext(GUEST, self.own_store, self.events, self.grants, self.loop, self.run)
        make = partial(NetBackend, source=lambda device, nodes: self.host)
        self.server = Server(context, folders=["xtool-vif"], types=lambda folder: make)
        self.step(4)

    def port(self, **how: object) -> NetPort:
        device = NetDevice(FRONT, BACK)
        return NetPort(self.store, self.guest_events, self.guest_pages, device, **how)  # type: ignore[arg-type]

    def connect(self, start: int = NEAR_WRAP, **how: object) -> NetPort:
        port = self.port(start=start, **how)
        self.until(lambda: port.look() == "4" and port.pairs)
        return port

    def step(self, count: int = 1, timeout: float = 0.0) -> None:
        for _ in range(count):
            self.server.step(timeout)

    def until(self, ready: Callable[[], object], deadline: float = 5.0) -> None:
        end = time.monotonic() + deadline
        while not ready():
            assert time.monotonic() < end, f"it did not come to that: {self.reason()!r}"
            self.server.step(0.005)

    def backend(self) -> NetBackend:
        found = self.server.devices["xtool-vif", 0].backend
        assert isinstance(found, NetBackend)
        return found

    @property
    def counters(self) -> Counters:
        return self.backend().counters

    def state(self) -> str | None:
        return self.store.get(f"{BACK}/state")

    def reason(self) -> str:
        return self.store.get(f"/local/domain/0/error/backend/xtool-vif/{GUEST}/0/error") or ""

    def kill(self) -> None:
        """As kill -9 does it: nothing of ours runs any more, the kernel lets go of everything."""
        for device in self.server.devices.values():
            backend = device._backend
            if isinstance(backend, NetBackend):
                for queue in backend._queues:
                    queue.tx.release()
                    queue.rx.release()
        self.grants.close()
        self.events.close()
        self.own_store.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.add()
    world.start()
    yield world
    world.server.close()
    assert not world.grants.live, "pages are still mapped"  # R5
    world.host._close()
    world.loop.close()


def ip4(size: int, *, seed: int = 0, mac: bytes = MAC, protocol: int = 17) -> bytes:
    """A frame of ``size`` bytes with UDP or TCP, its checksum blank as Linux leaves it."""
    payload = random.Random(seed).randbytes(size - 34)
    head = bytearray(8 if protocol == 17 else 20)
    if protocol == 6:
        head[12] = 0x50
    body = bytes(head) + payload[len(head) :]
    ip = b"\x45\0" + (size - 14).to_bytes(2, "big") + b"\0\1\0\0\x40" + bytes([protocol]) + b"\0\0"
    return OTHER + mac + b"\x08\0" + ip + bytes([10, 0, 0, 2, 10, 0, 0, 1]) + body


def plain(size: int, seed: int = 0, mac: bytes = MAC) -> bytes:
    return OTHER + mac + b"\x88\xb5" + random.Random(seed).randbytes(size - 14)


def digest(frames: list[bytes]) -> str:
    return sha256(b"".join(frames)).hexdigest()


def drive(world: World, port: NetPort, frames: list[bytes], **how: object) -> list[tuple[bytes, bytes]]:
    """Send them all; what arrived."""
    got: list[tuple[bytes, bytes]] = []
    for frame in frames:
        while not port.try_send(frame, **how):  # type: ignore[arg-type]
            port.kick()
            world.step()
            port.poll()
            got += world.host.sent()
    port.kick()
    until = time.monotonic() + 3
    while len(got) < len(frames) and time.monotonic() < until:
        world.step(timeout=0.002)
        port.poll()
        got += world.host.sent()
    return got


@pytest.mark.parametrize("chunk", [4096, 97])
def test_random_frames_from_the_guest(world: World, chunk: int) -> None:
    """Sizes at random, several slots to a frame, over the wrap of the indexes: all arrive, in order,
    whole."""
    port = world.connect()
    sizes = random.Random(1)
    frames = [plain(sizes.randint(14, 60_000 if chunk == 4096 else 1600), n) for n in range(300)]
    got = drive(world, port, frames, chunk=chunk)
    assert digest([frame for _, frame in got]) == digest(frames)
    assert port.tx_errors == 0 and world.counters.tx_frames == 300
    world.until(lambda: port.poll() == 0 and not port.pairs[0].tx_slots)
    port.close(0)
    world.until(lambda: world.state() == "6")
    assert not world.grants.live


def test_random_frames_to_the_guest(world: World) -> None:
    port = world.connect()
    sizes = random.Random(2)
    frames = [plain(sizes.randint(14, 60_000), n, OTHER) for n in range(300)]
    waiting, got = list(frames), []
    while len(got) < len(frames):
        while waiting and world.host.give(waiting[0]):
            waiting.pop(0)
        world.until(port.poll)
        while (frame := port.receive()) is not None:
            got.append(frame)
    assert digest([frame.data for frame in got]) == digest(frames)
    assert world.counters.rx_frames == 300 and not world.counters.rx_dropped
    port.close(0)


@pytest.mark.parametrize("size", [60, 1514, 60_000])
def test_frames_that_a_stream_read_already(tmp_path: Path, size: int) -> None:
    """More than one budget, and than the guest has room for, read from the socket at once; then silence."""
    world = World(tmp_path)
    world.host = Host(stream=True)
    world.add()
    world.start()
    port = world.connect()
    count = min(500, 3_000_000 // size)
    frames = [plain(size, n, OTHER) for n in range(count)]
    assert all(world.host.give(frame) for frame in frames)
    got: list[bytes] = []
    while len(got) < count:
        world.until(port.poll)
        while (frame := port.receive()) is not None:
            got.append(frame.data)
    assert digest(got) == digest(frames)
    port.close(0)
    world.server.close()
    world.host._close()
    world.loop.close()


def test_gso_and_checksums_both_ways(world: World) -> None:
    port = world.connect()
    tcp = ip4(40_000, protocol=6)
    ((head, data),) = drive(world, port, [tcp], csum_blank=True, gso=Gso(1, 1448))
    flags, kind, header, mss, start, offset = vnethdr.HEADER.unpack(head)
    assert (flags, kind, mss, start, offset) == (VIRTIO_NET_HDR_F_NEEDS_CSUM, 1, 1448, 34, 16)
    assert header == 54 and data == tcp
    link = world.host.links[0]
    assert isinstance(link, PairTap) and link.offload_flags == (True, True, True)
    world.host.give(tcp, head)
    world.until(port.poll)
    assert port.receive() == Frame(tcp, True, True, Gso(1, 1448))
    port.close(0)


def test_whole_pages_are_copied_to_and_from_whole_pages(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy over two pages of ours would be two to Xen."""
    port, seen, copy_block = world.connect(), [], world.grants.copy_block

    def look(address: int, count: int) -> None:
        for number in range(count):
            segment = GntdevGrantCopySegment.from_address(address + number * SEGMENT_SIZE)
            ours = segment.dest if segment.flags & GNTCOPY_source_gref else segment.source
            seen.append((ours % 4096, segment.len))
        copy_block(address, count)

    monkeypatch.setattr(world.grants, "copy_block", look)
    tcp, pair = ip4(66 + 3 * 4096 + 100, protocol=6), port.pairs[0]
    slots = [tcp[:66], *(tcp[at : at + 4096] for at in range(66, len(tcp), 4096))]
    for size in (60, 1514, 4096):
        drive(world, port, [plain(size)])
    refs = [ref(port, data, page) for page, data in enumerate(slots)]
    more, first = io.NETTXF_more_data, io.NETTXF_csum_blank
    raw_tx(
        world,
        port,
        TX_REQUEST.pack(refs[0], 0, first | more, 0, len(tcp)),
        *(TX_REQUEST.pack(refs[n], 0, more if n < 4 else 0, n, len(slots[n])) for n in range(1, 5)),
    )
    assert [frame for _, frame in world.host.sent()] == [tcp]
    pair.tx_slots |= set(range(5))
    for size in (60, 1514, 4096, 9000):
        world.host.give(plain(size, 1, OTHER))
    world.until(lambda: world.counters.rx_frames == 4)
    assert len(seen) == 3 + 5 + 3 + 3 and all(at + length <= 4096 for at, length in seen)
    port.close(0)


def test_a_page_that_cannot_be_written_costs_its_frame_alone(world: World) -> None:
    """Among frames of one slot and of several, in one batch."""
    port = world.connect()
    frames = [plain(size, size, OTHER) for size in (60, 9000, 1514, 5000, 100)]
    slots = sorted(port.pairs[0].rx_slots, key=lambda slot: (slot - NEAR_WRAP) % 256)
    refs = [port.pairs[0].rx_pages.refs[port.pairs[0].rx_slots[slot]] for slot in slots]
    for bad in (3, 6):  # the third page of the second frame, the second of the fourth
        world.machine.refused[GUEST, refs[bad]] = -1
    for frame in frames:
        world.host.give(frame)
    world.until(lambda: world.counters.rx_frames + world.counters.rx_failed == 5)
    got = []
    port.poll()
    while (found := port.receive()) is not None:
        got.append(found.data)
    assert got == [frames[0], frames[2], frames[4]] and port.rx_errors == 2
    assert (world.counters.rx_frames, world.counters.rx_failed) == (3, 2)
    assert world.counters.rx_bytes == 60 + 1514 + 100
    world.machine.refused.clear()
    port.close(0)


def test_a_stream_gets_whole_checksums(tmp_path: Path) -> None:
    """passt takes what wants to be cut as it is, with its checksum complete."""
    world = World(tmp_path)
    world.host = Host(stream=True)
    world.add()
    world.start()
    port = world.connect()
    frames = [ip4(60_000, protocol=6)] * 30
    got = drive(world, port, frames, csum_blank=True, gso=Gso(1, 1448))
    assert len(got) == 30
    for _, frame in got:
        assert vnethdr.checksum(frame[34:]) in (0, 0xFFFF) and frame[:34] == frames[0][:34]
    world.host.give(plain(1000, 5, OTHER))
    world.until(port.poll)
    assert port.receive() == Frame(plain(1000, 5, OTHER))
    world.server.close()


def test_two_queues(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host = Host(queues=4)
    world.add()
    world.start()
    port = world.connect(wants=NetOffer(max_queues=2), pages=32)
    assert len(world.backend()._queues) == 2 == len(world.host.ends)
    for queue in (0, 1):
        assert port.try_send(plain(500, queue), queue=queue)
        port.kick(queue)
        world.step(3)
        assert [frame for _, frame in world.host.sent(queue)] == [plain(500, queue)]
        world.host.give(plain(900, queue, OTHER), queue=queue)
        world.until(port.poll)
        assert port.receive() == Frame(plain(900, queue, OTHER))
    world.server.close()


# --- HF: lying frontends --------------------------------------------------------------------------------
def raw_tx(world: World, port: NetPort, *slots: bytes) -> None:
    pair = port.pairs[0]
    for slot in slots:
        pair.tx.push(slot)
    pair.tx.publish()
    world.guest_events.notify(pair.tx_port)
    world.step(4)


def ref(port: NetPort, data: bytes = b"", page: int = 0) -> int:
    pages = port.pairs[0].tx_pages
    pages.view[page * 4096 : page * 4096 + len(data)] = data
    return pages.refs[page]


def test_hf23_24_25_frames_that_make_no_sense(world: World) -> None:
    """Each is dropped with an error; the next good frame goes (R9)."""
    port = world.connect()
    good = plain(60)
    more, extra, blank = io.NETTXF_more_data, io.NETTXF_extra_info, io.NETTXF_csum_blank
    gref = ref(port, good)

    def gso(kind: int, mss: int) -> bytes:
        return EXTRA.pack(1, 0, mss, kind, 0)

    cases = [
        *([TX_REQUEST.pack(gref, 0, 0, 1, size)] for size in (0, 1, 13, 65535)),
        [TX_REQUEST.pack(gref, 4090, 0, 1, 60)],
        [TX_REQUEST.pack(gref, 0, more, 1, 60), TX_REQUEST.pack(gref, 0, 0, 2, 100)],
        [TX_REQUEST.pack(gref, 0, more, 1, 60), TX_REQUEST.pack(gref, 0, 0, 2, 0)],
        [TX_REQUEST.pack(gref, 0, more if n < 18 else 0, n, 19 if n == 0 else 1) for n in range(19)],
        [TX_REQUEST.pack(gref, 0, extra | blank, 1, 60), gso(9, 1448)],
        [TX_REQUEST.pack(gref, 0, extra | blank, 1, 60), gso(1, 0)],
        [TX_REQUEST.pack(gref, 0, extra, 1, 60), gso(1, 1448)],
        [TX_REQUEST.pack(gref, 0, extra | blank, 1, 60), gso(1, 1448)],  # no TCP in it
        [TX_REQUEST.pack(gref, 0, blank, 1, 60)],  # nor UDP
        [TX_REQUEST.pack(0xDEAD, 0, 0, 1, 60)],  # HF 11: no such grant
    ]
    for slots in cases:
        raw_tx(world, port, *slots)
        assert world.host.sent() == [] and world.state() == "4"
        statuses = Counter(int.from_bytes(raw[2:4], "little", signed=True) for raw in _responses(port))
        assert set(statuses) <= {-1, 1} and sum(statuses.values()) == len(slots)
    raw_tx(world, port, TX_REQUEST.pack(gref, 0, 0, 7, 60))
    assert world.host.sent() == [(vnethdr.PLAIN, good)]
    assert world.counters.tx_invalid == len(cases)


def _responses(port: NetPort) -> list[bytes]:
    return port.pairs[0].tx.take_responses()


@pytest.mark.parametrize("kind", ["data", "extra"])
def test_hf24_a_chain_without_an_end(world: World, kind: str) -> None:
    port = world.connect()
    gref = ref(port, plain(60))
    data = [TX_REQUEST.pack(gref, 0, io.NETTXF_more_data, n, 1) for n in range(40)]
    loop = [TX_REQUEST.pack(gref, 0, io.NETTXF_extra_info, 0, 60), *[EXTRA.pack(2, 1, 0, 0, 0)] * 40]
    raw_tx(world, port, *(data if kind == "data" else loop))
    assert world.state() == "5" and "in one frame" in world.reason()
    assert not world.grants.live


def test_hf1_2_4_indexes(world: World) -> None:
    for value in (257, 0x8000_0000, -1):
        port = world.connect()
        pair = port.pairs[0]
        store32(pair.rings.view, 0, NEAR_WRAP + value)
        world.guest_events.notify(pair.tx_port)
        world.until(lambda: world.state() == "5")
        assert "req_prod" in world.reason() and not world.grants.live
        port.close(0)
        world.until(lambda: world.state() == "6")
        world.store.write(f"{FRONT}/state", "1")
        world.until(lambda: world.state() == "2")


def test_hf1_2_an_index_of_the_other_ring(world: World) -> None:
    """Seen while a frame is read for the guest: the error's traceback must not keep the arena mapped."""
    port = world.connect()
    store32(port.pairs[0].rings.view, 4096, NEAR_WRAP + 0x8000_0000)
    world.host.give(plain(60, 1, OTHER))
    world.until(lambda: world.state() == "5")
    assert "req_prod" in world.reason() and not world.grants.live
    port.close(0)


def test_hf8_9_28_nodes_that_make_no_sense(world: World) -> None:
    """Refused before anything is mapped; the control ring is not even read."""
    port = world.connect()
    names = port.pairs[0].names()
    port.close(0)
    good = {"tx-ring-ref": str(names.tx_ref), "multi-queue-num-queues": "1", "ctrl-ring-ref": "x" * 2000}
    for node, value in [
        ("tx-ring-ref", "0"),
        ("tx-ring-ref", "4294967295"),
        ("tx-ring-ref", "-1"),
        ("tx-ring-ref", "7" * 2000),
        ("event-channel-tx", "70000000"),
        ("event-channel-tx", "1"),
        ("multi-queue-num-queues", "65535"),
        ("multi-queue-num-queues", "0"),
        ("request-rx-copy", "maybe"),
    ]:
        world.until(lambda: world.state() == "6")
        world.store.write(f"{FRONT}/state", "1")
        world.until(lambda: world.state() == "2")
        before = world.grants.maps
        for name, text in {**good, node: value}.items():
            world.store.write(f"{FRONT}/{name}", text)
        world.store.write(f"{FRONT}/state", "4")
        world.until(lambda: world.state() == "5")
        assert not world.grants.live and world.grants.maps - before <= 2
        world.store.write(f"{FRONT}/request-rx-copy", "1")
        world.store.write(f"{FRONT}/state", "6")


def test_hf26_a_guest_that_takes_no_frames(world: World) -> None:
    """R8: bounded in bytes and in time, with one slot where a frame needs two; then it goes on."""
    port = world.connect(pages=1)
    for n in range(200):
        world.host.give(plain(8000, n, OTHER))
    world.step(20)
    queue = world.backend()._queues[0]
    assert queue._end <= netqueue.ARENA and queue._queue and not world.counters.rx_frames
    world.now += netqueue.STALL_TIME + 1
    world.step(4)
    assert world.counters.rx_dropped >= 100 and not queue._queue
    world.host.give(plain(100, 3, OTHER))
    world.until(port.poll)
    assert port.receive() == Frame(plain(100, 3, OTHER))


def test_a_guest_without_any_slot_is_drained_for(world: World) -> None:
    port = world.connect(pages=1)
    world.host.give(plain(100, 0, OTHER))
    world.until(lambda: world.counters.rx_frames == 1)  # and it never looks
    for _ in range(5):
        world.host.give(plain(100, 1, OTHER))
        world.step(3)
        world.now += netqueue.STALL_TIME + 1
        world.step(3)
    assert world.counters.stalls == 1 and world.counters.rx_dropped == 5
    world.host.give(plain(100, 9, OTHER))
    world.step(2)
    assert port.receive() == Frame(plain(100, 0, OTHER))
    world.step(3)
    world.host.give(plain(100, 2, OTHER))
    world.until(port.poll)
    assert port.receive() == Frame(plain(100, 2, OTHER))


def test_hf27_spoofed_addresses(world: World) -> None:
    port = world.connect()
    arp = b"\xff" * 6 + MAC + b"\x08\x06" + bytes.fromhex("0001080006040001")
    tagged = b"\xff" * 6 + MAC + b"\x81\0\0\x05" + b"\x08\x06" + bytes.fromhex("0001080006040001")
    bad = [plain(60, n, n.to_bytes(6, "big")) for n in range(100)]
    bad += [arp + OTHER + bytes(30), tagged + OTHER + bytes(30), arp[:20], arp]
    good = [arp + MAC + bytes(30), tagged + MAC + bytes(30), plain(60)]
    got = drive(world, port, bad + good)
    assert [frame for _, frame in got] == good
    assert world.counters.tx_refused == len(bad) and world.state() == "4"


def test_mac_filter_can_be_turned_off(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add(mac_filter="0")
    world.start()
    assert len(drive(world, world.connect(), [plain(60, 1, OTHER)])) == 1
    world.server.close()


def test_hf29_31_33_nodes_that_change_all_the_time(world: World) -> None:
    """States at random, ``backend`` pointing elsewhere: the machine is total, and in the end it connects."""
    dice = random.Random(5)
    for _ in range(300):
        word = dice.choice(["1", "2", "3", "4", "5", "6", "", "99", "x" * 4000])
        world.store.write(f"{FRONT}/state", word[:2000])
        world.store.write(f"{FRONT}/backend", dice.choice([BACK, "/local/domain/0", "/"]))
        world.step()
    world.now += 60
    world.store.write(f"{FRONT}/state", "6")
    world.until(lambda: world.state() in ("6", "2"))
    assert not world.grants.live
    world.store.write(f"{FRONT}/state", "1")
    world.until(lambda: world.state() == "2")
    assert len(drive(world, world.connect(), [plain(60)])) == 1


def test_hf30_the_frontend_goes_away(world: World) -> None:
    world.connect()
    world.store.rm(FRONT)
    world.until(lambda: world.state() == "6")
    assert not world.grants.live
    world.store.rm(BACK)
    world.until(lambda: not world.server.devices)
    assert world.host.for_good is True


def test_hf6_notifications_without_requests(world: World) -> None:
    port = world.connect()
    for _ in range(100):
        world.guest_events.notify(port.pairs[0].tx_port)
        world.step()
    assert world.loop.dispatcher.timeout() is not None  # it waits for its turn
    assert len(drive(world, port, [plain(60)])) == 1


# --- limits, faults, kills ------------------------------------------------------------------------------
def test_a_rate_delays_and_drops_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add(rate="10000,50000", rate_in="10000,50000")
    world.start()
    port = world.connect()
    frames = [plain(1000, n) for n in range(50)]
    for frame in frames:
        assert port.try_send(frame)
        world.host.give(frame)
    port.kick()
    sent: list[bytes] = []
    got, since = 0, world.clock()
    for _ in range(200):
        world.now += 0.005
        world.step(2)
        sent += [frame for _, frame in world.host.sent()]
        port.poll()
        while port.receive() is not None:
            got += 1
        bound = 11 + ((world.clock() - since) / 0.005 + 2) * 1.1
        assert len(sent) <= bound and got <= bound
    assert sent == frames and got == 50
    world.server.close()


def test_rates_change_while_frames_wait(tmp_path: Path) -> None:
    """A rate at which a frame takes minutes, lifted: what waits goes at once. And one that comes later."""
    world = World(tmp_path)
    world.add(rate="10,1000000", rate_in="10,1000000")
    world.start()
    port = world.connect()
    frames = [plain(1000, n) for n in range(20)]
    for frame in frames:
        assert port.try_send(frame)
        world.host.give(frame)
    port.kick()
    world.step(5)
    assert len(world.host.sent()) == 1
    for text in ("nonsense", "100000000,50000"):
        world.store.write(f"{BACK}/rate", text)
        world.store.rm(f"{BACK}/rate-in")
        world.now += 1.0
        world.step(5)
    sent: list[bytes] = []
    got = 0

    def all_there() -> bool:
        nonlocal got
        sent.extend(frame for _, frame in world.host.sent())
        port.poll()
        while port.receive() is not None:
            got += 1
        return len(sent) == 19 and got == 20

    world.until(all_there)
    assert sent == frames[1:]
    [told] = list(world.server.answer("describe"))
    assert told["rate"] == 2_000_000_000 and told["rate_in"] == 0 and told["state"] == "connected"
    world.store.write(f"{BACK}/rate", "10,1000000")
    world.until(lambda: next(iter(world.server.answer("describe")))["rate"] == 10)
    for frame in frames[:5]:
        assert port.try_send(frame)
    port.kick()
    world.step(5)
    assert len(world.host.sent()) == 1
    world.server.close()


def test_a_tap_that_is_deleted_is_made_again(world: World) -> None:
    port = world.connect()
    link = world.host.links[0]
    assert isinstance(link, PairTap)
    link.deleted = True
    assert port.try_send(plain(60))
    port.kick()
    world.until(lambda: world.host.opened == 2)
    world.step(3)
    assert [frame for _, frame in drive(world, port, [plain(70)])] == [plain(70)]
    world.host.give(plain(99, 1, OTHER))
    world.until(port.poll)
    assert world.state() == "4" and world.counters.tx_lost == 1


def test_a_bridge_that_is_missing_closes_the_device_in_the_end(world: World) -> None:
    port = world.connect()
    link = world.host.links[0]
    assert isinstance(link, PairTap)
    link.deleted, world.host.missing = True, True
    port.try_send(plain(60))
    port.kick()
    for _ in range(40):
        world.now += 1
        world.step(2)
    assert world.state() == "5" and "no bridge xenbr0" in world.reason()
    assert not world.grants.live


def test_a_link_that_takes_nothing_delays_the_guest_and_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host = Host(stream=True)
    world.add()
    world.start()
    port = world.connect()
    sent = 0
    for n in range(400):
        if not port.try_send(plain(60_000, n)):
            break
        port.kick()
        world.step(2)
        port.poll()
        sent += 1
    assert sent < 400 and world.host.links[0].blocked
    got = len(world.host.sent())
    world.until(lambda: not world.host.links[0].blocked)
    world.step(4)
    assert port.try_send(plain(60)) is True and got > 0
    world.server.close()


def test_kill_and_resume(world: World) -> None:
    """Killed with frames in flight: the guest's rings go on, every frame comes once or was lost with the
    process; none comes damaged, and no response names a request that was not made."""
    port = world.connect()
    host, dice = world.host, random.Random(3)
    frames = {sha256(f).digest(): f for f in (plain(dice.randint(60, 9000), n) for n in range(300))}
    arrived: Counter[bytes] = Counter()
    answered = 0
    for number, frame in enumerate(frames.values()):
        while not port.try_send(frame):
            world.step()
            port.poll()
        if dice.random() < 0.6:
            port.kick()
        if dice.random() < 0.5:
            world.step()
        world.host.give(frame)
        for _, got in world.host.sent():
            arrived[sha256(got).digest()] += 1
        if number % 29 == 28:
            world.kill()
            world.host = Host()
            world.start()
            assert world.state() == "4"
        port.poll()
        while (back := port.receive()) is not None:
            assert sha256(back.data).digest() in frames
            answered += 1
    port.kick()
    world.step(6)
    for _, got in world.host.sent():
        arrived[sha256(got).digest()] += 1
    port.poll()
    assert set(arrived) <= set(frames) and max(arrived.values()) == 1
    assert len(arrived) > 200 and answered > 100 and not port.pairs[0].tx_slots
    assert host.for_good is None, "a process that was killed does not tidy up"


def test_stopped_and_started_for_an_upgrade(world: World) -> None:
    port = world.connect()
    drive(world, port, [plain(60)])
    host = world.host
    world.server.close()
    assert host.for_good is False and world.state() == "4" and not world.grants.live
    assert port.try_send(plain(61))
    port.kick()
    world.events.close()
    world.host = Host()
    world.start()
    world.until(lambda: world.counters.tx_frames)
    assert [frame for _, frame in world.host.sent()] == [plain(61)]


def test_what_is_told_of_it(world: World) -> None:
    port = world.connect()
    drive(world, port, [plain(100)])
    (told,) = list(world.server.answer("describe"))
    assert told["counters"]["tx_bytes"] == 100 and told["queues"][0]["tx"]["in_flight"] == 0
    assert told["mac_filter"] is True and net.REMAKE_AFTER[0] == 0.0


def test_our_frontend_takes_answers_in_any_order(world: World) -> None:
    """As netback gives them, which keeps the pages of large frames until they were sent on."""
    port = world.connect()
    pair = port.pairs[0]
    view, first = pair.rings.view, pair.tx.rsp_cons
    assert all(port.try_send(plain(size)) for size in (60, 100, 70))
    pair.tx.publish()
    for number, page in enumerate(sorted(pair.tx_slots)):  # the last comes first
        slot = 64 + (first + number) % pair.tx.size * TX_SLOT_SIZE
        view[slot : slot + TX_RESPONSE.size] = TX_RESPONSE.pack(page, 0)
    store32(view, 8, first + 3 & 0xFFFF_FFFF)
    port.poll()
    assert not pair.tx_slots and port.tx_errors == 0
    store32(view, 8, first + 4 & 0xFFFF_FFFF)
    with pytest.raises(RingError):
        port.poll()
