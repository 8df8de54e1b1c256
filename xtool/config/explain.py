"""Where each value of a domain came from, and what it does: ``xtool explain``. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xtool.config.load import Loaded
from xtool.config.model import FIELDS, KEY_OF, MERGED, about, default_of, guests_of
from xtool.config.nodes import Entry, MapNode, Mark, ScalarNode, find_node
from xtool.config.problems import did_you_mean
from xtool.config.xlkeys import INSTEAD, UNSUPPORTED
from xtool.errors import UsageError

_ATTRIBUTE = {key: name for name, key in KEY_OF.items()}
HIDDEN = "(not shown)"


@dataclass(frozen=True)
class Explained:
    """One key. ``origin`` is ``file:line``, with ``template`` or ``host default`` before it, the ``--set``
    argument, or ``built-in``; ``replaced`` are the weaker values it won over, with their origins."""

    key: str
    value: Any
    origin: str
    meaning: str
    default: str
    guests: tuple[str, ...]
    replaced: tuple[str, ...] = ()


def explain(loaded: Loaded, key: str | None = None, *, everything: bool = False) -> list[Explained]:
    """The keys that are given (``everything``: those at their built-in values too), or the one asked for.

    ``key`` may lead inside: ``disk[0].vdev``. Raises ``UsageError`` for a key that does not exist.
    """
    if key is not None:
        return [_one(loaded, key)]
    guest = loaded.config.type
    names = [name for name in FIELDS if everything or name in loaded.root.entries]
    return [_explained(loaded, name) for name in names if guest in guests_of(name)]


def _one(loaded: Loaded, key: str) -> Explained:
    name = key.split(".")[0].split("[")[0]
    if name in MERGED:
        name = key = "cmdline"
    if name in UNSUPPORTED:
        raise UsageError(
            f"xl's {name} is not supported by xtool: {UNSUPPORTED[name]}", hint=INSTEAD.get(name)
        )
    if name not in FIELDS:
        raise UsageError(f"there is no key {name}", hint=did_you_mean(name, [*FIELDS, *MERGED]))
    whole = _explained(loaded, name)
    if key == name:
        return whole
    steps: list[str | int] = []
    for step in key.replace("[", ".[").split("."):
        inside = step.removeprefix("[").removesuffix("]")
        steps.append(int(inside) if step.startswith("[") and inside.isdecimal() else step)
    node = find_node(loaded.root, tuple(steps))
    if node is None:
        raise UsageError(f"{key} is not given in this file", hint=f"xtool explain FILE {name} shows what is")
    value = _hide(key, node.data())
    return Explained(key, value, origin(node.mark), whole.meaning, "", whole.guests, _replaced(loaded, key))


def _explained(loaded: Loaded, name: str) -> Explained:
    attribute = _ATTRIBUTE.get(name, name)
    entry = loaded.root.entries.get(name)
    value = loaded.config.to_dict().get(name)
    if value is None:
        value = default_of(loaded.config, attribute)
        if name in ("maxmem", "memory"):
            value = value >> 20
        value = list(value) if isinstance(value, tuple) else value
    return Explained(
        key=name,
        value=_hide(name, value),
        origin=_origin_of(name, entry),
        meaning=FIELDS[name].description or "",
        default=about(name, "default") or _plain(FIELDS[name].default),
        guests=tuple(guests_of(name)),
        replaced=_replaced(loaded, name),
    )


def _replaced(loaded: Loaded, key: str) -> tuple[str, ...]:
    return tuple(_was(key, each) for each in reversed(loaded.shadowed.get(key, [])))


def _origin_of(name: str, entry: Entry | None) -> str:
    if entry is None:
        follows = {"maxmem": "memory", "maxvcpus": "vcpus"}.get(name)
        return f"built-in: what {follows} is" if follows else "built-in"
    if isinstance(entry.value, MapNode):
        # A merged map has values of several layers.
        marks = {origin(each.mark): None for each in entry.value.entries.values()}
        return ", ".join(marks) or origin(entry.mark)
    return origin(entry.mark)


def origin(mark: Mark) -> str:
    """Where a value stands, for a reader."""
    source = mark.source
    if source.role == "--set":
        return f"--set {(source.line(1) or '').partition('=')[0]}"
    place = f"{source.name}:{mark.line}"
    return place if source.role == "file" else f"{source.role} {place}"


def _was(name: str, entry: Entry) -> str:
    value = entry.value.value if isinstance(entry.value, ScalarNode) else entry.value.KIND
    return f"{_hide(name, str(value))} ({origin(entry.mark)})"


def _hide(key: str, value: Any) -> Any:
    """Secrets are not shown: a password, and what a seed holds."""
    if key == "vncpasswd" and value is not None:
        return HIDDEN
    if key.startswith("cloud_init"):
        if isinstance(value, dict):
            return {name: item if name == "vdev" else HIDDEN for name, item in value.items()}
        return value if key.endswith(".vdev") or value is None else HIDDEN
    return value


def _plain(default: Any) -> str:
    if default is None or default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
