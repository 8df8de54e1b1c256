"""Where everything lies in a PV guest's first memory image. Pure.

From the kernel's virtual base on, one contiguous mapping of the first pfns::

    kernel | ramdisk | p2m | start info | xenstore | console | page tables | boot stack | spare

The ramdisk moves behind the mapping if the kernel can take its frame number instead (MOD_START_PFN), and
the p2m gets a mapping of its own if the kernel says where (INIT_P2M), so that a large guest does not need
a large first mapping. The mapping ends on a 4 MiB boundary with at least 512 KiB to spare: that is what
the PV start-of-day rules promise a kernel (``public/xen.h``, above ``struct start_info``).
"""

from __future__ import annotations

from dataclasses import dataclass

from xtool.abi.base import PAGE_SHIFT, PAGE_SIZE, pages
from xtool.builder.image import KernelImage
from xtool.builder.pagetables import TableId, VirtualRange, tables_for
from xtool.builder.spec import Region
from xtool.errors import ImageError

_ALIGN = 4 << 20
_SPARE = 512 << 10


@dataclass(frozen=True)
class Extent:
    """A run of pfns."""

    pfn: int
    pages: int

    @property
    def end(self) -> int:
        return self.pfn + self.pages


@dataclass(frozen=True)
class PvLayout:
    virt_base: int
    pages: int
    kernel: Extent
    ramdisk: Extent | None
    #: The ramdisk is inside the first mapping.
    ramdisk_mapped: bool
    p2m: Extent
    p2m_virtual: int
    #: start info, xenstore, console: three pages.
    start_info: int
    xenstore: int
    console: int
    tables: Extent
    boot_stack: int
    #: How many pfns the first mapping shows.
    mapped_pages: int
    #: Tables of the p2m's own mapping, behind it.
    p2m_tables: Extent
    places: dict[TableId, int]
    ranges: tuple[VirtualRange, ...]

    def virtual(self, pfn: int) -> int:
        return self.virt_base + (pfn << PAGE_SHIFT)

    def regions(self) -> tuple[Region, ...]:
        def region(name: str, extent: Extent, virtual: int | None = None, note: str = "") -> Region:
            return Region(name, extent.pfn << PAGE_SHIFT, extent.pages << PAGE_SHIFT, virtual, note)

        here = self.virtual
        found = [
            region("kernel", self.kernel, here(self.kernel.pfn)),
            region("p2m list", self.p2m, self.p2m_virtual),
            region("start info", Extent(self.start_info, 1), here(self.start_info)),
            region("xenstore ring", Extent(self.xenstore, 1), here(self.xenstore)),
            region("console ring", Extent(self.console, 1), here(self.console)),
            region("page tables", self.tables, here(self.tables.pfn), "mapped read-only"),
            region("boot stack", Extent(self.boot_stack, 1), here(self.boot_stack)),
        ]
        if self.ramdisk:
            virtual = here(self.ramdisk.pfn) if self.ramdisk_mapped else None
            found.append(region("ramdisk", self.ramdisk, virtual, "" if virtual else "given by frame number"))
        if self.p2m_tables.pages:
            found.append(region("p2m page tables", self.p2m_tables))
        return tuple(sorted(found, key=lambda r: r.start))


def plan_pv(kernel: KernelImage, ramdisk_size: int, memory: int) -> PvLayout:
    """Lay out a PV guest. ``memory`` in bytes. Raises ``ImageError`` when the image does not fit."""
    notes, total, base = kernel.notes, memory >> PAGE_SHIFT, kernel.virt_base
    first = kernel.to_pfn_address(kernel.phys_start) >> PAGE_SHIFT
    kernel_extent = Extent(first, pages(kernel.to_pfn_address(kernel.phys_end)) - first)
    cursor = kernel_extent.end

    def take(count: int) -> Extent:
        nonlocal cursor
        extent = Extent(cursor, count)
        cursor += count
        return extent

    ramdisk: Extent | None = None
    if ramdisk_size and not notes.mod_start_pfn:
        ramdisk = take(pages(ramdisk_size))
    p2m_pages = pages(8 * total)
    own_mapping = notes.init_p2m is not None and not notes.init_p2m % PAGE_SIZE and notes.init_p2m < base
    p2m = Extent(0, 0) if own_mapping else take(p2m_pages)
    start_info, xenstore, console = (take(1).pfn for _ in range(3))

    table_ids, mapped = _first_mapping(base, cursor)
    tables = take(len(table_ids))
    boot_stack = take(1).pfn
    places = dict(zip(table_ids, range(tables.pfn, tables.end), strict=True))
    ranges = [VirtualRange(base, 0, mapped)]

    cursor = mapped
    if ramdisk_size and ramdisk is None:
        ramdisk = take(pages(ramdisk_size))
    p2m_tables = Extent(cursor, 0)
    p2m_virtual = base + (p2m.pfn << PAGE_SHIFT)
    if own_mapping:
        assert notes.init_p2m is not None
        p2m, p2m_virtual = take(p2m_pages), notes.init_p2m
        more = tables_for(p2m_virtual, p2m_virtual + (p2m_pages << PAGE_SHIFT), frozenset(places))
        p2m_tables = take(len(more))
        places.update(zip(more, range(p2m_tables.pfn, p2m_tables.end), strict=True))
        ranges.append(VirtualRange(p2m_virtual, p2m.pfn, p2m_pages))
    if cursor > total:
        raise ImageError(
            f"{kernel.path} needs {_mib(cursor)} MiB to start as a PV guest, memory is {_mib(total)} MiB",
            hint=f"give the domain more: memory: {_mib(cursor)}",
        )
    return PvLayout(
        base,
        total,
        kernel_extent,
        ramdisk,
        not notes.mod_start_pfn,
        p2m,
        p2m_virtual,
        start_info,
        xenstore,
        console,
        tables,
        boot_stack,
        mapped,
        p2m_tables,
        places,
        tuple(ranges),
    )


def _first_mapping(base: int, used: int) -> tuple[list[TableId], int]:
    """The tables of the first mapping, and how many pages it shows: it must hold the tables themselves."""
    tables: list[TableId] = []
    while True:
        end = base + (used + len(tables) + 1 << PAGE_SHIFT) + _SPARE
        end = (end + _ALIGN - 1) & ~(_ALIGN - 1)
        needed = tables_for(base, end)
        if len(needed) <= len(tables):
            return tables, end - base >> PAGE_SHIFT
        tables = needed


def _mib(page_count: int) -> int:
    return -(-page_count // 256)
