"""Anybody's libvirt XML as a domain file, with a line for each thing that could not be carried over.

The XML may come from anywhere: it is bounded and has no entities (``xmltext``), and every value goes through
the same checks as a domain file's; a value they refuse is left out and said.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from pydantic import ValidationError

from xtool.config import DomainConfig
from xtool.drivers.libvirt import importdevices
from xtool.drivers.libvirt.domainxml import ARGS, METADATA, TSC
from xtool.drivers.libvirt.seen import Seen
from xtool.drivers.libvirt.xmltext import parse_xml
from xtool.errors import ConfigError

MIB = 1 << 20
_UNITS = {
    "b": 1,
    "bytes": 1,
    "KB": 10**3,
    "k": 2**10,
    "KiB": 2**10,
    "MB": 10**6,
    "M": 2**20,
    "MiB": 2**20,
    "GB": 10**9,
    "G": 2**30,
    "GiB": 2**30,
    "TB": 10**12,
    "T": 2**40,
    "TiB": 2**40,
}
_TYPES = {"linux": "pv", "xen": "pv", "xenpvh": "pvh", "hvm": "hvm"}
_BOOT = {"hd": "c", "cdrom": "d", "network": "n"}
#: More refusals than a domain has values: something else is wrong then.
_ROUNDS = 200


class Imported(NamedTuple):
    config: DomainConfig
    left_out: list[str]


def import_xml(text: str, file: str = "") -> Imported:
    """Raises ``ConfigError`` for what is no domain XML, or no domain of a kind that xtool has."""
    root = parse_xml(text, file)
    if root.tag != "domain":
        raise ConfigError(
            f"<{str(root.tag)[:40]}> is no domain", file=file, hint="as virsh dumpxml prints it"
        )
    seen = Seen(root)
    notes: list[str] = []
    kind = seen.attr(root, "type")
    os_type = seen.text(root, "os/type")
    if os_type not in _TYPES or (os_type != "hvm" and kind != "xen"):
        raise ConfigError(
            f"a {kind} domain of type {os_type or 'unknown'} is none that xtool can run", file=file
        )
    keys: dict[str, Any] = {"name": seen.text(root, "name"), "type": _TYPES[os_type]}
    _basics(seen, root, keys, notes)
    _system(seen, root, keys, notes, kind == "xen")
    importdevices.devices(seen, root, keys, notes, kind == "xen")
    _quiet(seen, root)
    notes = [*notes, *seen.left_over()]
    return Imported(_validated(keys, notes, file), notes)


def _basics(seen: Seen, root: Element, keys: dict[str, Any], notes: list[str]) -> None:
    seen.attr(root, "id")
    keys["uuid"] = seen.text(root, "uuid") or None
    most = _size(seen, root, "memory", notes)
    now = _size(seen, root, "currentMemory", notes) or most
    keys["memory"], keys["maxmem"] = now, most or now
    vcpu = seen.child(root, "vcpu")
    seen.attr(vcpu, "placement")
    most_vcpus = seen.text(root, "vcpu") or "1"
    keys["maxvcpus"], keys["vcpus"] = most_vcpus, seen.attr(vcpu, "current") or most_vcpus
    keys["cpus"] = seen.attr(vcpu, "cpuset") or None
    pins = {p.get("vcpu", ""): p for p in root.iterfind("cputune/vcpupin")}
    if pins and set(pins) == {str(n) for n in range(len(pins))} and str(len(pins)) == most_vcpus:
        seen.child(root, "cputune")
        for pin in pins.values():
            seen.whole(pin)
        keys["cpus"] = [pins[str(n)].get("cpuset", "") for n in range(len(pins))]
    for name in ("on_poweroff", "on_reboot", "on_crash"):
        keys[name] = seen.text(root, name) or None


def _size(seen: Seen, root: Element, name: str, notes: list[str]) -> int | None:
    """Whole MiB, rounded up."""
    element = seen.child(root, name)
    text, unit = seen.text(root, name), seen.attr(element, "unit") or "KiB"
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and unit in _UNITS):
        return None
    size = int(text) * _UNITS[unit]
    if size % MIB:
        notes.append(f"{name} {text} {unit}: rounded up to whole MiB")
    return -(-size // MIB)


def _system(seen: Seen, root: Element, keys: dict[str, Any], notes: list[str], xen: bool) -> None:
    os = seen.child(root, "os")
    kind = seen.child(os, "type")
    if seen.attr(kind, "arch") not in ("", "x86_64", "i686"):
        notes.append(f"os/type arch={seen.attr(kind, 'arch')}: xtool's domains are x86_64")
    if "q35" in seen.attr(kind, "machine"):
        keys["hdtype"] = "ahci"
    for ours, path in (("kernel", "kernel"), ("ramdisk", "initrd"), ("cmdline", "cmdline")):
        keys[ours] = seen.text(os, path, strip=False) or None
    efi = seen.attr(os, "firmware") == "efi"
    loader = seen.child(os, "loader")
    if loader is not None and xen and loader.get("type") in (None, "rom"):
        keys["firmware_override"] = seen.text(os, "loader")
        seen.whole(loader)
    elif loader is not None and loader.get("type") == "pflash":
        efi = True  # which file it is is the host's business
    if efi:
        keys["firmware"] = "uefi"
    boot = []
    for each in seen.children(os, "boot"):
        letter = _BOOT.get(seen.attr(each, "dev"))
        if letter is None:
            seen.drop(each)
        elif letter not in boot:
            boot.append(letter)
    # Beside a kernel it has no effect.
    keys["boot"] = "".join(boot) if boot and keys["type"] == "hvm" and not keys["kernel"] else None
    _features(seen, root, keys, xen)
    _clock(seen, root, keys)
    for prefix in ("qemu", "xen"):
        space = f"{{{ARGS[prefix][1]}}}"
        args = [
            arg
            for line in seen.children(root, f"{space}commandline")
            for arg in seen.children(line, f"{space}arg")
        ]
        if args and keys["type"] == "hvm":
            keys["device_model_args"] = [seen.attr(arg, "value") for arg in args]


def _features(seen: Seen, root: Element, keys: dict[str, Any], xen: bool) -> None:
    features = seen.child(root, "features")
    names = {"pv": (), "pvh": ("acpi", "apic"), "hvm": ("acpi", "apic", "pae")}[keys["type"]]
    for name in ("acpi", "apic", "pae"):
        element = seen.child(features, name)
        if name in names and (xen or name != "pae"):  # to QEMU, libvirt says nothing of pae
            keys[name] = element is not None
    hap = seen.child(features, "hap")
    if hap is not None and keys["type"] != "pv":
        keys["hap"] = seen.attr(hap, "state") != "off"
    cpu = seen.child(root, "cpu")
    mode = seen.attr(cpu, "mode")
    if cpu is not None and xen and mode == "host-passthrough" and keys["type"] != "pv":
        keys["nestedhvm"] = True
    elif cpu is not None and mode not in ("host-passthrough", "maximum"):
        seen.drop(cpu)
    for name in ("check", "migratable"):
        seen.attr(cpu, name)


def _clock(seen: Seen, root: Element, keys: dict[str, Any]) -> None:
    clock = seen.child(root, "clock")
    offset = seen.attr(clock, "offset")
    if offset == "variable":
        keys["rtc_timeoffset"] = seen.attr(clock, "adjustment") or "0"
        keys["localtime"] = seen.attr(clock, "basis") == "localtime"
    elif offset in ("utc", "localtime"):
        keys["localtime"] = offset == "localtime"
    elif clock is not None:
        seen.drop(clock)
        return
    modes = {theirs: ours for ours, theirs in TSC.items()}
    for timer in seen.children(clock, "timer"):
        name, mode = timer.get("name"), timer.get("mode", "")
        if name == "hpet" and timer.get("present") == "no" and keys["type"] == "hvm":
            keys["hpet"] = False
            seen.whole(timer)
        elif name == "tsc" and mode in modes:
            keys["tsc_mode"] = modes[mode]
            seen.whole(timer)
        else:
            seen.drop(timer)


def _quiet(seen: Seen, root: Element) -> None:
    """What libvirt fills in by itself, and our own mark."""
    seen.whole(root.find("resource"))
    for label in root.iterfind("seclabel"):
        if label.get("type") == "dynamic":
            seen.whole(label)
    if seen.child(root, "metadata") is not None:
        seen.whole(root.find(f"metadata/{{{METADATA}}}domain"))


def _validated(keys: dict[str, Any], notes: list[str], file: str) -> DomainConfig:
    """The config; values it refuses are left out, one by one, unless there is no domain without them."""
    plain = {name: value for name, value in keys.items() if value is not None and value != []}
    for _ in range(_ROUNDS):
        try:
            return DomainConfig.model_validate(plain, context={"base_dir": "/"})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            context = first.get("ctx") or {}
            loc, message = tuple(first["loc"]), str(context.get("message") or first["msg"])
            if first["type"] == "broken_rules":
                rule = context["broken"][0]
                loc, message = (*loc, *rule.loc), rule.message
            if not _without(plain, loc):
                where = ".".join(map(str, loc))
                raise ConfigError(
                    f"the domain cannot be one of xtool's: {where}: {message}", file=file
                ) from None
            notes.append(f"{'.'.join(map(str, loc))}: {message}")
    raise ConfigError("too much of the domain is refused", file=file)


def _without(plain: dict[str, Any], loc: tuple[Any, ...]) -> bool:
    """Take the value at ``loc``, or the device around it, out; false if it cannot be missed."""
    if not loc or loc[0] in ("name", "type", "memory") or loc[0] not in plain:
        return False
    if len(loc) == 1:
        del plain[loc[0]]
        return True
    entries = plain[loc[0]]
    if not isinstance(entries, list) or not isinstance(loc[1], int) or loc[1] >= len(entries):
        del plain[loc[0]]
        return True
    entry = entries[loc[1]]
    if len(loc) > 2 and isinstance(entry, dict) and loc[2] in entry and loc[2] not in ("vdev", "target"):
        del entry[loc[2]]
    else:
        del entries[loc[1]]
    return True
