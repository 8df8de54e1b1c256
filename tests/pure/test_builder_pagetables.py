"""The first page tables of a PV guest, checked by walking them as a CPU would."""

from __future__ import annotations

from struct import unpack_from

from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.builder.pagetables import TableId, VirtualRange, build_tables, tables_for

MASK48 = (1 << 48) - 1
LINUX = 0xFFFFFFFF80000000


def walk(
    pages: dict[int, bytes], mfn_to_pfn: dict[int, int], root: int, address: int
) -> tuple[int, int] | None:
    """``(mfn, flags)`` of what a virtual address shows, or None."""
    table = root
    for level in (4, 3, 2, 1):
        slot = (address & MASK48) >> 12 + 9 * (level - 1) & 511
        (entry,) = unpack_from("<Q", pages[table], slot * 8)
        if not entry & 1:
            return None
        mfn = entry >> 12 & (1 << 40) - 1
        if level > 1:
            assert entry & 0xFFF == 0x67
            table = mfn_to_pfn[mfn]
    return mfn, entry & 0xFFF


def build(
    ranges: list[VirtualRange], first_table: int, p2m: list[int]
) -> tuple[dict[int, bytes], dict[TableId, int]]:
    ids: list[TableId] = []
    for area in ranges:
        ids += tables_for(area.start, area.end, frozenset(ids))
    places = dict(zip(ids, range(first_table, first_table + len(ids)), strict=True))
    return build_tables(places, ranges, p2m), places


@settings(max_examples=60, deadline=None)
@given(
    base=st.sampled_from([0, LINUX, 0xFFFFFFFF80000000 - (1 << 21), 0x7FFF00000000, 0xFFFF800000000000]),
    pages=st.integers(1, 3000),
    second=st.integers(0, 700),
)
def test_every_page_is_where_it_should_be(base: int, pages: int, second: int) -> None:
    total = pages + second + 64
    p2m = [0x40000 + 3 * pfn for pfn in range(total)]
    ranges = [VirtualRange(base, 0, pages)]
    if second:
        ranges.append(VirtualRange(0x8000000000, pages, second))
    first_table = max(0, pages - 20)
    tables, places = build(ranges, first_table, p2m)
    reverse = {mfn: pfn for pfn, mfn in enumerate(p2m)}
    root = places[TableId(4, 0)]
    table_pfns = set(places.values())
    for area in ranges:
        for index in {0, 1, area.pages // 2, area.pages - 1} | {p - area.pfn for p in table_pfns}:
            if not 0 <= index < area.pages:
                continue
            seen = walk(tables, reverse, root, area.start + index * 4096)
            assert seen is not None
            mfn, flags = seen
            assert mfn == p2m[area.pfn + index]
            # Xen refuses a tree in which a table page is mapped writable.
            assert flags == (0x21 if area.pfn + index in table_pfns else 0x23)
        assert walk(tables, reverse, root, area.end) is None or area.end in [r.start for r in ranges]


def test_table_counts_of_linux() -> None:
    """64 MiB from Linux's base: one table of each upper level, 32 of the lowest."""
    ids = tables_for(LINUX, LINUX + (64 << 20))
    assert [sum(t.level == level for t in ids) for level in (4, 3, 2, 1)] == [1, 1, 1, 32]
    assert ids[0].level == 4
    assert tables_for(LINUX, LINUX + (64 << 20), frozenset(ids)) == []
