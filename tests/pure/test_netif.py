"""Net slots: frames put together, frames spread out, and every way to get it wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.abi import io
from xtool.errors import BackendError, FrontendError, LocalProtocolError, RingError
from xtool.proto import netfeatures, netif
from xtool.proto.netfeatures import NetFrontend, NetOffer, NetQueue
from xtool.proto.netif import Fragment, Gso, RxBuilder, TxAssembler, TxDrop, TxFrame

MORE, EXTRA, CSUM, VALID = (
    io.NETTXF_more_data,
    io.NETTXF_extra_info,
    io.NETTXF_csum_blank,
    io.NETTXF_data_validated,
)


def tx(gref: int, offset: int, flags: int, request_id: int, size: int) -> bytes:
    return netif.TX_REQUEST.pack(gref, offset, flags, request_id, size)


def gso(mss: int = 1448, kind: int = 1, *, more: bool = False, extra: int = 1) -> bytes:
    return netif.EXTRA.pack(extra, int(more), mss, kind, 0).ljust(12, b"\xee")


def chain(
    fragments: list[Fragment], extra: Sequence[bytes] = (), flags: int = 0, first_id: int = 100
) -> list[bytes]:
    """The slots of a frame as Linux's netfront writes them."""
    slots: list[bytes] = []
    total = sum(length for _, _, length in fragments)
    for number, (gref, offset, length) in enumerate(fragments):
        own = MORE if number < len(fragments) - 1 else 0
        if number == 0:
            own |= flags | (EXTRA if extra else 0)
        slots.append(tx(gref, offset, own, first_id + number, length if number else total & 0xFFFF))
        slots += extra if number == 0 else ()
    return slots


def test_a_frame_as_bytes() -> None:
    raw = bytes.fromhex("05000000 1000 0700 aa00 6400") + bytes.fromhex("06000000 0000 0000 ab00 1400")
    (frame,) = TxAssembler().feed([raw[:12], raw[12:]])
    assert isinstance(frame, TxFrame)
    assert frame[:5] == (((5, 16, 80), (6, 0, 20)), 100, True, True, None)
    assert frame.responses() == [bytes.fromhex("aa00 0000"), bytes.fromhex("ab00 0000")]
    assert frame.responses(io.NETIF_RSP_DROPPED)[1] == bytes.fromhex("ab00 feff")


@st.composite
def tx_frames(draw: st.DrawFn) -> tuple[list[Fragment], Gso | None]:
    fragments: list[Fragment] = []
    for _ in range(draw(st.integers(1, 18))):
        offset = draw(st.integers(0, 4000))
        low = 14 if not fragments else 1
        fragments.append(
            (draw(st.integers(0, 2**32 - 1)), offset, draw(st.integers(low, min(3600, 4096 - offset))))
        )
    kinds = st.builds(Gso, st.sampled_from([1, 2]), st.integers(1, 65535))
    return fragments, draw(st.none() | kinds)


@settings(max_examples=200, deadline=None)
@given(st.lists(tx_frames(), min_size=1, max_size=6), st.data())
def test_frames_cut_anywhere(frames: list[tuple[list[Fragment], Gso | None]], data: st.DataObject) -> None:
    """Frames come out whole however the ring was looked at, and every slot gets one response."""
    slots: list[bytes] = []
    for fragments, kind in frames:
        extra = [gso(kind.mss, kind.type)] if kind else []
        slots += chain(fragments, extra, CSUM if kind else 0, len(slots))
    assembler = TxAssembler(gso_types=netif.GSO_TCP)
    found: list[TxFrame | TxDrop] = []
    at = 0
    while at < len(slots):
        step = data.draw(st.integers(1, 7))
        found += assembler.feed(slots[at : at + step])
        at += step
        assert assembler.open_slots <= 19
    assert assembler.open_slots == 0
    assert [f.responses() and (list(f.fragments), f.gso) for f in found if isinstance(f, TxFrame)] == frames
    assert sum(len(f.responses()) for f in found) == len(slots)
    nulls = [r for f in found for r in f.responses() if netif.TX_RESPONSE.unpack(r)[1] == io.NETIF_RSP_NULL]
    assert len(nulls) == sum(kind is not None for _, kind in frames)


GOOD = (7, 0, 1000)


@pytest.mark.parametrize(
    ("number", "slots", "reason"),
    [
        (23, [tx(7, 0, 0, 1, 0)], "0 bytes"),
        (23, [tx(7, 0, 0, 1, 1)], "1 bytes"),
        (23, [tx(7, 0, 0, 1, 13)], "13 bytes"),
        (23, [tx(7, 0, 0, 1, 65535)], "of a page"),
        (23, [tx(7, 4090, 0, 1, 100)], "of a page"),
        (23, [tx(7, 65535, 0, 1, 14)], "of a page"),
        (23, [tx(7, 0, MORE, 1, 100), tx(8, 0, 0, 2, 100)], "fragment of 0"),
        (23, [tx(7, 0, MORE, 1, 100), tx(8, 0, 0, 2, 101)], "fragment of -1"),
        (23, [tx(7, 0, MORE, 1, 100), tx(8, 0, 0, 2, 0)], "fragment of 0"),
        (23, [tx(7, 0, MORE, 1, 4500), tx(8, 0, MORE, 2, 14), tx(9, 4000, 0, 3, 97)], "of a page"),
        (23, chain([(n, 0, 4096) for n in range(17)]), "fragment of -"),  # 64 KiB and more
        (24, chain([(n, 0, 100) for n in range(19)]), "more than 18 slots"),
        (24, chain([(n, 0, 100) for n in range(20)]), "more than 18 slots"),
        (24, [tx(7, 0, MORE, 1, 100), tx(8, 0, EXTRA, 2, 50)], "after the first"),
        (25, chain([GOOD], [gso(kind=3)], CSUM), "GSO type 3"),
        (25, chain([GOOD], [gso(kind=0)], CSUM), "GSO type 0"),
        (25, chain([GOOD], [gso(mss=0)], CSUM), "0 bytes"),
        (25, chain([GOOD], [gso()], 0), "without checksum"),
        (25, chain([GOOD], [gso(more=True), gso()], CSUM), "twice"),
        (25, chain([GOOD], [gso(extra=0)], CSUM), "type 0"),
        (25, chain([GOOD], [gso(extra=5)], CSUM), "type 5"),
        (25, chain([GOOD], [gso(extra=2)], CSUM), "not offered"),
    ],
)
def test_hf_dropped(number: int, slots: list[bytes], reason: str) -> None:
    assembler = TxAssembler(gso_types=netif.GSO_TCP)
    found = assembler.feed([*slots, *chain([GOOD])])
    assert isinstance(found[0], TxDrop) and reason in found[0].reason, f"HF {number}: {found[0]}"
    assert len(found[0].responses()) == len(slots)
    statuses = {netif.TX_RESPONSE.unpack(r)[1] for r in found[0].responses()}
    assert statuses <= {io.NETIF_RSP_ERROR, io.NETIF_RSP_NULL}
    assert isinstance(found[1], TxFrame) and len(found) == 2  # the next one is not harmed


def test_hf_25_gso_that_was_not_offered() -> None:
    (found,) = TxAssembler().feed(chain([GOOD], [gso()], CSUM))
    assert isinstance(found, TxDrop) and "not offered" in found.reason


@pytest.mark.parametrize(
    "endless",
    [
        [tx(7, 0, MORE, 1, 14)] * 300,
        [tx(7, 0, EXTRA, 1, 14), *[gso(more=True)] * 300],
        [tx(7, 0, EXTRA | MORE, 1, 14), gso(), *[tx(7, 0, MORE | EXTRA, 1, 0)] * 300],
    ],
)
def test_hf_24_chains_without_end(endless: list[bytes]) -> None:
    assembler = TxAssembler(gso_types=netif.GSO_TCP)
    with pytest.raises(RingError):
        assembler.feed(endless)
    assert assembler.open_slots < 32


@settings(max_examples=500)
@given(st.lists(st.binary(min_size=12, max_size=12), max_size=60))
def test_r9_nothing_but_ring_errors(slots: list[bytes]) -> None:
    assembler = TxAssembler(gso_types=netif.GSO_TCP)
    answered = 0
    try:
        for slot in slots:
            for found in assembler.feed([slot]):
                answered += len(found.responses())
                if isinstance(found, TxFrame):
                    assert sum(f[2] for f in found.fragments) == found.size
                    assert all(length > 0 and at + length <= 4096 for _, at, length in found.fragments)
        assert answered + assembler.open_slots == len(slots)
    except RingError:
        pass


# -- towards the guest


@given(
    st.integers(14, 65535),
    st.none() | st.builds(Gso, st.sampled_from([1, 2]), st.integers(1, 65535)),
    st.booleans(),
)
def test_rx_frames(size: int, kind: Gso | None, blank: bool) -> None:
    """Read back as Linux's netfront does: slot by slot, extra info in the second, sizes added up."""
    builder = RxBuilder(sg=True, gso_types=netif.GSO_TCP)
    count = builder.needed(size, kind)
    plan = builder.build(
        size, [netif.RX_REQUEST.pack(i, 100 + i) for i in range(count)], gso=kind, csum_blank=blank
    )
    assert len(plan.responses) == count and all(len(r) == 8 for r in plan.responses)
    responses = list(plan.responses)
    first = netif.RX_RESPONSE.unpack(responses[0])
    assert bool(first[2] & io.NETRXF_csum_blank) == blank
    assert bool(first[2] & io.NETRXF_extra_info) == (kind is not None)
    if kind is not None:
        assert netif.EXTRA.unpack(responses.pop(1)) == (1, 0, kind.mss, kind.type, 0)
    at = 0
    for copy, raw in zip(plan.copies, responses, strict=True):
        number, offset, flags, length = netif.RX_RESPONSE.unpack(raw)
        assert copy == (100 + number, at, length) and offset == 0
        at += length
        assert bool(flags & io.NETRXF_more_data) == (at < size)
    assert at == size
    last = len(plan.copies) - 1
    plan.failed(last)
    bad = [i for i, r in enumerate(plan.responses) if r[6:] == b"\xff\xff"]
    assert plan.of[last] in bad


def test_rx_refusals() -> None:
    plain = RxBuilder(sg=False)
    assert plain.refusal(4096) is None and plain.needed(4096) == 1
    for size, kind in ((4097, None), (13, None), (65536, None), (1000, Gso(1, 500))):
        assert plain.refusal(size, kind)
    for size, count in ((100, 0), (100, 2), (5000, 2)):
        with pytest.raises(LocalProtocolError):
            plain.build(size, [bytes(8)] * count)


# -- negotiation

OFFER = NetOffer(max_queues=4)


@st.composite
def frontends(draw: st.DrawFn) -> NetFrontend:
    count = draw(st.integers(1, 4))
    refs = iter(
        draw(st.lists(st.integers(1, 2**32 - 2), min_size=2 * count, max_size=2 * count, unique=True))
    )
    ports = iter(draw(st.lists(st.integers(1, 131071), min_size=2 * count, max_size=2 * count, unique=True)))
    queues = []
    for tx_ref, rx_ref in zip(refs, refs, strict=True):
        port = next(ports)
        queues.append(NetQueue(tx_ref, rx_ref, port, draw(st.sampled_from([port, next(ports)]))))
    sg = draw(st.booleans())
    gso4, gso6 = sg and draw(st.booleans()), sg and draw(st.booleans())
    return NetFrontend(tuple(queues), sg, gso4, gso6, draw(st.booleans()), draw(st.booleans()))


@given(frontends())
def test_frontend_nodes_both_ways(frontend: NetFrontend) -> None:
    assert netfeatures.parse_frontend(netfeatures.frontend_nodes(frontend), OFFER) == frontend


@pytest.mark.parametrize("offer", [OFFER, NetOffer(False, False, False, False, False, 1)])
def test_backend_nodes_both_ways(offer: NetOffer) -> None:
    nodes = netfeatures.offer_nodes(offer)
    assert netfeatures.parse_backend(nodes) == offer
    assert "feature-ctrl-ring" not in nodes  # HF 28: not offered


ONE = {
    "request-rx-copy": "1",
    "feature-rx-notify": "1",
    "tx-ring-ref": "8",
    "rx-ring-ref": "9",
    "event-channel": "20",
}


def test_what_linux_writes_with_one_queue() -> None:
    found = netfeatures.parse_frontend(ONE, OFFER)
    assert found == NetFrontend((NetQueue(8, 9, 20, 20),), csum=True)
    split = {**ONE, "event-channel-tx": "21", "event-channel-rx": "22"}
    assert netfeatures.parse_frontend(split, OFFER).queues == (NetQueue(8, 9, 21, 22),)


@pytest.mark.parametrize(
    ("nodes", "node"),
    [
        ({**ONE, "request-rx-copy": "0"}, "request-rx-copy"),
        ({**ONE, "feature-rx-notify": "0"}, "feature-rx-notify"),
        ({**ONE, "tx-ring-ref": "9"}, "ring-ref"),
        ({**ONE, "rx-ring-ref": "z" * 10**6}, "rx-ring-ref"),
        ({**ONE, "tx-ring-ref": "0"}, "tx-ring-ref"),
        ({**ONE, "event-channel": "-5"}, "event-channel"),
        ({**ONE, "event-channel-tx": "5"}, "event-channel-rx"),
        ({**ONE, "event-channel-tx": "5", "event-channel-rx": "5"}, "event-channel-rx"),
        ({**ONE, "multi-queue-num-queues": "65535"}, "multi-queue-num-queues"),
        ({**ONE, "multi-queue-num-queues": "0"}, "multi-queue-num-queues"),
        ({**ONE, "multi-queue-num-queues": "2"}, "queue-0/tx-ring-ref"),
    ],
)
def test_hf_8_9_absurd_nodes(nodes: dict[str, str], node: str) -> None:
    with pytest.raises(FrontendError) as caught:
        netfeatures.parse_frontend(nodes, OFFER)
    assert caught.value.node == node and len(str(caught.value)) < 200


def test_a_backend_too_old() -> None:
    with pytest.raises(BackendError):
        netfeatures.parse_backend({})


def test_mac() -> None:
    assert netfeatures.parse_mac("00:16:3E:01:02:ff") == bytes.fromhex("00163e0102ff")
    assert netfeatures.format_mac(bytes.fromhex("00163e0102ff")) == "00:16:3e:01:02:ff"
    for text in (
        "",
        "00:16:3e:01:02",
        "01:16:3e:01:02:03",
        "00:00:00:00:00:00",
        "+1:16:3e:01:02:03",
        "0" * 17,
    ):
        with pytest.raises(ValueError):
            netfeatures.parse_mac(text)
