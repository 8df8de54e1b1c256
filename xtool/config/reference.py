"""The reference tables of ``docs/configuration.md``, made from the model.

``python -m xtool.config.reference docs/configuration.md`` rewrites the tables in the file; a test compares
them, so that the page cannot drift from the code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pydantic import BaseModel

from xtool.config.changes import CHANGES, DISK_CHANGES, VIF_CHANGES, Way
from xtool.config.devices import ChannelConfig, DiskConfig, VifConfig
from xtool.config.hvmwords import ENLIGHTENMENTS, SMBIOS
from xtool.config.model import FIELDS, MERGED, about, guests_of
from xtool.config.ready import ReadyConfig
from xtool.config.seed import CloudInitConfig
from xtool.config.xlkeys import UNSUPPORTED

_BEGIN, _END = "<!-- {0}: begin, made by xtool.config.reference -->", "<!-- {0}: end -->"


def keys_table() -> str:
    rows = ["| Key | Value | Default | Guests | Changes | Meaning |", "|---|---|---|---|---|---|"]
    names = list(FIELDS)
    names[names.index("cmdline") + 1 : names.index("cmdline") + 1] = list(MERGED)
    for name in names:
        guests = [g for g in guests_of(name) if g not in guests_of(name, "later")]
        text = MERGED.get(name) or FIELDS[name].description or ""
        kind, default = ("text", "") if name in MERGED else (about(name, "kind"), _default(name))
        when = CHANGES["cmdline" if name in MERGED else name].when
        row = (f"`{name}`", kind, default, ", ".join(guests) or "none yet", when, text)
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def _default(name: str) -> str:
    if noted := about(name, "default"):
        return noted
    default = FIELDS[name].default
    if default is None or default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def device_table(model: type[BaseModel], changes: dict[str, Way] | None = None) -> str:
    more = " Changes |" if changes else ""
    rows = [f"| Sub-key | Default |{more} Meaning |", f"|---|---|{'---|' if changes else ''}---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else "" if field.default is None else str(field.default)
        default = default.lower() if isinstance(field.default, bool) else default
        default = "" if "\n" in default else default
        way = f" {changes[field.alias or name].when} |" if changes else ""
        rows.append(f"| `{field.alias or name}` | {default} |{way} {field.description} |")
    return "\n".join(rows)


def unsupported_table() -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in sorted(UNSUPPORTED.items()):
        reasons.setdefault(reason, []).append(name)
    rows = ["| Why not | Keys |", "|---|---|"]
    for reason, names in reasons.items():
        rows.append(f"| {reason} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(rows)


def smbios_list() -> str:
    return ", ".join(f"`{name}`" for name in SMBIOS) + "."


def viridian_list() -> str:
    return ", ".join(f"`{name}`" for name in ENLIGHTENMENTS) + "."


def sections() -> Iterator[tuple[str, str]]:
    yield "keys", keys_table()
    yield "disk", device_table(DiskConfig, DISK_CHANGES)
    yield "vif", device_table(VifConfig, VIF_CHANGES)
    yield "channel", device_table(ChannelConfig)
    yield "cloud_init", device_table(CloudInitConfig)
    yield "ready", device_table(ReadyConfig)
    yield "viridian", viridian_list()
    yield "smbios", smbios_list()
    yield "unsupported", unsupported_table()


def rewrite(page: str) -> str:
    """``page`` with what stands between the marks of each section made anew."""
    for name, table in sections():
        begin, end = _BEGIN.format(name), _END.format(name)
        head, found, rest = page.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the page lacks the marks of section {name}")
        page = f"{head}{begin}\n{table}\n{end}{tail}"
    return page


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        new = rewrite(file.read())
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(new)
