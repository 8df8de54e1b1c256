"""A domain's grant table, as the domain and Xen wrote it.

Facts about grant tables
------------------------
* The table is the guest's own memory: what an entry says is the guest's claim, and may change while it is
  read. Only the two flags that say "mapped for reading / writing" come from Xen, and in version 1 the guest
  can overwrite those too.
* Version 1 has 8-byte entries with a 32-bit frame; version 2 has 16-byte entries, and Xen's flags in pages of
  their own. A guest that has not chosen yet (version 0) is read as version 1: the builder writes such
  entries.
* Asking Xen for a page beyond the table's end makes the table grow, so its size is asked first.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple, Protocol

from xtool.abi.base import PAGE_SIZE, pages
from xtool.abi.grant import (
    ENTRIES_PER_FRAME,
    GTF_invalid,
    GTF_permit_access,
    GTF_reading,
    GTF_readonly,
    GTF_sub_page,
    GTF_transitive,
    GTF_type_mask,
    GTF_writing,
)

_V1 = Struct("<HHI")  # struct grant_entry_v1
_V2 = Struct("<HHHHQ")  # union grant_entry_v2: full_page and sub_page


class Entry(NamedTuple):
    """``domid`` may use ``frame`` of the granting domain. ``flags`` are ``GTF_*``. ``offset`` and ``length``
    in bytes: the whole page but for a sub-page grant."""

    ref: int
    domid: int
    frame: int
    flags: int
    offset: int = 0
    length: int = PAGE_SIZE

    @property
    def kind(self) -> str:
        kind = self.flags & GTF_type_mask
        return {GTF_permit_access: "access", GTF_transitive: "transitive"}.get(kind, "transfer")

    @property
    def readonly(self) -> bool:
        return bool(self.flags & GTF_readonly)

    @property
    def mapped(self) -> bool:
        """In use at this moment, as Xen noted it."""
        return bool(self.flags & (GTF_reading | GTF_writing))


class _Size(Protocol):
    @property
    def version(self) -> int: ...
    @property
    def frames(self) -> int: ...


class _Mapping(Protocol):
    view: memoryview

    def close(self) -> None: ...


class Tables(Protocol):
    """The part of ``hypercall.port.Hypervisor`` that is needed here."""

    def grant_table_size(self, domid: int) -> _Size: ...
    def map_grant_table(self, domid: int, frames: int = 1) -> _Mapping: ...
    def map_grant_status(self, domid: int, frames: int) -> _Mapping: ...


def read_table(hv: Tables, domid: int) -> list[Entry]:
    """Every entry in use, in order of ``ref``. Raises ``HypercallError``."""
    size = hv.grant_table_size(domid)
    if not size.frames:
        return []
    raw = _snapshot(hv.map_grant_table(domid, size.frames))
    if size.version != 2:
        return parse_v1(raw)
    count = size.frames * ENTRIES_PER_FRAME[2]
    status = _snapshot(hv.map_grant_status(domid, pages(2 * count)))
    return parse_v2(raw, memoryview(status)[: 2 * count].cast("H").tolist())


def _snapshot(mapping: _Mapping) -> bytes:
    """One copy, then the mapping goes: it would keep a dying domain from going away."""
    try:
        return bytes(mapping.view)
    finally:
        mapping.close()


def parse_v1(raw: bytes) -> list[Entry]:
    return [
        Entry(ref, domid, frame, flags)
        for ref, (flags, domid, frame) in enumerate(_V1.iter_unpack(raw))
        if flags & GTF_type_mask != GTF_invalid
    ]


def parse_v2(raw: bytes, status: Sequence[int]) -> list[Entry]:
    """``status`` holds Xen's flags for each entry."""
    found = []
    for ref, (flags, domid, offset, length, frame) in enumerate(_V2.iter_unpack(raw)):
        kind = flags & GTF_type_mask
        if kind == GTF_invalid:
            continue
        # Version 2 has these two in the status alone; in the entry they are only what the guest put there.
        flags = flags & ~(GTF_reading | GTF_writing) | status[ref] & (GTF_reading | GTF_writing)
        whole = kind == GTF_transitive or not flags & GTF_sub_page
        found.append(
            Entry(ref, domid, frame, flags) if whole else Entry(ref, domid, frame, flags, offset, length)
        )
    return found
