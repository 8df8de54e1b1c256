"""The xenstore wire protocol, without any I/O.

A message is a 16-byte header (type, request id, transaction id, payload length) and a payload of at most
4096 bytes. Sources: ``io/xs_wire.h`` and ``docs/misc/xenstore.txt`` of Xen.

``XsConnection`` is the client's half: ``send`` turns a request into bytes, ``receive_data`` takes what
came back in pieces of any size, ``next_event`` hands out replies, failures and watch events::

    conn = XsConnection()
    req_id, data = conn.send(Op.READ, strings("/tool/x"))
    ...                                   # write data, read some bytes
    conn.receive_data(received)
    conn.next_event()                     # Reply(req_id, b"value"), or None: more bytes are needed

``PacketParser`` alone serves both halves; the in-memory daemon of ``xtool.fake`` uses it too.

Facts about the two daemons
---------------------------
- A request whose payload is over 4096 bytes makes the daemon drop the connection, so it is refused here.
- Over a socket ``oxenstored`` answers DIRECTORY with a payload as long as it takes, whatever the header
  file says; ``xenstored`` answers E2BIG and wants DIRECTORY_PART. So DIRECTORY replies, and only those,
  may be longer (to ``DIRECTORY_MAX``).
- ``oxenstored`` has an error name that is no errno: EQUOTA.
- The transaction id in a reply cannot be relied on through ``/dev/xen/xenbus``; request ids can.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from xtool.errors import LocalProtocolError, RemoteProtocolError

PAYLOAD_MAX = 4096
ABS_PATH_MAX = 3072
REL_PATH_MAX = 2048
#: The longest DIRECTORY reply taken from oxenstored over a socket, bytes.
DIRECTORY_MAX = 1 << 20

HEADER = Struct("<IIII")  # io/xs_wire.h: struct xsd_sockmsg


class Op(IntEnum):
    """``enum xsd_sockmsg_type``."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22


_OPS = {int(op): op for op in Op}
_PATH_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-/_@")
_ERRNO_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")


class Packet(NamedTuple):
    """One message. ``op`` is a known ``Op``; ``payload`` a private copy."""

    op: Op
    req_id: int
    tx_id: int
    payload: bytes


class Reply(NamedTuple):
    req_id: int
    payload: bytes


class Failure(NamedTuple):
    """The daemon refused request ``req_id``; ``errno`` is a name such as ``"ENOENT"``."""

    req_id: int
    errno: str


class WatchEvent(NamedTuple):
    """``path`` changed, below the watch that was registered with ``token``."""

    path: str
    token: str


Event = Reply | Failure | WatchEvent


def check_path(path: str, *, special: bool = False) -> str:
    """Return ``path`` if xenstore can hold it, else raise ``LocalProtocolError``.

    ``special`` also allows the ``@introduceDomain`` kind, which only watches and permissions take.
    """
    if special and path.startswith("@"):
        if len(path) > REL_PATH_MAX:
            raise LocalProtocolError(f"the xenstore path is {len(path)} bytes, the limit is {REL_PATH_MAX}")
    elif not path.startswith("/") or "//" in path or (path.endswith("/") and path != "/"):
        raise LocalProtocolError(f"not an absolute xenstore path: {path[:200]!r}")
    elif len(path) > ABS_PATH_MAX:
        raise LocalProtocolError(f"the xenstore path is {len(path)} bytes, the limit is {ABS_PATH_MAX}")
    if not path.isascii() or not _PATH_BYTES.issuperset(path.encode()):
        raise LocalProtocolError(f"a xenstore path may hold letters, digits and -/_@ only: {path[:200]!r}")
    return path


def strings(*parts: str) -> bytes:
    """Each part followed by a NUL: the payload of most requests."""
    for part in parts:
        if "\0" in part:
            raise LocalProtocolError(f"a NUL inside a xenstore string: {part[:200]!r}")
    return "".join(part + "\0" for part in parts).encode()


def split_strings(payload: bytes) -> tuple[str, ...]:
    """The NUL-terminated strings in a reply.

    Bytes that are not UTF-8 (a guest chose them) come back as backslash escapes.
    """
    if not payload:
        return ()
    if payload[-1] != 0:
        raise RemoteProtocolError(f"xenstore: strings without a final NUL: {payload[-40:]!r}")
    return tuple(part.decode(errors="backslashreplace") for part in payload[:-1].split(b"\0"))


def one_string(payload: bytes) -> str:
    """The single string in a reply, with or without its NUL."""
    return payload.removesuffix(b"\0").decode(errors="backslashreplace")


def is_ok(payload: bytes) -> bool:
    return payload == b"OK\0"


def parse_watch_event(payload: bytes) -> WatchEvent:
    parts = split_strings(payload)
    if len(parts) < 2:
        raise RemoteProtocolError(f"xenstore: a watch event with {len(parts)} strings")
    return WatchEvent(parts[0], parts[1])


def parse_error(payload: bytes) -> str:
    """The errno name in an ERROR reply."""
    name = payload.removesuffix(b"\0")
    if not 2 <= len(name) <= 32 or name[:1] != b"E" or not _ERRNO_BYTES.issuperset(name):
        raise RemoteProtocolError(f"xenstore: not an error name: {payload[:40]!r}")
    return name.decode()


def encode(op: Op, req_id: int, payload: bytes, tx_id: int = 0) -> bytes:
    """One message as bytes. Raises ``LocalProtocolError`` when the payload is over the limit."""
    if len(payload) > PAYLOAD_MAX:
        raise LocalProtocolError(
            f"xenstore {op.name.lower()}: the payload is {len(payload)} bytes, the limit is {PAYLOAD_MAX}",
            hint="xenstore is for small values; pass bulk data another way",
        )
    return HEADER.pack(op, req_id, tx_id, len(payload)) + payload


class PacketParser:
    """Bytes in, packets out. After an error the parser stays broken: the stream has lost its frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken: str | None = None

    def receive_data(self, data: bytes) -> None:
        self._buffer += data

    def pending(self) -> int:
        """Bytes received that do not make a whole packet yet."""
        return len(self._buffer)

    def next_packet(self) -> Packet | None:
        """The next whole packet, or None. Raises ``RemoteProtocolError`` on nonsense."""
        if self._broken:
            raise RemoteProtocolError(self._broken)
        if len(self._buffer) < HEADER.size:
            return None
        number, req_id, tx_id, length = HEADER.unpack_from(self._buffer)
        op = _OPS.get(number)
        if op is None:
            raise self.fail(f"xenstore: unknown message type {number}")
        if length > (DIRECTORY_MAX if op is Op.DIRECTORY else PAYLOAD_MAX):
            raise self.fail(f"xenstore: a payload of {length} bytes for {op.name.lower()}")
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        return Packet(op, req_id, tx_id, payload)

    def fail(self, message: str) -> RemoteProtocolError:
        """Mark the stream as broken for good; returns the error to raise."""
        self._broken = message
        self._buffer.clear()
        return RemoteProtocolError(message)


class XsConnection:
    """The client's half of one connection: which requests are unanswered, what the bytes mean."""

    def __init__(self) -> None:
        self._parser = PacketParser()
        self._pending: dict[int, Op] = {}
        self._last_id = 0

    @property
    def outstanding(self) -> int:
        """How many requests have no reply yet."""
        return len(self._pending)

    def send(self, op: Op, payload: bytes, tx_id: int = 0) -> tuple[int, bytes]:
        """``(request id, bytes to write)``."""
        req_id = self._last_id + 1 & 0xFFFF_FFFF or 1  # 0 is for watch events
        data = encode(op, req_id, payload, tx_id)
        self._last_id = req_id
        self._pending[req_id] = op
        return req_id, data

    def receive_data(self, data: bytes) -> None:
        self._parser.receive_data(data)

    def next_event(self) -> Event | None:
        """What the daemon said next, or None when more bytes are needed.

        Raises ``RemoteProtocolError`` for anything the daemon had no business saying.
        """
        packet = self._parser.next_packet()
        if packet is None:
            return None
        try:
            return self._interpret(packet)
        except RemoteProtocolError as error:
            raise self._parser.fail(error.message) from None

    def _interpret(self, packet: Packet) -> Event:
        if packet.op is Op.WATCH_EVENT:
            return parse_watch_event(packet.payload)
        asked = self._pending.pop(packet.req_id, None)
        if asked is None:
            raise RemoteProtocolError(
                f"xenstore: a {packet.op.name.lower()} reply to request {packet.req_id}, which nobody made"
            )
        if packet.op is Op.ERROR:
            return Failure(packet.req_id, parse_error(packet.payload))
        if packet.op is not asked:
            raise RemoteProtocolError(
                f"xenstore: a {packet.op.name.lower()} reply to a {asked.name.lower()} request"
            )
        return Reply(packet.req_id, packet.payload)


def perms_payload(path: str, perms: Iterable[str]) -> bytes:
    """SET_PERMS: the path, then at least one permission such as ``n0`` or ``r5``."""
    checked = [check_perm(perm) for perm in perms]
    if not checked:
        raise LocalProtocolError(f"no permissions given for {path}")
    return strings(check_path(path, special=True), *checked)


def check_perm(perm: str) -> str:
    """Return ``perm`` if it is one letter of ``nrwb`` and a domain id, else raise."""
    if perm[:1] not in ("n", "r", "w", "b") or not perm[1:].isdecimal() or not perm.isascii():
        raise LocalProtocolError(f"not a xenstore permission: {perm!r}", hint="write n0, r5, w5 or b5")
    return perm
