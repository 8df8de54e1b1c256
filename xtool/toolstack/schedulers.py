"""What schedulers go by: weight and cap of domains, period and budget of vCPUs, rate limits of pools.

Xen takes some senseless values without a word, and answers EINVAL to the others: every range is checked
here, where it can be named.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from xtool.abi import domctl as d
from xtool.abi import sysctl as s
from xtool.errors import DomainError, UsageError
from xtool.hypercall.tuningport import PoolParams, PoolState, RtdsParams
from xtool.toolstack import journal
from xtool.toolstack.api import CreditInfo, PoolScheduler, RtdsInfo
from xtool.toolstack.names import Named, named_domains, uuid_text
from xtool.toolstack.pools import SCHEDULERS, find_pool, pool_names, pool_of, scheduler_name

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

MAX_WEIGHT = 65535
#: Microseconds, of rtds: the least Xen takes, and the most its interface holds.
MIN_RTDS = 10
MAX_RTDS = 0xFFFF_FFFF


# --- credit, credit2 --------------------------------------------------------------------------------
def credits(host: Host, scheduler: str, found: Named | None, pool: str | None) -> list[CreditInfo]:
    """Of one domain, or of all in a pool, or of all in pools under that scheduler."""
    number = SCHEDULERS[scheduler]
    rows = []
    for domain, name in _under(host, scheduler, found, pool):
        now = host.hv.credit(domain.state.domid, number)
        rows.append(CreditInfo(domain.state.domid, domain.name, name, now.weight, now.cap))
    return rows


def set_credit(
    host: Host, scheduler: str, found: Named, weight: int | None, cap: int | None
) -> list[CreditInfo]:
    """Raises ``UsageError`` for a value out of range, ``DomainError`` for another scheduler."""
    domid, vcpus = found.state.domid, found.state.max_vcpu_id + 1
    _check_scheduler(host, scheduler, found)
    _between("weight", weight, 1, MAX_WEIGHT)
    _between("cap", cap, 0, 100 * vcpus, f"100 for each of its {vcpus} vCPUs; 0 is no cap")
    given = {"cpu_weight": weight, "cap": cap}
    kept = {key: value for key, value in given.items() if value is not None}
    uuid = uuid_text(found.state.handle)
    with journal.locked(uuid):
        host.hv.set_credit(domid, weight=weight, cap=cap, scheduler=SCHEDULERS[scheduler])
        journal.change_config(uuid, lambda config: {**config, **kept})
    return credits(host, scheduler, found, None)


# --- rtds -------------------------------------------------------------------------------------------
def rtds(
    host: Host, found: Named | None, pool: str | None, vcpus: Iterable[int] | None = None
) -> list[RtdsInfo]:
    """Of the vCPUs that are named, else of all."""
    rows = []
    for domain, name in _under(host, "rtds", found, pool):
        numbers = _numbers(domain, vcpus)
        for p in host.hv.rtds(domain.state.domid, numbers):
            rows.append(RtdsInfo(domain.state.domid, domain.name, name, *p))
    return rows


def set_rtds(
    host: Host,
    found: Named,
    vcpus: Iterable[int] | None,
    period: int | None,
    budget: int | None,
    extratime: bool | None,
) -> list[RtdsInfo]:
    """For the vCPUs that are named, else for all. Raises as ``set_credit``."""
    _check_scheduler(host, "rtds", found)
    numbers = _numbers(found, vcpus)
    _between("period", period, MIN_RTDS, MAX_RTDS, "microseconds")
    _between("budget", budget, MIN_RTDS, MAX_RTDS, "microseconds")
    wanted = [_changed(p, period, budget, extratime) for p in host.hv.rtds(found.state.domid, numbers)]
    for p in wanted:
        if p.budget > p.period:
            raise UsageError(
                f"vCPU {p.vcpu} would have a budget of {p.budget} us in a period of {p.period} us",
                hint="lower the budget, or raise the period",
            )
    host.hv.set_rtds(found.state.domid, wanted)
    return rtds(host, found, None, numbers)


def _changed(p: RtdsParams, period: int | None, budget: int | None, extratime: bool | None) -> RtdsParams:
    return RtdsParams(
        p.vcpu,
        p.period if period is None else period,
        p.budget if budget is None else budget,
        p.extratime if extratime is None else extratime,
    )


def _numbers(found: Named, vcpus: Iterable[int] | None) -> list[int]:
    count = found.state.max_vcpu_id + 1
    numbers = list(range(count) if vcpus is None else dict.fromkeys(vcpus))
    for number in numbers:
        if not 0 <= number < count:
            raise UsageError(f"{found.name} has no vCPU {number}", hint=f"its vCPUs are 0 to {count - 1}")
    return numbers


# --- pools ------------------------------------------------------------------------------------------
def pool_schedulers(host: Host, scheduler: str, pool: str | None) -> list[PoolScheduler]:
    """What that scheduler goes by, in one pool or in every pool it is in."""
    rows = []
    for found, name in _pools(host, scheduler, pool):
        now = host.hv.pool_params(found.id, found.scheduler)
        rows.append(_row(found, name, now))
    return rows


def set_pool_scheduler(
    host: Host,
    scheduler: str,
    pool: str | None,
    *,
    ratelimit_us: int | None = None,
    tslice_ms: int | None = None,
    migration_delay_us: int | None = None,
) -> list[PoolScheduler]:
    """Without ``pool``, in Pool-0, as xl. Raises ``UsageError`` for a value out of range."""
    ((found, name),) = _pools(host, scheduler, pool or "0")
    now = host.hv.pool_params(found.id, found.scheduler)
    least, most = s.XEN_SYSCTL_SCHED_RATELIMIT_MIN, s.XEN_SYSCTL_SCHED_RATELIMIT_MAX
    if ratelimit_us:
        _between("rate limit", ratelimit_us, least, most, "microseconds; 0 is none")
    _between(
        "time slice",
        tslice_ms,
        s.XEN_SYSCTL_CSCHED_TSLICE_MIN,
        s.XEN_SYSCTL_CSCHED_TSLICE_MAX,
        "milliseconds",
    )
    most = s.XEN_SYSCTL_CSCHED_MGR_DLY_MAX_US
    _between("migration delay", migration_delay_us, 0, most, "microseconds")
    wanted = PoolParams(
        now.ratelimit_us if ratelimit_us is None else ratelimit_us,
        now.tslice_ms if tslice_ms is None else tslice_ms,
        now.migration_delay_us if migration_delay_us is None else migration_delay_us,
    )
    if found.scheduler == d.XEN_SCHEDULER_CREDIT and wanted.ratelimit_us > wanted.tslice_ms * 1000:
        raise UsageError(
            f"the rate limit, {wanted.ratelimit_us} us, is longer than the time slice, {wanted.tslice_ms} ms",
            hint="lower the one, or raise the other",
        )
    host.hv.set_pool_params(found.id, found.scheduler, wanted)
    return [_row(found, name, host.hv.pool_params(found.id, found.scheduler))]


def _row(found: PoolState, name: str, now: PoolParams) -> PoolScheduler:
    row = PoolScheduler(name, scheduler_name(found.scheduler))
    if found.scheduler in (d.XEN_SCHEDULER_CREDIT, d.XEN_SCHEDULER_CREDIT2):
        row = replace(row, ratelimit_us=now.ratelimit_us)
    if found.scheduler == d.XEN_SCHEDULER_CREDIT:
        row = replace(row, tslice_ms=now.tslice_ms, migration_delay_us=now.migration_delay_us)
    return row


# --- which --------------------------------------------------------------------------------------------
def _pools(host: Host, scheduler: str, pool: str | None) -> list[tuple[PoolState, str]]:
    number = SCHEDULERS[scheduler]
    if pool is not None:
        found, name = find_pool(host, pool)
        if found.scheduler != number:
            _other_scheduler(f"CPU pool {name}", found.scheduler, scheduler)
        return [(found, name)]
    pools = host.hv.pools()
    names = pool_names(host, pools)
    return [(found, names[found.id]) for found in pools if found.scheduler == number]


def _under(host: Host, scheduler: str, found: Named | None, pool: str | None) -> list[tuple[Named, str]]:
    if found is not None:
        return [(found, _check_scheduler(host, scheduler, found))]
    pools = {state.id: name for state, name in _pools(host, scheduler, pool)}
    if not pools:
        default = scheduler_name(host.hv.scheduler())
        raise UsageError(
            f"no CPU pool of this host is under {scheduler}",
            hint=f"the host's scheduler is {default}; see xtool sched-{default} and xtool cpupool-list",
        )
    return [
        (domain, pools[domain.state.cpupool])
        for domain in named_domains(host)
        if domain.state.cpupool in pools
    ]


def _check_scheduler(host: Host, scheduler: str, found: Named) -> str:
    """The name of the domain's pool. Raises ``DomainError`` if that has another scheduler."""
    pool, name = pool_of(host, found.state.cpupool)
    if pool.scheduler != SCHEDULERS[scheduler]:
        _other_scheduler(f"{found.name}, in CPU pool {name},", pool.scheduler, scheduler)
    return name


def _other_scheduler(what: str, actual: int, wanted: str) -> NoReturn:
    name = scheduler_name(actual)
    known = name in ("credit", "credit2", "rtds")
    raise DomainError(
        f"{what} is under the scheduler {name}, not {wanted}",
        hint=f"use xtool sched-{name}" if known else f"{name} has nothing to set",
    )


def _between(what: str, value: int | None, least: int, most: int, more: str = "") -> None:
    if value is not None and not least <= value <= most:
        raise UsageError(
            f"a {what} of {value} is out of range", hint=f"{least} to {most}{f' ({more})' if more else ''}"
        )
