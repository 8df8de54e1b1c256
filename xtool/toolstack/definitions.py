"""What ``xtool plan`` and ``apply`` need of a host beside the other verbs: what domains were told to have,
the definition that counts at a domain's next start, and whether a guest is ready.

A domain's definition is its journal entry's configuration: a restart creates the domain from it. Keys whose
new value waits for that stand in the entry with the value the domain runs with, until it starts again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from xtool.errors import DomainError, UsageError
from xtool.progress import SILENT, Progress
from xtool.toolstack import journal
from xtool.toolstack.everydayrecords import DomainConfigInfo
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.config import DomainConfig
    from xtool.toolstack.host import Host
    from xtool.toolstack.names import Named


@dataclass(frozen=True)
class DomainTargets:
    """What a domain was told to have, whatever it has made of that. Sizes in bytes, None where nobody said;
    ``weight`` and ``cap`` under credit and credit2 only."""

    domid: int
    name: str
    uuid: str
    memory: int | None
    maxmem: int | None
    vcpus: int | None
    maxvcpus: int
    pool: str
    scheduler: str
    weight: int | None = None
    cap: int | None = None


@dataclass(frozen=True)
class Readiness:
    """``waited`` in seconds. ``checks`` are those that came true: ``running``, and what ``ready:`` has."""

    domid: int
    name: str
    checks: tuple[str, ...]
    waited: float


class Definitions(Protocol):
    """Verbs as in ``api.Client``."""

    def targets(self, domain: str | None = None) -> list[DomainTargets]:
        """Of one domain, or of all but domain 0."""

    def define(self, domain: str, config: DomainConfig, waits: Sequence[str] = ()) -> DomainConfigInfo:
        """Another definition for a running domain: what its next start creates it from, and what is done when
        it ends. ``waits`` are the keys that take effect at its next start only. Nothing else is changed.

        Raises ``UsageError`` for another name, type or uuid, ``DomainError`` for a domain of another
        toolstack's."""

    def wait_ready(
        self, domain: str, *, deadline: float | None = None, progress: Progress = SILENT
    ) -> Readiness:
        """Wait until what its ``ready:`` says has come true; without one, see that it runs. ``deadline`` in
        place of the one in ``ready:``. Raises ``DeadlineError``, ``DomainError`` when it ends meanwhile."""


class LocalDefinitions:
    """``Definitions`` on a ``Host``."""

    host: Host

    def targets(self, domain: str | None = None) -> list[DomainTargets]:
        from xtool.toolstack.names import find, named_domains

        chosen = named_domains(self.host) if domain is None else [find(self.host, domain)]
        return targets(self.host, [one for one in chosen if domain is not None or one.state.domid])

    def define(self, domain: str, config: DomainConfig, waits: Sequence[str] = ()) -> DomainConfigInfo:
        from xtool.toolstack.names import find

        return define(self.host, find(self.host, domain), config, waits)

    def wait_ready(
        self, domain: str, *, deadline: float | None = None, progress: Progress = SILENT
    ) -> Readiness:
        from xtool.toolstack.names import find
        from xtool.toolstack.ready import wait_ready

        return wait_ready(self.host, find(self.host, domain), deadline, progress)


# --- targets --------------------------------------------------------------------------------------------
def targets(host: Host, domains: Sequence[Named]) -> list[DomainTargets]:
    from xtool.toolstack.names import uuid_text
    from xtool.toolstack.pools import pool_names, scheduler_name

    if not domains:
        return []
    pools = host.hv.pools()
    names = pool_names(host, pools)
    schedulers = {pool.id: pool.scheduler for pool in pools}
    wanted = {one.state.domid: _nodes(one) for one in domains}
    values = host.store.get_many([node for nodes in wanted.values() for node in nodes])
    found = []
    for one in domains:
        state, root = one.state, paths.domain(one.state.domid)
        scheduler = schedulers.get(state.cpupool, -1)
        name = scheduler_name(scheduler)
        weighs = name in ("credit", "credit2")
        credit = host.hv.credit(state.domid, scheduler) if weighs else None
        target = _kib(values[f"{root}/memory/target"])
        video = _kib(values[f"{root}/memory/videoram"]) or 0
        cpus = [values[f"{root}/cpu/{n}/availability"] for n in range(state.max_vcpu_id + 1)]
        found.append(
            DomainTargets(
                state.domid,
                one.name,
                uuid_text(state.handle),
                None if target is None else target + video,
                _kib(values[f"{root}/memory/static-max"]),
                cpus.count("online") if None not in cpus else None,
                state.max_vcpu_id + 1,
                names.get(state.cpupool, ""),
                name,
                credit.weight if credit else None,
                credit.cap if credit else None,
            )
        )
    return found


def _nodes(one: Named) -> list[str]:
    root = paths.domain(one.state.domid)
    memory = [f"{root}/memory/{name}" for name in ("target", "videoram", "static-max")]
    return memory + [f"{root}/cpu/{n}/availability" for n in range(one.state.max_vcpu_id + 1)]


def _kib(text: str | None) -> int | None:
    return int(text) << 10 if text and text.isdecimal() and len(text) < 16 else None


# --- the definition -------------------------------------------------------------------------------------
def define(host: Host, found: Named, config: DomainConfig, waits: Sequence[str] = ()) -> DomainConfigInfo:
    from xtool.toolstack.facts import shown_config
    from xtool.toolstack.names import uuid_text

    domid, uuid = found.state.domid, uuid_text(found.state.handle)
    if domid == 0:
        raise UsageError("domain 0 has no definition of ours")
    with journal.locked(uuid):
        entry = journal.read(uuid)
        if entry is None or entry.config is None:
            raise DomainError(
                f"{found.name or domid} was not created by xtool, which cannot keep a definition for it",
                hint="end it with the toolstack that made it, and create it with xtool",
            )
        if entry.state != "running":
            raise DomainError(f"{entry.name} is just being ended or started", hint="try again")
        if config.name != entry.name:
            raise UsageError(f"{entry.name} keeps its name", hint=f"xtool rename {entry.name} {config.name}")
        if config.type != entry.type:
            raise UsageError(f"{entry.name} keeps its type, {entry.type}", hint="create another domain")
        if config.uuid is not None and str(config.uuid) != uuid:
            raise UsageError(f"{entry.name} keeps its uuid, {uuid}", hint="create another domain")
        new = config.to_dict()
        waiting = still_waiting(entry.waiting or {}, entry.config, new, waits)
        entry = replace(entry, config=new, waiting=waiting or None)
        journal.write(entry)
    return shown_config(found, entry, secrets=False)


def still_waiting(
    waiting: Mapping[str, Any], before: Mapping[str, Any], new: Mapping[str, Any], waits: Sequence[str]
) -> dict[str, Any]:
    """Keys that wait for the next start, and the value the domain runs with: those that waited already, and
    ``waits``; none that is back at that value. Pure."""
    found = dict(waiting)
    for key in waits:
        found.setdefault(key, before.get(key))
    return {key: value for key, value in found.items() if new.get(key) != value}
