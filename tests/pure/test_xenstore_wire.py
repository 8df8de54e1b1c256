"""The xenstore wire protocol: literal bytes, every way to cut them, and nonsense."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtool.errors import LocalProtocolError, RemoteProtocolError
from xtool.proto import xenstore as wire
from xtool.proto.xenstore import Failure, Op, Packet, PacketParser, Reply, WatchEvent, XsConnection
from xtool.proto.xsperms import Perm, may_read, may_write, owned_by

#: (operation, request id, transaction, payload, the whole message as bytes)
MESSAGES = [
    (Op.READ, 1, 0, b"/a\0", b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x03\0\0\0/a\0"),
    (Op.WRITE, 2, 7, b"/a\0x", b"\x0b\0\0\0\x02\0\0\0\x07\0\0\0\x04\0\0\0/a\0x"),
    (Op.TRANSACTION_START, 3, 0, b"\0", b"\x06\0\0\0\x03\0\0\0\0\0\0\0\x01\0\0\0\0"),
    (Op.ERROR, 0x01020304, 0, b"ENOENT\0", b"\x10\0\0\0\x04\x03\x02\x01\0\0\0\0\x07\0\0\0ENOENT\0"),
    (Op.DIRECTORY_PART, 9, 0, b"", b"\x16\0\0\0\x09\0\0\0\0\0\0\0\0\0\0\0"),
]


def parse_all(*pieces: bytes) -> list[Packet]:
    parser, found = PacketParser(), []
    for piece in pieces:
        parser.receive_data(piece)
        while (packet := parser.next_packet()) is not None:
            found.append(packet)
    return found


@pytest.mark.parametrize(("op", "req_id", "tx_id", "payload", "data"), MESSAGES)
def test_messages_both_ways(op: Op, req_id: int, tx_id: int, payload: bytes, data: bytes) -> None:
    assert wire.encode(op, req_id, payload, tx_id) == data
    packet = Packet(op, req_id, tx_id, payload)
    assert parse_all(data) == [packet]
    assert parse_all(*(data[i : i + 1] for i in range(len(data)))) == [packet]
    for cut in range(len(data)):
        assert parse_all(data[:cut]) == []


def test_all_messages_in_one_piece_and_a_rest() -> None:
    data = b"".join(message[4] for message in MESSAGES)
    assert [packet.op for packet in parse_all(data + b"\x02\0\0")] == [message[0] for message in MESSAGES]


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<IIII", 20, 1, 0, 0),  # a number that was removed
        struct.pack("<IIII", 0xFFFF, 1, 0, 0),
        struct.pack("<IIII", Op.READ, 1, 0, 4097),
        struct.pack("<IIII", Op.READ, 1, 0, 0xFFFF_FFFF),
        struct.pack("<IIII", Op.DIRECTORY, 1, 0, wire.DIRECTORY_MAX + 1),
    ],
)
def test_nonsense_breaks_the_parser_for_good(data: bytes) -> None:
    parser = PacketParser()
    parser.receive_data(data)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            parser.next_packet()
        parser.receive_data(MESSAGES[0][4])


def test_a_directory_may_be_longer_than_a_message() -> None:
    names = b"name\0" * 2000
    assert parse_all(struct.pack("<IIII", Op.DIRECTORY, 1, 0, len(names)) + names)[0].payload == names


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_any_bytes_parse_or_raise_remote_protocol_error(pieces: list[bytes]) -> None:
    conn = XsConnection()
    conn.send(Op.READ, b"/\0")
    try:
        for piece in pieces:
            conn.receive_data(piece)
            while conn.next_event() is not None:
                pass
    except RemoteProtocolError:
        pass


@given(
    st.lists(st.tuples(st.sampled_from(list(Op)), st.integers(0, 2**32 - 1), st.binary(max_size=60))),
    st.integers(1, 50),
)
def test_packets_survive_any_cut(packets: list[tuple[Op, int, bytes]], size: int) -> None:
    data = b"".join(wire.encode(op, req_id, payload) for op, req_id, payload in packets)
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert parse_all(*pieces) == [Packet(op, req_id, 0, payload) for op, req_id, payload in packets]


class TestConnection:
    def test_replies_match_by_request_id(self) -> None:
        conn = XsConnection()
        first, _ = conn.send(Op.READ, wire.strings("/a"))
        second, _ = conn.send(Op.READ, wire.strings("/b"))
        assert conn.outstanding == 2
        conn.receive_data(wire.encode(Op.ERROR, second, b"EACCES\0"))
        conn.receive_data(wire.encode(Op.READ, first, b"x"))
        assert conn.next_event() == Failure(second, "EACCES")
        assert conn.next_event() == Reply(first, b"x")
        assert conn.next_event() is None
        assert conn.outstanding == 0

    def test_watch_events_come_between(self) -> None:
        conn = XsConnection()
        req_id, _ = conn.send(Op.READ, wire.strings("/a"))
        conn.receive_data(wire.encode(Op.WATCH_EVENT, 0, b"/a/b\0token\0"))
        conn.receive_data(wire.encode(Op.READ, req_id, b""))
        assert conn.next_event() == WatchEvent("/a/b", "token")
        assert conn.next_event() == Reply(req_id, b"")

    def test_request_ids_wrap_past_zero(self) -> None:
        conn = XsConnection()
        conn._last_id = 0xFFFF_FFFE
        assert [conn.send(Op.READ, b"/\0")[0] for _ in range(3)] == [0xFFFF_FFFF, 1, 2]

    @pytest.mark.parametrize(
        ("op", "req_id", "payload"),
        [
            (Op.READ, 99, b"x"),  # nobody asked
            (Op.WRITE, 1, b"OK\0"),  # an answer to something else
            (Op.ERROR, 99, b"ENOENT\0"),
            (Op.ERROR, 1, b"\xff\xfe"),
            (Op.ERROR, 1, b"E" * 4000),
            (Op.ERROR, 1, b""),
            (Op.WATCH_EVENT, 0, b"/a\0"),
            (Op.WATCH_EVENT, 0, b"/a\0no end"),
            (Op.WATCH_EVENT, 0, b""),
        ],
    )
    def test_what_the_daemon_may_not_say(self, op: Op, req_id: int, payload: bytes) -> None:
        conn = XsConnection()
        conn.send(Op.READ, b"/a\0")
        conn.receive_data(wire.encode(op, req_id, payload))
        for _ in range(2):
            with pytest.raises(RemoteProtocolError):
                conn.next_event()

    def test_a_payload_over_the_limit_is_not_sent(self) -> None:
        conn = XsConnection()
        with pytest.raises(LocalProtocolError, match="4097"):
            conn.send(Op.WRITE, b"x" * 4097)
        assert conn.outstanding == 0


class TestStrings:
    @given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1))
    def test_both_ways(self, parts: list[str]) -> None:
        assert wire.split_strings(wire.strings(*parts)) == tuple(parts)

    def test_nul_inside_and_missing_at_the_end(self) -> None:
        with pytest.raises(LocalProtocolError):
            wire.strings("a\0b")
        with pytest.raises(RemoteProtocolError):
            wire.split_strings(b"a\0b")
        assert wire.split_strings(b"") == ()
        assert wire.split_strings(b"\xff\0") == ("\\xff",)


class TestPerms:
    @pytest.mark.parametrize("text", ["n0", "r5", "w7", "b32751"])
    def test_both_ways(self, text: str) -> None:
        assert str(Perm.parse(text)) == text

    @pytest.mark.parametrize("text", ["", "n", "x5", "r-1", "r5 ", "r٣", "5"])
    def test_refused(self, text: str) -> None:
        with pytest.raises(LocalProtocolError):
            Perm.parse(text)

    def test_who_may(self) -> None:
        perms = owned_by(3, read=[5], both=[6])
        assert perms == ("n3", "r5", "b6")
        assert [may_read(perms, d) for d in (0, 3, 5, 6, 7)] == [True, True, True, True, False]
        assert [may_write(perms, d) for d in (0, 3, 5, 6, 7)] == [True, True, False, True, False]
        assert may_read(("r0",), 9) and not may_write(("r0",), 9)
