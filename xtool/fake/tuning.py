"""Schedulers, affinity and CPU pools of the hypervisor in memory. It refuses what Xen refuses, with the same
errno; what a Xen refuses that has fewer schedulers built in, ``schedulers`` says."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from xtool.abi import domctl as d
from xtool.abi import hypfs as f
from xtool.abi import sysctl as s
from xtool.fake.domain import FakeDomain, refuse
from xtool.hypercall.tuningport import (
    CpuPlace,
    CreditParams,
    PoolParams,
    PoolState,
    RtdsParams,
    XenParameter,
)

_CREDITS = (d.XEN_SCHEDULER_CREDIT, d.XEN_SCHEDULER_CREDIT2)
_RTDS = (10000, 4000, False)
_RTDS_LEAST = 10
#: The rate limit of credit2 and credit, and credit's time slice.
_PARAMS = PoolParams(1000, 30, 0)


@dataclass
class FakePool:
    scheduler: int
    cpus: set[int] = field(default_factory=set)
    params: PoolParams = _PARAMS


class FakeTuning:
    """A part of ``FakeHypervisor``."""

    all: dict[int, FakeDomain]

    def __init__(self, cpus: int) -> None:
        self._cpus = cpus
        self.schedulers = {*_CREDITS, d.XEN_SCHEDULER_RTDS, d.XEN_SCHEDULER_NULL}
        self._pools = {0: FakePool(d.XEN_SCHEDULER_CREDIT2, set(range(cpus)))}
        #: NUMA node of each CPU.
        self.nodes = [0] * cpus
        #: What ``send_trigger`` and ``debug_keys`` were given.
        self.triggers: list[tuple[int, int, int]] = []
        self.keys = ""
        self.parameters: dict[str, XenParameter] = {
            "/buildinfo/changeset": XenParameter(f.XEN_HYPFS_TYPE_STRING, b"fake\0", False),
            "/params/gnttab_max_frames": XenParameter(f.XEN_HYPFS_TYPE_STRING, b"64\0", True),
            "/params/global-pages": XenParameter(f.XEN_HYPFS_TYPE_BOOL, b"\1", True),
            "/params/loglvl": XenParameter(f.XEN_HYPFS_TYPE_STRING, b"warning\0", True),
        }

    def _op(self, name: str) -> None:
        raise NotImplementedError

    def _get(self, name: str, domid: int) -> FakeDomain:
        raise NotImplementedError

    def _pool(self, name: str, pool: int) -> FakePool:
        self._op(name)
        if pool not in self._pools:
            raise refuse(f"{name} of pool {pool}", errno.ENOENT)
        return self._pools[pool]

    def _pool_for_new(self, pool: int) -> None:
        """What ``createdomain`` wants of its pool."""
        if pool not in self._pools:
            raise refuse("createdomain", errno.ESRCH)
        if not self._pools[pool].cpus:
            raise refuse("createdomain", errno.ENODEV)

    def _under(self, name: str, domid: int, schedulers: Iterable[int]) -> FakeDomain:
        domain = self._get(name, domid)
        if self._pools[domain.pool].scheduler not in schedulers:
            raise refuse(f"scheduler_op of domain {domid}", errno.EINVAL)
        return domain

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
        domain = self._get("set_affinity", domid)
        operation = f"setvcpuaffinity of domain {domid}"
        if vcpu >= domain.vcpus or (cpus is None and soft is None and not force):
            raise refuse(operation, errno.EINVAL)
        hard_now, soft_now = self._affinity(domain, vcpu)
        hard_new = hard_now if cpus is None else frozenset(cpus) & frozenset(range(self._cpus))
        if cpus is not None and not hard_new & self._pools[domain.pool].cpus:
            raise refuse(operation, errno.EINVAL)
        soft_new = soft_now if soft is None else frozenset(soft) & frozenset(range(self._cpus))
        domain.affinities[vcpu] = (hard_new, soft_new)

    def _affinity(self, domain: FakeDomain, vcpu: int) -> tuple[frozenset[int], frozenset[int]]:
        everything = frozenset(range(self._cpus))
        return domain.affinities.get(vcpu, (everything, everything))

    def affinity(self, domid: int, vcpu: int) -> tuple[frozenset[int], frozenset[int]]:
        domain = self._get("affinity", domid)
        if vcpu >= domain.vcpus:
            raise refuse(f"getvcpuaffinity of domain {domid}", errno.EINVAL)
        return self._affinity(domain, vcpu)

    def send_trigger(self, domid: int, trigger: int, vcpu: int = 0) -> None:
        domain = self._get("send_trigger", domid)
        name = f"sendtrigger of domain {domid}"
        if vcpu >= domain.vcpus:
            raise refuse(name, errno.ESRCH)
        if trigger in (d.XEN_DOMCTL_SENDTRIGGER_RESET, d.XEN_DOMCTL_SENDTRIGGER_INIT):
            raise refuse(name, errno.ENOSYS)
        if trigger != d.XEN_DOMCTL_SENDTRIGGER_NMI and not domain.spec.hvm:
            raise refuse(name, errno.EINVAL)
        self.triggers.append((domid, trigger, vcpu))

    # --- schedulers -------------------------------------------------------------------------------
    def scheduler(self) -> int:
        return self._pools[0].scheduler

    def credit(self, domid: int, scheduler: int) -> CreditParams:
        domain = self._under("credit", domid, [scheduler])
        return domain.credit if scheduler in _CREDITS else CreditParams(0, 0)

    def set_credit(
        self, domid: int, *, weight: int | None = None, cap: int | None = None, scheduler: int | None = None
    ) -> None:
        scheduler = self.scheduler() if scheduler is None else scheduler
        domain = self._under("set_credit", domid, [scheduler])
        limited = scheduler == d.XEN_SCHEDULER_CREDIT2
        if cap and limited and cap > 100 * domain.vcpus:
            raise refuse(f"scheduler_op of domain {domid}", errno.EINVAL)
        now = domain.credit
        domain.credit = CreditParams(weight or now.weight, now.cap if cap is None else cap)

    def rtds(self, domid: int, vcpus: Sequence[int]) -> list[RtdsParams]:
        domain = self._under("rtds", domid, [d.XEN_SCHEDULER_RTDS])
        if any(vcpu >= domain.vcpus for vcpu in vcpus):
            raise refuse(f"scheduler_op of domain {domid}", errno.EINVAL)
        return [domain.rtds.get(vcpu, RtdsParams(vcpu, *_RTDS)) for vcpu in vcpus]

    def set_rtds(self, domid: int, params: Sequence[RtdsParams]) -> None:
        domain = self._under("set_rtds", domid, [d.XEN_SCHEDULER_RTDS])
        for wanted in params:
            fits = _RTDS_LEAST <= wanted.budget <= wanted.period
            if wanted.vcpu >= domain.vcpus or not fits:
                raise refuse(f"scheduler_op of domain {domid}", errno.EINVAL)
            domain.rtds[wanted.vcpu] = wanted

    def pool_params(self, pool: int, scheduler: int) -> PoolParams:
        found = self._scheduled("pool_params", pool, scheduler)
        two = scheduler == d.XEN_SCHEDULER_CREDIT2
        return PoolParams(found.params.ratelimit_us) if two else found.params

    def set_pool_params(self, pool: int, scheduler: int, params: PoolParams) -> None:
        found = self._scheduled("set_pool_params", pool, scheduler)
        limit, least, most = (
            params.ratelimit_us,
            s.XEN_SYSCTL_SCHED_RATELIMIT_MIN,
            s.XEN_SYSCTL_SCHED_RATELIMIT_MAX,
        )
        bad = limit and not least <= limit <= most
        if scheduler == d.XEN_SCHEDULER_CREDIT:
            bad = bad or not params.tslice_ms >= s.XEN_SYSCTL_CSCHED_TSLICE_MIN
            bad = bad or params.tslice_ms > s.XEN_SYSCTL_CSCHED_TSLICE_MAX
            bad = bad or limit > params.tslice_ms * 1000
            bad = bad or params.migration_delay_us > s.XEN_SYSCTL_CSCHED_MGR_DLY_MAX_US
        if bad:
            raise refuse(f"scheduler_op of pool {pool}", errno.EINVAL)
        found.params = params

    def _scheduled(self, name: str, pool: int, scheduler: int) -> FakePool:
        self._op(name)
        if pool not in self._pools:
            raise refuse(f"scheduler_op of pool {pool}", errno.ESRCH)
        if self._pools[pool].scheduler != scheduler:
            raise refuse(f"scheduler_op of pool {pool}", errno.EINVAL)
        return self._pools[pool]

    # --- pools ------------------------------------------------------------------------------------
    def _members(self, pool: int) -> int:
        return sum(domain.pool == pool for domain in self.all.values())

    def pools(self) -> list[PoolState]:
        self._op("pools")
        return [
            PoolState(number, pool.scheduler, self._members(number), frozenset(pool.cpus))
            for number, pool in sorted(self._pools.items())
        ]

    def free_cpus(self) -> frozenset[int]:
        self._op("free_cpus")
        return frozenset(range(self._cpus)) - {c for pool in self._pools.values() for c in pool.cpus}

    def create_pool(self, scheduler: int) -> int:
        self._op("create_pool")
        if scheduler not in self.schedulers:
            raise refuse("cpupool create", errno.ENOENT)
        if len(self._pools) >= 2 * self._cpus:
            raise refuse("cpupool create", errno.ENOSPC)
        number = max(self._pools) + 1
        self._pools[number] = FakePool(scheduler)
        return number

    def destroy_pool(self, pool: int) -> None:
        if self._pool("cpupool destroy", pool).cpus or self._members(pool):
            raise refuse(f"cpupool destroy of pool {pool}", errno.EBUSY)
        del self._pools[pool]

    def add_pool_cpu(self, pool: int, cpu: int) -> None:
        found = self._pool("add_pool_cpu", pool)
        if cpu >= self._cpus:
            raise refuse(f"adding CPU {cpu} to pool {pool}", errno.EINVAL)
        if cpu not in self.free_cpus():
            raise refuse(f"adding CPU {cpu} to pool {pool}", errno.ENODEV)
        found.cpus.add(cpu)

    def remove_pool_cpu(self, pool: int, cpu: int) -> None:
        found = self._pool("remove_pool_cpu", pool)
        name = f"removing CPU {cpu} from pool {pool}"
        if (pool == 0 and cpu == 0) or cpu >= self._cpus:
            raise refuse(name, errno.EINVAL)
        if cpu not in found.cpus:
            raise refuse(name, errno.EADDRNOTAVAIL)
        if found.cpus == {cpu} and self._members(pool):
            raise refuse(name, errno.EBUSY)
        found.cpus.remove(cpu)

    def move_to_pool(self, domid: int, pool: int) -> None:
        domain = self._get("move_to_pool", domid)
        if domain.pool == pool:
            return
        if pool not in self._pools or not self._pools[pool].cpus:
            raise refuse(f"moving domain {domid} to pool {pool}", errno.ENOENT)
        # The new scheduler knows nothing of what was set in the old one.
        domain.pool = pool
        domain.affinities.clear()
        domain.rtds.clear()
        domain.credit = CreditParams(256, 0)

    def cpu_places(self) -> list[CpuPlace | None]:
        self._op("cpu_places")
        return [CpuPlace(cpu, 0, self.nodes[cpu]) for cpu in range(self._cpus)]

    # --- Xen itself -------------------------------------------------------------------------------
    def debug_keys(self, keys: str) -> None:
        self._op("debug_keys")
        self.keys += keys

    def parameter(self, path: str) -> XenParameter:
        self._op("parameter")
        if path not in self.parameters:
            raise refuse(f"reading {path}", errno.ENOENT)
        return self.parameters[path]

    def set_parameter(self, path: str, content: bytes) -> None:
        self._op("set_parameter")
        name = f"writing {path}"
        if path not in self.parameters:
            raise refuse(name, errno.ENOENT)
        known = self.parameters[path]
        if not known.writable:
            raise refuse(name, errno.EACCES)
        if known.type == f.XEN_HYPFS_TYPE_STRING:
            # These are parsed by Xen itself, which knows what makes sense.
            if content.find(b"\0") != len(content) - 1:
                raise refuse(name, errno.EDOM)
            if known.content[:-1].isdigit() and not content[:-1].isdigit():
                raise refuse(name, errno.EINVAL)
        elif len(content) != len(known.content):
            raise refuse(name, errno.EDOM)
        self.parameters[path] = known._replace(content=content)
