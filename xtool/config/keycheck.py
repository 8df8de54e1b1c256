"""The keys of one domain's tree: xl's spec strings made maps, and every key known, wanted and not empty."""

from __future__ import annotations

from xtool.config.model import FIELDS, MERGED, guests_of
from xtool.config.nodes import Entry, ListNode, MapNode, Mark, Node, Scalar, ScalarNode
from xtool.config.problems import close_word, did_you_mean
from xtool.config.ready import SUBKEYS as READY_KEYS
from xtool.config.seed import SUBKEYS as CLOUD_KEYS
from xtool.config.specs import (
    CHANNEL_KEYS,
    DISK_FLAGS,
    DISK_KEYS,
    DISK_LATER,
    VIF_FLAGS,
    VIF_KEYS,
    SpecError,
    parse_channel_spec,
    parse_disk_spec,
    parse_vif_spec,
)
from xtool.config.xlkeys import INSTEAD, UNSUPPORTED
from xtool.errors import ConfigError

_SPECS = {"disk": parse_disk_spec, "vif": parse_vif_spec, "channel": parse_channel_spec}
SUBKEYS = {
    "disk": {*DISK_KEYS, *DISK_FLAGS},
    "vif": {*VIF_KEYS, *VIF_FLAGS},
    "channel": {*CHANNEL_KEYS},
    "cloud_init": {*CLOUD_KEYS},
    "ready": {*READY_KEYS},
}


class Findings:
    """What is wrong, and what the misspelt keys were probably meant to be: a required key that is there but
    misspelt is not reported as missing too."""

    def __init__(self) -> None:
        self.problems: list[ConfigError] = []
        #: Where (``""`` or ``disk[0]``) and the key that was meant.
        self.meant: set[tuple[str, str]] = set()
        #: Keys taken out of the tree because of a problem.
        self.gone: set[str] = set()

    def unknown(self, mark: Mark, where: str, key: str, known: list[str]) -> ConfigError:
        if meant := close_word(key, known):
            self.meant.add((where, meant))
        outer = f"{where}: unknown sub-key" if where else "unknown key"
        path = f"{where}.{key}" if where else key
        return mark.problem(f"{outer} {_short(key)}", did_you_mean(key, known), key=path)


def expand_specs(root: MapNode, found: Findings) -> None:
    """Put maps in the place of xl's spec strings, marks kept where the string stands as it is written."""
    for key, parse in _SPECS.items():
        entry = root.entries.get(key)
        if entry is None or not isinstance(entry.value, ListNode):
            continue
        kept: list[Node] = []
        for item in entry.value.items:
            if isinstance(item, ScalarNode) and not item.value.empty:
                try:
                    expanded = MapNode(item.mark, {})
                    for sub in parse(str(item.value)):
                        mark = _inside(item, sub.offset)
                        value = Scalar(sub.value, False, item.value.base)
                        expanded.entries[sub.key] = Entry(mark, ScalarNode(mark, value, True))
                    kept.append(expanded)
                except SpecError as error:
                    mark = _inside(item, error.offset)
                    found.problems.append(mark.problem(f"{key}: {error.message}", error.hint, key=key))
                    found.gone.add(key)
            else:
                kept.append(item)
        entry.value.items[:] = kept


def _inside(node: ScalarNode, offset: int) -> Mark:
    return node.mark.right(offset + node.value.quoted) if node.verbatim else node.mark


def check_keys(root: MapNode, found: Findings) -> None:
    """Take out, and report, keys that are unknown, not supported, without a value or without effect."""
    guest = root.text("type")
    for key, (mark, value) in list(root.entries.items()):
        if mark.source.role == "host default" and _for_others(key, guest):
            del root.entries[key]
            continue
        problem = _key_problem(key, mark, guest, found)
        if problem is None and isinstance(value, ScalarNode) and value.value.empty:
            problem = mark.problem(f"{key} has no value", f"write one, or remove {key}", key=key)
        if problem is not None:
            found.problems.append(problem)
            found.gone.add(key)
            del root.entries[key]
        elif key in SUBKEYS and isinstance(value, ListNode):
            for index, item in enumerate(value.items):
                if isinstance(item, MapNode):
                    _check_subkeys(key, f"{key}[{index}]", item, found)
            if value.items and guest in guests_of(key, "later"):
                found.problems.append(mark.problem(f"xtool does not act on {key} for type: {guest} yet"))
        elif key in SUBKEYS and isinstance(value, MapNode):
            _check_subkeys(key, key, value, found)


def _for_others(key: str, guest: str | None) -> bool:
    """A host's defaults are for all its guests: what this one has no use for is left out."""
    return guest in ("pv", "pvh", "hvm") and (key in FIELDS or key in MERGED) and guest not in guests_of(key)


def _key_problem(key: str, mark: Mark, guest: str | None, found: Findings) -> ConfigError | None:
    if key in UNSUPPORTED:
        return mark.problem(
            f"xl's {key} is not supported by xtool: {UNSUPPORTED[key]}",
            INSTEAD.get(key, f"remove {key}"),
            key=key,
        )
    if key not in FIELDS and key not in MERGED:
        return found.unknown(mark, "", key, [*FIELDS, *MERGED, "extends"])
    guests = guests_of(key)
    if guest in ("pv", "pvh", "hvm") and guest not in guests:
        return mark.problem(
            f"{key} has no effect for type: {guest}", f"it is for type: {' or '.join(guests)}", key=key
        )
    return None


def _short(key: str) -> str:
    text = key if len(key) <= 40 else key[:37] + "..."
    return text if text.isprintable() else ascii(text)


def _check_subkeys(key: str, where: str, item: MapNode, found: Findings) -> None:
    for sub, (mark, value) in list(item.entries.items()):
        problem = None
        path = f"{where}.{sub}"
        if key == "disk" and sub in DISK_LATER:
            problem = mark.problem(
                f"{where}: xl's {sub} is not supported by xtool", f"remove {sub}", key=path
            )
        elif key == "vif" and sub == "netdev":
            problem = mark.problem(f"{where}: netdev is deprecated", "use gatewaydev", key=path)
        elif sub not in SUBKEYS[key]:
            problem = found.unknown(mark, where, sub, sorted(SUBKEYS[key]))
        elif isinstance(value, ScalarNode) and value.value.empty:
            problem = mark.problem(f"{where}: {sub} has no value", f"write one, or remove {sub}", key=path)
        if problem is not None:
            found.problems.append(problem)
            del item.entries[sub]


def merge_cmdline(root: MapNode, found: Findings) -> None:
    """xl's ``root`` and ``extra`` become ``cmdline``; beside a ``cmdline`` they would have no effect."""
    parts: list[str] = []
    first: Entry | None = None
    for key in MERGED:
        entry = root.entries.pop(key, None)
        if entry is None:
            continue
        if not isinstance(entry.value, ScalarNode):
            kind = entry.value.KIND
            found.problems.append(entry.value.mark.problem(f"{key}: text is wanted, not {kind}", key=key))
        elif "cmdline" in root.entries:
            found.problems.append(
                entry.mark.problem(
                    f"{key} has no effect when cmdline is given", "put it into cmdline", key=key
                )
            )
        else:
            first = first or entry
            parts.append(f"root={entry.value.value}" if key == "root" else str(entry.value.value))
    if first is not None and "cmdline" not in root.entries:
        merged = ScalarNode(first.value.mark, Scalar(" ".join(parts), True))
        root.entries["cmdline"] = Entry(first.mark, merged)
