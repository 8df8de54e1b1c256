"""Where everything lies in a PVH or HVM guest. Pure.

Guest-physical memory, from below::

    RAM from 0                 (HVM: without 0xA0000-0xC0000, where the VGA window is)
    a hole up to 4 GiB         HVM: from 0xF0000000, for PCI. PVH: from 0xFC000000.
      0xFC000000               PVH: the ACPI tables
      0xFEE00000               the local APIC
      0xFEFF0000, 8 pages      HVM: ioreq server pages
      0xFEFF8000, 8 pages      special pages: xenstore and console rings, identity page table, ...
    RAM from 4 GiB             what the hole displaced
"""

from __future__ import annotations

from dataclasses import dataclass

from xtool.abi.base import PAGE_SHIFT, PAGE_SIZE, page_up
from xtool.abi.hvm import HVM_INFO_OFFSET, HVM_INFO_PFN
from xtool.abi.memory import E820_ACPI, E820_RAM, E820_RESERVED
from xtool.builder.spec import Region
from xtool.errors import ImageError
from xtool.hypercall.port import E820Entry

GIB4 = 1 << 32
MIB = 1 << 20

VGA_HOLE = range(0xA0, 0xC0)  # pages
HVM_HOLE_START = 0xF000_0000
ACPI_BASE = 0xFC00_0000
SPECIAL_PAGES = 8
SPECIAL_FIRST = 0xFF000 - SPECIAL_PAGES
IOREQ_SERVER_PAGES = 8
IOREQ_SERVER_FIRST = SPECIAL_FIRST - IOREQ_SERVER_PAGES
(
    SPECIAL_PAGING,
    SPECIAL_ACCESS,
    SPECIAL_SHARING,
    SPECIAL_BUFIOREQ,
    SPECIAL_XENSTORE,
    SPECIAL_IOREQ,
    SPECIAL_IDENT_PT,
    SPECIAL_CONSOLE,
) = range(SPECIAL_FIRST, SPECIAL_FIRST + SPECIAL_PAGES)


@dataclass(frozen=True)
class Placed:
    """Something copied into the guest: ``[start, start + size)``, guest-physical."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class HvmLayout:
    """``low_end`` and ``high_end`` are where RAM ends below the hole and above 4 GiB (0: none)."""

    low_end: int
    high_end: int
    ram: tuple[range, ...]  # of guest frames
    memory_map: tuple[E820Entry, ...]
    kernel: Placed
    module: Placed | None
    start_info: Placed
    acpi: Placed | None
    device_model: bool

    @property
    def ram_pages(self) -> int:
        return sum(len(run) for run in self.ram)

    def regions(self) -> tuple[Region, ...]:
        found = [Region("start info", self.start_info.start, self.start_info.size)]
        found += [
            Region(placed.name, placed.start, placed.size)
            for placed in (self.kernel, self.module, self.acpi)
            if placed
        ]
        found.append(
            Region("special pages", SPECIAL_FIRST << PAGE_SHIFT, SPECIAL_PAGES * PAGE_SIZE, note="rings")
        )
        if self.device_model:
            found.append(Region("hvm_info", (HVM_INFO_PFN << PAGE_SHIFT) + HVM_INFO_OFFSET, 48))
            size = IOREQ_SERVER_PAGES * PAGE_SIZE
            found.append(Region("ioreq server pages", IOREQ_SERVER_FIRST << PAGE_SHIFT, size))
        return tuple(sorted(found, key=lambda r: r.start))


def plan_hvm(
    kernel: tuple[str, int, int],
    module: tuple[str, int] | None,
    start_info_size: int,
    memory: int,
    *,
    device_model: bool,
    acpi_size: int = 0,
    mmio_hole: int | None = None,
) -> HvmLayout:
    """Lay out a PVH guest, or an HVM one (``device_model``).

    ``kernel`` is ``(path, first, end)`` in guest-physical bytes; ``module`` is ``(name, size)`` of the
    ramdisk (or the firmware); ``memory`` is RAM in bytes, display memory already taken off; ``mmio_hole``
    is how large an HVM guest's hole below 4 GiB is, in bytes, if it is not the usual one.
    Raises ``ImageError`` when the pieces do not fit below the hole.
    """
    hole = HVM_HOLE_START if device_model else ACPI_BASE
    if device_model and mmio_hole:
        hole = GIB4 - mmio_hole
    low_end = min(memory, hole)
    high_end = GIB4 + memory - hole if memory > hole else 0

    path, first, end = kernel
    placed_kernel = Placed("hvmloader" if device_model else "kernel", first, end - first)
    cursor = page_up(end)
    placed_module = None
    if module:
        placed_module = Placed(module[0], cursor, module[1])
        cursor = page_up(cursor + module[1])
    start_info = Placed("start info", cursor, start_info_size)
    cursor = page_up(cursor + start_info_size)
    if cursor > low_end:
        raise ImageError(
            f"{path} needs {-(-cursor // MIB)} MiB to start, memory is {memory // MIB} MiB",
            hint=f"give the domain more: memory: {-(-cursor // MIB)}",
        )

    low_pages = low_end >> PAGE_SHIFT
    ram = [range(VGA_HOLE.start), range(VGA_HOLE.stop, low_pages)] if device_model else [range(low_pages)]
    ram_start = MIB if device_model else 0
    entries = [E820Entry(ram_start, low_end - ram_start, E820_RAM)]
    acpi = None
    if not device_model:
        if acpi_size:
            acpi = Placed("ACPI tables", ACPI_BASE, acpi_size)
            entries.append(E820Entry(ACPI_BASE, page_up(acpi_size), E820_ACPI))
        entries.append(E820Entry(SPECIAL_FIRST << PAGE_SHIFT, SPECIAL_PAGES * PAGE_SIZE, E820_RESERVED))
    if high_end:
        ram.append(range(GIB4 >> PAGE_SHIFT, high_end >> PAGE_SHIFT))
        entries.append(E820Entry(GIB4, high_end - GIB4, E820_RAM))
    return HvmLayout(
        low_end,
        high_end,
        tuple(ram),
        tuple(entries),
        placed_kernel,
        placed_module,
        start_info,
        acpi,
        device_model,
    )
