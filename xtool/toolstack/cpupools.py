"""CPU pools: CPUs and domains in groups, each with a scheduler of its own.

Facts: CPU 0 stays in pool 0, which stays too. A CPU is in one pool or in none. A domain needs a pool with
CPUs, and forgets its affinity when it moves. Xen numbers pools; their names are in xenstore (/local/pool),
where xl finds them as well.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from xtool.errors import DomainError, HostError, HypercallError, UsageError
from xtool.hypercall.port import DomainState
from xtool.hypercall.tuningport import PoolState
from xtool.toolstack import journal
from xtool.toolstack.api import LifecycleResult, PoolInfo, PoolRequest
from xtool.toolstack.names import Named, named_domains, uuid_text
from xtool.toolstack.pools import (
    SCHEDULERS,
    chosen_cpus,
    find_pool,
    folder,
    host_cpus,
    host_nodes,
    pool_names,
    pool_of,
    ranges,
    scheduler_name,
)
from xtool.toolstack.scheduleplan import OF_A_POOL

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

_BUSY = (errno.EAGAIN, errno.EBUSY, errno.EADDRINUSE)


def listed(host: Host, pool: str | None = None) -> list[PoolInfo]:
    if pool is not None:
        return [_info(*find_pool(host, pool))]
    pools = host.hv.pools()
    names = pool_names(host, pools)
    return [_info(found, names[found.id]) for found in pools]


def _info(pool: PoolState, name: str) -> PoolInfo:
    return PoolInfo(pool.id, name, scheduler_name(pool.scheduler), tuple(sorted(pool.cpus)), pool.domains)


def create(host: Host, request: PoolRequest) -> PoolInfo:
    """Make a pool of free CPUs. Raises ``UsageError``, ``HostError``; nothing is left of one that failed."""
    _check_name(host, request.name)
    scheduler = SCHEDULERS.get(request.scheduler, -1) if request.scheduler else host.hv.scheduler()
    if scheduler < 0:
        raise UsageError(
            f"there is no scheduler {request.scheduler!r}", hint=f"it is one of {', '.join(SCHEDULERS)}"
        )
    cpus = _cpus_for(host, request)
    with ExitStack() as undo:
        try:
            number = host.hv.create_pool(scheduler)
        except HypercallError as error:
            if error.errno != errno.ENOENT:
                raise
            raise HostError(
                f"this host's Xen was built without the scheduler {request.scheduler}",
                hint="credit and credit2 are in every Xen",
            ) from None
        undo.callback(host.hv.destroy_pool, number)
        for cpu in sorted(cpus):
            host.hv.add_pool_cpu(number, cpu)
            undo.callback(host.hv.remove_pool_cpu, number, cpu)
        _name(host, number, request.name, str(uuid4()))
        undo.pop_all()
    return _info(*pool_of(host, number))


def _cpus_for(host: Host, request: PoolRequest) -> frozenset[int]:
    free = host.hv.free_cpus()
    if not request.cpus and not request.nodes:
        if not free:
            raise HostError(
                "every CPU of this host is in a pool", hint="take one out: xtool cpupool-cpu-remove Pool-0 1"
            )
        return frozenset({min(free)})
    chosen: frozenset[int] = frozenset()
    if request.cpus:
        chosen |= chosen_cpus(host, request.cpus)
    if request.nodes:
        # Of a node, what is free; of a list of CPUs, all.
        nodes = chosen_cpus(host, f"nodes:{request.nodes}") & free
        if not nodes:
            raise HostError(f"no CPU of the nodes {request.nodes} is free", hint="xtool cpupool-list -c")
        chosen |= nodes
    _must_be_free(host, chosen)
    return chosen


def _must_be_free(host: Host, cpus: Iterable[int]) -> None:
    pools = host.hv.pools()
    names = pool_names(host, pools)
    for cpu in sorted(cpus):
        holder = next((names[pool.id] for pool in pools if cpu in pool.cpus), None)
        if holder is not None:
            raise HostError(
                f"CPU {cpu} is not free: it is in CPU pool {holder}",
                hint=f"take it out first: xtool cpupool-cpu-remove {holder} {cpu}",
            )


def _check_name(host: Host, name: str) -> None:
    if not name or name.isdecimal() or len(name) > 255 or not name.isprintable():
        raise UsageError(f"{name!r} is no name for a CPU pool", hint="it is printable, and no number")
    if name in pool_names(host, host.hv.pools()).values():
        raise UsageError(f"there is a CPU pool {name!r} already", hint="choose another name")


def _name(host: Host, pool: int, name: str, uuid: str | None = None) -> None:
    with host.store.batch() as batch:
        if uuid is not None:
            batch.write(f"{folder(pool)}/uuid", uuid)
        batch.write(f"{folder(pool)}/name", name)


def destroy(host: Host, pool: str) -> PoolInfo:
    """Take the pool away; its CPUs are free then. Raises ``UsageError`` for Pool-0, ``DomainError`` for one
    with domains in it."""
    found, name = find_pool(host, pool)
    if found.id == 0:
        raise UsageError(f"{name} is Xen's own pool, and stays")
    if found.domains:
        raise DomainError(
            f"CPU pool {name} has domains in it: {_who(host, found)}",
            hint="move each to another: xtool cpupool-migrate DOMAIN Pool-0; or xtool destroy it",
        )
    for cpu in sorted(found.cpus):
        _take(host, found, name, cpu)
    host.hv.destroy_pool(found.id)
    host.store.rm(folder(found.id))
    return _info(found, name)


def _who(host: Host, pool: PoolState) -> str:
    names = [domain.name for domain in named_domains(host) if domain.state.cpupool == pool.id]
    return ", ".join(names) or "one that is going away"


def rename(host: Host, pool: str, name: str) -> PoolInfo:
    found, old = find_pool(host, pool)
    if name != old:
        _check_name(host, name)
        _name(host, found.id, name)
    return _info(found, name)


def add_cpus(host: Host, pool: str, cpus: str) -> PoolInfo:
    """Put free CPUs into a pool. Raises ``HostError`` for one that is in another."""
    found, _ = find_pool(host, pool)
    chosen = chosen_cpus(host, cpus) - found.cpus
    if cpus.startswith("node"):  # of a node, what is free
        chosen &= host.hv.free_cpus()
    _must_be_free(host, chosen)
    for cpu in sorted(chosen):
        host.hv.add_pool_cpu(found.id, cpu)
    return _info(*pool_of(host, found.id))


def remove_cpus(host: Host, pool: str, cpus: str) -> PoolInfo:
    """Take CPUs out of a pool. Raises ``HostError`` for one that is not in it or must stay."""
    found, name = find_pool(host, pool)
    chosen = chosen_cpus(host, cpus)
    if cpus.startswith("node"):
        chosen &= found.cpus
    if outside := chosen - found.cpus:
        raise HostError(
            f"CPU {ranges(outside)} is not in CPU pool {name}", hint=f"it has the CPUs {ranges(found.cpus)}"
        )
    if found.id == 0 and 0 in chosen:
        raise HostError(f"CPU 0 stays in {name}: Xen needs it there", hint="take another")
    if chosen == found.cpus and found.domains:
        raise DomainError(
            f"CPU {ranges(chosen)} is the last of CPU pool {name}, which has domains: {_who(host, found)}",
            hint="add another CPU first, or move the domains: xtool cpupool-migrate DOMAIN POOL",
        )
    for cpu in sorted(chosen):
        _take(host, found, name, cpu)
    return _info(*pool_of(host, found.id))


def _take(host: Host, pool: PoolState, name: str, cpu: int) -> None:
    try:
        host.hv.remove_pool_cpu(pool.id, cpu)
    except HypercallError as error:
        if error.errno not in _BUSY:
            raise
        raise HostError(
            f"CPU {cpu} cannot leave CPU pool {name} now: something is bound to it, or runs there",
            hint=f"try again; if it stays so, put it back: xtool cpupool-cpu-add {name} {cpu}",
        ) from None


def migrate(host: Host, found: Named, pool: str) -> LifecycleResult:
    """Move a domain into another pool. Raises ``UsageError`` for domain 0, ``HostError``."""
    domid = found.state.domid
    target, name = find_pool(host, pool)
    if domid == 0:
        raise UsageError("domain 0 stays in its CPU pool: it is the one that asks")
    if not target.cpus:
        raise HostError(
            f"CPU pool {name} has no CPUs to run {found.name} on", hint=f"xtool cpupool-cpu-add {name} CPU"
        )
    with journal.locked(uuid_text(found.state.handle)):
        host.hv.move_to_pool(domid, target.id)

        def remember(config: dict[str, Any]) -> dict[str, Any]:
            return {**{key: value for key, value in config.items() if key not in OF_A_POOL}, "pool": name}

        journal.change_config(uuid_text(found.state.handle), remember)
    return LifecycleResult(domid, found.name, f"moved to CPU pool {name}")


def numa_split(host: Host) -> list[PoolInfo]:
    """A pool for each NUMA node, ``Pool-nodeN``; domain 0 stays on the first. Raises ``HostError`` when there
    are other pools already."""
    pools = host.hv.pools()
    if len(pools) > 1:
        raise HostError(
            f"there are {len(pools)} CPU pools already: {', '.join(pool_names(host, pools).values())}",
            hint="destroy all but the first: xtool cpupool-destroy",
        )
    for cpu in sorted(host.hv.free_cpus()):
        host.hv.add_pool_cpu(0, cpu)
    nodes = host_nodes(host_cpus(host))
    first = host_cpus(host)[0]
    rename(host, "0", f"Pool-node{first}")
    own = host.hv.domain(0)
    if own is not None and own.online_vcpus > len(nodes[first]):
        _shrink(host, own, len(nodes[first]))
    for node, cpus in sorted(nodes.items()):
        if node == first:
            continue
        for cpu in cpus:
            _take(host, pools[0], f"Pool-node{first}", cpu)
        create(host, replace(PoolRequest(f"Pool-node{node}"), cpus=",".join(map(str, cpus))))
    return listed(host)


def _shrink(host: Host, own: DomainState, count: int) -> None:
    """Domain 0 has no use for more vCPUs than its pool has CPUs."""
    from xtool.toolstack.vcpus import set_online

    set_online(host, Named(own, "Domain-0"), count)
