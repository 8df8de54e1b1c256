"""What a guest may send, and how much. Pure.

``SourceRules`` keeps a guest from speaking as somebody else: the source address of its frames must be that of
its interface, and so must the sender's in ARP, where neighbours learn who has an IP address. Neither is
looked at beyond that: IP addresses are free, since nothing here knows which the guest was given.
"""

from __future__ import annotations

from struct import Struct

from xtool.backends.vnethdr import ETH_ARP, ETH_HLEN, ETH_IPV4, ETH_IPV6, ethertype

#: From the beginning of an ARP packet to the sender's hardware address, and to the end of it.
_ARP_SENDER, _ARP_SENDER_END = 8, 14
#: The source address and the ethertype; ethertypes of which the source address is all that is looked at.
_SOURCE = Struct(">6x6sH")
_EASY = (ETH_IPV4, ETH_IPV6)


class SourceRules:
    """``mac`` is the interface's, 6 bytes; None lets everything pass."""

    def __init__(self, mac: bytes | None) -> None:
        self._mac = mac
        self._easy = frozenset((mac, kind) for kind in _EASY)

    @property
    def active(self) -> bool:
        return self._mac is not None

    def easy(self, room: memoryview, at: int) -> bool:
        """Whether the frame at byte ``at`` of ``room`` may be sent, by a look that most frames need no more
        than. False says nothing: ask ``refusal``."""
        return self._mac is None or _SOURCE.unpack_from(room, at) in self._easy

    def refusal(self, head: bytes) -> str | None:
        """Why a frame that begins with ``head`` (64 bytes, or all of it) must not be sent, or None."""
        mac = self._mac
        if mac is None:
            return None
        if head[6:12] != mac:
            return f"a frame from {head[6:12].hex(':')}"
        if head[12:14] == b"\x08\x00":  # by far the most
            return None
        kind, at = ethertype(head)
        if kind == 0 and at > ETH_HLEN:
            return "a frame within too many VLANs, or cut short"
        if kind == ETH_ARP and head[at + _ARP_SENDER : at + _ARP_SENDER_END] != mac:
            return f"ARP from {head[at + _ARP_SENDER : at + _ARP_SENDER_END].hex(':')}"
        return None


def parse_rate(text: str | None) -> tuple[int, float]:
    """The ``rate`` node, ``bytes,microseconds``: bytes per second, 0 where there is none or one that limits
    nothing, and the burst in seconds.

    Raises ``ValueError`` for other text.
    """
    if not text:
        return 0, 0.0
    count, comma, interval = text.partition(",")
    if not (comma and count.isdecimal() and interval.isdecimal()) or len(text) > 24:
        raise ValueError(f"rate {text[:40]!r} is not bytes,microseconds")
    if not int(count) or not int(interval):
        return 0, 0.0
    seconds = int(interval) / 1e6
    return max(1, int(int(count) / seconds)), seconds
