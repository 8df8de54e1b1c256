"""What is asked of a hypervisor about scheduling, CPU pools, its own parameters and core dumps; a part of
``port.Hypervisor``, and the records it answers with. The same rules as there."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class PoolState(NamedTuple):
    """A CPU pool: ``scheduler`` is ``abi.domctl.XEN_SCHEDULER_*``, ``domains`` how many are in it."""

    id: int
    scheduler: int
    domains: int
    cpus: frozenset[int]


class CpuPlace(NamedTuple):
    """Where a CPU is in the machine."""

    core: int
    socket: int
    node: int


class CreditParams(NamedTuple):
    """Of a domain under credit or credit2: its share, and its cap in per cent of one CPU (0 is none)."""

    weight: int
    cap: int


class RtdsParams(NamedTuple):
    """Of one vCPU under rtds: ``budget`` microseconds in each ``period``; ``extratime``: more if idle."""

    vcpu: int
    period: int
    budget: int
    extratime: bool


class PoolParams(NamedTuple):
    """Of a pool's scheduler, microseconds and milliseconds; credit2 has the rate limit alone."""

    ratelimit_us: int
    tslice_ms: int = 0
    migration_delay_us: int = 0


class XenParameter(NamedTuple):
    """An entry of Xen's file system: ``type`` is ``abi.hypfs.XEN_HYPFS_TYPE_*``."""

    type: int
    content: bytes
    writable: bool


class XenVersion(NamedTuple):
    """All of ``xen_version``, texts as the padded bytes Xen gives."""

    major: int
    minor: int
    extraversion: bytes
    compile_info: bytes
    capabilities: bytes
    changeset: bytes
    virt_start: int
    page_size: int


class PodState(NamedTuple):
    """Memory promised on demand, in pages: ``entries`` promised and not given, ``cache`` there to give."""

    cache: int
    entries: int


class TuningPort(Protocol):
    # --- vCPUs ------------------------------------------------------------------------------------
    def set_affinity(
        self,
        domid: int,
        vcpu: int,
        cpus: Iterable[int] | None = None,
        soft: Iterable[int] | None = None,
        *,
        force: bool = False,
    ) -> None:
        """Hard affinity ``cpus`` and ``soft`` affinity; None leaves one as it is. ``force`` undoes an
        override that the domain's kernel made for itself."""

    def affinity(self, domid: int, vcpu: int) -> tuple[frozenset[int], frozenset[int]]:
        """``(hard, soft)``."""

    # --- schedulers -------------------------------------------------------------------------------
    def credit(self, domid: int, scheduler: int) -> CreditParams:
        """Refused with EINVAL when ``scheduler`` is not that of the domain's pool; so are the next."""

    def set_credit(
        self, domid: int, *, weight: int | None = None, cap: int | None = None, scheduler: int | None = None
    ) -> None:
        """Without ``scheduler``, the host's default one is meant. A cap beyond the domain's vCPUs is refused
        by credit2 alone."""

    def rtds(self, domid: int, vcpus: Sequence[int]) -> list[RtdsParams]: ...

    def set_rtds(self, domid: int, params: Sequence[RtdsParams]) -> None: ...

    def pool_params(self, pool: int, scheduler: int) -> PoolParams: ...

    def set_pool_params(self, pool: int, scheduler: int, params: PoolParams) -> None: ...

    # --- pools ------------------------------------------------------------------------------------
    def pools(self) -> list[PoolState]: ...

    def free_cpus(self) -> frozenset[int]:
        """CPUs in no pool."""

    def create_pool(self, scheduler: int) -> int:
        """An empty pool; its id."""

    def destroy_pool(self, pool: int) -> None: ...

    def add_pool_cpu(self, pool: int, cpu: int) -> None: ...

    def remove_pool_cpu(self, pool: int, cpu: int) -> None: ...

    def move_to_pool(self, domid: int, pool: int) -> None: ...

    def cpu_places(self) -> list[CpuPlace | None]:
        """By CPU number; None for a CPU that is not online."""

    # --- Xen itself -------------------------------------------------------------------------------
    def debug_keys(self, keys: str) -> None: ...

    def parameter(self, path: str) -> XenParameter:
        """An entry of Xen's file system, such as ``/params/sched-gran``. ENOENT: no such; ENOSYS: none."""

    def set_parameter(self, path: str, content: bytes) -> None: ...

    # --- for core dumps ---------------------------------------------------------------------------
    def xen_version(self) -> XenVersion: ...

    def vcpu_context(self, domid: int, vcpu: int) -> bytes | None:
        """A packed ``vcpu_guest_context``; None for a vCPU that was never started."""

    def max_gpfn(self, domid: int) -> int:
        """The highest guest frame of a PVH or HVM guest."""

    def present(self, domid: int, frames: Sequence[int]) -> list[bool]:
        """Which frames are the domain's memory. Memory that was promised on demand is given by this."""

    def pod_state(self, domid: int) -> PodState: ...

    def ram_end(self) -> int:
        """The first machine frame beyond all RAM (Xen calls it the maximum)."""

    def machine_to_phys(self, first: int, count: int) -> array[int]:
        """For machine frames from ``first`` on, what their owner, a PV guest, calls them. The guests write
        these entries themselves: they may be anything."""
