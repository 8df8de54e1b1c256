"""Where a domain's vCPUs run, in which CPU pool, and what its scheduler is told: decided. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtool.builder.spec import RtdsSpec, ScheduleSpec
from xtool.config.cpus import resolve_cpus
from xtool.errors import HostError, UsageError

if TYPE_CHECKING:
    from xtool.config import DomainConfig

_CREDIT_KEYS = ("cpu_weight", "cap")
_RTDS_KEYS = ("period", "budget", "extratime")
#: What each scheduler can be told; the others know nothing.
_KEYS = {"credit": _CREDIT_KEYS, "credit2": _CREDIT_KEYS, "rtds": _RTDS_KEYS}
#: What a domain loses with its CPU pool.
OF_A_POOL = ("cpus", "cpus_soft", *_CREDIT_KEYS, *_RTDS_KEYS)
#: What rtds gives a vCPU of itself, microseconds.
_PERIOD, _BUDGET = 10000, 4000


@dataclass(frozen=True)
class PoolFacts:
    """A CPU pool of the host; ``scheduler`` is its name."""

    id: int
    name: str
    scheduler: str
    scheduler_id: int
    cpus: frozenset[int]


@dataclass(frozen=True)
class ScheduleFacts:
    """``nodes`` are the host's CPUs by NUMA node."""

    pools: tuple[PoolFacts, ...]
    nodes: Mapping[int, tuple[int, ...]]


def wants_facts(config: DomainConfig) -> bool:
    """Whether the host has to be asked at all: most domains run where Xen puts them."""
    return any(getattr(config, key) not in (None, 0, "all") for key in ("pool", *OF_A_POOL))


def plan_schedule(config: DomainConfig, facts: ScheduleFacts | None) -> ScheduleSpec:
    """Raises ``HostError`` for a pool or CPUs that this host does not have, ``UsageError`` for what the
    pool's scheduler cannot be told."""
    if facts is None:
        return ScheduleSpec()
    pool = _pool(config, facts)
    _check_scheduler(config, pool)
    hard = _cpu_sets("cpus", config.cpus, facts)
    for chosen in hard:
        if not chosen & pool.cpus:
            raise HostError(
                f"cpus: none of the CPUs {_shown(chosen)} is in CPU pool {pool.name}",
                hint=f"that has the CPUs {_shown(pool.cpus)}; choose among those, or say another pool:",
            )
    rtds = None
    if any(value is not None for value in (config.period, config.budget, config.extratime)):
        rtds = RtdsSpec(
            _PERIOD if config.period is None else config.period,
            _BUDGET if config.budget is None else config.budget,
            bool(config.extratime),
        )
        if rtds.budget > rtds.period:
            raise UsageError(
                f"a budget of {rtds.budget} us does not fit into a period of {rtds.period} us",
                hint="lower budget:, or raise period:",
            )
    return ScheduleSpec(
        pool=pool.id,
        scheduler=pool.scheduler_id,
        hard=hard,
        soft=_cpu_sets("cpus_soft", config.cpus_soft, facts),
        weight=config.cpu_weight,
        cap=config.cap or None,
        rtds=rtds,
    )


def _pool(config: DomainConfig, facts: ScheduleFacts) -> PoolFacts:
    wanted = config.pool or "0"
    by_name = [pool for pool in facts.pools if pool.name == wanted]
    by_number = [pool for pool in facts.pools if wanted.isdecimal() and pool.id == int(wanted)]
    for pool in (*by_name, *by_number):
        if pool.cpus:
            return pool
        raise HostError(
            f"CPU pool {pool.name} has no CPUs to run on", hint=f"xtool cpupool-cpu-add {pool.name} CPU"
        )
    known = ", ".join(pool.name for pool in facts.pools)
    raise HostError(
        f"pool: this host has no CPU pool {wanted!r}",
        hint=f"it has {known}; xtool cpupool-create makes another",
    )


def _check_scheduler(config: DomainConfig, pool: PoolFacts) -> None:
    for key in (*_CREDIT_KEYS, *_RTDS_KEYS):
        if getattr(config, key) and key not in _KEYS.get(pool.scheduler, ()):
            where = "credit and credit2" if key in _CREDIT_KEYS else "rtds"
            raise UsageError(
                f"{key}: is for the schedulers {where}; CPU pool {pool.name} is under {pool.scheduler}",
                hint=f"leave {key} out, or name a pool under another scheduler: pool: NAME",
            )


def _cpu_sets(
    key: str, value: str | tuple[str, ...] | None, facts: ScheduleFacts
) -> tuple[frozenset[int], ...]:
    if value is None or value == "all":
        return ()
    cpus = [cpu for own in facts.nodes.values() for cpu in own]
    sets = []
    for text in (value,) if isinstance(value, str) else value:
        chosen = resolve_cpus(text, cpus, facts.nodes)
        if not chosen:
            raise HostError(
                f"{key}: {text!r} leaves none of this host's {len(cpus)} CPUs",
                hint=f"they are numbered {_shown(cpus)}",
            )
        sets.append(chosen)
    return tuple(sets)


def _shown(cpus: frozenset[int] | list[int]) -> str:
    """``{0, 1, 2, 5}`` -> ``0 to 2, 5``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
