"""CPU pools by name, and CPUs of the host: what the verbs for vCPUs, schedulers and pools share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtool.abi import domctl as d
from xtool.config.cpus import resolve_cpus
from xtool.errors import HostError, UsageError
from xtool.hypercall.tuningport import PoolState
from xtool.toolstack.query import cpu_ranges

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

SCHEDULERS = {
    "credit": d.XEN_SCHEDULER_CREDIT,
    "credit2": d.XEN_SCHEDULER_CREDIT2,
    "arinc653": d.XEN_SCHEDULER_ARINC653,
    "rtds": d.XEN_SCHEDULER_RTDS,
    "null": d.XEN_SCHEDULER_NULL,
}
_NAMES = {number: name for name, number in SCHEDULERS.items()}


def scheduler_name(number: int) -> str:
    return _NAMES.get(number, f"scheduler {number}")


def folder(pool: int) -> str:
    """Where xenstore has a pool's name and uuid, for xl as for us."""
    return f"/local/pool/{pool}"


def pool_names(host: Host, pools: list[PoolState]) -> dict[int, str]:
    """Xen numbers pools; their names are in xenstore. One that nobody named is ``Pool-N``."""
    known = host.store.get_many(f"{folder(pool.id)}/name" for pool in pools)
    return {pool.id: known[f"{folder(pool.id)}/name"] or f"Pool-{pool.id}" for pool in pools}


def pool_of(host: Host, pool: int) -> tuple[PoolState, str]:
    """A pool and its name. Raises ``HostError`` when it is gone."""
    pools = host.hv.pools()
    names = pool_names(host, pools)
    for found in pools:
        if found.id == pool:
            return found, names[pool]
    raise HostError(f"there is no CPU pool {pool}", hint="xtool cpupool-list shows those there are")


def find_pool(host: Host, text: str) -> tuple[PoolState, str]:
    """The pool a person means by its name or number. Raises ``UsageError``."""
    pools = host.hv.pools()
    names = pool_names(host, pools)
    for pool in pools:
        if names[pool.id] == text:
            return pool, text
    for pool in pools:
        if text.isdecimal() and pool.id == int(text):
            return pool, names[pool.id]
    raise UsageError(f"there is no CPU pool {text!r}", hint=f"there are {', '.join(names.values())}")


def host_cpus(host: Host) -> dict[int, int]:
    """Every CPU that is online, and its NUMA node."""
    return {cpu: place.node for cpu, place in enumerate(host.hv.cpu_places()) if place}


def host_nodes(cpus: dict[int, int]) -> dict[int, list[int]]:
    nodes: dict[int, list[int]] = {}
    for cpu, node in cpus.items():
        nodes.setdefault(node, []).append(cpu)
    return nodes


def chosen_cpus(host: Host, text: str) -> frozenset[int]:
    """The CPUs a list such as ``0-3,^1`` or ``node:1`` means. Raises ``UsageError`` for what is no list, or
    leaves none of the host's CPUs."""
    cpus = host_cpus(host)
    nodes = host_nodes(cpus)
    try:
        chosen = resolve_cpus(text, cpus, nodes)
    except ValueError:
        raise UsageError(f"{text!r} is not a list of CPUs", hint="write 0-3,^1 or node:0 or all") from None
    if not chosen:
        raise UsageError(
            f"{text!r} leaves none of this host's CPUs",
            hint=f"the CPUs are {ranges(cpus)}, the NUMA nodes {ranges(nodes)}",
        )
    return chosen


def ranges(numbers: object) -> str:
    """``{0, 1, 2, 5}`` -> ``0-2,5``."""
    found = frozenset(int(n) for n in numbers)  # type: ignore[attr-defined]
    # One more than the last: a set is never "all".
    return cpu_ranges(found, max(found, default=0) + 2)
