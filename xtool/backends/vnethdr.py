"""Between netif's flags and a virtio-net header, and checksums nobody else will fill in. Pure.

A frame from a guest may say "checksum blank" and no more; a tap wants to know where the checksum begins and
where it goes. So the headers are looked at here: Ethernet, VLAN tags, IPv4 or IPv6 with its extension
headers, TCP or UDP. Every bound is checked against the frame itself.

Facts
-----
* In either direction a blank checksum field holds the sum of the pseudo-header, not zero: whoever
  completes it sums from the start of the TCP or UDP header and stores the complement.
* ``csum_start`` and ``csum_offset`` of a header that lies outside the frame make the kernel refuse the write
  (EINVAL): that frame is lost, no more.
* ``hdr_len`` may be any number between the true one and the frame's size; the kernel takes that many bytes
  into the linear part of its buffer.
* A frontend that gets a frame with a blank checksum finds TCP and UDP by itself; others it cannot finish.
* A sum of 16-bit words in one's complement is the number they form, modulo 65535. Python does that to a whole
  frame at once, a hundred times faster than word by word.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from xtool.abi.io import XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6
from xtool.abi.tun import (
    VIRTIO_NET_HDR_F_DATA_VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
)
from xtool.errors import RemoteProtocolError
from xtool.proto.netif import Gso

#: ``struct virtio_net_hdr``: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
HEADER = Struct("<BBHHHH")
PLAIN = bytes(HEADER.size)
#: How much of a frame is looked at for its headers.
LOOK = 512

ETH_HLEN = 14
ETH_IPV4, ETH_ARP, ETH_IPV6 = 0x0800, 0x0806, 0x86DD
_VLAN = (0x8100, 0x88A8)
TCP, UDP = 6, 17
_CSUM_AT = {TCP: 16, UDP: 6}
_L4_SIZE = {TCP: 20, UDP: 8}
#: IPv6 extension headers that say how long they are: hop-by-hop, routing, destination options.
_EXTENSIONS = (0, 43, 60)
_MAX_EXTENSIONS = 8
_MAX_TAGS = 2

_VIRTIO = {
    XEN_NETIF_GSO_TYPE_TCPV4: VIRTIO_NET_HDR_GSO_TCPV4,
    XEN_NETIF_GSO_TYPE_TCPV6: VIRTIO_NET_HDR_GSO_TCPV6,
}
_NETIF = {virtio: netif for netif, virtio in _VIRTIO.items()}


class Offload(NamedTuple):
    """What is left to do to a frame; the words of netif."""

    csum_blank: bool = False
    data_validated: bool = False
    gso: Gso | None = None


NOTHING = Offload()
VALIDATED = Offload(data_validated=True)
#: A blank checksum, and no more.
BLANK = Offload(csum_blank=True, data_validated=True)

#: By far the most frames: IPv4 without options, right behind the Ethernet header. Ethertype, version and
#: header length, total length, fragment, protocol; where TCP's header ends.
_GLANCE = Struct(">12xHBxHxxHxB22xB")
_L4_AT = ETH_HLEN + 20
_BLANK_TCP4 = HEADER.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, 0, 0, _L4_AT, _CSUM_AT[TCP])
_BLANK_UDP4 = HEADER.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, 0, 0, _L4_AT, _CSUM_AT[UDP])
_JUST_VALIDATED = HEADER.pack(VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_GSO_NONE, 0, 0, 0, 0)


class Transport(NamedTuple):
    """Where a frame's TCP or UDP header begins, in bytes; ``end`` is where the IP packet ends."""

    version: int
    protocol: int
    start: int
    end: int

    @property
    def csum_offset(self) -> int:
        return _CSUM_AT[self.protocol]


def ethertype(head: bytes | memoryview) -> tuple[int, int]:
    """The type of what a frame carries and where it begins, past VLAN tags; ``(0, ...)`` if it is cut
    short."""
    at = ETH_HLEN
    for _ in range(_MAX_TAGS + 1):
        if len(head) < at:
            return 0, at
        kind = head[at - 2] << 8 | head[at - 1]
        if kind not in _VLAN:
            return kind, at
        at += 4
    return 0, at


def find_transport(head: bytes | memoryview, size: int) -> Transport | None:
    """The TCP or UDP header of a frame of ``size`` bytes whose beginning is ``head``; None if it has none, is
    a fragment, or its lengths make no sense."""
    kind, at = ethertype(head)
    if kind == ETH_IPV4:
        found = _in_ipv4(head, at, size)
    elif kind == ETH_IPV6:
        found = _in_ipv6(head, at, size)
    else:
        return None
    if found is None or found.start + _L4_SIZE[found.protocol] > found.end:
        return None
    return found


def _in_ipv4(head: bytes | memoryview, at: int, size: int) -> Transport | None:
    if len(head) < at + 20 or head[at] >> 4 != 4:
        return None
    length = (head[at] & 15) * 4
    total = head[at + 2] << 8 | head[at + 3]
    fragment = (head[at + 6] << 8 | head[at + 7]) & 0x3FFF  # offset, and "more fragments"
    protocol = head[at + 9]
    if length < 20 or fragment or protocol not in _CSUM_AT or not length <= total <= size - at:
        return None
    return Transport(4, protocol, at + length, at + total)


def _in_ipv6(head: bytes | memoryview, at: int, size: int) -> Transport | None:
    if len(head) < at + 40 or head[at] >> 4 != 6:
        return None
    end = at + 40 + (head[at + 4] << 8 | head[at + 5])
    protocol, start = head[at + 6], at + 40
    if end > size:
        return None
    for _ in range(_MAX_EXTENSIONS):
        if protocol in _CSUM_AT:
            return Transport(6, protocol, start, end)
        if protocol not in _EXTENSIONS or len(head) < start + 2:
            return None
        protocol, start = head[start], start + 8 * (head[start + 1] + 1)
    return None


def _at_a_glance(frame: bytes | memoryview, at: int, size: int) -> tuple[int, int]:
    """The protocol and the size of TCP's header, of one of ``_GLANCE``'s frames; ``(0, 0)`` if it is not
    one, or is too short to say: that is for ``find_transport``."""
    if size < _GLANCE.size:
        return 0, 0
    kind, version, total, fragment, protocol, offset = _GLANCE.unpack_from(frame, at)
    if kind != ETH_IPV4 or version != 0x45 or fragment & 0x3FFF or not 40 <= total <= size - ETH_HLEN:
        return 0, 0
    length = (offset >> 4) * 4
    if protocol == TCP and 20 <= length <= total - 20:
        return TCP, length
    return (UDP, 0) if protocol == UDP else (0, 0)


def encode(frame: bytes | memoryview, todo: Offload, at: int = 0) -> bytes:
    """The virtio-net header for a guest's frame, which begins at byte ``at``. Raises ``RemoteProtocolError``
    where the guest asks for what the frame's headers do not allow: the frame is to be dropped."""
    if not todo.csum_blank:
        if todo.gso is not None:
            raise RemoteProtocolError("GSO without checksum offload")
        return _JUST_VALIDATED if todo.data_validated else PLAIN
    size, gso = len(frame) - at, todo.gso
    protocol, length = _at_a_glance(frame, at, size)
    if gso is None and protocol:
        return _BLANK_TCP4 if protocol == TCP else _BLANK_UDP4
    if gso is not None and gso.type == XEN_NETIF_GSO_TYPE_TCPV4 and protocol == TCP:
        kind = VIRTIO_NET_HDR_GSO_TCPV4
        return HEADER.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, kind, _L4_AT + length, gso.mss, _L4_AT, _CSUM_AT[TCP])
    with memoryview(frame)[at:] as whole:
        return _encode(whole, todo)


def _encode(frame: memoryview, todo: Offload) -> bytes:
    with frame[:LOOK] as head:
        found = find_transport(bytes(head), len(frame))
    if found is None:
        raise RemoteProtocolError("checksum offload for a frame without a TCP or UDP header")
    kind, header, mss = VIRTIO_NET_HDR_GSO_NONE, 0, 0
    if todo.gso is not None:
        header = _tcp_end(frame, found, todo.gso)
        kind, mss = _VIRTIO[todo.gso.type], todo.gso.mss
    return HEADER.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, kind, header, mss, found.start, found.csum_offset)


def _tcp_end(frame: bytes | memoryview, found: Transport, gso: Gso) -> int:
    """Where the payload of a frame to be cut begins."""
    if gso.type not in _VIRTIO:
        raise RemoteProtocolError(f"GSO type {gso.type}")
    if found.protocol != TCP or found.version != (4 if gso.type == XEN_NETIF_GSO_TYPE_TCPV4 else 6):
        raise RemoteProtocolError(f"GSO type {gso.type} for a frame of another kind")
    length = (frame[found.start + 12] >> 4) * 4
    if length < 20 or found.start + length > found.end:
        raise RemoteProtocolError(f"GSO with a TCP header of {length} bytes")
    return found.start + length


def decode_at(room: memoryview, size: int, csum: tuple[bool, bool]) -> Offload:
    """As ``decode``, for the frame that lies behind its header in the first ``size`` bytes of ``room``."""
    flags, kind, _, mss, start, offset = HEADER.unpack_from(room)
    if not flags | kind:
        return NOTHING
    if flags == VIRTIO_NET_HDR_F_DATA_VALID:
        return VALIDATED
    if flags & VIRTIO_NET_HDR_F_NEEDS_CSUM and start == _L4_AT and csum[0]:
        protocol, _ = _at_a_glance(room, HEADER.size, size - HEADER.size)
        if protocol and _CSUM_AT[protocol] == offset:
            if kind == VIRTIO_NET_HDR_GSO_NONE:
                return BLANK
            if kind & ~VIRTIO_NET_HDR_GSO_ECN == VIRTIO_NET_HDR_GSO_TCPV4 and mss:
                return Offload(True, True, Gso(XEN_NETIF_GSO_TYPE_TCPV4, mss))
    with room[HEADER.size : size] as frame:
        return decode(bytes(room[: HEADER.size]), frame, csum=csum)


def decode(raw: bytes | memoryview, frame: memoryview, *, csum: tuple[bool, bool] = (True, True)) -> Offload:
    """What a tap's header says of ``frame``, for a frontend that takes blank checksums as ``csum`` says
    (IPv4, IPv6). A checksum it could not complete is completed here, in ``frame``.

    Raises ``RemoteProtocolError`` for a header that does not fit the frame.
    """
    flags, kind, _, mss, start, offset = HEADER.unpack_from(raw)
    gso = None
    if kind & ~VIRTIO_NET_HDR_GSO_ECN != VIRTIO_NET_HDR_GSO_NONE:
        name = _NETIF.get(kind & ~VIRTIO_NET_HDR_GSO_ECN)
        if name is None or not mss:
            raise RemoteProtocolError(f"a frame of GSO type {kind} with segments of {mss} bytes")
        gso = Gso(name, mss)
    if not flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        if gso is not None:
            raise RemoteProtocolError("a frame to be cut, with its checksum complete")
        return Offload(data_validated=bool(flags & VIRTIO_NET_HDR_F_DATA_VALID))
    with frame[:LOOK] as head:
        found = find_transport(bytes(head), len(frame))
    takes = found is not None and csum[found.version == 6] and found[2] == start
    if takes and found is not None and found.csum_offset == offset:
        return Offload(True, True, gso)
    if gso is not None:
        raise RemoteProtocolError("a frame to be cut, to a frontend that cannot complete checksums")
    complete(frame, start, offset)
    return Offload(data_validated=True)


def complete(frame: memoryview, start: int, offset: int, end: int | None = None) -> None:
    """Fill in a blank checksum: the sum of everything from ``start`` to ``end``, at ``start + offset``.

    Raises ``RemoteProtocolError`` if that lies outside the frame.
    """
    end = len(frame) if end is None else end
    at = start + offset
    if not 0 <= start <= at <= end - 2 or end > len(frame):
        raise RemoteProtocolError(f"a checksum at byte {at} of a frame of {len(frame)}")
    frame[at : at + 2] = checksum(frame[start:end]).to_bytes(2, "big")


def checksum(data: bytes | memoryview) -> int:
    """The Internet checksum (RFC 1071). 0, which means "none" to UDP, comes out as its other form 0xFFFF."""
    number = int.from_bytes(data, "big")
    if len(data) & 1:
        number <<= 8
    return 0xFFFF - number % 0xFFFF


def finish(frame: memoryview, todo: Offload) -> None:
    """Complete what a guest left blank, for a receiver that does not. Only what IP says is summed: a frame
    may have padding. Raises ``RemoteProtocolError`` as ``encode`` does."""
    if not todo.csum_blank:
        return
    with frame[:LOOK] as head:
        found = find_transport(bytes(head), len(frame))
    if found is None:
        raise RemoteProtocolError("checksum offload for a frame without a TCP or UDP header")
    complete(frame, found.start, found.csum_offset, found.end)
