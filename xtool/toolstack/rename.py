"""Another name for a running domain.

Facts: xl shows the name in ``/local/domain/N/name``; ``/vm/<uuid>/name`` is what it was started as, and libxl
changes both. Two who want one name at once take turns (``journal.naming``), as those who create do.
Console logs go by uuid; only a device model's log has the domain's name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from xtool.errors import DomainExistsError, DomainNotFoundError, UsageError
from xtool.toolstack import journal
from xtool.toolstack.api import LifecycleResult
from xtool.toolstack.names import Named, named_domains, uuid_text
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host
    from xtool.xenstore.port import Transaction


def rename(host: Host, found: Named, name: str) -> LifecycleResult:
    """Call the domain ``name`` from now on, also after a restart.

    Raises ``UsageError`` for a name that is none, ``DomainExistsError`` when another domain has it.
    """
    if found.state.domid == 0:
        raise UsageError("domain 0 is the host itself; every tool expects it to be called Domain-0")
    name = check_name(name)
    with journal.locked(uuid_text(found.state.handle)):
        return rename_locked(host, found, name)


def rename_locked(host: Host, found: Named, name: str) -> LifecycleResult:
    """The same for who holds the domain's lock and has checked the name."""
    domid, uuid = found.state.domid, uuid_text(found.state.handle)
    with journal.naming():
        _check_free(host, found, name)
        entry = journal.read(uuid)
        if entry:
            config = {**entry.config, "name": name} if entry.config else entry.config
            journal.write(replace(entry, name=name, config=config))
        try:
            host.store.atomically(lambda tx: _write(tx, domid, uuid, name))
        except BaseException:
            if entry:
                journal.write(entry)
            raise
        if host.real:
            _rename_log(found.name, name)
    return LifecycleResult(domid, name, f"renamed from {found.name}" if found.name else "named")


def check_name(name: str) -> str:
    """The name, or ``UsageError`` for one that a domain file could not have."""
    from pydantic_core import PydanticCustomError

    from xtool.config.units import to_name

    try:
        return to_name(name)
    except PydanticCustomError as error:
        context = error.context or {}
        raise UsageError(f"name: {context.get('message')}", hint=context.get("hint")) from None


def _check_free(host: Host, found: Named, name: str) -> None:
    # The journal first: one that is not being created any more has its name in xenstore by then.
    entries = journal.entries()
    alive = {uuid_text(domain.state.handle): domain for domain in named_domains(host)}
    own = uuid_text(found.state.handle)
    if own not in alive:
        raise DomainNotFoundError(f"{found.name or found.state.domid} has just ended by itself")
    hint = "choose another name, or rename that one first"
    for domain in alive.values():
        if domain.name == name and domain.state.domid != found.state.domid:
            raise DomainExistsError(f"domain {domain.state.domid} is already named {name!r}", hint=hint)
    for entry in entries:
        if entry.name == name and entry.uuid != own and entry.state == "creating":
            raise DomainExistsError(f"another domain named {name!r} is being created", hint=hint)


def _write(tx: Transaction, domid: int, uuid: str, name: str) -> None:
    if not tx.exists(paths.domain(domid)):
        raise DomainNotFoundError(f"domain {domid} has just ended by itself")
    tx.write(f"{paths.domain(domid)}/name", name)
    if tx.exists(paths.vm(uuid)):
        tx.write(f"{paths.vm(uuid)}/name", name)


def _rename_log(old: str, new: str) -> None:
    """What QEMU says goes on into the same file, under the new name."""
    from xtool.devicemodel.process import log_path

    before, after = log_path(old), log_path(new)
    if old and old != new and before.exists():
        if after.exists():
            after.replace(after.with_name(after.name + ".1"))
        before.replace(after)
