"""``TuningVerbs`` on a ``Host``: a part of ``local.LocalClient``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xtool.progress import SILENT, Progress
from xtool.toolstack.api import (
    CoreDump,
    CreditInfo,
    LifecycleResult,
    MemoryInfo,
    ParameterChange,
    PoolInfo,
    PoolRequest,
    PoolScheduler,
    RtdsInfo,
    VcpuCount,
    VcpuInfo,
)
from xtool.toolstack.names import Named, find

if TYPE_CHECKING:
    from xtool.toolstack.host import Host


class LocalTuning:
    host: Host

    def _maybe(self, domain: str | None) -> Named | None:
        return None if domain is None else find(self.host, domain)

    def vcpu_pin(
        self,
        domain: str,
        vcpu: int | None,
        hard: str | None = None,
        soft: str | None = None,
        *,
        force: bool = False,
    ) -> list[VcpuInfo]:
        from xtool.toolstack.vcpus import pin

        return pin(self.host, find(self.host, domain), vcpu, hard, soft, force=force)

    def vcpu_set(
        self, domain: str, count: int, *, ignore_host: bool = False, wait: float | None = None
    ) -> VcpuCount:
        from xtool.toolstack.vcpus import set_online

        return set_online(self.host, find(self.host, domain), count, ignore_host=ignore_host, wait=wait)

    def mem_set(self, domain: str, size: int, *, wait: float | None = None) -> MemoryInfo:
        from xtool.toolstack.memory import set_target

        return set_target(self.host, find(self.host, domain), size, wait=wait)

    def mem_max(self, domain: str, size: int) -> MemoryInfo:
        from xtool.toolstack.memory import set_maximum

        return set_maximum(self.host, find(self.host, domain), size)

    def sched_credit(
        self, scheduler: str, domain: str | None = None, pool: str | None = None
    ) -> list[CreditInfo]:
        from xtool.toolstack.schedulers import credits

        return credits(self.host, scheduler, self._maybe(domain), pool)

    def sched_credit_set(
        self, scheduler: str, domain: str, *, weight: int | None = None, cap: int | None = None
    ) -> list[CreditInfo]:
        from xtool.toolstack.schedulers import set_credit

        return set_credit(self.host, scheduler, find(self.host, domain), weight, cap)

    def sched_rtds(
        self, domain: str | None = None, pool: str | None = None, vcpus: Sequence[int] | None = None
    ) -> list[RtdsInfo]:
        from xtool.toolstack.schedulers import rtds

        return rtds(self.host, self._maybe(domain), pool, vcpus)

    def sched_rtds_set(
        self,
        domain: str,
        vcpus: Sequence[int] | None = None,
        *,
        period: int | None = None,
        budget: int | None = None,
        extratime: bool | None = None,
    ) -> list[RtdsInfo]:
        from xtool.toolstack.schedulers import set_rtds

        return set_rtds(self.host, find(self.host, domain), vcpus, period, budget, extratime)

    def sched_pool(self, scheduler: str, pool: str | None = None) -> list[PoolScheduler]:
        from xtool.toolstack.schedulers import pool_schedulers

        return pool_schedulers(self.host, scheduler, pool)

    def sched_pool_set(
        self,
        scheduler: str,
        pool: str | None = None,
        *,
        ratelimit_us: int | None = None,
        tslice_ms: int | None = None,
        migration_delay_us: int | None = None,
    ) -> list[PoolScheduler]:
        from xtool.toolstack.schedulers import set_pool_scheduler

        return set_pool_scheduler(
            self.host,
            scheduler,
            pool,
            ratelimit_us=ratelimit_us,
            tslice_ms=tslice_ms,
            migration_delay_us=migration_delay_us,
        )

    def cpupool_list(self, pool: str | None = None) -> list[PoolInfo]:
        from xtool.toolstack.cpupools import listed

        return listed(self.host, pool)

    def cpupool_create(self, request: PoolRequest) -> PoolInfo:
        from xtool.toolstack.cpupools import create

        return create(self.host, request)

    def cpupool_destroy(self, pool: str) -> PoolInfo:
        from xtool.toolstack.cpupools import destroy

        return destroy(self.host, pool)

    def cpupool_rename(self, pool: str, name: str) -> PoolInfo:
        from xtool.toolstack.cpupools import rename

        return rename(self.host, pool, name)

    def cpupool_cpu_add(self, pool: str, cpus: str) -> PoolInfo:
        from xtool.toolstack.cpupools import add_cpus

        return add_cpus(self.host, pool, cpus)

    def cpupool_cpu_remove(self, pool: str, cpus: str) -> PoolInfo:
        from xtool.toolstack.cpupools import remove_cpus

        return remove_cpus(self.host, pool, cpus)

    def cpupool_migrate(self, domain: str, pool: str) -> LifecycleResult:
        from xtool.toolstack.cpupools import migrate

        return migrate(self.host, find(self.host, domain), pool)

    def cpupool_numa_split(self) -> list[PoolInfo]:
        from xtool.toolstack.cpupools import numa_split

        return numa_split(self.host)

    def trigger(self, domain: str, what: str, vcpu: int = 0) -> LifecycleResult:
        from xtool.toolstack.control import trigger

        return trigger(self.host, find(self.host, domain), what, vcpu)

    def sysrq(self, domain: str, letter: str) -> LifecycleResult:
        from xtool.toolstack.control import sysrq

        return sysrq(self.host, find(self.host, domain), letter)

    def debug_keys(self, keys: str) -> str:
        from xtool.toolstack.control import debug_keys

        return debug_keys(self.host, keys)

    def set_parameters(self, settings: Sequence[str]) -> list[ParameterChange]:
        from xtool.toolstack.control import set_parameters

        return set_parameters(self.host, settings)

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
        from xtool.toolstack.dumpcore import dump_and_act

        found = find(self.host, domain)
        return dump_and_act(self.host, found, path, live=live, crash=crash, reset=reset, progress=progress)
