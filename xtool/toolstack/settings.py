"""``xtool set``: the configuration of a running domain, changed now where that can be, else for its next
start.

What is now: ``LIVE`` lists the keys whose change reaches the running domain and how; what each cannot do
at the moment it says. Everything else is kept in the journal, whose configuration a restart creates the
domain from. All of it is checked as a domain file is before anything is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xtool.config import DomainConfig, parse_config
from xtool.errors import UsageError, XtoolError
from xtool.toolstack import journal
from xtool.toolstack.definitions import still_waiting
from xtool.toolstack.everydayrecords import SettingChange, SettingResult
from xtool.toolstack.names import Named, uuid_text
from xtool.toolstack.rename import rename_locked
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

Config = Mapping[str, Any]

#: They make the domain what it is; another value is another domain.
_FIXED = {"uuid": "a domain keeps its uuid", "type": "a domain keeps its type"}
_WHEN_IT_ENDS = ("on_poweroff", "on_reboot", "on_crash", "on_watchdog", "on_soft_reset")
_LIMITS = {
    "disk": ("bytes-per-second", "ops-per-second"),
    "vif": ("rate", "rate-in"),
}


class _NotNow(Exception):
    """It is kept for the next start; the text says why not now."""


def change_settings(host: Host, found: Named, settings: Sequence[str], base_dir: str = "/") -> SettingResult:
    """``key=value`` words, as ``create --set`` takes them; relative paths are relative to ``base_dir``.

    Raises ``UsageError`` where nothing can be changed, ``ConfigError`` for a value that is wrong: then
    nothing is.
    """
    domid, uuid = found.state.domid, uuid_text(found.state.handle)
    if domid == 0:
        raise UsageError("domain 0 has no configuration of ours to change")
    if not settings:
        raise UsageError("nothing is to be set", hint="as in: xtool set web memory=512MiB on_crash=restart")
    with journal.locked(uuid):
        entry = journal.read(uuid)
        if entry is None or entry.config is None:
            raise UsageError(
                f"{found.name or domid} was not created by xtool, which does not know its configuration",
                hint="xl config-update changes what xl created",
            )
        before = _whole(entry.config)
        wanted = parse_config(json.dumps(_kept(entry.config, before, settings)), "--set", base_dir, settings)
        _refuse_fixed(before, wanted)
        keys = _changed(before, wanted)
        made: list[SettingChange] = []
        try:
            for key in keys:
                made.append(_change(host, found, before, wanted, key))
        finally:  # what was changed is kept, whatever became of the rest
            entry = journal.read(uuid)
            if entry and made:
                left = set(keys) - {change.key for change in made}
                new = _merged(before, wanted, left)
                later = [change.key for change in made if change.when != "now"]
                waiting = still_waiting(entry.waiting or {}, before.to_dict(), new, later)
                journal.write(replace(entry, config=new, waiting=waiting or None))
    return SettingResult(domid, wanted.name, tuple(made))


def _whole(config: Config) -> DomainConfig:
    return parse_config(json.dumps(config), "the domain's configuration", "/")


def _kept(config: Config, before: DomainConfig, settings: Sequence[str]) -> dict[str, Any]:
    """What is changed upon: room to grow that was implied by another key stays as it is."""
    given = {setting.partition("=")[0].strip() for setting in settings}
    kept = dict(config)
    for small, large, value in (
        ("memory", "maxmem", before.maxmem >> 20),
        ("vcpus", "maxvcpus", before.maxvcpus),
    ):
        if small in given and large not in given:
            asked = _asked(settings, small, config)
            kept[large] = max(value, asked) if asked is not None else value
    return kept


def _asked(settings: Sequence[str], key: str, config: Config) -> int | None:
    """The value of one size or number that is asked for, MiB for a size; None if it is none."""
    alone = {"name": "x", "type": config.get("type"), "memory": 1, "kernel": "/x"}
    words = [setting for setting in settings if setting.partition("=")[0].strip() == key]
    try:
        parsed = parse_config(json.dumps(alone), "--set", "/", words)
    except XtoolError:  # the same words are parsed again, with everything else, and refused there
        return None
    return parsed.memory >> 20 if key == "memory" else int(getattr(parsed, key))


def _changed(before: DomainConfig, wanted: DomainConfig) -> list[str]:
    old, new = before.to_dict(), wanted.to_dict()
    keys = [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]
    # A default may turn into a value of its own: that is no change. The name is first: another may have it.
    keys = [key for key in keys if key not in _IMPLIED or getattr(before, key) != getattr(wanted, key)]
    return sorted(keys, key=lambda key: key != "name")


_IMPLIED = ("maxmem", "maxvcpus")


def _merged(before: DomainConfig, wanted: DomainConfig, left: set[str]) -> dict[str, Any]:
    """The new configuration, but for the keys that are ``left`` as they were."""
    old, new = before.to_dict(), wanted.to_dict()
    kept = {key: value for key, value in new.items() if key not in left}
    return {**kept, **{key: old[key] for key in left if key in old}}


def _shown(config: DomainConfig, key: str) -> Any:
    if key == "vncpasswd":
        return "(secret)" if config.vncpasswd else None
    if key in _IMPLIED:
        return config.maxmem >> 20 if key == "maxmem" else config.maxvcpus
    return config.to_dict().get(key)


def _refuse_fixed(before: DomainConfig, wanted: DomainConfig) -> None:
    for key, why in _FIXED.items():
        was, now = getattr(before, key), getattr(wanted, key)
        if was != now and not (key == "uuid" and was is None):
            raise UsageError(f"{key} cannot be changed: {why}", hint="create another domain")
    if before.uuid is None and wanted.uuid is not None:
        raise UsageError("uuid cannot be changed: a domain keeps its uuid")


def _change(host: Host, found: Named, before: DomainConfig, wanted: DomainConfig, key: str) -> SettingChange:
    shown = (_shown(before, key), _shown(wanted, key))
    if key == "name":
        rename_locked(host, found, wanted.name)
    if key == "name" or key in _WHEN_IT_ENDS:
        return SettingChange(key, *shown, "now")
    change = LIVE.get(key)
    if change is None:
        return SettingChange(key, *shown, "next start", "it is read when the domain is started")
    try:
        change(host, found, before, wanted)
    except _NotNow as reason:
        return SettingChange(key, *shown, "next start", str(reason))
    return SettingChange(key, *shown, "now")


# --- each key -------------------------------------------------------------------------------------------
Change = Callable[["Host", Named, DomainConfig, DomainConfig], None]


def _memory(host: Host, found: Named, before: DomainConfig, wanted: DomainConfig) -> None:
    """The guest's balloon aims at it; Xen's limit goes along."""
    from xtool.builder.domain import SLACK

    domid = found.state.domid
    node = f"{paths.domain(domid)}/memory"
    values = host.store.get_many([f"{node}/static-max", f"{node}/videoram"])
    most = int(values[f"{node}/static-max"] or 0) << 10
    if wanted.memory > most:
        raise _NotNow(f"the guest was started with at most {most >> 20} MiB (maxmem)")
    video = int(values[f"{node}/videoram"] or 0) << 10
    host.hv.set_max_memory(domid, wanted.memory + SLACK)
    host.store.write(f"{node}/target", str((wanted.memory - video) >> 10))


def _maxmem(host: Host, found: Named, before: DomainConfig, wanted: DomainConfig) -> None:
    raise _NotNow("the guest's memory map was made for the maxmem it started with")


def _vcpus(host: Host, found: Named, before: DomainConfig, wanted: DomainConfig) -> None:
    domid = found.state.domid
    if before.type == "hvm":
        raise _NotNow("an hvm guest's vCPUs are plugged in through its device model")
    if wanted.vcpus > before.maxvcpus:
        raise _NotNow(f"the guest was started with at most {before.maxvcpus} vCPUs (maxvcpus)")
    with host.store.batch() as batch:
        for number in range(before.maxvcpus):
            state = "online" if number < wanted.vcpus else "offline"
            batch.write(f"{paths.domain(domid)}/cpu/{number}/availability", state)


def _cpus(host: Host, found: Named, before: DomainConfig, wanted: DomainConfig) -> None:
    from xtool.toolstack.scheduleplan import plan_schedule

    schedule = plan_schedule(wanted, host.schedule())
    everywhere = (frozenset(range(host.hv.host().cpus)),)
    for vcpu in range(found.state.max_vcpu_id + 1):
        hard, soft = (
            sets[min(vcpu, len(sets) - 1)]
            for sets in (schedule.hard or everywhere, schedule.soft or everywhere)
        )
        host.hv.set_affinity(found.state.domid, vcpu, hard, soft)


def _credit(host: Host, found: Named, before: DomainConfig, wanted: DomainConfig) -> None:
    from xtool.toolstack.scheduleplan import plan_schedule

    schedule = plan_schedule(wanted, host.schedule())
    weight = wanted.cpu_weight or _DEFAULT_WEIGHT
    host.hv.set_credit(found.state.domid, weight=weight, cap=wanted.cap, scheduler=schedule.scheduler)


_DEFAULT_WEIGHT = 256


def _disks(host: Host, found: Named, before: DomainConfig, wanted: DomainConfig) -> None:
    from xtool.toolstack.limits import limit_disk_now

    pairs = _only_limits("disk", before, wanted, "vdev")
    for vdev, change in pairs:
        try:
            limit_disk_now(host, found, vdev, {name: value or 0 for name, value in change.items()})
        except UsageError as error:
            raise _NotNow(error.message) from None


def _vifs(host: Host, found: Named, before: DomainConfig, wanted: DomainConfig) -> None:
    from xtool.toolstack.limits import limit_vif_now

    for devid, change in _only_limits("vif", before, wanted, None):
        try:
            limit_vif_now(host, found, devid, {name: value or "" for name, value in change.items()})
        except UsageError as error:
            raise _NotNow(error.message) from None


def _only_limits(
    key: str, before: DomainConfig, wanted: DomainConfig, by: str | None
) -> list[tuple[str, dict[str, Any]]]:
    """Each device whose limits change, and which; ``_NotNow`` when anything else about them does."""
    old, new = before.to_dict().get(key, []), wanted.to_dict().get(key, [])
    verb = "block" if key == "disk" else "network"
    elsewhere = f"xtool {verb}-attach and {verb}-detach change a running domain's devices"
    if len(old) != len(new):
        raise _NotNow(elsewhere)
    found = []
    for number, (one, other) in enumerate(zip(old, new, strict=True)):
        names = {name for name in (*one, *other) if one.get(name) != other.get(name)}
        if names - set(_LIMITS[key]):
            raise _NotNow(elsewhere)
        if names:
            which = str(one[by]) if by else str(_devid(old, number))
            found.append((which, {name: other.get(name) for name in names}))
    return found


def _devid(vifs: list[dict[str, Any]], index: int) -> int:
    from xtool.toolstack.devices import vif_index

    return next(n for n in range(256) if vif_index(vifs, n) == index)


#: What reaches a running domain.
LIVE: dict[str, Change] = {
    "memory": _memory,
    "maxmem": _maxmem,
    "vcpus": _vcpus,
    "cpus": _cpus,
    "cpus_soft": _cpus,
    "cpu_weight": _credit,
    "cap": _credit,
    "disk": _disks,
    "vif": _vifs,
}
