"""The verbs that tune a running domain, its CPU pool or Xen itself: a part of ``api.Client``.

As there, ``domain`` takes a name, a domain id or a uuid as text; sizes are bytes. CPU lists are written as in
xl: ``0-3,^1``, ``node:1``, ``all``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from xtool.progress import SILENT, Progress
from xtool.toolstack.records import LifecycleResult, VcpuInfo
from xtool.toolstack.tuningrecords import (
    CoreDump,
    CreditInfo,
    MemoryInfo,
    ParameterChange,
    PoolInfo,
    PoolRequest,
    PoolScheduler,
    RtdsInfo,
    VcpuCount,
)

if TYPE_CHECKING:
    from pathlib import Path


class TuningVerbs(Protocol):
    # --- vCPUs and memory -------------------------------------------------------------------------
    def vcpu_pin(
        self,
        domain: str,
        vcpu: int | None,
        hard: str | None = None,
        soft: str | None = None,
        *,
        force: bool = False,
    ) -> list[VcpuInfo]:
        """Where a vCPU (None: all) may run, and where it should; None or ``-`` leaves that as it is."""

    def vcpu_set(
        self, domain: str, count: int, *, ignore_host: bool = False, wait: float | None = None
    ) -> VcpuCount:
        """Ask for so many vCPUs online; ``wait``: seconds for the guest to do it."""

    def mem_set(self, domain: str, size: int, *, wait: float | None = None) -> MemoryInfo:
        """Ask the guest to have so much memory; ``wait``: seconds for the guest to do it."""

    def mem_max(self, domain: str, size: int) -> MemoryInfo:
        """The most memory the guest may be asked to have."""

    # --- schedulers -------------------------------------------------------------------------------
    def sched_credit(
        self, scheduler: str, domain: str | None = None, pool: str | None = None
    ) -> list[CreditInfo]:
        """Weights and caps; ``scheduler`` is ``credit`` or ``credit2``."""

    def sched_credit_set(
        self, scheduler: str, domain: str, *, weight: int | None = None, cap: int | None = None
    ) -> list[CreditInfo]: ...

    def sched_rtds(
        self, domain: str | None = None, pool: str | None = None, vcpus: Sequence[int] | None = None
    ) -> list[RtdsInfo]: ...

    def sched_rtds_set(
        self,
        domain: str,
        vcpus: Sequence[int] | None = None,
        *,
        period: int | None = None,
        budget: int | None = None,
        extratime: bool | None = None,
    ) -> list[RtdsInfo]: ...

    def sched_pool(self, scheduler: str, pool: str | None = None) -> list[PoolScheduler]: ...

    def sched_pool_set(
        self,
        scheduler: str,
        pool: str | None = None,
        *,
        ratelimit_us: int | None = None,
        tslice_ms: int | None = None,
        migration_delay_us: int | None = None,
    ) -> list[PoolScheduler]: ...

    # --- CPU pools --------------------------------------------------------------------------------
    def cpupool_list(self, pool: str | None = None) -> list[PoolInfo]: ...

    def cpupool_create(self, request: PoolRequest) -> PoolInfo: ...

    def cpupool_destroy(self, pool: str) -> PoolInfo:
        """The pool as it was; its CPUs are in no pool then."""

    def cpupool_rename(self, pool: str, name: str) -> PoolInfo: ...

    def cpupool_cpu_add(self, pool: str, cpus: str) -> PoolInfo: ...

    def cpupool_cpu_remove(self, pool: str, cpus: str) -> PoolInfo: ...

    def cpupool_migrate(self, domain: str, pool: str) -> LifecycleResult: ...

    def cpupool_numa_split(self) -> list[PoolInfo]:
        """One pool for each NUMA node."""

    # --- control ----------------------------------------------------------------------------------
    def trigger(self, domain: str, what: str, vcpu: int = 0) -> LifecycleResult:
        """``nmi``, ``reset``, ``init``, ``power``, ``sleep`` or ``s3resume``."""

    def sysrq(self, domain: str, letter: str) -> LifecycleResult: ...

    def debug_keys(self, keys: str) -> str: ...

    def set_parameters(self, settings: Sequence[str]) -> list[ParameterChange]:
        """``name=value`` each."""

    def dump_core(
        self,
        domain: str,
        path: Path,
        *,
        live: bool = False,
        crash: bool = False,
        reset: bool = False,
        progress: Progress = SILENT,
    ) -> CoreDump:
        """The domain's memory and registers into a file. It is paused meanwhile, unless ``live``; then it
        goes on, or is made to crash, or is destroyed and started again (``reset``)."""
