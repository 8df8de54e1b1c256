"""What a domain is asked to do, and what is done when it has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import CLOCK_BOOTTIME, clock_gettime, monotonic, sleep, time
from typing import TYPE_CHECKING

from xtool.abi.domctl import XEN_DOMCTL_SENDTRIGGER_POWER
from xtool.errors import DeadlineError, DomainError, UsageError, XtoolError
from xtool.progress import SILENT, Progress
from xtool.toolstack import backoff, journal
from xtool.toolstack.api import CreateOptions, LifecycleResult
from xtool.toolstack.destroy import destroy_locked, finish_restart, roll_back
from xtool.toolstack.names import Named, uuid_text
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.config import DomainConfig
    from xtool.toolstack.host import Host

log = logging.getLogger(__name__)

#: The configuration key that says what to do, by why the domain ended.
ACTION_KEYS = {
    "poweroff": "on_poweroff",
    "reboot": "on_reboot",
    "crash": "on_crash",
    "watchdog": "on_watchdog",
    "soft-reset": "on_soft_reset",
}
_DEFAULT_ACTIONS = {"reboot": "restart"}
_RESTARTS = ("restart", "rename-restart", "coredump-restart")
_HVM_PARAM_CALLBACK_IRQ = 0
#: xenstored's word on a domain's end may be missed or coalesced: look again this often (seconds).
_RESCAN = 2.0
#: While a domain waits to be restarted, whether it still is there is asked this often (seconds).
_LOOK = 1.0


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


def _nap(seconds: float) -> None:
    sleep(min(seconds, _LOOK))


def settle(
    host: Host,
    domid: int,
    uuid: str,
    progress: Progress = SILENT,
    pause: Callable[[float], None] = _nap,
) -> LifecycleResult | None:
    """If the domain has ended, do what its configuration says (once, whoever comes first).

    A domain that ends again and again is not restarted at once: this waits, as ``backoff`` says, and looks
    again whenever ``pause``, which gets the seconds that are left, comes back.
    """
    told = False
    while True:
        with journal.locked(uuid):
            entry = journal.read(uuid)
            state = host.hv.domain(domid) if domid >= 0 else None
            gone = state is None or state.dying or uuid_text(state.handle) != uuid
            name = entry.name if entry else host.store.get(f"{paths.domain(domid)}/name") or ""
            if entry and entry.domid != domid and entry.state == "running":
                return LifecycleResult(domid, name, "restarted", entry.domid)
            if gone or state is None:
                if entry and entry.then:  # who restarted it was killed
                    return finish_restart(host, entry, None)
                if entry:  # who destroyed it, if it was one of us, was killed at it
                    roll_back(host, entry, None)
                return LifecycleResult(domid, name, "destroyed")
            if entry is None or not state.shutdown:
                return None
            reason = state.shutdown_reason
            action = action_for(entry.config or {}, reason)
            entry, wait = _noted(entry, reason, action)
            if not wait:
                return _carry_out(host, Named(state, name), entry, action, progress)
        if not told:
            told = True
            often = backoff.short_lives(entry.history)
            text = f"{name} ended {often} times right after its start ({reason}): restarted in {wait:.0f} s"
            log.warning(text)
            progress.step(text)
        pause(wait)


def action_for(config: dict[str, object], reason: str) -> str:
    """What is to be done with a domain that ended for this reason."""
    if reason not in ACTION_KEYS:
        return "preserve"
    return str(config.get(ACTION_KEYS[reason]) or _DEFAULT_ACTIONS.get(reason, "destroy"))


def _noted(entry: journal.Entry, reason: str, action: str) -> tuple[journal.Entry, float]:
    """The entry with the end noted, and the seconds until ``action`` may be carried out."""
    now = clock_gettime(CLOCK_BOOTTIME)
    history = backoff.ended(entry.history, now, reason)
    if history != entry.history:
        history["last"] = {"time": time(), "reason": reason, "action": action}
        journal.update(entry.uuid, history=history)
        entry = journal.read(entry.uuid) or entry
    return entry, backoff.pause(history, now) if action in _RESTARTS else 0.0


def _carry_out(
    host: Host, found: Named, entry: journal.Entry, action: str, progress: Progress
) -> LifecycleResult:
    domid = found.state.domid
    if action == "preserve":
        journal.update(entry.uuid, settled="preserved")
        return LifecycleResult(domid, found.name, "preserved")
    if action.startswith("coredump-"):
        _dump_core(host, found)
    if action == "rename-restart":
        return _rename_restart(host, found, entry, progress)
    restart = action in _RESTARTS
    destroy_locked(host, found.state, entry.uuid, then="restart" if restart else "")
    if restart:
        return create_again(host, entry, progress)
    return LifecycleResult(domid, found.name, "destroyed")


def _dump_core(host: Host, found: Named) -> None:
    """Write the domain's memory beside others' cores. One that cannot be written stops nothing."""
    from importlib import import_module

    from xtool.paths import dump_dir

    path = dump_dir() / f"{found.name.replace('/', '_')}.core"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        import_module("xtool.toolstack.dumpcore").dump_core(host, found.state.domid, path)
    except (OSError, XtoolError, ImportError) as error:
        log.warning("no core of %s was written to %s: %s", found.name, path, error)


def create_again(host: Host, entry: journal.Entry, progress: Progress = SILENT) -> LifecycleResult:
    """Create the domain from the configuration it was created with; it is gone, the caller holds its lock."""
    from uuid import UUID

    from xtool.toolstack.create import carry_out
    from xtool.toolstack.plan import plan

    config = _config_of(entry)
    wanted = plan(config, host.facts(config), UUID(entry.uuid))
    result = carry_out(host, wanted, config, CreateOptions(), progress)
    if host.real:
        from xtool.toolstack.keeper import start_keeper

        start_keeper(result.domid, result.uuid, host)
    return LifecycleResult(entry.domid, entry.name, "restarted", result.domid)


def _config_of(entry: journal.Entry) -> DomainConfig:
    from json import dumps

    from xtool.config import parse_config

    return parse_config(dumps(entry.config), file=f"the configuration of {entry.name}", base_dir="/")


def _rename_restart(host: Host, found: Named, entry: journal.Entry, progress: Progress) -> LifecycleResult:
    """Keep the ended domain under another name, and create the same again beside it with a new uuid."""
    from dataclasses import replace
    from uuid import uuid4

    again = replace(entry, uuid=str(uuid4()), state="creating", domid=-1, then="restart")
    with journal.locked(again.uuid):
        # Written first: whoever is killed from here on, the domain is started again.
        journal.write(again)
        _rename(host, found, entry)
        result = create_again(host, again, progress)
    return replace(result, domid=found.state.domid)


def _rename(host: Host, found: Named, entry: journal.Entry) -> None:
    """Keep the ended domain under a name nobody asked for. Its devices go: the new one gets them."""
    from xtool.toolstack.devices import remove_all

    remove_all(host, found.state.domid)
    name = f"{entry.name}-{found.state.domid}"
    kept = {key: value for key, value in (entry.config or {}).items() if key not in ("disk", "vif")}
    config = {**kept, "name": name, "on_poweroff": "preserve", "on_reboot": "preserve"}
    config = {**config, "on_crash": "preserve", "on_watchdog": "preserve"}
    journal.update(entry.uuid, name=name, config=config, settled="preserved")
    host.store.write(f"{paths.domain(found.state.domid)}/name", name)


def device_model_ended(
    host: Host, domid: int, uuid: str, progress: Progress = SILENT
) -> LifecycleResult | None:
    """The domain's QEMU died by itself: do what ``on_dm_exit`` says. None if there is nothing to do."""
    noted = False
    while True:
        with journal.locked(uuid):
            entry = journal.read(uuid)
            state = host.hv.domain(domid)
            if entry is None or entry.state != "running" or entry.domid != domid:
                return None
            if state is None or state.dying or state.shutdown or uuid_text(state.handle) != uuid:
                return None  # the end of the domain itself is what counts
            action = str((entry.config or {}).get("on_dm_exit") or "preserve")
            if not noted:
                noted = True
                log.warning("the device model of %s has ended by itself: %s", entry.name, action)
                entry = _noted_dm_exit(entry, action)
            if action == "preserve":
                return None
            host.hv.pause_domain(domid)
            if action == "pause":
                return LifecycleResult(domid, entry.name, "paused")
            now = clock_gettime(CLOCK_BOOTTIME)
            wait = backoff.pause(entry.history, now) if action == "restart" else 0.0
            if not wait:
                return _carry_out(host, Named(state, entry.name), entry, action, progress)
        sleep(min(wait, _LOOK))


def _noted_dm_exit(entry: journal.Entry, action: str) -> journal.Entry:
    history = dict(entry.history or {})
    if action == "restart":
        history = backoff.ended(history, clock_gettime(CLOCK_BOOTTIME), "dm-exit")
    history["last"] = {"time": time(), "reason": "dm-exit", "action": action}
    journal.update(entry.uuid, history=history)
    return journal.read(entry.uuid) or entry
