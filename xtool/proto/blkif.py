"""Block requests and responses (``public/io/blkif.h``): parsing what a guest sent, and building both.

``parse_request`` takes a private copy of a ring slot and returns a request that can be carried out as it
is, or a ``BadRequest`` that can be answered as it is. It never raises.

Facts about blkif
-----------------
* Sectors are 512 bytes on the ring whatever ``sector-size`` says; that is what Linux and QEMU do.
* The layout depends on the frontend's ``protocol``: a 32-bit x86 guest packs its 64-bit numbers to 4 bytes.
* A flush may carry data (flush, then write); Linux sends a barrier for a write that must be durable.
* The operation in the response to an indirect request is the one inside it, not ``INDIRECT``: Linux
  disables a device that answers otherwise. Bytes of a request beyond its segments mean nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

from xtool.abi.io import (
    BLKIF_DISCARD_SECURE,
    BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST,
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
)
from xtool.errors import LocalProtocolError
from xtool.proto.blksegments import PAGE, Segment, Segments, WholePages

SECTOR = 512
SEGMENT_SIZE = 8
SEGMENTS_PER_PAGE = 4096 // SEGMENT_SIZE
#: The most segments an indirect request can name.
MAX_INDIRECT = BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST * SEGMENTS_PER_PAGE

_SEGMENT = "IBB2x"
_SEGMENT_STRUCT = Struct("<" + _SEGMENT)
#: The second word of a segment that is a whole page: sectors 0 to 7.
_WHOLE = (7 << 8).to_bytes(4, "little") * SEGMENTS_PER_PAGE


class Layout(NamedTuple):
    """How one machine ABI lays out a slot. Sizes are bytes."""

    protocol: str
    slot_size: int
    id_at: int
    transfers: tuple[Struct, ...]  # by number of segments
    discard: Struct
    indirect: Struct
    response: Struct


def _layout(protocol: str, header: str, id_at: int, slot_size: int, response: str) -> Layout:
    most = BLKIF_MAX_SEGMENTS_PER_REQUEST
    return Layout(
        protocol,
        slot_size,
        id_at,
        tuple(Struct(f"<BBH{header}{_SEGMENT * n}") for n in range(most + 1)),
        Struct(f"<BBH{header}Q"),
        Struct(f"<BBH{header}H2x8I"),
        Struct(response),
    )


X86_64 = _layout("x86_64-abi", "4xQQ", 8, 112, "<QBxh4x")
X86_32 = _layout("x86_32-abi", "QQ", 4, 108, "<QBxh")
LAYOUTS = {layout.protocol: layout for layout in (X86_64, X86_32)}


class Limits(NamedTuple):
    """What the backend offered and what the disk is: a request beyond it is bad.

    ``capacity`` is in sectors of 512 bytes; ``max_indirect`` 0 means not offered.
    """

    capacity: int
    readonly: bool = False
    flush: bool = True
    barrier: bool = False
    discard: bool = False
    secure_discard: bool = False
    max_indirect: int = 0


class Read(NamedTuple):
    """``sector``, ``sectors``: where on the disk, in units of 512 bytes. ``segments`` add up to it."""

    id: int
    sector: int
    sectors: int
    segments: Segments
    operation: int = BLKIF_OP_READ


class Write(NamedTuple):
    id: int
    sector: int
    sectors: int
    segments: Segments
    operation: int = BLKIF_OP_WRITE


class Barrier(NamedTuple):
    """All writes before it are to be durable before this one is, this one before any later. May be empty."""

    id: int
    sector: int
    sectors: int
    segments: Segments
    operation: int = BLKIF_OP_WRITE_BARRIER


class Flush(NamedTuple):
    """Make all answered writes durable; then write ``segments``, if there are any."""

    id: int
    sector: int
    sectors: int
    segments: Segments
    operation: int = BLKIF_OP_FLUSH_DISKCACHE


class Discard(NamedTuple):
    id: int
    sector: int
    sectors: int
    secure: bool
    operation: int = BLKIF_OP_DISCARD


class Indirect(NamedTuple):
    """A read or write whose ``nr_segments`` segments stand in the pages granted by ``refs``: copy them, then
    ``parse_indirect``. ``operation`` is the one inside."""

    id: int
    operation: int
    sector: int
    nr_segments: int
    refs: tuple[int, ...]


class BadRequest(NamedTuple):
    """To be answered with ``status``; ``reason`` is for the log."""

    id: int
    operation: int
    reason: str
    status: int = BLKIF_RSP_ERROR


Transfer = Read | Write | Barrier | Flush
Request = Transfer | Discard | Indirect | BadRequest

_TRANSFER: dict[int, Callable[[int, int, int, Segments], Transfer]] = {
    BLKIF_OP_READ: Read,
    BLKIF_OP_WRITE: Write,
    BLKIF_OP_WRITE_BARRIER: Barrier,
    BLKIF_OP_FLUSH_DISKCACHE: Flush,
}


def parse_request(slot: bytes, limits: Limits, layout: Layout = X86_64) -> Request:
    """What a whole slot (``layout.slot_size`` bytes, a private copy) asks for."""
    op, count = slot[0], slot[1]
    if op > BLKIF_OP_FLUSH_DISKCACHE:
        return _parse_other(slot, limits, layout)
    if count > BLKIF_MAX_SEGMENTS_PER_REQUEST:
        return BadRequest(_id(slot, layout), op, f"{count} segments")
    fields = layout.transfers[count].unpack_from(slot)
    if count == 1 and op <= BLKIF_OP_WRITE:  # the hot path: no loops
        _, _, _, request_id, sector, ref, first, last = fields
        if first > last or last > 7:
            return BadRequest(request_id, op, f"sectors {first} to {last} of a page")
        if sector + last - first >= limits.capacity:
            return BadRequest(request_id, op, _beyond(sector, last - first + 1, limits))
        length = last - first + 1
        if op == BLKIF_OP_READ:
            return Read(request_id, sector, length, ((ref, first * SECTOR, length * SECTOR),))
        if limits.readonly:
            return BadRequest(request_id, op, "a write to a read-only disk")
        return Write(request_id, sector, length, ((ref, first * SECTOR, length * SECTOR),))
    return _transfer(op, fields[3], fields[4], fields[5:], limits)


def parse_indirect(request: Indirect, pages: bytes, limits: Limits) -> Transfer | BadRequest:
    """The transfer an indirect request stands for. ``pages``: a private copy of its pages, in order."""
    needed = request.nr_segments * SEGMENT_SIZE
    if len(pages) < needed:
        return BadRequest(request.id, request.operation, f"{len(pages)} bytes of segments, {needed} needed")
    words = array("I", pages[:needed])  # the guest and we are little-endian
    if needed <= len(_WHOLE) * 2 and words[1::2].tobytes() == _WHOLE[: needed // 2]:
        sectors = request.nr_segments * (PAGE // SECTOR)
        if request.operation == BLKIF_OP_WRITE and limits.readonly:
            return BadRequest(request.id, request.operation, "a write to a read-only disk")
        if request.sector + sectors > limits.capacity:
            reason = _beyond(request.sector, sectors, limits)
            return BadRequest(request.id, request.operation, reason)
        segments = WholePages(words[0::2].tolist())
        return _TRANSFER[request.operation](request.id, request.sector, sectors, segments)
    flat = _segments_struct(request.nr_segments).unpack_from(pages)
    return _transfer(request.operation, request.id, request.sector, flat, limits)


@lru_cache(maxsize=256)
def _segments_struct(count: int) -> Struct:
    return Struct("<" + _SEGMENT * count)


def _id(slot: bytes, layout: Layout) -> int:
    """The id stands at the same place in every kind of request."""
    return int.from_bytes(slot[layout.id_at : layout.id_at + 8], "little")


def _beyond(sector: int, sectors: int, limits: Limits) -> str:
    return f"sectors {sector} + {sectors} on a disk of {limits.capacity}"


def _transfer(
    op: int, request_id: int, sector: int, flat: Sequence[int], limits: Limits
) -> Transfer | BadRequest:
    """``flat``: reference, first and last sector of each segment, one after another."""
    empty_ok = op > BLKIF_OP_WRITE
    if (op == BLKIF_OP_FLUSH_DISKCACHE and not limits.flush) or (
        op == BLKIF_OP_WRITE_BARRIER and not limits.barrier
    ):
        return BadRequest(request_id, op, "an operation that was not offered", BLKIF_RSP_EOPNOTSUPP)
    if op != BLKIF_OP_READ and limits.readonly:
        status = BLKIF_RSP_EOPNOTSUPP if empty_ok and not flat else BLKIF_RSP_ERROR
        return BadRequest(request_id, op, "a write to a read-only disk", status)
    if not flat:
        if not empty_ok:
            return BadRequest(request_id, op, "0 segments")
        return _TRANSFER[op](request_id, 0, 0, ())
    segments = []
    sectors = 0
    for ref, first, last in zip(flat[0::3], flat[1::3], flat[2::3], strict=True):
        if first > last or last > 7:
            return BadRequest(request_id, op, f"sectors {first} to {last} of a page")
        length = last - first + 1
        sectors += length
        segments.append((ref, first * SECTOR, length * SECTOR))
    if sector + sectors > limits.capacity:
        return BadRequest(request_id, op, _beyond(sector, sectors, limits))
    return _TRANSFER[op](request_id, sector, sectors, tuple(segments))


def _parse_other(slot: bytes, limits: Limits, layout: Layout) -> Request:
    op = slot[0]
    if op == BLKIF_OP_INDIRECT:
        return _parse_indirect_slot(slot, limits, layout)
    request_id = _id(slot, layout)
    if op != BLKIF_OP_DISCARD:
        return BadRequest(request_id, op, f"unknown operation {op}", BLKIF_RSP_EOPNOTSUPP)
    _, flag, _, _, sector, sectors = layout.discard.unpack_from(slot)
    secure = bool(flag & BLKIF_DISCARD_SECURE)
    if limits.readonly:
        return BadRequest(request_id, op, "a discard on a read-only disk")
    if not limits.discard or (secure and not limits.secure_discard):
        return BadRequest(request_id, op, "a discard that was not offered", BLKIF_RSP_EOPNOTSUPP)
    if not sectors or sector + sectors > limits.capacity:
        return BadRequest(request_id, op, _beyond(sector, sectors, limits))
    return Discard(request_id, sector, sectors, secure)


def _parse_indirect_slot(slot: bytes, limits: Limits, layout: Layout) -> Indirect | BadRequest:
    _, op, count, request_id, sector, _, *refs = layout.indirect.unpack_from(slot)
    if not limits.max_indirect:
        return BadRequest(request_id, op, "indirect segments were not offered", BLKIF_RSP_EOPNOTSUPP)
    if op not in (BLKIF_OP_READ, BLKIF_OP_WRITE):
        return BadRequest(request_id, op, f"operation {op} in an indirect request")
    if not 1 <= count <= min(limits.max_indirect, MAX_INDIRECT):
        return BadRequest(request_id, op, f"{count} indirect segments")
    if op == BLKIF_OP_WRITE and limits.readonly:
        return BadRequest(request_id, op, "a write to a read-only disk")
    if sector + count > limits.capacity:  # before its pages are fetched; each segment is at least a sector
        return BadRequest(request_id, op, _beyond(sector, count, limits))
    return Indirect(request_id, op, sector, count, tuple(refs[: -(-count // SEGMENTS_PER_PAGE)]))


def build_response(request: Request, status: int, layout: Layout = X86_64) -> bytes:
    """The response to ``request``; ``status`` is a ``BLKIF_RSP_*``."""
    return layout.response.pack(request.id, request.operation, status)


# -- the frontend's side


class Response(NamedTuple):
    id: int
    operation: int
    status: int


def parse_response(slot: bytes, layout: Layout = X86_64) -> Response:
    return Response._make(layout.response.unpack_from(slot))


def _sectors(segment: Segment) -> tuple[int, int, int]:
    ref, offset, length = segment
    if offset % SECTOR or length % SECTOR or not SECTOR <= length <= 4096 - offset:
        raise LocalProtocolError(f"bytes {offset} + {length} of a page are no whole sectors")
    return ref, offset // SECTOR, (offset + length) // SECTOR - 1


def build_transfer(
    operation: int,
    request_id: int,
    sector: int,
    segments: Sequence[Segment],
    *,
    handle: int = 0,
    layout: Layout = X86_64,
) -> bytes:
    """A read, write, flush or barrier of up to 11 segments."""
    flat = [number for segment in segments for number in _sectors(segment)]
    return layout.transfers[len(segments)].pack(operation, len(segments), handle, request_id, sector, *flat)


def build_discard(
    request_id: int,
    sector: int,
    sectors: int,
    *,
    secure: bool = False,
    handle: int = 0,
    layout: Layout = X86_64,
) -> bytes:
    return layout.discard.pack(BLKIF_OP_DISCARD, int(secure), handle, request_id, sector, sectors)


def build_indirect(
    operation: int,
    request_id: int,
    sector: int,
    count: int,
    refs: Sequence[int],
    *,
    handle: int = 0,
    layout: Layout = X86_64,
) -> bytes:
    """A read or write of ``count`` segments that stand in the pages granted by ``refs``."""
    padded = [*refs, *[0] * (BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST - len(refs))]
    return layout.indirect.pack(BLKIF_OP_INDIRECT, operation, count, request_id, sector, handle, *padded)


def build_segments(segments: Sequence[Segment]) -> bytes:
    """What goes into an indirect request's pages, one page after another."""
    return b"".join([_SEGMENT_STRUCT.pack(*_sectors(segment)) for segment in segments])
