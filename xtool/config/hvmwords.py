"""Values that only HVM guests have: enlightenments for Windows, SMBIOS strings, timer modes; pure.

Facts, from Xen's public headers (``hvm/params.h``, ``hvm/hvm_xs_strings.h``) and xl.cfg(5): enlightenments
are bits of HVM_PARAM_VIRIDIAN, none works without ``base``, and ``freq`` is the one whose bit says "not";
hvmloader takes up to 99 OEM strings, and reads every other string by one name.
"""

from __future__ import annotations

from typing import Any

from xtool.config.problems import did_you_mean
from xtool.config.units import refused, shown, to_bool, to_word

#: Group -> bit of HVM_PARAM_VIRIDIAN.
ENLIGHTENMENTS = {
    name: bit
    for bit, name in enumerate(
        (
            *("base", "freq", "time_ref_count", "reference_tsc", "hcall_remote_tlb_flush", "apic_assist"),
            *(
                "crash_ctl",
                "synic",
                "stimer",
                "hcall_ipi",
                "ex_processor_masks",
                "no_vp_limit",
                "cpu_hotplug",
            ),
        )
    )
}
_DEFAULTS = frozenset("base freq time_ref_count apic_assist crash_ctl no_vp_limit cpu_hotplug".split())  # noqa: SIM905
_ALL = frozenset(ENLIGHTENMENTS)

#: ``timer_mode``, in the order of their numbers.
TIMER_MODES = (
    "delay_for_missed_ticks",
    "no_delay_for_missed_ticks",
    "no_missed_ticks_pending",
    "one_missed_tick_pending",
)

SMBIOS = (
    *("bios_vendor", "bios_version", "system_manufacturer", "system_product_name", "system_version"),
    *("system_serial_number", "baseboard_manufacturer", "baseboard_product_name", "baseboard_version"),
    *("baseboard_serial_number", "baseboard_asset_tag", "baseboard_location_in_chassis"),
    *("enclosure_manufacturer", "enclosure_serial_number", "enclosure_asset_tag"),
    *("battery_manufacturer", "battery_device_name", "oem"),
)
_MAX_OEM = 99


def to_viridian(value: Any) -> tuple[str, ...]:
    """A switch, or groups in order (``defaults``, ``all``, ``synic``, ``!freq``) -> the groups, sorted."""
    if not isinstance(value, (list, tuple)):
        return tuple(sorted(_DEFAULTS)) if to_bool(value) else ()
    chosen: set[str] = set()
    for item in value:
        word = to_word(item).strip()
        name = word.removeprefix("!")
        meant = {"all": _ALL, "defaults": _DEFAULTS}.get(name) or ({name} if name in _ALL else None)
        if meant is None:
            known = [*ENLIGHTENMENTS, "defaults", "all"]
            raise refused(
                f"{shown(word)} is no group of enlightenments",
                did_you_mean(name, known) or f"use {', '.join(known)}; ! before one takes it away",
            )
        chosen = chosen - meant if word.startswith("!") else chosen | meant
    if chosen and "base" not in chosen:
        raise refused("no group works without base", "add base, or defaults")
    return tuple(sorted(chosen))


def viridian_mask(groups: tuple[str, ...]) -> int:
    """HVM_PARAM_VIRIDIAN for these groups; 0 for none."""
    if not groups:
        return 0
    mask = sum(1 << ENLIGHTENMENTS[name] for name in groups)
    return mask ^ 1 << ENLIGHTENMENTS["freq"]


def to_smbios(value: Any) -> tuple[str, ...]:
    """A map, or xl's list of ``name=value`` -> ``name=value`` texts in order."""
    if isinstance(value, dict):
        items = [(str(name), text) for name, text in value.items()]
    elif isinstance(value, (list, tuple)):
        items = []
        for item in value:
            name, equals, text = to_word(item).partition("=")
            if not equals:
                raise refused(f"{shown(item)} is no SMBIOS string", "write system_product_name=Web server")
            items.append((name.strip(), text))
    else:
        raise refused(f"a map or a list is wanted, not {shown(value)}")
    found = []
    for name, text in items:
        if name not in SMBIOS:
            raise refused(
                f"{shown(name)} is no SMBIOS string", did_you_mean(name, SMBIOS) or f"use {', '.join(SMBIOS)}"
            )
        texts = text if isinstance(text, (list, tuple)) and name == "oem" else [text]
        found += [f"{name}={to_word(each)}" for each in texts]
    names = [text.partition("=")[0] for text in found]
    for name in names:
        if name != "oem" and names.count(name) > 1:
            raise refused(f"{name} is given twice")
    if names.count("oem") > _MAX_OEM:
        raise refused(f"{_MAX_OEM} OEM strings at most")
    return tuple(found)


def smbios_nodes(strings: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """What hvmloader reads below ``bios-strings``: names and values."""
    nodes, oem = [], 0
    for text in strings:
        name, _, value = text.partition("=")
        if name == "oem":
            oem += 1
            name = f"oem-{oem}"
        nodes.append((name.replace("_", "-"), value))
    return tuple(nodes)
