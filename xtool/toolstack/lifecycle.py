"""What a domain is asked to do, and what is done when it has ended."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from xtool.abi.domctl import XEN_DOMCTL_SENDTRIGGER_POWER
from xtool.errors import DeadlineError, DomainError, UsageError
from xtool.progress import SILENT, Progress
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions, LifecycleResult
from xtool.toolstack.destroy import destroy_locked
from xtool.toolstack.names import Named, uuid_text
from xtool.xenstore import paths

if TYPE_CHECKING:
    from uuid import UUID

    from xtool.toolstack.host import Host

#: The configuration key that says what to do, by why the domain ended.
ACTION_KEYS = {
    "poweroff": "on_poweroff",
    "reboot": "on_reboot",
    "crash": "on_crash",
    "watchdog": "on_watchdog",
    "soft-reset": "on_soft_reset",
}
_DEFAULT_ACTIONS = {"reboot": "restart"}
_HVM_PARAM_CALLBACK_IRQ = 0
#: xenstored's word on a domain's end may be missed or coalesced: look again this often (seconds).
_RESCAN = 2.0


def ask(host: Host, found: Named, what: str, *, acpi_fallback: bool) -> None:
    """Ask the guest to ``poweroff`` or ``reboot``. Raises ``DomainError`` if it cannot be asked."""
    domid = found.state.domid
    if domid == 0:
        raise UsageError("domain 0 is the host itself; use its own shutdown")
    if found.state.shutdown:
        return
    listens = not found.state.hvm or host.hv.hvm_param(domid, _HVM_PARAM_CALLBACK_IRQ) != 0
    if listens:
        host.store.write(f"{paths.domain(domid)}/control/shutdown", what)
    elif acpi_fallback and what == "poweroff":
        host.hv.send_trigger(domid, XEN_DOMCTL_SENDTRIGGER_POWER)
    else:
        raise DomainError(
            f"{found.name} has no paravirtual drivers to hear a {what} request",
            hint="-F presses its ACPI power button" if what == "poweroff" else "xtool destroy ends it",
        )


def wait_shutdown(host: Host, found: Named, deadline: float) -> None:
    """Wait until the domain has shut down or is gone. Raises ``DeadlineError`` after ``deadline`` seconds."""
    until = monotonic() + deadline
    with host.store.watch("@releaseDomain") as watch:
        while True:
            state = host.hv.domain(found.state.domid)
            if state is None or state.handle != found.state.handle or state.shutdown or state.dying:
                return
            left = until - monotonic()
            if left <= 0:
                raise DeadlineError(
                    f"{found.name} did not shut down within {deadline:g} s",
                    hint=f"xtool console {found.name} shows what it is doing; xtool destroy ends it",
                )
            watch.wait(min(left, _RESCAN))


def settle(host: Host, domid: int, uuid: str, progress: Progress = SILENT) -> LifecycleResult | None:
    """If the domain has ended, do what its configuration says (once, whoever comes first)."""
    with journal.locked(uuid):
        entry = journal.read(uuid)
        state = host.hv.domain(domid)
        gone = state is None or state.dying or uuid_text(state.handle) != uuid
        name = entry.name if entry else host.store.get(f"{paths.domain(domid)}/name") or ""
        if entry and entry.domid != domid and entry.state == "running":
            return LifecycleResult(domid, name, "restarted", entry.domid)
        if gone or state is None:
            if entry:
                journal.remove(uuid)
            return LifecycleResult(domid, name, "destroyed")
        if entry is None or not state.shutdown:
            return None
        return _act(host, Named(state, name), entry, progress)


def _act(host: Host, found: Named, entry: journal.Entry, progress: Progress) -> LifecycleResult:
    reason = found.state.shutdown_reason
    if reason not in ACTION_KEYS:
        return LifecycleResult(found.state.domid, found.name, "preserved")
    config = entry.config or {}
    action = str(config.get(ACTION_KEYS[reason]) or _DEFAULT_ACTIONS.get(reason, "destroy"))
    if action == "preserve":
        return LifecycleResult(found.state.domid, found.name, "preserved")
    if action in ("restart", "rename-restart"):
        return _restart(host, found, entry, rename=action == "rename-restart", progress=progress)
    destroy_locked(host, found.state, entry.uuid)
    return LifecycleResult(found.state.domid, found.name, "destroyed")


def _restart(
    host: Host, found: Named, entry: journal.Entry, *, rename: bool, progress: Progress
) -> LifecycleResult:
    """Create the domain again from the configuration it was created with."""
    from json import dumps
    from uuid import UUID, uuid4

    from xtool.config import parse_config
    from xtool.toolstack.create import carry_out
    from xtool.toolstack.plan import plan

    config = parse_config(dumps(entry.config), file=f"the configuration of {entry.name}", base_dir="/")
    uuid: UUID = UUID(entry.uuid)
    if rename:
        _rename(host, found, entry)
        uuid = uuid4()
    else:
        destroy_locked(host, found.state, entry.uuid, keep_entry=True)
    result = carry_out(host, plan(config, host.facts(config), uuid), config, CreateOptions(), progress)
    return LifecycleResult(found.state.domid, found.name, "restarted", result.domid)


def _rename(host: Host, found: Named, entry: journal.Entry) -> None:
    """Keep the ended domain under a name nobody asked for. Its devices go: the new one gets them."""
    from xtool.toolstack.devices import remove_all

    remove_all(host, found.state.domid)
    name = f"{entry.name}-{found.state.domid}"
    kept = {key: value for key, value in (entry.config or {}).items() if key not in ("disk", "vif")}
    config = {**kept, "name": name, "on_poweroff": "preserve", "on_reboot": "preserve"}
    journal.update(entry.uuid, name=name, config={**config, "on_crash": "preserve"})
    host.store.write(f"{paths.domain(found.state.domid)}/name", name)
