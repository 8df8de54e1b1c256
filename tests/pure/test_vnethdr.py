"""Between netif and virtio-net headers: every bound, and checksums against a plain sum."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.abi import tun
from xtool.backends import vnethdr
from xtool.backends.link import FRAME_ROOM, LinkGoneError
from xtool.backends.netrules import SourceRules, parse_rate
from xtool.backends.passt import PasstSource, StreamLink, port_options
from xtool.backends.tap import HEAD, Tap, TapSource
from xtool.backends.throttle import Throttle
from xtool.backends.vnethdr import Offload
from xtool.devices.hotplug import tap as taps
from xtool.errors import HostError, RemoteProtocolError
from xtool.proto.netif import Gso

ETHER = bytes(12)


def slow_sum(data: bytes) -> int:
    total = sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total or 0xFFFF


@given(st.binary(max_size=200))
def test_checksum(data: bytes) -> None:
    assert vnethdr.checksum(data) == slow_sum(data)


def udp4(payload: bytes, *, options: int = 0, tag: bytes = b"", protocol: int = 17, size: int = 8) -> bytes:
    total = 20 + 4 * options + size + len(payload)
    ip = bytes([0x45 + options, 0]) + total.to_bytes(2, "big") + b"\0\0\x40\0\x40" + bytes([protocol, 0, 0])
    l4 = bytearray(size)
    if protocol == 6:
        l4[12] = size << 2
    return ETHER + tag + b"\x08\0" + ip + bytes(8 + 4 * options) + bytes(l4) + payload


def tcp6(payload: bytes, *, hops: int = 0) -> bytes:
    size = 8 * hops + 20 + len(payload)
    ip = b"\x60\0\0\0" + size.to_bytes(2, "big") + bytes([0 if hops else 6, 64]) + bytes(32)
    chain = b"".join(bytes([0 if n < hops - 1 else 6, 0]) + bytes(6) for n in range(hops))
    return ETHER + b"\x86\xdd" + ip + chain + bytes(12) + b"\x50" + bytes(7) + payload


@pytest.mark.parametrize(
    ("frame", "start", "offset"),
    [
        (udp4(b"hi"), 34, 6),
        (udp4(b"hi", options=3), 46, 6),
        (udp4(b"hi", tag=b"\x81\0\0\5"), 38, 6),
        (udp4(b"x" * 50, protocol=6, size=20), 34, 16),
        (tcp6(b"x" * 50), 54, 16),
        (tcp6(b"x" * 50, hops=3), 78, 16),
    ],
)
def test_where_the_checksum_is(frame: bytes, start: int, offset: int) -> None:
    raw = vnethdr.encode(frame, Offload(csum_blank=True))
    assert vnethdr.HEADER.unpack(raw) == (1, 0, 0, 0, start, offset)
    copy = memoryview(bytearray(frame))
    assert vnethdr.decode(raw, copy) == Offload(True, True)
    assert vnethdr.decode(raw, copy, csum=(False, False)) == Offload(data_validated=True)
    assert slow_sum(bytes(copy[start:])) == 0xFFFF  # now it adds up
    for cut in range(len(frame)):
        with pytest.raises(RemoteProtocolError):
            vnethdr.encode(frame[:cut], Offload(csum_blank=True))


def test_gso() -> None:
    frame = tcp6(b"x" * 5000)
    raw = vnethdr.encode(frame, Offload(True, True, Gso(2, 1440)))
    assert vnethdr.HEADER.unpack(raw) == (1, 4, 74, 1440, 54, 16)
    assert vnethdr.decode(raw, memoryview(bytearray(frame))) == Offload(True, True, Gso(2, 1440))
    for wrong in (Gso(1, 1440), Gso(7, 1)):
        with pytest.raises(RemoteProtocolError):
            vnethdr.encode(frame, Offload(True, True, wrong))
    with pytest.raises(RemoteProtocolError, match="TCP header of 60"):
        vnethdr.encode(tcp6(b"")[:-8] + b"\xf0" + bytes(7), Offload(True, True, Gso(2, 1440)))


_KINDS = [b"\x08\0\x45", b"\x08\0\x4f", b"\x86\xdd\x60", b"\x81\0\0\1\x08\0\x45", b"\x08\6", b""]
frames = st.builds(
    lambda kind, rest: ETHER + kind + rest, st.sampled_from(_KINDS), st.binary(max_size=200)
) | st.binary(max_size=100)
todos = st.builds(
    Offload,
    st.booleans(),
    st.booleans(),
    st.none() | st.builds(Gso, st.integers(0, 9), st.integers(0, 65535)),
)


@settings(max_examples=500)
@given(frames, todos)
def test_a_guest_may_write_anything(frame: bytes, todo: Offload) -> None:
    """What comes out lies within the frame; nothing but "the peer is wrong" escapes."""
    with suppress(RemoteProtocolError):
        flags, kind, header, mss, start, offset = vnethdr.HEADER.unpack(vnethdr.encode(frame, todo))
        if flags & tun.VIRTIO_NET_HDR_F_NEEDS_CSUM:
            assert start + offset + 2 <= len(frame)
        assert not kind or start < header <= len(frame)
        assert bool(kind) == bool(mss)
    with suppress(RemoteProtocolError):
        vnethdr.finish(memoryview(bytearray(frame)), todo)
    SourceRules(b"\0" * 6).refusal(frame)


@settings(max_examples=500)
@given(st.binary(min_size=10, max_size=10), frames)
def test_headers_from_a_tap(raw: bytes, frame: bytes) -> None:
    with suppress(RemoteProtocolError):
        todo = vnethdr.decode(raw, memoryview(bytearray(frame)))
        assert todo.gso is None or (todo.csum_blank and todo.gso.mss)


@st.composite
def common_frames(draw: st.DrawFn) -> bytes:
    """IPv4 with TCP or UDP, right or nearly so."""
    size = draw(st.integers(34, 140))
    frame = bytearray(draw(st.binary(min_size=size, max_size=size)))
    frame[12:15] = b"\x08\0" + bytes([draw(st.sampled_from([0x45, 0x45, 0x45, 0x46, 0x65]))])
    total = draw(st.sampled_from([size - 14, size - 14, size - 15, size - 13, 0, 39, 40]))
    frame[16:18] = max(0, total).to_bytes(2, "big")
    frame[20:22] = draw(st.sampled_from([b"\0\0", b"\x40\0", b"\x20\0", b"\0\1"]))
    frame[23] = draw(st.sampled_from([6, 6, 17, 1]))
    if size > 46:
        frame[46] = draw(st.sampled_from([0x50, 0x80, 0xF0, 0x40, 0]))
    return bytes(frame)


@settings(max_examples=800)
@given(common_frames(), st.none() | st.builds(Gso, st.integers(1, 2), st.integers(1, 65535)))
def test_a_glance_says_what_a_long_look_says(frame: bytes, gso: Gso | None) -> None:
    """From the guest: the same header, or the same refusal. To it: the same, and the frame is as it was."""
    todo, room = Offload(True, True, gso), bytes(HEAD) + frame
    try:
        long = vnethdr._encode(memoryview(frame), todo)
    except RemoteProtocolError as error:
        with pytest.raises(RemoteProtocolError, match=f"^{error.message}$"):
            vnethdr.encode(room, todo, HEAD)
        return
    assert vnethdr.encode(room, todo, HEAD) == long == vnethdr.encode(frame, todo)
    for csum in ((True, True), (False, True)):
        took, other = memoryview(bytearray(long + frame + b"more")), memoryview(bytearray(frame))
        try:
            wanted = vnethdr.decode(long, other, csum=csum)
        except RemoteProtocolError:
            with pytest.raises(RemoteProtocolError):
                vnethdr.decode_at(took, HEAD + len(frame), csum)
        else:
            assert vnethdr.decode_at(took, HEAD + len(frame), csum) == wanted
        assert took[HEAD : HEAD + len(frame)] == other


@given(st.sampled_from([ETHER, b"\2" * 12]), st.sampled_from(_KINDS), st.binary(max_size=60))
def test_what_is_easy_is_allowed(ether: bytes, kind: bytes, rest: bytes) -> None:
    frame = (ether + kind + rest).ljust(14, b"\0")
    rules = SourceRules(bytes(6))
    if rules.easy(memoryview(bytes(10) + frame), 10):
        assert rules.refusal(frame) is None
    assert SourceRules(None).easy(memoryview(frame), 0)


def test_a_rate() -> None:
    now = 0.0
    rate, burst = parse_rate("1000,100000")
    bucket = Throttle(lambda: now, rate, burst=burst)
    gone = 0
    while now < 10:
        if pause := bucket.wait():
            now += pause + 1e-6
        else:
            bucket.charge(1500, 1)
            gone += 1500
    assert 100_000 <= gone <= 103_000
    assert parse_rate(None) == parse_rate("0,50000") == (0, 0.0)
    for text in ("1", "x,y", "1,2,3", "9" * 30 + ",1"):
        with pytest.raises(ValueError, match="rate"):
            parse_rate(text)


@given(st.lists(st.binary(min_size=14, max_size=3000), min_size=1, max_size=20), st.integers(1, 5000))
def test_frames_over_a_stream_however_it_is_cut(sent: list[bytes], cut: int) -> None:
    ours, theirs = socket.socketpair()
    link, room, got = StreamLink(ours), memoryview(bytearray(FRAME_ROOM)), []
    raw = b"".join(len(frame).to_bytes(4, "big") + frame for frame in sent)
    with theirs:
        for at in range(0, len(raw), cut):
            theirs.sendall(raw[at : at + cut])
            while size := link.receive(room):
                got.append(bytes(room[4:size]))
        assert got == sent
        theirs.sendall(b"\0\0\0\1xxx")
        with pytest.raises(LinkGoneError):
            link.receive(room)
    link.close()


def test_passts_options() -> None:
    assert port_options(()) == ["-t", "none", "-u", "none"]
    forwards = ["tcp:127.0.0.1:2222:22", "tcp:[::1]:80:8080", "udp:0.0.0.0:53:53"]
    assert port_options(forwards) == [
        *("-t", "127.0.0.1/2222:22", "-t", "::1/80:8080", "-u", "0.0.0.0/53:53")
    ]
    with pytest.raises(ValueError, match="forward"):
        port_options(["tcp:22"])


def test_a_helper_that_dies_at_once_says_why(tmp_path: Path) -> None:
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\necho no route >&2\nexit 1\n")
    program.chmod(0o755)
    source = PasstSource(program=[str(program)])
    (link,) = source.open(1)
    room = memoryview(bytearray(FRAME_ROOM))
    with pytest.raises(LinkGoneError):
        while True:
            link.receive(room)
    source.close(for_good=True)
    assert source.last_words() == "no route" and source.describe()["pid"] is None
    with pytest.raises(HostError, match="cannot start"):
        PasstSource(program=["/nonexistent/passt"]).open(1)


def test_a_real_tap(tmp_path: Path) -> None:
    """Where we may make one: it stays when we let go, goes for good, and is noticed when it is gone."""
    name = f"xtt{os.getpid() % 10**8}"
    try:
        taps.make(name)
    except HostError as error:
        pytest.skip(error.message)
    source = TapSource(name, None, queues=2)
    first, second = source.open(2)
    source.accept(csum=True, tso4=True, tso6=True)
    assert isinstance(first, Tap) and first.fileno() != second.fileno()
    room = memoryview(bytearray(FRAME_ROOM))
    assert first.receive(room) == 0
    room[HEAD : HEAD + 60] = bytes(60)
    first.prepare(room[: HEAD + 60], vnethdr.NOTHING)
    assert first.send([room[: HEAD + 60]]) == 1  # it is down: lost
    source.close(for_good=False)
    assert os.path.exists(f"/sys/class/net/{name}")
    taps.remove(name)
    assert not os.path.exists(f"/sys/class/net/{name}")
    again = TapSource(name, None)
    again.open(1)
    again.close(for_good=True)
    assert not os.path.exists(f"/sys/class/net/{name}")
