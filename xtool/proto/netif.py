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


class Gso(NamedTuple):
    """A frame to be cut into TCP segments of ``mss`` bytes; ``type`` is ``XEN_NETIF_GSO_TYPE_*``."""

    type: int
    mss: int


class _Answers(NamedTuple):
    """Which slots a frame used: ids of data slots, None for extra info, in ring order."""

    ids: tuple[int | None, ...]

    def with_status(self, status: int) -> list[bytes]:
        return [
            TX_RESPONSE.pack(0, NETIF_RSP_NULL) if slot is None else TX_RESPONSE.pack(slot, status)
            for slot in self.ids
        ]


class TxFrame(NamedTuple):
    """A whole frame: copy the fragments in order, then answer its slots. ``size`` is in bytes."""

    fragments: tuple[Fragment, ...]
    size: int
    csum_blank: bool
    data_validated: bool
    gso: Gso | None
    slots: _Answers

    def responses(self, status: int = NETIF_RSP_OKAY) -> list[bytes]:
        """One response per slot, in order: to be put on the ring in one batch."""
        return self.slots.with_status(status)


class TxDrop(NamedTuple):
    """A frame that must not be sent; answer it and count it. ``reason`` is for the log."""

    reason: str
    slots: _Answers

    def responses(self) -> list[bytes]:
        return self.slots.with_status(NETIF_RSP_ERROR)


class TxAssembler:
    """Tx request slots in, frames out. What was begun and not ended is bounded by ``FATAL_SLOTS``.

    ``gso_types``: what the backend offered. ``max_size``: the largest frame without GSO, in bytes.
    """

    def __init__(self, *, gso_types: frozenset[int] = frozenset(), max_size: int = MAX_FRAME) -> None:
        self.gso_types = gso_types
        self.max_size = max_size
        self._reset()

    def _reset(self) -> None:
        self._ids: list[int | None] = []
        self._rest: list[Fragment] = []
        self._first: tuple[int, int, int, int, int] | None = None
        self._gso: Gso | None = None
        self._extras: set[int] = set()
        self._extra_next = False
        self._why: str | None = None

    @property
    def open_slots(self) -> int:
        """Slots of a frame whose end was not seen yet."""
        return len(self._ids)

    def feed(self, slots: Sequence[bytes]) -> list[TxFrame | TxDrop]:
        """What is complete after these slots. Raises ``RingError`` for a chain that does not end."""
        done: list[TxFrame | TxDrop] = []
        for slot in slots:
            if self._extra_next:
                ended = self._extra(slot)
            elif self._first is None:
                ended = self._begin(slot)
            else:
                ended = self._continue(slot)
            if ended:
                done.append(self._end())
                self._reset()
        return done

    def _drop(self, reason: str) -> None:
        self._why = self._why or reason

    def _begin(self, slot: bytes) -> bool:
        first = TX_REQUEST.unpack_from(slot)
        self._first = first
        self._ids.append(first[3])
        self._extra_next = bool(first[2] & NETTXF_extra_info)
        return not first[2] & (NETTXF_extra_info | NETTXF_more_data)

    def _extra(self, slot: bytes) -> bool:
        kind, flags, size, gso_type, _ = EXTRA.unpack_from(slot)
        self._ids.append(None)
        if not 0 < kind < XEN_NETIF_EXTRA_TYPE_MAX:
            self._drop(f"extra info of type {kind}")
        elif kind in self._extras:
            self._drop(f"extra info of type {kind} twice")
        elif kind != XEN_NETIF_EXTRA_TYPE_GSO:
            self._drop(f"extra info of type {kind}, which was not offered")
        elif gso_type not in self.gso_types:
            self._drop(f"GSO type {gso_type}, which was not offered")
        elif not size:
            self._drop("GSO with segments of 0 bytes")
        else:
            self._gso = Gso(gso_type, size)
        self._extras.add(kind)
        if self._ids.count(None) > FATAL_EXTRAS:
            raise RingError(f"more than {FATAL_EXTRAS} extra infos in one frame")
        self._extra_next = bool(flags & XEN_NETIF_EXTRA_FLAG_MORE)
        assert self._first is not None
        return not self._extra_next and not self._first[2] & NETTXF_more_data

    def _continue(self, slot: bytes) -> bool:
        gref, offset, flags, request_id, size = TX_REQUEST.unpack_from(slot)
        self._ids.append(request_id)
        data_slots = len(self._ids) - self._ids.count(None)
        if data_slots > FATAL_SLOTS:
            raise RingError(f"more than {FATAL_SLOTS} slots in one frame")
        if data_slots > MAX_SLOTS:
            self._drop(f"more than {MAX_SLOTS} slots")
        if flags & NETTXF_extra_info:
            self._drop("extra info after the first slot")
        self._rest.append((gref, offset, size))
        return not flags & NETTXF_more_data

    def _end(self) -> TxFrame | TxDrop:
        slots = _Answers(tuple(self._ids))
        assert self._first is not None
        gref, offset, flags, _, size = self._first
        own = size - sum(fragment[2] for fragment in self._rest)
        fragments = ((gref, offset, own), *self._rest)
        reason = self._why or self._wrong(size, flags, fragments)
        if reason:
            return TxDrop(reason, slots)
        return TxFrame(
            fragments,
            size,
            bool(flags & NETTXF_csum_blank),
            bool(flags & NETTXF_data_validated),
            self._gso,
            slots,
        )

    def _wrong(self, size: int, flags: int, fragments: Sequence[Fragment]) -> str | None:
        if size < ETH_HLEN:
            return f"a frame of {size} bytes"
        for _, offset, length in fragments:
            if length <= 0:
                return f"a fragment of {length} bytes"
            if offset + length > PAGE_SIZE:
                return f"bytes {offset} + {length} of a page"
        if self._gso is None:
            return f"a frame of {size} bytes" if size > self.max_size else None
        return None if flags & NETTXF_csum_blank else "GSO without checksum offload"


class RxPlan(NamedTuple):
    """How a frame goes out: for each copy the grant, where in the frame, how many bytes, and its response.

    Copies go to offset 0 of their page. ``of[i]`` is the index in ``responses`` of copy ``i``.
    """

    copies: tuple[Fragment, ...]
    of: tuple[int, ...]
    responses: list[bytes]

    def failed(self, copy: int) -> None:
        """Copy ``copy`` was refused by Xen: say so in its response; the frontend drops the frame."""
        at = self.of[copy]
        request_id, offset, flags, _ = RX_RESPONSE.unpack(self.responses[at])
        self.responses[at] = RX_RESPONSE.pack(request_id, offset, flags, NETIF_RSP_ERROR)


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
        if len(requests) != self.needed(size, gso) or self.refusal(size, gso):
            raise LocalProtocolError(f"{len(requests)} rx requests for a frame of {size} bytes")
        copies: list[Fragment] = []
        of: list[int] = []
        responses: list[bytes] = []
        at = 0
        first = NETRXF_data_validated if data_validated or csum_blank else 0
        first |= NETRXF_csum_blank if csum_blank else 0
        first |= NETRXF_extra_info if gso else 0
        for number, request in enumerate(requests):
            if number == 1 and gso is not None:
                responses.append(EXTRA.pack(XEN_NETIF_EXTRA_TYPE_GSO, 0, gso.mss, gso.type, 0))
                continue
            request_id, gref = RX_REQUEST.unpack_from(request)
            length = min(PAGE_SIZE, size - at)
            copies.append((gref, at, length))
            of.append(number)
            at += length
            flags = (first if number == 0 else 0) | (NETRXF_more_data if at < size else 0)
            responses.append(RX_RESPONSE.pack(request_id, 0, flags, length))
        return RxPlan(tuple(copies), tuple(of), responses)


GSO_TCP = frozenset({XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6})
