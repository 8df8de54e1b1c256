"""Domains by name: looking them up, and reserving a name so that two creates cannot both have it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from time import CLOCK_BOOTTIME, clock_gettime
from typing import TYPE_CHECKING, NamedTuple

from xtool.errors import DomainExistsError, DomainNotFoundError
from xtool.hypercall.port import DomainState
from xtool.toolstack import backoff, journal
from xtool.toolstack.images import check_free
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.config import DomainConfig
    from xtool.toolstack.host import Host
    from xtool.toolstack.plan import DomainPlan


class Named(NamedTuple):
    """A domain and the name xenstore has for it (empty if it has none)."""

    state: DomainState
    name: str


def uuid_text(handle: bytes) -> str:
    raw = handle.hex()
    return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"


def named_domains(host: Host) -> list[Named]:
    """Every domain that is not already dying, with its name: one hypercall and one xenstore pipeline."""
    states = [state for state in host.hv.domains() if not state.dying]
    nodes = [f"{paths.domain(state.domid)}/name" for state in states]
    names = host.store.get_many(nodes)
    return [
        Named(state, names[node] or ("Domain-0" if state.domid == 0 else ""))
        for state, node in zip(states, nodes, strict=True)
    ]


def find(host: Host, text: str) -> Named:
    """The domain a person means by a domid, a name or a uuid. Raises ``DomainNotFoundError``."""
    if text.isdecimal():
        state = host.hv.domain(int(text)) if int(text) < 0x7FF0 else None
        if state and not state.dying:
            name = host.store.get(f"{paths.domain(state.domid)}/name")
            return Named(state, name or ("Domain-0" if state.domid == 0 else ""))
    else:
        for found in named_domains(host):
            if found.name == text or uuid_text(found.state.handle) == text.lower():
                return found
    raise DomainNotFoundError(f"there is no domain {text!r}", hint="xtool list shows those there are")


def now(host: Host, found: Named) -> Named:
    """The same domain as it is now, perhaps under another number, for who had to wait for its lock.

    Raises ``DomainNotFoundError`` if it has ended meanwhile.
    """
    state = host.hv.domain(found.state.domid)
    if state is None or state.dying or state.handle != found.state.handle:
        others = (s for s in host.hv.domains() if s.handle == found.state.handle and not s.dying)
        state = next(others, None)
    if state is None:
        raise DomainNotFoundError(f"{found.name or found.state.domid} has just ended by itself")
    return Named(state, found.name)


def reserve(host: Host, plan: DomainPlan, config: DomainConfig, undo: ExitStack, source: str = "") -> None:
    """Take the name and the uuid: from here on the journal knows of this domain.

    Raises ``DomainExistsError`` when either is taken, by a running domain or by one being created, or when
    one of its disks is in use.
    """
    with journal.naming():
        # The journal first: one that is not being created any more has its name in xenstore by then.
        entries = journal.entries()
        domains = named_domains(host)
        alive = {uuid_text(domain.state.handle): domain for domain in domains}
        for domain in domains:
            if domain.name == plan.name and domain.state.handle != plan.build.handle:
                raise _taken(f"domain {domain.state.domid} is already named {plan.name!r}")
        if plan.uuid in alive:
            raise _taken(f"domain {alive[plan.uuid].state.domid} already has the uuid {plan.uuid}")
        for entry in entries:
            if entry.name == plan.name and entry.uuid != plan.uuid and entry.state == "creating":
                raise _taken(f"another domain named {plan.name!r} is being created")
        check_free(host, plan.disks, plan.uuid)
        undo.callback(journal.remove, plan.uuid)
        entry = journal.Entry(
            plan.uuid, plan.name, plan.kind, "creating", config=config.to_dict(), source=source
        )
        before = journal.read(plan.uuid)
        if before and before.then:  # a restart that is under way
            entry = replace(entry, then=before.then, history=before.history, source=before.source)
        journal.write(entry)


def now_running(uuid: str, domid: int) -> None:
    """Tell the journal that the domain is complete and has started."""
    entry = journal.read(uuid)
    if entry:
        history = backoff.started(entry.history, clock_gettime(CLOCK_BOOTTIME))
        journal.update(uuid, state="running", domid=domid, then="", history=history)


def _taken(message: str) -> DomainExistsError:
    return DomainExistsError(message, hint="choose another name (--set name=...), or xtool destroy it first")
