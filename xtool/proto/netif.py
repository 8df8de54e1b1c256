"""Network slots (``public/io/netif.h``): frames out of a guest's tx slots, frames into its rx slots.

``TxAssembler`` takes copies of request slots and gives whole frames, or drops with a reason, both with the
responses for every slot they used. ``RxBuilder`` spreads a frame over free rx requests.

Facts about netif
-----------------
* The size in a frame's first tx slot is that of the whole frame; its own part is what the others leave.
* Extra info uses up a whole slot, has no id, and sits between the first slot and the rest. It is answered
  with status NULL.
* Linux's netfront takes an rx response for the request in the same ring slot, whatever its id says; so
  responses must stay in their places, and extra info takes the place of the frame's second request.
* A frame of up to 18 slots is legal. Linux's netback drops longer ones and gives a frontend up at 20.
* Slots of one frame may arrive in several looks at the ring; the assembler remembers where it was.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from xtool.abi.io import (
    NETIF_RSP_ERROR,
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    XEN_NETIF_EXTRA_FLAG_MORE,
    XEN_NETIF_EXTRA_TYPE_GSO,
    XEN_NETIF_EXTRA_TYPE_MAX,
    XEN_NETIF_GSO_TYPE_TCPV4,
    XEN_NETIF_GSO_TYPE_TCPV6,
    XEN_NETIF_MAX_TX_SIZE,
    XEN_NETIF_NR_SLOTS_MIN,
    NETRXF_csum_blank,
    NETRXF_data_validated,
    NETRXF_extra_info,
    NETRXF_more_data,
    NETTXF_csum_blank,
    NETTXF_data_validated,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from xtool.errors import LocalProtocolError, RingError

TX_SLOT_SIZE = 12
RX_SLOT_SIZE = 8
PAGE_SIZE = 4096
ETH_HLEN = 14
MAX_SLOTS = XEN_NETIF_NR_SLOTS_MIN
MAX_FRAME = XEN_NETIF_MAX_TX_SIZE
#: Data slots from which on a chain is taken for one that never ends.
FATAL_SLOTS = 20
#: Likewise extra infos: there are four kinds.
FATAL_EXTRAS = 8

TX_REQUEST = Struct("<IHHHH")  # gref, offset, flags, id, size
TX_RESPONSE = Struct("<Hh")  # id, status
RX_REQUEST = Struct("<H2xI")  # id, gref
RX_RESPONSE = Struct("<HHHh")  # id, offset, flags, status
EXTRA = Struct("<BBHBxH")  # type, flags; gso: size, type, features

#: A piece of a guest's page: grant reference, byte offset in the page, length in bytes.
Fragment = tuple[int, int, int]


#: The response to extra info, as a word.
_NULL = NETIF_RSP_NULL << 16
#: A frame that has more than its first slot.
_LONGER = NETTXF_extra_info | NETTXF_more_data
#: An rx response without its id: a full page, and there is more. And what is not its status.
_FULL = NETRXF_more_data << 32 | PAGE_SIZE << 48
_BUT_STATUS = (1 << 48) - 1


class Gso(NamedTuple):
    """A frame to be cut into TCP segments of ``mss`` bytes; ``type`` is ``XEN_NETIF_GSO_TYPE_*``."""

    type: int
    mss: int


def _with_status(slots: Sequence[int], status: int) -> list[int]:
    """``slots`` are words of a frame's responses that say OKAY, or NULL for extra info."""
    if status == NETIF_RSP_OKAY:
        return list(slots)
    return [slot if slot == _NULL else slot | (status & 0xFFFF) << 16 for slot in slots]


def _as_bytes(words: Sequence[int], size: int) -> list[bytes]:
    return [word.to_bytes(size, "little") for word in words]


class TxFrame(NamedTuple):
    """A whole frame: copy the fragments in order, then answer its slots. ``size`` is in bytes, and that of
    all fragments; each lies within its page."""

    fragments: tuple[Fragment, ...]
    size: int
    csum_blank: bool
    data_validated: bool
    gso: Gso | None
    slots: Sequence[int]

    def answers(self, status: int = NETIF_RSP_OKAY) -> list[int]:
        """One response per slot, in order, each a word as it stands on the ring."""
        return _with_status(self.slots, status)

    def responses(self, status: int = NETIF_RSP_OKAY) -> list[bytes]:
        return _as_bytes(self.answers(status), TX_RESPONSE.size)


class TxDrop(NamedTuple):
    """A frame that must not be sent; answer it and count it. ``reason`` is for the log."""

    reason: str
    slots: Sequence[int]

    def answers(self) -> list[int]:
        return _with_status(self.slots, NETIF_RSP_ERROR)

    def responses(self) -> list[bytes]:
        return _as_bytes(self.answers(), TX_RESPONSE.size)


class _Open:
    """A frame whose end was not seen yet: its first slot, and what came after."""

    __slots__ = ("extra_next", "extras", "first", "flags", "gso", "rest", "size", "slots", "why")

    def __init__(self, gref: int, offset: int, flags: int, request_id: int, size: int) -> None:
        self.first = (gref, offset)
        self.flags = flags
        self.size = size
        self.slots = [request_id]
        self.rest: list[Fragment] = []
        self.gso: Gso | None = None
        self.extras: list[int] = []
        self.extra_next = bool(flags & NETTXF_extra_info)
        self.why: str | None = None


class TxAssembler:
    """Tx request slots in, frames out. What was begun and not ended is bounded by ``FATAL_SLOTS``.

    ``gso_types``: what the backend offered. ``max_size``: the largest frame without GSO, in bytes.
    """

    def __init__(self, *, gso_types: frozenset[int] = frozenset(), max_size: int = MAX_FRAME) -> None:
        self.gso_types = gso_types
        self.max_size = max_size
        self._open: _Open | None = None

    @property
    def open_slots(self) -> int:
        """Slots of a frame whose end was not seen yet."""
        return len(self._open.slots) if self._open is not None else 0

    def feed(self, slots: Sequence[bytes]) -> list[TxFrame | TxDrop]:
        """What is complete after these slots. Raises ``RingError`` for a chain that does not end."""
        return self.feed_block(b"".join(slots))

    def feed_block(self, block: bytes) -> list[TxFrame | TxDrop]:
        """As ``feed``, the slots one after the other."""
        done: list[TxFrame | TxDrop] = []
        frame, at = self._open, -TX_SLOT_SIZE
        for gref, offset, flags, request_id, size in TX_REQUEST.iter_unpack(block):
            at += TX_SLOT_SIZE
            if frame is None:
                if flags & _LONGER:
                    self._open = frame = _Open(gref, offset, flags, request_id, size)
                elif ETH_HLEN <= size <= self.max_size and offset + size <= PAGE_SIZE:
                    # By far the most: one slot, nothing to be checked beyond this.
                    blank, valid = bool(flags & NETTXF_csum_blank), bool(flags & NETTXF_data_validated)
                    done.append(TxFrame(((gref, offset, size),), size, blank, valid, None, (request_id,)))
                else:
                    done.append(self._end(_Open(gref, offset, flags, request_id, size)))
                continue
            if frame.extra_next:
                self._extra(frame, block[at : at + TX_SLOT_SIZE])
                if frame.extra_next or frame.flags & NETTXF_more_data:
                    continue
            else:
                frame.slots.append(request_id)
                frame.rest.append((gref, offset, size))
                if flags & NETTXF_extra_info or len(frame.rest) >= MAX_SLOTS:
                    self._suspect(frame, flags)
                if flags & NETTXF_more_data:
                    continue
            done.append(self._end(frame))
            self._open = frame = None
        return done

    def _suspect(self, frame: _Open, flags: int) -> None:
        data_slots = 1 + len(frame.rest)
        if data_slots > FATAL_SLOTS:
            raise RingError(f"more than {FATAL_SLOTS} slots in one frame")
        if data_slots > MAX_SLOTS:
            frame.why = frame.why or f"more than {MAX_SLOTS} slots"
        if flags & NETTXF_extra_info:
            frame.why = frame.why or "extra info after the first slot"

    def _extra(self, frame: _Open, slot: bytes) -> None:
        kind, flags, size, gso_type, _ = EXTRA.unpack_from(slot)
        frame.slots.append(_NULL)
        why = None
        if not 0 < kind < XEN_NETIF_EXTRA_TYPE_MAX:
            why = f"extra info of type {kind}"
        elif kind in frame.extras:
            why = f"extra info of type {kind} twice"
        elif kind != XEN_NETIF_EXTRA_TYPE_GSO:
            why = f"extra info of type {kind}, which was not offered"
        elif gso_type not in self.gso_types:
            why = f"GSO type {gso_type}, which was not offered"
        elif not size:
            why = "GSO with segments of 0 bytes"
        else:
            frame.gso = Gso(gso_type, size)
        frame.why = frame.why or why
        frame.extras.append(kind)
        if len(frame.extras) > FATAL_EXTRAS:
            raise RingError(f"more than {FATAL_EXTRAS} extra infos in one frame")
        frame.extra_next = bool(flags & XEN_NETIF_EXTRA_FLAG_MORE)

    def _end(self, frame: _Open) -> TxFrame | TxDrop:
        flags, size, gso = frame.flags, frame.size, frame.gso
        own = size - sum([length for _, _, length in frame.rest])
        fragments = ((*frame.first, own), *frame.rest)
        reason = frame.why or self._wrong(size, flags, gso, fragments)
        if reason:
            return TxDrop(reason, frame.slots)
        blank, valid = bool(flags & NETTXF_csum_blank), bool(flags & NETTXF_data_validated)
        return TxFrame(fragments, size, blank, valid, gso, frame.slots)

    def _wrong(self, size: int, flags: int, gso: Gso | None, fragments: Sequence[Fragment]) -> str | None:
        if size < ETH_HLEN:
            return f"a frame of {size} bytes"
        for _, offset, length in fragments:
            if length <= 0:
                return f"a fragment of {length} bytes"
            if offset + length > PAGE_SIZE:
                return f"bytes {offset} + {length} of a page"
        if gso is None:
            return f"a frame of {size} bytes" if size > self.max_size else None
        return None if flags & NETTXF_csum_blank else "GSO without checksum offload"


def rx_words(block: bytes) -> array[int]:
    """Rx requests, one after the other, as words: the id in the lowest 16 bits, the grant above 32."""
    return array("Q", block)


def rx_answer(request: int, flags: int, length: int) -> int:
    """The response to a request that got ``length`` bytes at the beginning of its page, as words both."""
    return request & 0xFFFF | flags << 32 | length << 48


def rx_flags(csum_blank: bool, data_validated: bool) -> int:
    """A frame's flags, in its first response."""
    if csum_blank:
        return NETRXF_csum_blank | NETRXF_data_validated
    return NETRXF_data_validated if data_validated else 0


class RxPlan(NamedTuple):
    """How a frame goes out: a page of it to each grant, what is left to the last; the response to each
    request, a word as it stands on the ring. Copies go to offset 0 of their page. ``size`` is in bytes."""

    grefs: list[int]
    size: int
    answers: list[int]

    @property
    def copies(self) -> tuple[Fragment, ...]:
        """Of each copy the grant, where in the frame, how many bytes."""
        return tuple(
            (gref, at, min(PAGE_SIZE, self.size - at))
            for gref, at in zip(self.grefs, range(0, self.size, PAGE_SIZE), strict=True)
        )

    @property
    def of(self) -> tuple[int, ...]:
        """``of[i]`` is the index in ``answers`` of copy ``i``."""
        extras = len(self.answers) - len(self.grefs)
        return (0, *range(1 + extras, len(self.answers)))

    @property
    def responses(self) -> list[bytes]:
        return _as_bytes(self.answers, RX_RESPONSE.size)

    def failed(self, copy: int) -> None:
        """Copy ``copy`` was refused by Xen: say so in its response; the frontend drops the frame."""
        at = self.of[copy]
        self.answers[at] = self.answers[at] & _BUT_STATUS | (NETIF_RSP_ERROR & 0xFFFF) << 48


class RxBuilder:
    """Frames to one frontend. ``sg``: it takes frames over several slots; ``gso_types``: that it takes."""

    def __init__(self, *, sg: bool, gso_types: frozenset[int] = frozenset()) -> None:
        self.sg = sg
        self.gso_types = gso_types

    def refusal(self, size: int, gso: Gso | None = None) -> str | None:
        """Why a frame of ``size`` bytes can never go to this frontend, or None."""
        if not ETH_HLEN <= size <= MAX_FRAME:
            return f"a frame of {size} bytes"
        if size > PAGE_SIZE and not self.sg:
            return "a frame over one page to a frontend that takes one slot"
        if gso is not None and gso.type not in self.gso_types:
            return f"GSO type {gso.type} to a frontend that does not take it"
        return None

    @staticmethod
    def needed(size: int, gso: Gso | None = None) -> int:
        """How many rx requests a frame uses up."""
        return -(-size // PAGE_SIZE) + (gso is not None)

    def build(
        self,
        size: int,
        requests: Sequence[bytes],
        *,
        gso: Gso | None = None,
        csum_blank: bool = False,
        data_validated: bool = False,
    ) -> RxPlan:
        """Spread a frame over exactly ``needed`` requests, in ring order."""
        return self.spread(size, rx_words(b"".join(requests)), gso, rx_flags(csum_blank, data_validated))

    def spread(self, size: int, requests: Sequence[int], gso: Gso | None, flags: int) -> RxPlan:
        """As ``build``, for the words of requests; ``flags``: see ``rx_flags``."""
        if len(requests) != self.needed(size, gso) or self.refusal(size, gso):
            raise LocalProtocolError(f"{len(requests)} rx requests for a frame of {size} bytes")
        data = list(requests)
        if gso is not None:
            del data[1]
            flags |= NETRXF_extra_info
        answers = [request & 0xFFFF | _FULL for request in data]
        answers[-1] = rx_answer(data[-1], 0, size - (len(data) - 1) * PAGE_SIZE)
        answers[0] |= flags << 32
        if gso is not None:
            answers.insert(1, XEN_NETIF_EXTRA_TYPE_GSO | gso.mss << 16 | gso.type << 32)
        return RxPlan([request >> 32 for request in data], size, answers)


GSO_TCP = frozenset({XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6})
