"""The first page tables of a 64-bit PV guest. Pure: address ranges in, table pages out.

A PV guest starts in paged mode on tables that we made and Xen has checked. Xen insists that nobody has a
writable mapping of a page-table page, so the tables map themselves read-only.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from xtool.abi.base import PAGE_SHIFT

LEVELS = 4
_BITS = 9
_ENTRIES = 1 << _BITS
_VADDR_MASK = (1 << 48) - 1

_PRESENT, _RW, _USER, _ACCESSED, _DIRTY = 1, 2, 4, 0x20, 0x40
LEAF = _PRESENT | _RW | _ACCESSED
LEAF_READ_ONLY = _PRESENT | _ACCESSED
UPPER = _PRESENT | _RW | _USER | _ACCESSED | _DIRTY


class VirtualRange(NamedTuple):
    """``pages`` pages at virtual address ``start`` show the pfns from ``pfn`` on."""

    start: int
    pfn: int
    pages: int

    @property
    def end(self) -> int:
        return self.start + (self.pages << PAGE_SHIFT)


class TableId(NamedTuple):
    """A table: level 1 holds the mappings of pages, level 4 is the root; ``number`` counts the tables of
    that level through the whole 48-bit address space."""

    level: int
    number: int


def _numbers(level: int, start: int, end: int) -> range:
    shift = PAGE_SHIFT + _BITS * level
    return range((start & _VADDR_MASK) >> shift, ((end - 1 & _VADDR_MASK) >> shift) + 1)


def tables_for(start: int, end: int, known: frozenset[TableId] = frozenset()) -> list[TableId]:
    """The tables that mapping ``[start, end)`` takes beyond those known, root first."""
    needed = [
        TableId(level, number) for level in range(LEVELS, 0, -1) for number in _numbers(level, start, end)
    ]
    return [table for table in needed if table not in known]


def build_tables(
    places: dict[TableId, int], ranges: Sequence[VirtualRange], p2m: Sequence[int]
) -> dict[int, bytes]:
    """Contents of every table page, by pfn. ``places`` says at which pfn each table lies; ``p2m`` gives
    the machine frame of each pfn. Pages that are tables are mapped read-only."""
    table_pfns = sorted(places.values())
    contents = {
        table: _leaf_entries(table.number, ranges, p2m, table_pfns)
        if table.level == 1
        else array("Q", bytes(8 * _ENTRIES))
        for table in places
    }
    for table, place in places.items():
        if table.level < LEVELS:
            parent = contents[TableId(table.level + 1, table.number >> _BITS)]
            parent[table.number & _ENTRIES - 1] = p2m[place] << PAGE_SHIFT | UPPER
    return {places[table]: entries.tobytes() for table, entries in contents.items()}


def _leaf_entries(
    number: int, ranges: Sequence[VirtualRange], p2m: Sequence[int], table_pfns: Sequence[int]
) -> array[int]:
    entries = array("Q", bytes(8 * _ENTRIES))
    first = number << _BITS  # the number of the first page this table maps
    for area in ranges:
        start = (area.start & _VADDR_MASK) >> PAGE_SHIFT
        low, high = max(first, start), min(first + _ENTRIES, start + area.pages)
        if low >= high:
            continue
        pfn = area.pfn + low - start
        count = high - low
        entries[low - first : high - first] = array(
            "Q", [mfn << PAGE_SHIFT | LEAF for mfn in p2m[pfn : pfn + count]]
        )
        if table_pfns and table_pfns[0] < pfn + count and table_pfns[-1] >= pfn:
            for table_pfn in table_pfns:
                if pfn <= table_pfn < pfn + count:
                    entries[low - first + table_pfn - pfn] &= ~_RW
    return entries
