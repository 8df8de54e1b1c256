"""Ending a domain, and finding what half-done creations and destructions left behind."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from xtool.builder.domain import destroy_by_handle
from xtool.errors import UsageError, XtoolError
from xtool.hypercall.port import DomainState
from xtool.toolstack import journal
from xtool.toolstack.api import LifecycleResult
from xtool.toolstack.backends import stop_backends
from xtool.toolstack.create import forget
from xtool.toolstack.devices import finish_pending
from xtool.toolstack.names import Named, now, uuid_text
from xtool.toolstack.wiring import Record, all_folders, backend_folders, offline, records, remove_taps
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

log = logging.getLogger(__name__)

_FLUSH_TIME = 1.0  # seconds QEMU may take to write out its disks


def destroy(host: Host, found: Named) -> LifecycleResult:
    """End the domain at once: device model, domain, xenstore nodes, journal. The guest is not asked."""
    domid = found.state.domid
    if domid == 0:
        raise UsageError("domain 0 is the host itself; it cannot be destroyed")
    uuid = uuid_text(found.state.handle)
    with journal.locked(uuid):
        state = now(host, found).state
        destroy_locked(host, state, uuid)
    return LifecycleResult(state.domid, found.name, "destroyed")


def destroy_locked(host: Host, state: DomainState, uuid: str, *, then: str = "") -> None:
    """The same for who holds the domain's lock; ``then`` is ``restart`` if its journal entry is to stay, for
    the same domain to be created again."""
    domid = state.domid
    # From here on the domain is not coming back: if we die, recovery goes on where we stopped.
    journal.update(uuid, state="destroying", then=then)
    host.hv.pause_domain(domid)
    devices = records(host, domid)
    if host.real and (state.hvm or host.store.exists(paths.device_model_pid(domid))):
        stop_device_model(host, domid, uuid)
    host.hv.destroy_domain(domid)
    offline(host, devices)
    stop_backends(host, domid)
    remove_taps(host, devices)
    forget(host, domid, uuid, _folders(domid, devices))
    if not then:
        journal.remove(uuid)


def stop_device_model(host: Host, domid: int, uuid: str) -> None:
    """End the domain's QEMU, whoever started it."""
    from xtool.devicemodel.process import find, qmp_path

    text = host.store.get(paths.device_model_pid(domid), "")
    model = find(domid, uuid=uuid, pid=int(text) if text.isdecimal() else None)
    if model:
        model.stop(grace=_FLUSH_TIME)
    qmp_path(domid).unlink(missing_ok=True)


def _folders(domid: int, devices: list[Record]) -> tuple[str, ...]:
    """The backend folders of a domain's devices, as the toolstack's own tree has them: what the guest
    can write is not asked (XSA-175, XSA-178)."""
    return backend_folders(domid, {(r.device.backend_domid, r.device.folder) for r in devices})


def recover(host: Host) -> list[LifecycleResult]:
    """Finish what processes that died left half-done. Safe at any time, and cheap when there is nothing.

    A journal entry that says ``creating`` or ``destroying`` while nobody holds its lock belongs to a
    process that was killed: that domain goes, with everything of it; if it was being restarted, it is then
    created again. An entry of a domain that no longer
    exists goes too. A device that was being added to or taken from a running domain goes.
    """
    done: list[LifecycleResult] = []
    journal.sweep()
    entries = journal.entries()
    if not entries:
        return done
    alive = {uuid_text(state.handle): state for state in host.hv.domains() if not state.dying}
    for entry in entries:
        if entry.state == "running" and entry.uuid in alive and not entry.pending:
            continue
        with journal.locked(entry.uuid, wait=False) as ours:
            current = journal.read(entry.uuid)
            if not ours or current is None:
                continue
            if current.state == "running" and current.uuid in alive:
                if current.pending:
                    done.append(finish_pending(host, current, alive[current.uuid]))
                continue
            finish = finish_restart if current.then else roll_back
            done.append(finish(host, current, alive.get(current.uuid)))
    return done


def finish_restart(host: Host, entry: journal.Entry, state: DomainState | None) -> LifecycleResult:
    """Go on with a restart whose process was killed: what is left of the domain goes, and it is created
    again. The caller holds its lock."""
    from xtool.toolstack.lifecycle import create_again

    roll_back(host, entry, state)
    try:
        return create_again(host, entry)
    except XtoolError as error:
        journal.remove(entry.uuid)
        log.warning("%s could not be restarted: %s", entry.name, error.message)
        return LifecycleResult(entry.domid, entry.name, "rolled-back")


def roll_back(host: Host, entry: journal.Entry, state: DomainState | None) -> LifecycleResult:
    """Remove a domain, or what is left of it, and its entry unless it is to be restarted. The caller holds
    its lock."""
    domid = state.domid if state else entry.domid
    if host.real and domid >= 0:
        stop_device_model(host, domid, entry.uuid)
    destroy_by_handle(host.hv, bytes.fromhex(entry.uuid.replace("-", "")))
    owner = host.store.get(f"{paths.domain(domid)}/vm") if domid >= 0 else None
    if domid >= 0 and owner in (None, paths.vm(entry.uuid)):
        # The number may belong to another domain by now.
        devices = records(host, domid)
        offline(host, devices)
        stop_backends(host, domid)
        remove_taps(host, devices)
        forget(host, domid, entry.uuid, dict.fromkeys((*_folders(domid, devices), *all_folders(domid))))
    host.store.rm(paths.vm(entry.uuid))
    if not entry.then:
        journal.remove(entry.uuid)
    return LifecycleResult(domid, entry.name, "rolled-back")
