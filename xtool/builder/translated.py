"""Building PVH and HVM guests: the two kinds whose frames Xen translates.

Facts about PVH and HVM guests
------------------------------
* Both start in flat 32-bit protected mode with the address of hvm_start_info in EBX: a PVH guest in its
  own kernel, an HVM guest in hvmloader, which installs the firmware and never needs our help again.
* Xen keeps the guest's page tables (nested paging) or shadows of them in a pool we have to size first.
* On Intel without "unrestricted guest", real mode and unpaged mode run on an identity page table that
  the toolstack must provide (HVM_PARAM_IDENT_PT). Setting it on AMD does no harm: one path for both.
* The hypercall page of such guests is set up by the guest itself, through an MSR.
"""

from __future__ import annotations

from array import array
from typing import ClassVar

from xtool.abi import hvm as h
from xtool.abi.base import PAGE_SHIFT, PAGE_SIZE, pages
from xtool.abi.domctl import XEN_X86_EMU_ALL, XEN_X86_EMU_LAPIC, XEN_X86_EMU_VPCI
from xtool.builder import bootinfo, hvmlayout, vcpu
from xtool.builder.acpi import AcpiTables, build_acpi
from xtool.builder.directboot import DirectBoot, plan_direct_boot
from xtool.builder.domain import DomainBuilder
from xtool.builder.guestmem import ORDER_1G, ORDER_2M, ORDER_4K, GuestMemory, populate
from xtool.builder.hvmlayout import HvmLayout, plan_hvm
from xtool.builder.image import Ramdisk, load_ramdisk
from xtool.builder.spec import BuiltDomain, Region

_CMDLINE_LIMIT = 4096
#: One entry of a 32-bit page directory of 4 MiB pages: present, writable, user, accessed, dirty, large.
_IDENT_ENTRY = 0xE7
_ORDERS = (ORDER_1G, ORDER_2M, ORDER_4K)
_ON_DEMAND_ORDERS = (ORDER_2M, ORDER_4K)


def paging_pool(max_memory: int, vcpus: int, *, hap: bool) -> int:
    """Bytes for Xen's page tables of a guest: 1 MiB a vCPU, one page a MiB of memory for the p2m, and
    as much again where tables are shadowed."""
    mib = max_memory >> 20
    return (256 * vcpus + mib * (1 if hap else 2)) * PAGE_SIZE


class TranslatedBuilder(DomainBuilder):
    hvm = True
    device_model: ClassVar[bool]
    layout: HvmLayout
    guest: GuestMemory
    #: What start info lists as its one module: the ramdisk (PVH) or the firmware (HVM).
    module: Ramdisk | None = None

    def create_more(self) -> None:
        spec, hv = self.spec, self.hv
        pool = spec.paging_pool or paging_pool(spec.max_memory, spec.max_vcpus, hap=spec.hap)
        hv.set_paging_pool(self.domid, pool)
        hv.set_hvm_param(self.domid, h.HVM_PARAM_TIMER_MODE, spec.timer_mode)

    @property
    def claimed_pages(self) -> int:
        # The device model takes its video memory while we populate the rest.
        return self._pages + (self.spec.video_memory >> PAGE_SHIFT)

    @property
    def _pages(self) -> int:
        """Of its RAM, what the guest starts with."""
        return self.layout.ram_pages - (self.spec.max_memory - self.spec.memory >> PAGE_SHIFT)

    def memory(self) -> None:
        hv, domid, layout = self.hv, self.domid, self.layout
        hv.set_memory_map(domid, layout.memory_map)
        if self.spec.max_memory > self.spec.memory:
            # The guest sees all it may ever have, and gets part of it as it touches it until its balloon
            # driver has given the rest back.
            hv.set_pod_target(domid, self._pages)
            populate(hv, domid, layout.ram, _ON_DEMAND_ORDERS, on_demand=True)
        else:
            populate(hv, domid, layout.ram, _ORDERS)
        first = hvmlayout.IOREQ_SERVER_FIRST if self.device_model else hvmlayout.SPECIAL_FIRST
        populate(hv, domid, [range(first, hvmlayout.SPECIAL_FIRST + hvmlayout.SPECIAL_PAGES)], (0,))
        self.guest = GuestMemory(hv, domid)
        ident = array("I", [n << 22 | _IDENT_ENTRY for n in range(1024)]).tobytes()
        self.guest.fill(
            first << PAGE_SHIFT,
            hvmlayout.SPECIAL_FIRST + hvmlayout.SPECIAL_PAGES - first << PAGE_SHIFT,
            [(hvmlayout.SPECIAL_IDENT_PT << PAGE_SHIFT, ident)],
        )

    def image(self) -> None:
        layout = self.layout
        pieces = self.kernel_pieces()
        start = layout.kernel.start & ~(PAGE_SIZE - 1)
        self.guest.fill(start, layout.kernel.start + layout.kernel.size - start, pieces)
        for _, piece in pieces:
            piece.release()
        if self.module and layout.module:
            start = layout.module.start
            self.guest.fill(start, layout.module.size, [(start, self.module.data)])

    def boot_info(self) -> None:
        placed = self.layout.start_info
        module = self.layout.module
        modules = [(module.start, module.size, self.module_text)] if module else []
        info = bootinfo.hvm_start_info(
            placed.start,
            cmdline=self.start_cmdline,
            modules=modules,
            memory_map=self.layout.memory_map,
            rsdp=self.rsdp,
        )
        self.guest.fill(placed.start, placed.size, [(placed.start, info)])

    def vcpus(self) -> None:
        saved = self.hv.hvm_context(self.domid)
        records = vcpu.hvm_records(
            saved,
            entry=self.entry,
            start_info=self.layout.start_info.start,
            write_back_vcpus=0 if self.device_model else self.spec.max_vcpus,
        )
        self.hv.set_hvm_context(self.domid, records)

    def seal(self) -> None:
        params = {
            h.HVM_PARAM_STORE_PFN: hvmlayout.SPECIAL_XENSTORE,
            h.HVM_PARAM_STORE_EVTCHN: self.store_port,
            h.HVM_PARAM_CONSOLE_PFN: hvmlayout.SPECIAL_CONSOLE,
            h.HVM_PARAM_CONSOLE_EVTCHN: self.console_port,
            h.HVM_PARAM_PAGING_RING_PFN: hvmlayout.SPECIAL_PAGING,
            h.HVM_PARAM_MONITOR_RING_PFN: hvmlayout.SPECIAL_ACCESS,
            h.HVM_PARAM_SHARING_RING_PFN: hvmlayout.SPECIAL_SHARING,
            h.HVM_PARAM_IDENT_PT: hvmlayout.SPECIAL_IDENT_PT << PAGE_SHIFT,
        }
        for index, value in params.items():
            self.hv.set_hvm_param(self.domid, index, value)
        self.seed_grants(hvmlayout.SPECIAL_CONSOLE, hvmlayout.SPECIAL_XENSTORE)

    def result(self) -> BuiltDomain:
        return BuiltDomain(
            self.domid,
            hvmlayout.SPECIAL_XENSTORE,
            self.store_port,
            hvmlayout.SPECIAL_CONSOLE,
            self.console_port,
            self.entry,
            tuple(sorted((*self.layout.regions(), *self.more_regions()), key=lambda r: r.start)),
            tuple(tuple(entry) for entry in self.layout.memory_map),  # type: ignore[misc]
        )

    def more_regions(self) -> tuple[Region, ...]:
        return ()

    # --- what differs -------------------------------------------------------------------------------
    module_text: ClassVar[str] = ""
    rsdp = 0

    @property
    def start_cmdline(self) -> str:
        return ""

    @property
    def entry(self) -> int:
        raise NotImplementedError


class PvhBuilder(TranslatedBuilder):
    emulation_flags = XEN_X86_EMU_LAPIC
    device_model = False
    acpi: AcpiTables | None = None

    def load_image(self) -> None:
        super().load_image()
        spec, kernel = self.spec, self.kernel
        kernel.require("pvh")
        bootinfo.encode_cmdline(spec.cmdline, _CMDLINE_LIMIT)
        if spec.acpi:
            self.acpi = build_acpi(spec.max_vcpus, hvmlayout.ACPI_BASE, online=spec.vcpus)
            self.rsdp = self.acpi.rsdp_gpa
        self.module = self.ramdisk
        modules = [(0, 0, "")] if self.module else []
        self.layout = plan_hvm(
            (kernel.path, kernel.phys_start, kernel.phys_end),
            ("ramdisk", self.module.size) if self.module else None,
            bootinfo.hvm_start_info_size(spec.cmdline, modules, 4),
            spec.max_memory,
            device_model=False,
            acpi_size=len(self.acpi.blob) if self.acpi else 0,
        )

    @property
    def start_cmdline(self) -> str:
        return self.spec.cmdline

    @property
    def entry(self) -> int:
        return self.kernel.pvh_entry

    def tables(self) -> None:
        if self.acpi:
            first, count = hvmlayout.ACPI_BASE >> PAGE_SHIFT, pages(len(self.acpi.blob))
            populate(self.hv, self.domid, [range(first, first + count)], (0,))
            self.guest.fill(hvmlayout.ACPI_BASE, len(self.acpi.blob), [(hvmlayout.ACPI_BASE, self.acpi.blob)])


class HvmBuilder(TranslatedBuilder):
    emulation_flags = XEN_X86_EMU_ALL & ~XEN_X86_EMU_VPCI
    device_model = True
    module_text = "firmware"
    direct: DirectBoot | None = None

    def load_image(self) -> None:
        # hvmloader is the kernel here, the firmware its module.
        super().load_image()
        spec, kernel = self.spec, self.kernel
        if spec.firmware:
            self.module = load_ramdisk(spec.firmware)
            self.open_images.callback(self.module.close)
        modules = [(0, 0, self.module_text)] if self.module else []
        self.layout = plan_hvm(
            (kernel.path, kernel.phys_start, kernel.phys_end),
            ("firmware", self.module.size) if self.module else None,
            bootinfo.hvm_start_info_size("", modules, 4),
            spec.max_memory - spec.video_memory,
            device_model=True,
            mmio_hole=spec.mmio_hole,
        )
        # UEFI keeps its own things anywhere in memory; there QEMU's way remains.
        if spec.direct_kernel and spec.firmware_is_bios:
            self._plan_direct_boot(spec.direct_kernel)

    def _plan_direct_boot(self, path: str) -> None:
        image = load_ramdisk(path)  # as it is on disk: it unpacks itself
        self.open_images.callback(image.close)
        size = self.ramdisk.size if self.ramdisk else 0
        self.direct = plan_direct_boot(image.data, self.spec.cmdline, size, self.layout.low_end)
        if self.direct:
            self.open_images.callback(self.direct.code[1].release)
            self.kernel_in_place = True

    def image(self) -> None:
        super().image()
        if self.direct is None:
            return
        fill, (setup, code) = self.guest.fill, (self.direct.setup, self.direct.code)
        fill(setup[0], 0x10000, [setup, self.direct.cmdline])
        fill(code[0], len(code[1]), [code])
        if self.ramdisk and self.direct.ramdisk:
            fill(*self.direct.ramdisk, [(self.direct.ramdisk[0], self.ramdisk.data)])

    def more_regions(self) -> tuple[Region, ...]:
        if self.direct is None:
            return ()
        setup, code, ramdisk = self.direct.setup, self.direct.code, self.direct.ramdisk
        found = [
            Region("kernel set-up code", setup[0], len(setup[1])),
            Region("command line", self.direct.cmdline[0], len(self.direct.cmdline[1])),
            Region("kernel", code[0], len(code[1])),
        ]
        return (*found, *([Region("ramdisk", *ramdisk)] if ramdisk else ()))

    @property
    def entry(self) -> int:
        return self.kernel.entry

    def create_more(self) -> None:
        super().create_more()
        hv, domid = self.hv, self.domid
        hv.set_hvm_param(domid, h.HVM_PARAM_HPET_ENABLED, int(self.spec.hpet))
        if self.spec.viridian:
            hv.set_hvm_param(domid, h.HVM_PARAM_VIRIDIAN, self.spec.viridian)
        hv.set_hvm_param(domid, h.HVM_PARAM_IOREQ_PFN, hvmlayout.SPECIAL_IOREQ)
        hv.set_hvm_param(domid, h.HVM_PARAM_BUFIOREQ_PFN, hvmlayout.SPECIAL_BUFIOREQ)
        # The device model asks for these as soon as it starts, which is now.
        hv.set_hvm_param(domid, h.HVM_PARAM_IOREQ_SERVER_PFN, hvmlayout.IOREQ_SERVER_FIRST)
        hv.set_hvm_param(domid, h.HVM_PARAM_NR_IOREQ_SERVER_PAGES, hvmlayout.IOREQ_SERVER_PAGES)

    def tables(self) -> None:
        page = bootinfo.hvm_info_page(
            vcpus=self.spec.vcpus,
            max_vcpus=self.spec.max_vcpus,
            apic=self.spec.apic,
            low_end=self.layout.low_end,
            high_end=self.layout.high_end,
            reserved_first=hvmlayout.IOREQ_SERVER_FIRST,
        )
        self.guest.write_page(h.HVM_INFO_PFN, page)
