"""A domain's file against what runs: which keys differ, and how each can change. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xtool.apply.records import KeyChange
from xtool.config.changes import (
    CHANGES,
    DISK_CHANGES,
    LIVE,
    REBOOT,
    RECREATE,
    VIF_CHANGES,
    Way,
)
from xtool.config.model import FIELDS, KEY_OF, SIZES, DomainConfig
from xtool.toolstack.api import DomainTargets

_MIB = 1 << 20
_ATTRIBUTE = {key: name for name, key in KEY_OF.items()}
_RESTARTS = ("restart", "rename-restart", "coredump-restart")
_CREDIT, _RTDS = ("cpu_weight", "cap"), ("period", "budget", "extratime")
SECRET = "(secret)"
_DEFAULT_WEIGHT = 256


@dataclass(frozen=True)
class Known:
    """What runs: its definition, and what it was told to have. ``hidden`` keys cannot be compared."""

    definition: DomainConfig
    uuid: str
    targets: DomainTargets | None = None
    hidden: Sequence[str] = ()


def compare(wanted: DomainConfig, given: frozenset[str], known: Known) -> list[KeyChange]:
    """``given`` are the keys the file has. The order is that of the model's keys."""
    found = [change for key in FIELDS for change in _key(key, wanted, given, known)]
    if wanted.on_reboot in _RESTARTS:
        return found
    why = f"a reboot ends it: on_reboot is {wanted.on_reboot}"
    return [c if c.when != REBOOT else KeyChange(c.key, c.before, c.after, RECREATE, why) for c in found]


def plain(config: DomainConfig, key: str) -> Any:
    """A key's value as a file has it."""
    value = getattr(config, _ATTRIBUTE.get(key, key))
    if key in SIZES and value is not None:
        return value // _MIB
    if key in ("vncpasswd", "cloud_init") and value is not None:
        return SECRET
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, tuple):
        return [item.to_dict() if hasattr(item, "to_dict") else item for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _key(key: str, wanted: DomainConfig, given: frozenset[str], known: Known) -> Iterator[KeyChange]:
    old, targets = known.definition, known.targets
    name = _ATTRIBUTE.get(key, key)
    before, after = getattr(old, name), getattr(wanted, name)
    if key == "name" or key in known.hidden:
        return
    if key == "uuid":
        before = known.uuid
        if after is None or str(after) == before:
            return
        yield KeyChange(key, before, str(after), *CHANGES[key])
        return
    if key in ("disk", "vif"):
        yield from (_disks if key == "disk" else _vifs)(old, wanted)
        return
    if key in ("maxmem", "maxvcpus") and key not in given and before >= after:
        return  # room that was left by a change is kept
    shown = plain(old, key)
    if targets is not None:
        if key == "memory" and targets.memory is not None:
            before, shown = targets.memory, targets.memory // _MIB
        if key == "vcpus" and targets.vcpus is not None:
            before = shown = targets.vcpus
        if key in _CREDIT and targets.weight is not None:
            before = targets.weight if key == "cpu_weight" else targets.cap
            after = _DEFAULT_WEIGHT if key == "cpu_weight" and after is None else after
            shown = before
    if before != after:
        yield KeyChange(key, shown, plain(wanted, key), *_way(key, wanted, known))


def _way(key: str, wanted: DomainConfig, known: Known) -> Way:
    old, targets = known.definition, known.targets
    if key == "memory":
        most = targets.maxmem if targets and targets.maxmem else old.maxmem
        if wanted.memory > most:
            return Way(REBOOT, f"the guest was started with at most {most // _MIB} MiB (maxmem)")
    if key == "vcpus":
        most = targets.maxvcpus if targets else old.maxvcpus
        now = targets.vcpus if targets and targets.vcpus else old.vcpus
        if wanted.vcpus > most:
            return Way(REBOOT, f"the guest was started with at most {most} vCPUs (maxvcpus)")
        if wanted.type == "hvm" and wanted.vcpus < now:
            return Way(REBOOT, "vCPUs of an hvm guest can be added, not taken away")
    if targets is not None and (key in _CREDIT or key in _RTDS):
        fits = ("credit", "credit2") if key in _CREDIT else ("rtds",)
        if targets.scheduler not in fits:
            return Way(REBOOT, f"the scheduler of its CPU pool is {targets.scheduler}")
    return CHANGES[key]


def _disks(old: DomainConfig, wanted: DomainConfig) -> Iterator[KeyChange]:
    before, after = ({d.number: d for d in c.disks} for c in (old, wanted))
    emulated = Way(REBOOT, "an hvm guest's emulated drives are its device model's")
    for number in dict.fromkeys((*before, *after)):
        one, other = before.get(number), after.get(number)
        disk = other or one
        assert disk is not None
        key = f"disk[{disk.vdev}]"
        fixed = wanted.type == "hvm" and (disk.cdrom or disk.vdev.startswith("hd"))
        if one is None or other is None:
            way = emulated if fixed else Way(LIVE, "attached" if one is None else "detached")
            yield KeyChange(key, one and one.to_dict(), other and other.to_dict(), *way)
            continue
        table = DISK_CHANGES
        if one.cdrom and other.cdrom and _differ(one.to_dict(), other.to_dict()) == ["target"]:
            table = {**table, "target": Way(LIVE, "the drive's medium is changed")}
        yield from _subkeys(key, one.to_dict(), other.to_dict(), table)


def numbered(config: DomainConfig) -> dict[int, dict[str, Any]]:
    """The interfaces by their number, as they are numbered when a domain is started."""
    taken = {vif.devid for vif in config.vifs if vif.devid is not None}
    found = {}
    for vif in config.vifs:
        devid = vif.devid
        if devid is None:
            devid = next(n for n in range(len(taken) + 1) if n not in taken)
            taken.add(devid)
        found[devid] = {key: value for key, value in vif.to_dict().items() if key != "devid"}
    return found


def _vifs(old: DomainConfig, wanted: DomainConfig) -> Iterator[KeyChange]:
    before, after = numbered(old), numbered(wanted)
    for devid in dict.fromkeys((*before, *after)):
        one, other, key = before.get(devid), after.get(devid), f"vif[{devid}]"
        if one is None or other is None:
            fixed = wanted.type == "hvm" and (one or other or {}).get("type") != "vif"
            way = Way(LIVE, "attached" if one is None else "detached")
            if fixed:
                way = Way(REBOOT, "an hvm guest's emulated cards are its device model's")
            yield KeyChange(key, one, other, *way)
            continue
        if "mac" not in other:  # made up: the same each time
            one = {name: value for name, value in one.items() if name != "mac"}
        yield from _subkeys(key, one, other, VIF_CHANGES)


def _differ(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)]


def _subkeys(
    key: str, one: dict[str, Any], other: dict[str, Any], table: dict[str, Way]
) -> Iterator[KeyChange]:
    for name in _differ(one, other):
        yield KeyChange(f"{key}.{name}", one.get(name), other.get(name), *table[name])
