"""Building a 64-bit PV guest, stage by stage.

Facts about PV guests
---------------------
* The guest knows machine frames. Its p2m list (frame of each pfn) is made by us and lives in its memory;
  the reverse table is Xen's, and ``populate_physmap`` fills it in.
* It starts in paged mode. We write its first page tables, drop every mapping of them, and pin the root:
  Xen then checks the whole tree and refuses it if anyone could write to a table page.
* shared_info is a page of Xen's, not of the guest: its machine address is in start_info.
"""

from __future__ import annotations

from array import array

from xtool.abi.base import PAGE_SHIFT, PAGE_SIZE
from xtool.abi.memory import E820_RAM
from xtool.abi.xen import XEN_LEGACY_MAX_VCPUS, VcpuInfo
from xtool.builder import bootinfo, vcpu
from xtool.builder.domain import DomainBuilder, new_p2m
from xtool.builder.guestmem import ORDER_2M, ORDER_4K, GuestMemory, populate
from xtool.builder.pagetables import build_tables
from xtool.builder.pvlayout import PvLayout, plan_pv
from xtool.builder.spec import BuiltDomain
from xtool.errors import HypercallError
from xtool.hypercall.port import E820Entry


class PvBuilder(DomainBuilder):
    layout: PvLayout
    p2m: array[int]
    guest: GuestMemory

    def load_image(self) -> None:
        super().load_image()
        self.kernel.require("pv")
        self.layout = plan_pv(self.kernel, self.ramdisk.size if self.ramdisk else 0, self.spec.memory)
        bootinfo.encode_cmdline(self.spec.cmdline, 1024)

    @property
    def claimed_pages(self) -> int:
        return self.layout.pages

    def memory(self) -> None:
        # One entry up to maxmem: how far the guest may balloon.
        self.hv.set_memory_map(self.domid, [E820Entry(0, self.spec.max_memory, E820_RAM)])
        self.p2m = new_p2m()
        populate(self.hv, self.domid, [range(self.layout.pages)], (ORDER_2M, ORDER_4K), self.p2m)
        self.guest = GuestMemory(self.hv, self.domid, self.p2m)

    def image(self) -> None:
        layout = self.layout
        pieces = self.kernel_pieces(self.kernel.paddr_offset)
        self.guest.fill(layout.kernel.pfn << PAGE_SHIFT, layout.kernel.pages << PAGE_SHIFT, pieces)
        for _, piece in pieces:
            piece.release()
        if self.ramdisk and layout.ramdisk:
            start = layout.ramdisk.pfn << PAGE_SHIFT
            self.guest.fill(start, self.ramdisk.size, [(start, self.ramdisk.data)])

    def boot_info(self) -> None:
        layout, shared = self.layout, self.hv.domain(self.domid)
        if shared is None:
            raise HypercallError(f"getdomaininfo of domain {self.domid}", 3)
        self.shared_info = shared.shared_info_frame
        ramdisk = None
        if self.ramdisk and layout.ramdisk:
            pfn = layout.ramdisk.pfn
            ramdisk = (layout.virtual(pfn) if layout.ramdisk_mapped else pfn, self.ramdisk.size)
        own_p2m = layout.p2m.pfn >= layout.mapped_pages
        page = bootinfo.pv_start_info(
            pages=layout.pages,
            shared_info_mfn=self.shared_info,
            store_mfn=self.p2m[layout.xenstore],
            store_port=self.store_port,
            console_mfn=self.p2m[layout.console],
            console_port=self.console_port,
            table_base=layout.virtual(layout.tables.pfn),
            table_pages=layout.tables.pages,
            p2m_virtual=layout.p2m_virtual,
            p2m_frames=(layout.p2m.pfn, layout.p2m.pages + layout.p2m_tables.pages) if own_p2m else None,
            ramdisk=ramdisk,
            ramdisk_is_pfn=not layout.ramdisk_mapped,
            cmdline=self.spec.cmdline,
        )
        # start info, xenstore and console lie side by side; the rings start empty.
        start = layout.start_info << PAGE_SHIFT
        self.guest.fill(start, 3 * PAGE_SIZE, [(start, page)])

    def tables(self) -> None:
        layout = self.layout
        with memoryview(self.p2m) as words, words.cast("B") as raw:
            start = layout.p2m.pfn << PAGE_SHIFT
            self.guest.fill(start, layout.p2m.pages << PAGE_SHIFT, [(start, raw)])
        contents = build_tables(layout.places, layout.ranges, self.p2m)
        for extent, spare in ((layout.tables, 1), (layout.p2m_tables, 0)):
            # The boot stack follows the first tables and starts zeroed, like everything we touch.
            if extent.pages:
                raw_tables = b"".join(contents[pfn] for pfn in range(extent.pfn, extent.end))
                start = extent.pfn << PAGE_SHIFT
                self.guest.fill(start, extent.pages + spare << PAGE_SHIFT, [(start, raw_tables)])
        self.root = self.p2m[layout.tables.pfn]
        self.hv.pin_l4_table(self.domid, self.root)

    def vcpus(self) -> None:
        layout = self.layout
        context = vcpu.pv_context(
            entry=self.kernel.pv_entry,
            stack=layout.virtual(layout.boot_stack + 1),
            start_info=layout.virtual(layout.start_info),
            cr3_mfn=self.root,
        )
        self.hv.set_vcpu_context(self.domid, 0, context)

    def seal(self) -> None:
        hypercall_page = self.kernel.notes.hypercall_page
        if hypercall_page is not None:
            pfn = hypercall_page - self.layout.virt_base >> PAGE_SHIFT
            self.hv.init_hypercall_page(self.domid, self.p2m[pfn])
        masked = bytes(VcpuInfo(evtchn_upcall_mask=1)) * XEN_LEGACY_MAX_VCPUS
        with self.hv.map_foreign(self.domid, [self.shared_info]) as shared:
            shared.view[:] = masked.ljust(PAGE_SIZE, b"\0")
        self.seed_grants(self.p2m[self.layout.console], self.p2m[self.layout.xenstore])

    def result(self) -> BuiltDomain:
        layout = self.layout
        return BuiltDomain(
            self.domid,
            self.p2m[layout.xenstore],
            self.store_port,
            self.p2m[layout.console],
            self.console_port,
            self.kernel.pv_entry,
            layout.regions(),
            ((0, self.spec.max_memory, E820_RAM),),
            layout.tables.pages + layout.p2m_tables.pages,
        )
