"""What the rest of xtool asks of a hypervisor: a Protocol, and the records it answers with.

``xtool.hypercall.xen`` implements it on /dev/xen/privcmd, ``xtool.fake.hypervisor`` in memory; the tests in
``tests/contract`` run on both. Frames are 4 KiB. For a PV guest a ``gfn`` argument is a machine frame, for
a PVH or HVM guest it is a guest frame: Xen itself makes that distinction per domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Protocol

from xtool.abi import domctl as d
from xtool.hypercall.tuningport import TuningPort

SHUTDOWN_REASONS = ("poweroff", "reboot", "suspend", "crash", "watchdog", "soft-reset")


class Versions(NamedTuple):
    """``xen`` such as ``"4.17.7"``; the two interface versions are what the live hypervisor accepts."""

    xen: str
    domctl: int
    sysctl: int


class HostState(NamedTuple):
    """``XEN_SYSCTL_physinfo``. Memory in pages."""

    threads_per_core: int
    cores_per_socket: int
    cpus: int
    max_cpu_id: int
    nodes: int
    cpu_khz: int
    capabilities: int
    total_pages: int
    free_pages: int
    scrub_pages: int
    outstanding_pages: int
    hw_cap: tuple[int, ...]


class DomainState(NamedTuple):
    """``XEN_DOMCTL_getdomaininfo``. Memory in pages, time in nanoseconds."""

    domid: int
    flags: int
    pages: int
    max_pages: int
    outstanding_pages: int
    shared_info_frame: int
    cpu_time: int
    online_vcpus: int
    max_vcpu_id: int
    handle: bytes
    emulation_flags: int
    cpupool: int = 0

    @property
    def hvm(self) -> bool:
        return bool(self.flags & d.XEN_DOMINF_hvm_guest)

    @property
    def dying(self) -> bool:
        return bool(self.flags & d.XEN_DOMINF_dying)

    @property
    def shutdown(self) -> bool:
        return bool(self.flags & d.XEN_DOMINF_shutdown)

    @property
    def paused(self) -> bool:
        return bool(self.flags & d.XEN_DOMINF_paused)

    @property
    def blocked(self) -> bool:
        return bool(self.flags & d.XEN_DOMINF_blocked)

    @property
    def running(self) -> bool:
        return bool(self.flags & d.XEN_DOMINF_running)

    @property
    def shutdown_reason(self) -> str:
        """Why it shut down, or an empty string while it has not."""
        if not self.shutdown:
            return ""
        code = self.flags >> d.XEN_DOMINF_shutdownshift & d.XEN_DOMINF_shutdownmask
        return SHUTDOWN_REASONS[code] if code < len(SHUTDOWN_REASONS) else f"code {code}"


class VcpuState(NamedTuple):
    vcpu: int
    online: bool
    blocked: bool
    running: bool
    cpu: int
    cpu_time: int


class CreateSpec(NamedTuple):
    """What ``XEN_DOMCTL_createdomain`` takes; -1 asks for the hypervisor's default limit."""

    handle: bytes
    hvm: bool = False
    hap: bool = False
    nested: bool = False
    max_vcpus: int = 1
    max_evtchn_port: int = 1023
    max_grant_frames: int = -1
    max_maptrack_frames: int = -1
    grant_version: int = 1
    emulation_flags: int = 0
    cpupool: int = 0
    ssidref: int = 0


class E820Entry(NamedTuple):
    """Bytes, and an ``abi.memory.E820_*`` type."""

    address: int
    size: int
    type: int


class EvtchnState(NamedTuple):
    """``EVTCHNOP_status``: ``status`` is closed, unbound, interdomain, pirq, virq or ipi; ``vcpu`` is the one
    it notifies."""

    status: str
    remote_domid: int | None
    remote_port: int | None
    number: int | None
    vcpu: int = 0


class GrantTableSize(NamedTuple):
    """``version`` is what the guest chose: 1, 2, or 0 before it has. Frames are pages of the table."""

    version: int
    frames: int
    max_frames: int


class Mapping(Protocol):
    """Pages of somebody else's memory, mapped. Use it as a context manager and drop every sub-view
    before it ends: the memory goes away with it."""

    view: memoryview

    def close(self) -> None: ...

    def __enter__(self) -> Mapping: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Hypervisor(TuningPort, Protocol):
    """Every call raises ``HypercallError`` (or ``HostMemoryError``) when Xen refuses."""

    versions: Versions

    @property
    def count(self) -> int:
        """Hypercalls and privcmd ioctls so far."""

    # --- the host -------------------------------------------------------------------------------
    def host(self) -> HostState: ...

    def capabilities(self) -> tuple[str, ...]: ...

    def commandline(self) -> str: ...

    def scheduler(self) -> int:
        """An ``abi.domctl.XEN_SCHEDULER_*`` number."""

    def console_ring(self, *, clear: bool = False) -> bytes:
        """Xen's own log (``dmesg``)."""

    def default_cpu_policy(self, *, hvm: bool) -> bytes:
        """The default CPUID policy for such guests: packed ``xen_cpuid_leaf_t`` records."""

    # --- domains --------------------------------------------------------------------------------
    def domains(self) -> list[DomainState]:
        """Every domain, dying ones included, in order of domid."""

    def domain(self, domid: int) -> DomainState | None: ...

    def create_domain(self, spec: CreateSpec) -> int: ...

    def destroy_domain(self, domid: int) -> None: ...

    def pause_domain(self, domid: int) -> None: ...

    def unpause_domain(self, domid: int) -> None: ...

    def shutdown_domain(self, domid: int, reason: int) -> None:
        """Make Xen itself consider the domain shut down, without asking the guest."""

    def send_trigger(self, domid: int, trigger: int, vcpu: int = 0) -> None: ...

    def set_max_vcpus(self, domid: int, count: int) -> None: ...

    def set_max_memory(self, domid: int, size: int) -> None:
        """``size`` in bytes."""

    def set_paging_pool(self, domid: int, size: int) -> None:
        """Bytes for the page tables Xen keeps for a PVH or HVM guest."""

    def set_time_offset(self, domid: int, seconds: int) -> None: ...

    def set_tsc_mode(self, domid: int, mode: int) -> None: ...

    def set_cpu_policy(self, domid: int, leaves: bytes) -> None: ...

    def vcpu(self, domid: int, vcpu: int) -> VcpuState | None: ...

    def set_vcpu_context(self, domid: int, vcpu: int, context: bytes) -> None:
        """PV only: a packed ``vcpu_guest_context``."""

    def hvm_context(self, domid: int) -> bytes: ...

    def set_hvm_context(self, domid: int, records: bytes) -> None: ...

    def init_hypercall_page(self, domid: int, gfn: int) -> None: ...

    # --- memory ---------------------------------------------------------------------------------
    def populate(
        self, domid: int, extents: Sequence[int], order: int = 0, *, on_demand: bool = False
    ) -> list[int]:
        """Give memory to the domain at guest frames ``extents``, each ``1 << order`` pages.

        Returns the machine frame of each extent for a PV guest, the guest frames themselves for
        others; fewer than asked when Xen ran out (of contiguous) memory. ``on_demand`` (not for PV)
        only promises the memory: it is taken from what ``set_pod_target`` set aside when it is touched.
        """

    def set_pod_target(self, domid: int, pages: int) -> None:
        """Give the domain, which has no memory yet, ``pages`` to be handed out as it touches them."""

    def claim(self, domid: int, pages: int) -> None:
        """Reserve pages for the domain so that populating cannot fail half-way; 0 gives back."""

    def set_memory_map(self, domid: int, entries: Sequence[E820Entry]) -> None: ...

    def clear_page(self, domid: int, gfn: int) -> None: ...

    def pin_l4_table(self, domid: int, mfn: int) -> None:
        """PV only: Xen validates the whole page-table tree below ``mfn``."""

    def map_foreign(self, domid: int, gfns: Sequence[int], *, writable: bool = True) -> Mapping: ...

    def grant_table_size(self, domid: int) -> GrantTableSize: ...

    def map_grant_table(self, domid: int, frames: int = 1) -> Mapping:
        """The first pages of the domain's grant table. Asking for more than it has makes Xen enlarge it."""

    def map_grant_status(self, domid: int, frames: int) -> Mapping:
        """The first pages of what Xen notes about the grants of a version 2 table: a u16 for each."""

    # --- HVM parameters and event channels --------------------------------------------------------
    def set_hvm_param(self, domid: int, index: int, value: int) -> None: ...

    def hvm_param(self, domid: int, index: int) -> int: ...

    def alloc_unbound(self, domid: int, remote: int) -> int:
        """A port in ``domid`` that ``remote`` may bind to."""

    def evtchn_status(self, domid: int, port: int) -> EvtchnState | None:
        """None where the port number is beyond the domain's table."""

    def close(self) -> None: ...
