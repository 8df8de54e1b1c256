"""Whatever a peer writes, for as long as anybody cares to try: an exception other than "the peer is wrong"
never comes out, a broken device is closed with a reason, and the process goes on.

``XTOOL_FUZZ=30`` tries for 30 minutes, each test its share (CONTRIBUTING.md). Those of
rings, blkif, netif, console ring, xenstore packets and virtio-net headers alone are in ``tests/pure``.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splitdrivers import GUEST, XVDA, Rig
from test_console_backend import GUEST as CONSOLE_GUEST
from test_console_backend import World as Console
from test_net_backend import FRONT, World

from xtool.abi import io
from xtool.backends.consolelog import DATA, Record
from xtool.backends.control import ControlSocket
from xtool.backends.viewers import Viewers
from xtool.devices.vbd import Vbd
from xtool.errors import BackendError, FrontendError, RemoteProtocolError, XtoolError
from xtool.fake.store import FakeStoreDaemon
from xtool.frontends.nbd import _Client
from xtool.proto import blkfeatures, nbd, netfeatures
from xtool.proto.blkif import X86_32, X86_64, build_indirect
from xtool.proto.consolering import INDEXES_AT
from xtool.proto.netif import EXTRA, TX_REQUEST
from xtool.proto.ring import HEADER_SIZE, BackRing
from xtool.proto.ringjournal import ResponseJournal
from xtool.toolstack import journal
from xtool.xenstore.client import StoreClient

MINUTES = float(os.environ.get("XTOOL_FUZZ") or 0)
#: How many tests share the time.
TESTS = 11
SIZE = 64 << 10
_UUID = "11111111-2222-3333-4444-555555555555"
U16, U32, U64 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFF_FFFF), st.integers(0, (1 << 64) - 1)


def fuzz(count: int) -> Callable[[Any], Any]:
    """``count`` examples, or rounds of so many as long as the time allows."""

    def decorate(test: Any) -> Any:
        rounds = settings(
            max_examples=count,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None if MINUTES else settings.default.database,
        )(test)
        if not MINUTES:
            return rounds

        @wraps(test)
        def for_long() -> None:
            end = time.monotonic() + 60 * MINUTES / TESTS
            while time.monotonic() < end:
                rounds()

        del for_long.__wrapped__  # type: ignore[attr-defined]
        return for_long

    return decorate


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


#: Text for a node: numbers that are nearly right, and anything.
TEXT = st.one_of(
    st.integers(-2, 40).map(str),
    U64.map(str),
    st.sampled_from(["", " 1", "0x1", "1\n", "x86_32-abi", "x86_64-abi", "\x1b[2J", "٣"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40),
)


# --- rings, through the whole backend process
def _slot(refs: list[int]) -> st.SearchStrategy[bytes]:
    """A block request that is right in most places."""
    ref = st.sampled_from([*refs, 0, 4000])
    small = st.integers(0, 9)
    sector = st.integers(0, SIZE // 512 + 8) | U64
    segment = st.builds(lambda r, a, b: r.to_bytes(4, "little") + bytes([a, b, 0, 0]), ref, small, small)
    direct = st.builds(
        lambda op, count, at, segments: (
            bytes([op, count, 0, 0]) + bytes(4) + bytes(8) + at.to_bytes(8, "little") + b"".join(segments)
        ),
        st.integers(0, 6),
        st.integers(0, 12),
        sector,
        st.lists(segment, max_size=11),
    )
    indirect = st.builds(
        lambda op, at, count, pages: build_indirect(op, 1, at, count, pages),
        st.sampled_from([io.BLKIF_OP_READ, io.BLKIF_OP_WRITE, io.BLKIF_OP_INDIRECT, 9]),
        sector,
        st.integers(0, 20) | U16,
        st.lists(ref, min_size=1, max_size=8),
    )
    whole = direct.map(lambda raw: raw.ljust(112, b"\0")[:112])
    return whole | indirect.map(lambda raw: raw.ljust(112, b"\0")) | st.binary(min_size=112, max_size=112)


@fuzz(60)
@given(st.data())
def test_a_block_ring(data: st.DataObject) -> None:
    """Requests, indirect pages, the words of the ring and the nodes, in any order; a second disk is well."""
    with folder() as run:
        (run / "run").mkdir()
        image = run / "disk.img"
        image.write_bytes(bytes(range(256)) * (SIZE // 256))
        rig = Rig(run / "run")
        device = rig.add_disk(Vbd("xvda", XVDA, str(image), kind="xtool"))
        spare = run / "spare.img"
        spare.write_bytes(b"spare!!!" * 64)
        other = rig.frontend(rig.add_disk(Vbd("xvdb", XVDA + 16, str(spare), kind="xtool")))
        front = rig.frontend(device, layout=data.draw(st.sampled_from([X86_64, X86_32])))
        queue = front._queues[0]
        view = queue.shared.view
        slot = _slot(front._pool.refs[:8])
        for _ in range(data.draw(st.integers(1, 6))):
            step = data.draw(st.sampled_from(["push", "push", "push", "poke", "pages", "node", "revoke"]))
            if step == "push":
                for raw in data.draw(st.lists(slot, min_size=1, max_size=8)):
                    if queue.ring.free() > 0:
                        queue.ring.push(raw[: queue.ring.slot_size])
                queue.ring.publish()
            elif step == "poke":
                at = data.draw(st.integers(0, len(view) - 4))
                view[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
            elif step == "pages":
                pages = list(range(8))
                front._pool.fill(pages, memoryview(data.draw(st.binary(max_size=200)) * 8))
            elif step == "node":
                names = ["state", "ring-ref", "event-channel", "protocol", "feature-persistent", "queue-0/x"]
                rig.guest.write(f"{device.frontend}/{data.draw(st.sampled_from(names))}", data.draw(TEXT))
            else:
                rig.machine.revoke(GUEST, front._pool.refs[data.draw(st.integers(0, 7))])
            front._events.notify(queue.port)
            rig.turns(2)
            front.events_came()
        assert image.stat().st_size == SIZE
        assert other.pread(512, 0) == spare.read_bytes()
        assert rig.state(device) in ("2", "4", "5", "6")
        if rig.state(device) == "5":
            assert (
                rig.toolstack.get(f"{device.error}/error") or rig.guest.get(f"{device.frontend}/state") == "5"
            )
        for told in rig.describe():
            json.dumps(told)
        rig.end()


@fuzz(60)
@given(st.data())
def test_a_pair_of_net_rings(data: st.DataObject) -> None:
    """Slots, extras, the words of both rings, frames from the link; afterwards a good frontend is served."""
    with folder() as run:
        world = World(run)
        world.add(mac_filter=data.draw(st.sampled_from(["0", "1"])))
        world.start()
        port = world.connect(pages=8)
        pair = port.pairs[0]
        view = pair.rings.view
        ref = st.sampled_from([*pair.tx_pages.refs[:4], 0, 4000])
        small = st.sampled_from([0, 1, 13, 14, 60, 1500, 4000, 4096, 65535])
        request = st.builds(TX_REQUEST.pack, ref, small, st.integers(0, 15), U16, small)
        extra = st.builds(EXTRA.pack, st.integers(0, 6), st.integers(0, 1), U16, st.integers(0, 3), U16)
        slots = st.lists(request | extra | st.binary(min_size=12, max_size=12), min_size=1, max_size=12)
        for _ in range(data.draw(st.integers(1, 6))):
            step = data.draw(st.sampled_from(["tx", "tx", "tx", "page", "poke", "rx", "link"]))
            if step == "tx":
                for raw in data.draw(slots):
                    if pair.tx.free() > 0:
                        pair.tx.push(raw)
                pair.tx.publish()
            elif step == "page":
                part = data.draw(st.binary(max_size=100))
                pair.tx_pages.view[: len(part)] = part
            elif step == "poke":
                at = data.draw(st.integers(0, len(view) - 4))
                view[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
            elif step == "rx":
                if pair.rx.free() > 0:
                    pair.rx.push(data.draw(st.binary(min_size=8, max_size=8)))
                pair.rx.publish()
            elif world.host.ends:
                world.host.give(data.draw(st.binary(min_size=14, max_size=9000)))
            for number in (pair.tx_port, pair.rx_port):
                world.guest_events.notify(number)
            world.step(3)
            world.host.sent()
        assert world.state() in ("4", "5")
        assert (world.state() == "5") == bool(world.reason())
        json.dumps(list(world.server.answer("describe")))
        world.store.write(f"{FRONT}/state", "6")
        world.until(lambda: world.state() == "6")
        assert not world.grants.live
        world.server.close()
        world.host._close()
        world.loop.close()
        for closing in (world.events, world.guest_events, world.own_store, world.store):
            closing.close()


@fuzz(100)
@given(
    st.dictionaries(
        st.sampled_from(
            blk_nodes := [
                "state",
                "ring-ref",
                "ring-ref0",
                "ring-ref1",
                "ring-page-order",
                "event-channel",
                "protocol",
                "multi-queue-num-queues",
                "queue-0/ring-ref",
                "queue-0/event-channel",
                "queue-1/ring-ref",
                "queue-1/event-channel",
                "feature-persistent",
                "queue-x",
                "queue-0/queue-0/ring-ref",
            ]
        ),
        TEXT,
        max_size=12,
    ),
    st.lists(TEXT, max_size=6),
)
def test_nodes_of_a_disk(nodes: dict[str, str], states: list[str]) -> None:
    """Any nodes with any states: refused or connected, and the machine is total."""
    with folder() as run:
        (run / "run").mkdir()
        image = run / "disk.img"
        image.write_bytes(bytes(SIZE))
        rig = Rig(run / "run")
        device = rig.add_disk(Vbd("xvda", XVDA, str(image), kind="xtool"))
        for state in [*states, "3"]:
            for name, value in {**nodes, "state": state}.items():
                rig.guest.write(f"{device.frontend}/{name}", value)
            rig.turns(3)
        assert rig.state(device) in ("2", "4", "5", "6")
        if rig.state(device) == "5" and "5" not in states:
            assert rig.toolstack.get(f"{device.error}/error")
        rig.end()


# --- what is negotiated
_MORE = """
tx-ring-ref rx-ring-ref event-channel-tx event-channel-rx request-rx-copy feature-rx-notify feature-rx-copy
feature-sg feature-gso-tcpv4 feature-no-csum-offload mac sectors info sector-size physical-sector-size
feature-discard discard-granularity max-ring-page-order multi-queue-max-queues feature-max-indirect-segments
"""
_NAMES = st.sampled_from([*blk_nodes, *_MORE.split()])


@fuzz(200)
@given(st.dictionaries(_NAMES, TEXT))
def test_features(nodes: dict[str, str]) -> None:
    offers: list[tuple[Callable[[], object], type[XtoolError]]] = [
        (lambda: blkfeatures.parse_frontend(nodes, blkfeatures.BlockOffer(8, max_queues=4)), FrontendError),
        (lambda: netfeatures.parse_frontend(nodes, netfeatures.NetOffer(max_queues=4)), FrontendError),
        (lambda: blkfeatures.parse_backend(nodes), BackendError),
        (lambda: blkfeatures.transport_limits(nodes), BackendError),
        (lambda: netfeatures.parse_backend(nodes), BackendError),
    ]
    for parse, wrong in offers:
        try:
            parse()
        except wrong as error:
            assert len(error.message) < 500


# --- streams
class _Disk:
    """A disk without a backend: bounds are the NBD server's business."""

    offer = blkfeatures.BlockOffer(SIZE // 512, discard_granularity=512)
    size = SIZE

    def submit(self, operation: int, offset: int, data: memoryview, done: Callable[[Any], None]) -> None:
        assert 0 <= offset <= offset + len(data) <= SIZE and not offset % 512 and not len(data) % 512
        done(None)

    def submit_flush(self, done: Callable[[Any], None]) -> None:
        done(None)

    def submit_discard(self, offset: int, length: int, done: Callable[[Any], None]) -> None:
        assert 0 <= offset <= offset + length <= SIZE
        done(None)


_PIECES = st.one_of(
    st.binary(max_size=40),
    st.just(b"\0\0\0\x03"),
    st.builds(
        lambda kind, length, body: nbd.OPTION.pack(nbd.OPTION_MAGIC, kind, length) + body,
        st.integers(0, 8),
        st.integers(0, 20) | U32,
        st.binary(max_size=20),
    ),
    st.builds(
        lambda flags, command, offset, length: nbd.REQUEST.pack(
            nbd.REQUEST_MAGIC, flags, command, 1, offset, length
        ),
        U16,
        st.integers(0, 7),
        st.integers(0, SIZE + 512) | U64,
        st.integers(0, 8).map(lambda n: 512 * n) | U32,
    ),
)


@fuzz(200)
@given(st.booleans(), st.lists(_PIECES, max_size=12))
def test_an_nbd_client(greets: bool, pieces: list[bytes]) -> None:
    go = b"\0\0\0\x03" + nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.OPT_GO, 0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        client = _Client(_Disk(), ours)  # type: ignore[arg-type]
        for piece in [go, *pieces] if greets else pieces:
            if piece:
                theirs.send(piece)
                if not client.work(1):  # POLLIN
                    break
            client.flush()
            try:
                theirs.recv(1 << 20)
            except BlockingIOError:
                pass
            assert len(client._input) <= 1 << 18 or client._want > 1 << 18
        client.close()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.just("describe"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("do") | st.text(max_size=5), inner),
    max_leaves=6,
)
_LINES = (
    st.binary(max_size=200)
    | _JSON.map(lambda value: json.dumps(value).encode())
    | st.integers(1, 4000).map(lambda depth: b"[" * depth)
    | st.builds(
        lambda more: json.dumps({"version": journal.VERSION, "uuid": _UUID, **more}).encode(),
        st.dictionaries(st.sampled_from(["name", "domid", "keeper", "x"]), _JSON, max_size=4),
    )
)


@fuzz(300)
@given(_LINES)
def test_a_line_on_the_control_socket(line: bytes) -> None:
    control = ControlSocket.__new__(ControlSocket)
    known: dict[str, list[dict[str, Any]]] = {"describe": [{"a": 1}]}
    control._answer = lambda word: known[word]
    for answer in control.lines(line).splitlines():
        assert json.loads(answer) in ({"a": 1}, {"error": "what?"})


@fuzz(200)
@given(st.lists(st.binary(max_size=60), max_size=12), st.integers(1, 40))
def test_what_xenstored_says(pieces: list[bytes], chunk: int) -> None:
    """Answers that are nonsense, cut anywhere: the client's error, a new connection, and it works again."""
    daemon = FakeStoreDaemon()
    store = StoreClient(daemon.connect, deadline=0.05)
    store.write("/tool/a", "1")
    [link] = daemon.links
    link.chunk = chunk
    daemon.hung = True
    for piece in pieces:
        link.push(piece)
    try:
        store.get("/tool/a")
    except XtoolError:
        pass
    daemon.hung = False
    for _ in range(4):
        try:
            assert store.get("/tool/a") == "1"
            break
        except XtoolError:
            continue
    else:
        raise AssertionError("the client does not come back")
    store.close()


# --- files that outlive a process
@fuzz(300)
@given(st.binary(max_size=400), st.integers(0, 70), st.integers(0, 40), st.integers(0, 0xFFFF_FFFF))
def test_a_response_journal(raw: bytes, count: int, size: int, start: int) -> None:
    """Any bytes in it: no record, or one whose sum is right; a ring is recovered or refused."""
    journal = ResponseJournal(memoryview(bytearray(raw.ljust(64 + 32 * 16, b"\0"))))
    journal.read()
    if count and size:
        try:
            journal.record(start, [bytes(size)] * count)
        except XtoolError:
            pass
    ring = memoryview(bytearray(raw.ljust(HEADER_SIZE, b"\1").ljust(4096, b"\0")[:4096]))
    try:
        BackRing.recover(ring, 112, journal).take(32)
    except (RemoteProtocolError, XtoolError) as error:
        assert error.message


@fuzz(300)
@given(_LINES)
def test_a_domain_s_journal(raw: bytes) -> None:
    """Any bytes in the toolstack's file of a domain: an entry, or none."""
    path = journal._file(_UUID)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    found = journal.read(_UUID)
    assert found is None or found.uuid == _UUID
    assert journal.entries() == ([found] if found else [])


# --- consoles and those who look
_MOVES = ["print", "page", "word", "type", "read"]


@fuzz(40)
@given(
    st.lists(st.tuples(st.sampled_from(["print", "page", "word", "type", "read"]), st.binary(max_size=64)))
)
def test_a_console_ring(steps: list[tuple[str, bytes]]) -> None:
    """Output, input and anything at all in the shared page; a console that is closed has a reason."""
    with folder() as run:
        world = Console(run)
        view = world.console._shared.view
        for step, data in steps:
            try:
                if step == "print":
                    world.console.write(data)
                elif step == "read":
                    world.console.take()
            except RemoteProtocolError:
                pass  # what this end thinks of the page after its own vandalism
            if step == "type":
                world.backend().viewers.input += data
            elif step == "page" and data:
                view[: len(data) * 40] = data * 40
            elif step == "word" and len(data) >= 5:
                at = INDEXES_AT + 4 * (data[0] % 4)
                view[at : at + 4] = data[1:5]
            world.guest_events.notify(int(world.console.nodes["port"]))
            world.step(2, 0)
            if world.state() != "4":
                break
        reason = world.store.get(f"/local/domain/0/error/backend/xtool-console/{CONSOLE_GUEST}/0/error")
        assert world.state() == "4" or (reason and not world.grants.live)
        world.server.close()
        world.loop.close()
        assert not world.grants.live
        for closing in (world.events, world.guest_events, world.own_store, world.store):
            closing.close()


_STEPS = ["type", "show", "take", "leave", "come"]


@fuzz(60)
@given(
    st.lists(st.tuples(st.sampled_from(["type", "show", "take", "leave", "come"]), st.binary(max_size=300)))
)
def test_viewers_of_a_console(steps: list[tuple[str, bytes]]) -> None:
    with folder() as name:
        viewers = Viewers(name / "sock", list, backlog=1000)
        links: list[socket.socket] = []
        shown = 0
        for step, data in steps:
            if step == "come":
                links.append(socket.socket(socket.AF_UNIX))
                links[-1].setblocking(False)
                try:
                    links[-1].connect(str(name / "sock"))
                except BlockingIOError:
                    links.pop().close()
            elif step == "type" and links:
                try:
                    links[0].send(data or b"x")
                except OSError:
                    pass
            elif step == "leave" and links:
                links.pop(0).close()
            elif step == "take":
                viewers.taken(min(len(data), len(viewers.input)))
            elif step == "show":
                shown += len(data)
                viewers.show(Record(DATA, 0.0, shown, data))
            viewers.ready()
            assert len(viewers.input) <= 4096 and len(viewers) <= 16
        for link in links:
            link.close()
        viewers.close()


def test_the_fuzzers_share_their_time() -> None:
    here = [
        name for name in globals() if name.startswith("test_") and name != "test_the_fuzzers_share_their_time"
    ]
    assert len(here) == TESTS
