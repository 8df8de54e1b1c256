"""Block requests: what a guest may send, what it may not, and what both ends tell each other."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.abi import io
from xtool.errors import BackendError, FrontendError, LocalProtocolError
from xtool.proto import blkfeatures, blkif
from xtool.proto.blkfeatures import BlockFrontend, BlockOffer, BlockQueue
from xtool.proto.blkif import BadRequest, Discard, Flush, Indirect, Layout, Limits, Read, Request, Write

LIMITS = Limits(1000, barrier=True, discard=True, max_indirect=256)
LAYOUTS = st.sampled_from([blkif.X86_64, blkif.X86_32])
U64 = st.integers(0, 2**64 - 1)


def pad(raw: bytes, layout: Layout = blkif.X86_64) -> bytes:
    """A request in its slot; what follows it is whatever the last one left there."""
    return raw.ljust(layout.slot_size, b"\xee")


def sectors(first: int, last: int, ref: int = 9) -> blkif.Segment:
    return ref, first * 512, (last - first + 1) * 512


@st.composite
def segments(draw: st.DrawFn, most: int = 11) -> list[blkif.Segment]:
    found = []
    for _ in range(draw(st.integers(1, most))):
        first = draw(st.integers(0, 7))
        found.append(sectors(first, draw(st.integers(first, 7)), draw(st.integers(0, 2**32 - 1))))
    return found


def test_a_request_as_bytes() -> None:
    """Field by field from the header file, not by our own builder."""
    raw = bytes.fromhex(
        "01 02 0abc 00000000 8877665544332211 0500000000000000 01000000 00 07 0000 02000000 03 04 0000"
    )
    assert blkif.parse_request(pad(raw), LIMITS) == Write(
        0x1122334455667788, 5, 10, ((1, 0, 4096), (2, 1536, 1024))
    )
    raw32 = bytes.fromhex("00 01 0abc 8877665544332211 0500000000000000 01000000 07 07 0000")
    assert blkif.parse_request(pad(raw32, blkif.X86_32), LIMITS, blkif.X86_32) == Read(
        0x1122334455667788, 5, 1, ((1, 3584, 512),)
    )
    assert blkif.build_response(Write(3, 0, 0, ()), -1) == bytes.fromhex(
        "0300000000000000 01 00 ffff 00000000"
    )
    assert blkif.build_response(Read(3, 0, 0, ()), -2, blkif.X86_32) == bytes.fromhex(
        "0300000000000000 00 00 feff"
    )


@given(st.integers(0, 3), U64, segments(), LAYOUTS)
def test_both_ways(op: int, request_id: int, wanted: list[blkif.Segment], layout: Layout) -> None:
    total = sum(length for _, _, length in wanted) // 512
    raw = pad(blkif.build_transfer(op, request_id, 1000 - total, wanted, layout=layout), layout)
    found = blkif.parse_request(raw, LIMITS, layout)
    assert not isinstance(found, BadRequest | Discard | Indirect)
    assert (found.id, found.operation, found.sector, found.sectors) == (request_id, op, 1000 - total, total)
    assert list(found.segments) == wanted
    raw = pad(blkif.build_transfer(op, request_id, 1001 - total, wanted, layout=layout), layout)
    assert isinstance(blkif.parse_request(raw, LIMITS, layout), BadRequest)  # one sector past the end
    answer = blkif.build_response(found, io.BLKIF_RSP_OKAY, layout)
    assert blkif.parse_response(answer, layout) == (request_id, op, 0)


@given(st.integers(0, 1), U64, segments(600), LAYOUTS)
def test_indirect_both_ways(op: int, request_id: int, wanted: list[blkif.Segment], layout: Layout) -> None:
    limits = Limits(1 << 20, max_indirect=4096)
    refs = list(range(10, 10 + -(-len(wanted) // 512)))
    raw = pad(blkif.build_indirect(op, request_id, 7, len(wanted), refs, layout=layout), layout)
    found = blkif.parse_request(raw, limits, layout)
    assert found == Indirect(request_id, op, 7, len(wanted), tuple(refs))
    pages = blkif.build_segments(wanted).ljust(len(refs) * 4096, b"\xff")
    inner = blkif.parse_indirect(found, pages, limits)
    assert isinstance(inner, Read | Write)
    assert list(inner.segments) == wanted
    # Linux disables a device whose response names INDIRECT instead of the operation inside.
    assert blkif.parse_response(blkif.build_response(inner, 0, layout), layout).operation == op
    assert isinstance(blkif.parse_indirect(found, pages[: len(wanted) * 8 - 1], limits), BadRequest)


OK, ERROR, UNSUPPORTED = io.BLKIF_RSP_OKAY, io.BLKIF_RSP_ERROR, io.BLKIF_RSP_EOPNOTSUPP
READONLY = LIMITS._replace(readonly=True)
BARE = Limits(1000, flush=False)
PAGE = sectors(0, 7)


def raw_transfer(op: int, count: int, sector: int, *numbers: int) -> bytes:
    """A transfer our builder would refuse to make."""
    fields = (*numbers, *[0] * (33 - len(numbers)))
    return blkif.X86_64.transfers[11].pack(op, count, 0, 77, sector, *fields)


@pytest.mark.parametrize(
    ("number", "raw", "limits", "status"),
    [
        (16, raw_transfer(0, 0, 0), LIMITS, ERROR),
        (16, raw_transfer(1, 12, 0), LIMITS, ERROR),
        (16, raw_transfer(0, 255, 0), LIMITS, ERROR),
        (16, raw_transfer(0, 1, 0, 9, 5, 4), LIMITS, ERROR),
        (16, raw_transfer(1, 1, 0, 9, 0, 8), LIMITS, ERROR),
        (16, raw_transfer(1, 2, 0, 9, 0, 7, 9, 255, 255), LIMITS, ERROR),
        (16, raw_transfer(3, 2, 0, 9, 0, 7, 9, 3, 2), LIMITS, ERROR),
        (17, raw_transfer(0, 1, 2**63, 9, 0, 0), LIMITS, ERROR),
        (17, raw_transfer(1, 1, 2**64 - 1, 9, 0, 7), LIMITS, ERROR),
        (17, raw_transfer(1, 2, 2**64 - 8, 9, 0, 7, 9, 0, 7), LIMITS, ERROR),
        (17, raw_transfer(1, 1, 1000, 9, 0, 0), LIMITS, ERROR),
        (17, raw_transfer(0, 1, 0, 9, 0, 0), Limits(0), ERROR),
        (17, blkif.build_discard(77, 2**64 - 1, 2), LIMITS, ERROR),
        (17, blkif.build_discard(77, 1, 2**64 - 1), LIMITS, ERROR),
        (17, blkif.build_discard(77, 5, 0), LIMITS, ERROR),
        (17, blkif.build_indirect(0, 77, 2**64 - 1, 256, [1]), LIMITS, ERROR),
        (18, blkif.build_indirect(0, 77, 0, 0, [1]), LIMITS, ERROR),
        (18, blkif.build_indirect(1, 77, 0, 257, [1]), LIMITS, ERROR),
        (18, blkif.build_indirect(1, 77, 0, 65535, [1]), LIMITS._replace(max_indirect=9**9), ERROR),
        (18, blkif.build_indirect(6, 77, 0, 1, [1]), LIMITS, ERROR),
        (18, blkif.build_indirect(5, 77, 0, 1, [1]), LIMITS, ERROR),
        (18, blkif.build_indirect(0, 77, 0, 1, [1]), BARE, UNSUPPORTED),
        (19, raw_transfer(4, 1, 0, 9, 0, 0), LIMITS, UNSUPPORTED),
        (19, raw_transfer(255, 1, 0, 9, 0, 0), LIMITS, UNSUPPORTED),
        (19, raw_transfer(1, 1, 0, 9, 0, 0), READONLY, ERROR),
        (19, blkif.build_transfer(1, 77, 0, [PAGE] * 3), READONLY, ERROR),
        (19, blkif.build_transfer(2, 77, 0, []), READONLY, UNSUPPORTED),
        (19, blkif.build_transfer(3, 77, 0, []), READONLY, UNSUPPORTED),
        (19, blkif.build_transfer(3, 77, 0, [PAGE]), READONLY, ERROR),
        (19, blkif.build_discard(77, 0, 8), READONLY, ERROR),
        (19, blkif.build_indirect(1, 77, 0, 20, [1]), READONLY, ERROR),
        (19, blkif.build_discard(77, 0, 8, secure=True), LIMITS, UNSUPPORTED),
        (19, blkif.build_discard(77, 0, 8), BARE, UNSUPPORTED),
        (19, blkif.build_transfer(3, 77, 0, []), BARE, UNSUPPORTED),
        (19, blkif.build_transfer(2, 77, 0, [PAGE]), BARE, UNSUPPORTED),
    ],
)
def test_hf_refused(number: int, raw: bytes, limits: Limits, status: int) -> None:
    found = blkif.parse_request(pad(raw), limits)
    assert isinstance(found, BadRequest), f"HF {number}"
    assert (found.id, found.status) == (77, status)
    assert found.operation == (raw[1] if raw[0] == io.BLKIF_OP_INDIRECT else raw[0])
    assert found.reason


def test_an_empty_flush_and_a_discard_are_fine() -> None:
    assert blkif.parse_request(pad(blkif.build_transfer(3, 1, 99**9, [])), LIMITS) == Flush(1, 0, 0, ())
    secure = LIMITS._replace(secure_discard=True)
    raw = pad(blkif.build_discard(1, 2, 998, secure=True))
    assert blkif.parse_request(raw, secure) == Discard(1, 2, 998, True)


@settings(max_examples=500)
@given(
    st.binary(min_size=112, max_size=112),
    st.integers(0, 7),
    st.integers(0, 14),
    LAYOUTS,
    st.tuples(st.integers(0, 2**40), *[st.booleans()] * 5, st.sampled_from([0, 8, 256])),
    st.binary(max_size=4096),
)
def test_no_request_gets_past_the_limits(
    raw: bytes,
    op: int,
    count: int,
    layout: Layout,
    limit: tuple[int, bool, bool, bool, bool, bool, int],
    pages: bytes,
) -> None:
    limits = Limits(*limit)
    slot = bytes([op, count]) + raw[2 : layout.slot_size]
    found: Request = blkif.parse_request(slot, limits, layout)
    if isinstance(found, Indirect):
        assert 1 <= found.nr_segments <= limits.max_indirect and len(found.refs) == 1
        found = blkif.parse_indirect(found, pages, limits)
    assert len(blkif.build_response(found, ERROR, layout)) <= layout.slot_size
    if isinstance(found, BadRequest | Indirect):
        return
    assert 0 <= found.sector <= found.sector + found.sectors <= limits.capacity
    assert isinstance(found, Read) or not limits.readonly
    if not isinstance(found, Discard):
        assert sum(length for _, _, length in found.segments) == found.sectors * 512
        assert all(0 <= at < at + length <= 4096 for _, at, length in found.segments)


@pytest.mark.parametrize("segment", [(1, 1, 512), (1, 0, 0), (1, 0, 4608), (1, 3584, 1024), (1, 0, 100)])
def test_our_frontend_sends_whole_sectors(segment: blkif.Segment) -> None:
    with pytest.raises(LocalProtocolError):
        blkif.build_transfer(0, 1, 0, [segment])


# -- negotiation

OFFER = BlockOffer(sectors=2048, max_queues=4, persistent=True)
REFS = st.integers(1, 0xFFFF_FFFE)


@st.composite
def frontends(draw: st.DrawFn) -> BlockFrontend:
    count, pages = draw(st.integers(1, 4)), 1 << draw(st.integers(0, 4))
    refs = iter(draw(st.lists(REFS, min_size=count * pages, max_size=count * pages, unique=True)))
    ports = draw(st.lists(st.integers(1, 131071), min_size=count, max_size=count, unique=True))
    queues = tuple(BlockQueue(tuple(itertools.islice(refs, pages)), port) for port in ports)
    return BlockFrontend(draw(LAYOUTS), queues, draw(st.booleans()))


@given(frontends())
def test_frontend_nodes_both_ways(frontend: BlockFrontend) -> None:
    assert blkfeatures.parse_frontend(blkfeatures.frontend_nodes(frontend), OFFER) == frontend


@pytest.mark.parametrize(
    "offer",
    [
        OFFER,
        BlockOffer(1, readonly=True, cdrom=True, removable=True, flush=False, max_indirect=0),
        BlockOffer(8, barrier=True, discard_granularity=4096, discard_alignment=512, discard_secure=True),
        BlockOffer(8, sector_size=4096, physical_sector_size=8192, max_ring_page_order=0),
    ],
)
def test_backend_nodes_both_ways(offer: BlockOffer) -> None:
    nodes = {**blkfeatures.offer_nodes(offer), **blkfeatures.device_nodes(offer)}
    assert blkfeatures.parse_backend(nodes) == offer
    assert ("feature-max-indirect-segments" in nodes) == bool(offer.max_indirect)


ONE = {"ring-ref": "8", "event-channel": "9", "protocol": "x86_64-abi"}


def test_what_frontends_really_write() -> None:
    """Linux with one page and one queue; order 0 spelt out either way; no protocol; two queues."""
    plain = BlockFrontend(blkif.X86_64, (BlockQueue((8,), 9),))
    assert blkfeatures.parse_frontend(ONE, OFFER) == plain
    assert blkfeatures.parse_frontend({**ONE, "ring-page-order": "0"}, OFFER) == plain
    order0 = {"ring-ref0": "8", "event-channel": "9", "ring-page-order": "0", "feature-persistent": "0"}
    assert blkfeatures.parse_frontend(order0, OFFER) == plain
    assert blkfeatures.parse_frontend({**ONE, "protocol": "x86_32-abi"}, OFFER).layout is blkif.X86_32
    two = {"multi-queue-num-queues": "2", "queue-0": "", "queue-1": ""}
    two |= {f"queue-{q}/{k}": str(v + q) for q in (0, 1) for k, v in (("ring-ref", 8), ("event-channel", 20))}
    found = blkfeatures.parse_frontend(two, OFFER)
    assert found.queues == (BlockQueue((8,), 20), BlockQueue((9,), 21))


@pytest.mark.parametrize(
    ("number", "nodes", "node"),
    [
        *[
            (8, {**ONE, "ring-ref": text}, "ring-ref")
            for text in (
                "0",
                "4294967295",
                "4294967296",
                "-1",
                "",
                "x",
                "0x10",
                " 8",
                "8\n",
                "٣",
                "9" * 10**6,
            )
        ],
        (8, {"event-channel": "9"}, "ring-ref"),
        (8, {**ONE, "ring-page-order": "1", "ring-ref0": "8", "ring-ref1": "8"}, "ring-ref"),
        (8, {**ONE, "ring-page-order": "1", "ring-ref0": "8"}, "ring-ref1"),
        (8, {**ONE, "event-channel": "0"}, "event-channel"),
        (8, {**ONE, "event-channel": "131072"}, "event-channel"),
        (8, {"ring-ref": "8"}, "event-channel"),
        (9, {**ONE, "ring-page-order": "31"}, "ring-page-order"),
        (9, {**ONE, "ring-page-order": "5"}, "ring-page-order"),
        (9, {**ONE, "multi-queue-num-queues": "65535"}, "multi-queue-num-queues"),
        (9, {**ONE, "multi-queue-num-queues": "5"}, "multi-queue-num-queues"),
        (9, {**ONE, "multi-queue-num-queues": "0"}, "multi-queue-num-queues"),
        (9, {**ONE, "multi-queue-num-queues": "2"}, "queue-0/ring-ref"),
        (9, {**ONE, "protocol": "arm-abi"}, "protocol"),
        (9, {**ONE, "protocol": "z" * 4096}, "protocol"),
        (9, {**ONE, "feature-persistent": "yes"}, "feature-persistent"),
    ],
)
def test_hf_8_9_absurd_nodes(number: int, nodes: dict[str, str], node: str) -> None:
    with pytest.raises(FrontendError) as caught:
        blkfeatures.parse_frontend(nodes, OFFER)
    assert caught.value.node == node, f"HF {number}"
    assert len(str(caught.value)) < 200


NODES = st.sampled_from([*ONE, "ring-ref0", "ring-page-order", "multi-queue-num-queues", "queue-0/ring-ref"])


@given(st.dictionaries(NODES, st.text("0123456789-x \n٣", max_size=30) | st.integers(0, 9).map(str)))
def test_nothing_but_frontend_errors(nodes: dict[str, str]) -> None:
    try:
        found = blkfeatures.parse_frontend(nodes, OFFER)
    except FrontendError:
        return
    assert all(1 <= len(queue.refs) <= 16 for queue in found.queues) and 1 <= len(found.queues) <= 4


@pytest.mark.parametrize(
    "nodes", [{}, {"sectors": "x"}, {"sectors": "8", "sector-size": "1000"}, {"sectors": "8", "info": "-4"}]
)
def test_a_backend_that_talks_nonsense(nodes: dict[str, str]) -> None:
    with pytest.raises(BackendError):
        blkfeatures.parse_backend(nodes)


def test_offers_that_cannot_be() -> None:
    for bad in (
        OFFER._replace(max_queues=0),
        OFFER._replace(max_ring_page_order=5),
        OFFER._replace(max_indirect=5000),
    ):
        with pytest.raises(LocalProtocolError):
            blkfeatures.offer_nodes(bad)
    with pytest.raises(LocalProtocolError):
        blkfeatures.device_nodes(OFFER._replace(sector_size=520))
