"""Scheduling and CPU pools: affinity, scheduler parameters, ``XEN_SYSCTL_cpupool_op``.

Facts about Xen's side:
* A scheduler operation names the scheduler it means; EINVAL where the domain's pool has another one.
* credit2 refuses a cap of more than 100 % for each vCPU; credit takes any. 0 as a weight changes nothing.
* rtds' ``getinfo`` tells the defaults and no domain's parameters: those are asked for vCPU by vCPU.
* null has no parameters, and answers success without doing anything.
* CPU 0 stays in pool 0. Removing a CPU may fail for a moment, while something runs on it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from xtool.abi import domctl as d
from xtool.abi import sysctl as s
from xtool.errors import HypercallError
from xtool.hypercall.calls import Calls
from xtool.hypercall.tuningport import CpuPlace, CreditParams, PoolParams, PoolState, RtdsParams

#: 4096 CPUs: more than Xen is ever built for.
_CPUMAP_BYTES = 512
_CPUMAP_BITS = _CPUMAP_BYTES * 8
_MAX_CPUS = 4096
#: vCPUs in one call: Xen may stop after 64 to look for something more urgent.
_VCPUS = 64
#: How often a CPU is asked to leave its pool while it is busy.
_TRIES = 5


def cpu_bytes(cpus: Iterable[int]) -> bytes:
    """A CPU set as Xen's bitmap: bit n of byte n/8."""
    bits = 0
    for cpu in cpus:
        bits |= 1 << cpu
    return bits.to_bytes(_CPUMAP_BYTES, "little")


def cpu_set(raw: bytes) -> frozenset[int]:
    bits = int.from_bytes(raw, "little")
    return frozenset(n for n in range(bits.bit_length()) if bits >> n & 1)


class TuningCalls(Calls):
    # --- affinity ---------------------------------------------------------------------------------
    def set_affinity(
        self,
        domid: int,
        vcpu: int,
        cpus: Iterable[int] | None = None,
        soft: Iterable[int] | None = None,
        *,
        force: bool = False,
    ) -> None:
        maps = [cpu_bytes(()) if chosen is None else cpu_bytes(chosen) for chosen in (cpus, soft)]
        address = self._device.put_bulk(b"".join(maps))
        flags = 0 if cpus is None else d.XEN_VCPUAFFINITY_HARD
        flags |= 0 if soft is None else d.XEN_VCPUAFFINITY_SOFT
        flags |= d.XEN_VCPUAFFINITY_FORCE if force else 0
        payload = d.VcpuAffinity(
            vcpu=vcpu,
            flags=flags,
            cpumap_hard=d.Bitmap(address, _CPUMAP_BITS),
            cpumap_soft=d.Bitmap(address + _CPUMAP_BYTES, _CPUMAP_BITS),
        )
        self._domctl("setvcpuaffinity", d.XEN_DOMCTL_setvcpuaffinity, domid, payload)

    def affinity(self, domid: int, vcpu: int) -> tuple[frozenset[int], frozenset[int]]:
        self._device.put_bulk(bytes(2 * _CPUMAP_BYTES))
        payload = d.VcpuAffinity(
            vcpu=vcpu,
            flags=d.XEN_VCPUAFFINITY_HARD | d.XEN_VCPUAFFINITY_SOFT,
            cpumap_hard=d.Bitmap(self._device.bulk, _CPUMAP_BITS),
            cpumap_soft=d.Bitmap(self._device.bulk + _CPUMAP_BYTES, _CPUMAP_BITS),
        )
        self._domctl("getvcpuaffinity", d.XEN_DOMCTL_getvcpuaffinity, domid, payload)
        raw = self._device.get_bulk(2 * _CPUMAP_BYTES)
        return cpu_set(raw[:_CPUMAP_BYTES]), cpu_set(raw[_CPUMAP_BYTES:])

    # --- a domain's parameters --------------------------------------------------------------------
    def credit(self, domid: int, scheduler: int) -> CreditParams:
        request = d.SchedulerOp(sched_id=scheduler, cmd=d.XEN_DOMCTL_SCHEDOP_getinfo)
        now = self._domctl_out("scheduler_op", d.XEN_DOMCTL_scheduler_op, domid, request)
        return CreditParams(now.weight, now.cap)

    def set_credit(
        self, domid: int, *, weight: int | None = None, cap: int | None = None, scheduler: int | None = None
    ) -> None:
        scheduler = self.scheduler() if scheduler is None else scheduler
        now = self.credit(domid, scheduler)
        request = d.SchedulerOp(
            sched_id=scheduler,
            cmd=d.XEN_DOMCTL_SCHEDOP_putinfo,
            weight=now.weight if weight is None else weight,
            cap=now.cap if cap is None else cap,
        )
        self._domctl("scheduler_op", d.XEN_DOMCTL_scheduler_op, domid, request)

    def rtds(self, domid: int, vcpus: Sequence[int]) -> list[RtdsParams]:
        asked = [RtdsParams(vcpu, 0, 0, False) for vcpu in vcpus]
        return self._rtds(domid, d.XEN_DOMCTL_SCHEDOP_getvcpuinfo, asked)

    def set_rtds(self, domid: int, params: Sequence[RtdsParams]) -> None:
        self._rtds(domid, d.XEN_DOMCTL_SCHEDOP_putvcpuinfo, params)

    def _rtds(self, domid: int, cmd: int, params: Sequence[RtdsParams]) -> list[RtdsParams]:
        size = d.SchedParamVcpu.size()
        answered: list[RtdsParams] = []
        left = list(params)
        while left:
            part = left[:_VCPUS]
            raw = b"".join(
                bytes(d.SchedParamVcpu(p.period, p.budget, d.XEN_DOMCTL_SCHEDRT_extra * p.extratime, p.vcpu))
                for p in part
            )
            request = d.SchedulerVcpusOp(
                sched_id=d.XEN_SCHEDULER_RTDS,
                cmd=cmd,
                vcpus=self._device.put_bulk(raw),
                nr_vcpus=len(part),
            )
            done = self._domctl_out("scheduler_op", d.XEN_DOMCTL_scheduler_op, domid, request).nr_vcpus
            raw = self._device.get_bulk(done * size)
            for at in range(0, len(raw), size):
                p = d.SchedParamVcpu.from_buffer_copy(raw, at)
                extra = bool(p.flags & d.XEN_DOMCTL_SCHEDRT_extra)
                answered.append(RtdsParams(p.vcpuid, p.period, p.budget, extra))
            left = left[done:]
        return answered

    # --- a pool's parameters ----------------------------------------------------------------------
    def pool_params(self, pool: int, scheduler: int) -> PoolParams:
        return self._pool_params(pool, scheduler, s.XEN_SYSCTL_SCHEDOP_getinfo, PoolParams(0))

    def set_pool_params(self, pool: int, scheduler: int, params: PoolParams) -> None:
        self._pool_params(pool, scheduler, s.XEN_SYSCTL_SCHEDOP_putinfo, params)

    def _pool_params(self, pool: int, scheduler: int, cmd: int, params: PoolParams) -> PoolParams:
        name, number = f"scheduler_op of pool {pool}", s.XEN_SYSCTL_scheduler_op
        if scheduler == d.XEN_SCHEDULER_CREDIT2:
            two = s.PoolCredit2Op(
                cpupool_id=pool, sched_id=scheduler, cmd=cmd, ratelimit_us=params.ratelimit_us
            )
            return PoolParams(self._sysctl(name, number, two).ratelimit_us)
        request = s.PoolSchedulerOp(
            cpupool_id=pool,
            sched_id=scheduler,
            cmd=cmd,
            tslice_ms=params.tslice_ms,
            ratelimit_us=params.ratelimit_us,
            vcpu_migr_delay_us=params.migration_delay_us,
        )
        seen = self._sysctl(name, number, request)
        return PoolParams(seen.ratelimit_us, seen.tslice_ms, seen.vcpu_migr_delay_us)

    # --- pools ------------------------------------------------------------------------------------
    def scheduler(self) -> int:
        return int(self._sysctl("sched_id", s.XEN_SYSCTL_sched_id, s.SchedId()).sched_id)

    def _pool(self, name: str, op: int, pool: int = 0, **fields: int) -> s.CpupoolOp:
        request = s.CpupoolOp(op=op, cpupool_id=pool, **fields)
        request.cpumap = d.Bitmap(self._device.bulk, _CPUMAP_BITS)
        return self._sysctl(name, s.XEN_SYSCTL_cpupool_op, request)

    def pools(self) -> list[PoolState]:
        found: list[PoolState] = []
        number = 0
        while True:
            try:
                # Answers with the pool of that number, or the next there is.
                info = self._pool("cpupool info", s.XEN_SYSCTL_CPUPOOL_OP_INFO, number)
            except HypercallError as error:
                if error.errno == errno.ENOENT:
                    return found
                raise
            cpus = cpu_set(self._device.get_bulk(_CPUMAP_BYTES))
            found.append(PoolState(info.cpupool_id, info.sched_id, info.n_dom, cpus))
            number = info.cpupool_id + 1

    def free_cpus(self) -> frozenset[int]:
        self._pool("cpupool freeinfo", s.XEN_SYSCTL_CPUPOOL_OP_FREEINFO)
        return cpu_set(self._device.get_bulk(_CPUMAP_BYTES))

    def create_pool(self, scheduler: int) -> int:
        any_id = s.XEN_SYSCTL_CPUPOOL_PAR_ANY
        made = self._pool("cpupool create", s.XEN_SYSCTL_CPUPOOL_OP_CREATE, any_id, sched_id=scheduler)
        return int(made.cpupool_id)

    def destroy_pool(self, pool: int) -> None:
        self._pool(f"cpupool destroy of pool {pool}", s.XEN_SYSCTL_CPUPOOL_OP_DESTROY, pool)

    def add_pool_cpu(self, pool: int, cpu: int) -> None:
        name = f"adding CPU {cpu} to pool {pool}"
        self._pool(name, s.XEN_SYSCTL_CPUPOOL_OP_ADDCPU, pool, cpu=cpu)

    def remove_pool_cpu(self, pool: int, cpu: int) -> None:
        name = f"removing CPU {cpu} from pool {pool}"
        for attempt in range(_TRIES):
            try:
                self._pool(name, s.XEN_SYSCTL_CPUPOOL_OP_RMCPU, pool, cpu=cpu)
                return
            except HypercallError as error:
                if error.errno not in (errno.EAGAIN, errno.EBUSY) or attempt == _TRIES - 1:
                    raise

    def move_to_pool(self, domid: int, pool: int) -> None:
        name = f"moving domain {domid} to pool {pool}"
        self._pool(name, s.XEN_SYSCTL_CPUPOOL_OP_MOVEDOMAIN, pool, domid=domid)

    def cpu_places(self) -> list[CpuPlace | None]:
        size = s.CpuTopo.size()
        request = s.CpuTopoInfo(num_cpus=_MAX_CPUS, cputopo=self._device.bulk)
        count = self._sysctl("cputopoinfo", s.XEN_SYSCTL_cputopoinfo, request).num_cpus
        raw = self._device.get_bulk(count * size)
        places = (s.CpuTopo.from_buffer_copy(raw, at) for at in range(0, len(raw), size))
        gone = s.XEN_INVALID_CORE_ID
        return [None if p.core == gone else CpuPlace(p.core, p.socket, p.node) for p in places]
