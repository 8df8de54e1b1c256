"""Where a domain's keys come from besides its own file: templates (``extends:``) and the host's defaults.

One rule merges two layers, the stronger onto the weaker: maps merge key by key, everything else (a list too)
is replaced as a whole, and an empty value (``key: ~``) takes away what the weaker layer has. From weak to
strong: built-in defaults, ``/etc/xtool/defaults.yaml`` of the host the guest will run on,
``~/.config/xtool/defaults.yaml``, the templates in the order ``extends`` names them (each on top of what it
extends itself), the document, ``--set``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

from xtool import paths
from xtool.config.nodes import Entry, ListNode, MapNode, Mark, Node, ScalarNode
from xtool.config.problems import did_you_mean
from xtool.errors import ConfigError

MAX_NESTING = 8
#: What every guest has for itself.
_NOT_FOR_ALL = ("name", "uuid", "extends")


class HostDefaults(NamedTuple):
    """Another host's ``/etc/xtool/defaults.yaml``."""

    host: str
    text: str


_elsewhere: ContextVar[HostDefaults | None] = ContextVar("another host's defaults", default=None)


class Reader(Protocol):
    """Gives a file's documents, as a layer of this role; ``another`` has the text of another host's."""

    def __call__(self, path: str, role: str, another: HostDefaults | None = None) -> list[Node]: ...


@contextmanager
def defaults_of(host: str, text: str) -> Iterator[None]:
    """What is read meanwhile is for that host: its defaults count, not this one's. ``text`` is the file's, or
    "" if it has none."""
    before = _elsewhere.set(HostDefaults(host, text))
    try:
        yield
    finally:
        _elsewhere.reset(before)


def merge(weak: MapNode, strong: MapNode, shadowed: dict[str, list[Entry]] | None = None) -> MapNode:
    """``strong`` on top of ``weak``; both stay as they are. What loses goes into ``shadowed``."""
    merged = MapNode(strong.mark, dict(weak.entries))
    for key, entry in strong.entries.items():
        before = merged.entries.get(key)
        if before is None:
            merged.entries[key] = entry
            continue
        if isinstance(before.value, MapNode) and isinstance(entry.value, MapNode):
            merged.entries[key] = Entry(entry.mark, merge(before.value, entry.value))
            continue
        if shadowed is not None:
            shadowed.setdefault(key, []).append(before)
        if isinstance(entry.value, ScalarNode) and entry.value.value.empty:
            del merged.entries[key]
        else:
            merged.entries[key] = entry
    return merged


def default_layers(read: Reader) -> Iterator[MapNode]:
    """The host's defaults, then the user's. Raises ``ConfigError``."""
    user, host = paths.config_dirs()
    for folder, another in ((host, _elsewhere.get()), (user, None)):
        path = str(folder / "defaults.yaml")
        if another is None and not os.path.exists(path):
            continue
        root = _single(read(path, "host default", another), path)
        if root is None:
            continue
        for key in _NOT_FOR_ALL:
            if key in root.entries:
                raise root.entries[key].mark.problem(
                    f"{key} cannot be a default of all guests", "put it into the domain's file", key=key
                )
        yield root


def with_templates(root: MapNode, folder: str, read: Reader) -> tuple[list[MapNode], MapNode]:
    """The templates ``root`` extends, each whole, and ``root`` without its ``extends``."""
    return _templates(root, folder, read, ())


def _templates(
    root: MapNode, folder: str, read: Reader, above: tuple[str, ...]
) -> tuple[list[MapNode], MapNode]:
    entry = root.entries.get("extends")
    if entry is None:
        return [], root
    own = MapNode(root.mark, {key: value for key, value in root.entries.items() if key != "extends"})
    layers: list[MapNode] = []
    for mark, name in _names(entry):
        path = _find(name, folder, mark)
        real = os.path.realpath(path)
        if real in above:
            raise mark.problem(f"{name} extends itself, by way of {' and '.join(above)}", key="extends")
        if len(above) >= MAX_NESTING:
            raise mark.problem(f"templates are nested more than {MAX_NESTING} deep", key="extends")
        template = _single(read(path, "template"), path)
        if template is None:
            continue
        more, plain = _templates(template, os.path.dirname(path), read, (*above, real))
        whole = plain
        for layer in reversed(more):
            whole = merge(layer, whole)
        layers.append(whole)
    return layers, own


def _names(entry: Entry) -> Iterator[tuple[Mark, str]]:
    value = entry.value
    for node in value.items if isinstance(value, ListNode) else [value]:
        if not isinstance(node, ScalarNode) or node.value.empty or not node.value.strip():
            raise node.mark.problem(
                "extends: the name or path of a template is wanted, or a list of them",
                "as in: extends: webserver, or extends: [base.yaml, ../web.yaml]",
                key="extends",
            )
        yield node.mark, str(node.value).strip()


def _find(name: str, folder: str, mark: Mark) -> str:
    """A path (with a slash, or .yaml or .yml at its end) is relative to the file; a name is looked up."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = os.path.normpath(os.path.join(folder, name))
        if not os.path.isfile(path):
            raise mark.problem(
                f"extends: there is no file {path}", "paths are relative to this file", key="extends"
            )
        return path
    places = [str(each / "templates") for each in paths.config_dirs()]
    for place in places:
        path = os.path.join(place, f"{name}.yaml")
        if os.path.isfile(path):
            return path
    known = {entry[:-5] for place in places for entry in _listed(place) if entry.endswith(".yaml")}
    hint = did_you_mean(name, known) or "a file beside this one is written with its ending: base.yaml"
    raise mark.problem(f"extends: no template {name} in {' or '.join(places)}", hint, key="extends")


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _single(roots: list[Node], path: str) -> MapNode | None:
    if not roots or (isinstance(roots[0], ScalarNode) and roots[0].value.empty and len(roots) == 1):
        return None
    if len(roots) > 1:
        raise roots[1].mark.problem("a template holds one document", "remove what follows the ---")
    root = roots[0]
    if not isinstance(root, MapNode):
        raise ConfigError(
            f"{path} is no map of keys", file=path, line=root.mark.line, column=root.mark.column
        )
    return root
