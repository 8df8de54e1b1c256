"""What building any kind of domain has in common: creating it, its limits, its grant table."""

from __future__ import annotations

from array import array
from contextlib import ExitStack
from struct import Struct
from typing import ClassVar

from xtool.abi import xen as x
from xtool.builder.cpuid import guest_policy
from xtool.builder.guestmem import claim
from xtool.builder.image import KernelCache, KernelImage, Ramdisk, load_kernel, load_ramdisk
from xtool.builder.spec import BuildSpec, BuiltDomain
from xtool.hypercall.port import CreateSpec, Hypervisor
from xtool.hypercall.tuningport import RtdsParams

#: libxl leaves every domain this much above its memory, for pages that are not its RAM.
SLACK = 1 << 20
_GRANT = Struct("<HHI")


def destroy_by_handle(hv: Hypervisor, handle: bytes) -> list[int]:
    """Destroy every domain that carries this uuid; the domids. Nothing found is fine."""
    found = [state.domid for state in hv.domains() if state.handle == handle and not state.dying]
    for domid in found:
        hv.destroy_domain(domid)
    return found


class DomainBuilder:
    """One build. The stages are methods, called in the order of ``STAGES`` by ``build``."""

    #: What ``createdomain`` is told about emulated hardware.
    emulation_flags: ClassVar[int] = 0
    hvm: ClassVar[bool] = False

    def __init__(self, hv: Hypervisor, spec: BuildSpec, cache: KernelCache | None, undo: ExitStack) -> None:
        self.hv = hv
        self.spec = spec
        self.cache = cache
        self.undo = undo
        self.open_images = ExitStack()
        self.domid = -1
        self.store_port = self.console_port = 0
        self.kernel: KernelImage
        self.ramdisk: Ramdisk | None = None
        #: An HVM guest's kernel is already in its memory: the device model need not load it.
        self.kernel_in_place = False

    # --- stages -------------------------------------------------------------------------------------
    def load_image(self) -> None:
        """Open kernel and ramdisk and decide where everything goes."""
        self.kernel = load_kernel(self.spec.kernel, cache=self.cache)
        self.open_images.callback(self.kernel.close)
        if self.spec.ramdisk:
            self.ramdisk = load_ramdisk(self.spec.ramdisk)
            self.open_images.callback(self.ramdisk.close)

    def create(self) -> None:
        """Create the domain, its limits, vCPUs and the two event channels every guest has."""
        hv, spec = self.hv, self.spec
        # Registered first: whatever interrupts us from here on, the domain is found by its uuid.
        self.undo.callback(destroy_by_handle, hv, spec.handle)
        self.domid = domid = hv.create_domain(
            CreateSpec(
                handle=spec.handle,
                hvm=self.hvm,
                hap=self.hvm and spec.hap,
                nested=self.hvm and spec.nested,
                max_vcpus=spec.max_vcpus,
                max_evtchn_port=spec.max_event_channels,
                max_grant_frames=spec.max_grant_frames,
                max_maptrack_frames=spec.max_maptrack_frames,
                grant_version=spec.grant_version,
                emulation_flags=self.emulation_flags,
                cpupool=spec.schedule.pool,
            )
        )
        hv.set_max_vcpus(domid, spec.max_vcpus)
        self._schedule()
        hv.set_max_memory(domid, spec.memory + SLACK)
        # Before anything large is allocated: a shortage shows here.
        claim(hv, domid, self.claimed_pages)
        if spec.tsc_mode:
            hv.set_tsc_mode(domid, spec.tsc_mode)
        if spec.time_offset:
            hv.set_time_offset(domid, spec.time_offset)
        self.store_port = hv.alloc_unbound(domid, spec.store_domid)
        self.console_port = hv.alloc_unbound(domid, spec.console_domid)
        policy = hv.default_cpu_policy(hvm=self.hvm)
        hv.set_cpu_policy(domid, guest_policy(policy, hvm=self.hvm, pae=spec.pae, nested=spec.nested))
        self.create_more()

    def _schedule(self) -> None:
        wanted, count = self.spec.schedule, self.spec.max_vcpus
        for vcpu in range(count) if wanted.hard or wanted.soft else ():
            hard, soft = (
                sets[min(vcpu, len(sets) - 1)] if sets else None for sets in (wanted.hard, wanted.soft)
            )
            self.hv.set_affinity(self.domid, vcpu, hard, soft)
        if wanted.weight is not None or wanted.cap is not None:
            self.hv.set_credit(self.domid, weight=wanted.weight, cap=wanted.cap, scheduler=wanted.scheduler)
        if wanted.rtds is not None:
            r = wanted.rtds
            params = [RtdsParams(vcpu, r.period, r.budget, r.extratime) for vcpu in range(count)]
            self.hv.set_rtds(self.domid, params)

    @property
    def claimed_pages(self) -> int:
        """What will be populated of the domain's memory, by us or by its device model."""
        raise NotImplementedError

    def create_more(self) -> None:
        """What only this kind of domain needs before it gets memory."""

    def memory(self) -> None:
        raise NotImplementedError

    def image(self) -> None:
        raise NotImplementedError

    def boot_info(self) -> None:
        raise NotImplementedError

    def tables(self) -> None:
        """Page tables (PV) or ACPI tables (PVH)."""

    def vcpus(self) -> None:
        raise NotImplementedError

    def seal(self) -> None:
        """The last touches; after this nobody maps the guest's memory any more."""
        raise NotImplementedError

    def result(self) -> BuiltDomain:
        raise NotImplementedError

    # --- shared pieces ------------------------------------------------------------------------------
    def seed_grants(self, console_gfn: int, store_gfn: int) -> None:
        """Let the console and xenstore backends map their rings by the two reserved grants."""
        console = _GRANT.pack(x.GTF_permit_access, self.spec.console_domid, console_gfn & 0xFFFFFFFF)
        store = _GRANT.pack(x.GTF_permit_access, self.spec.store_domid, store_gfn & 0xFFFFFFFF)
        with self.hv.map_grant_table(self.domid) as table:
            table.view[0:8] = console
            table.view[8:16] = store

    def kernel_pieces(self, offset: int = 0) -> list[tuple[int, memoryview]]:
        """The kernel's segments as ``(address, data)``; ``offset`` is taken off the physical address."""
        data = self.kernel.data
        return sorted(
            (
                (segment.paddr - offset, data[segment.offset : segment.offset + segment.filesz])
                for segment in self.kernel.segments
                if segment.filesz
            ),
            key=lambda piece: piece[0],
        )


def new_p2m() -> array[int]:
    return array("Q")
