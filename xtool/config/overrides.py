"""``--set key=value``: one value of a domain file replaced or added, before anything is checked."""

from __future__ import annotations

from collections.abc import Iterable

from xtool.config.nodes import (
    Entry,
    ListNode,
    MapNode,
    Mark,
    Node,
    Scalar,
    ScalarNode,
    Source,
    find_node,
    parse_yaml,
)

_MAX_INDEX = 255


def apply_override(root: MapNode, text: str, shadowed: dict[str, list[Entry]] | None = None) -> None:
    """Carry out one ``key=value``, as in ``memory=2GiB``, ``disk[0].vdev=xvdb``, ``serial=[pty, pty]``. What
    it takes the place of goes into ``shadowed``, by its key.

    A value that begins with a quote, ``[`` or ``{`` is YAML; any other is taken as it stands. Problems
    point into ``text``. Raises ``ConfigError``.
    """
    source = Source("--set", text, role="--set")
    start = Mark(source, 1, 1)
    path, equals, value = text.partition("=")
    if not equals:
        raise start.problem(f"--set wants key=value, not {text!r}", "as in --set memory=2GiB")
    steps = _steps(path, start)
    before = _entry(root, steps)
    _graft(root, steps, _value(source, value, len(path) + 2), start)
    if before is not None and shadowed is not None:
        shadowed.setdefault(path, []).append(before)


def _entry(root: MapNode, steps: list[str | int]) -> Entry | None:
    if len(steps) == 1:
        return root.entries.get(str(steps[0]))
    node = find_node(root, tuple(steps))
    return None if node is None else Entry(node.mark, node)


def plain_sets(texts: Iterable[str]) -> dict[str, str]:
    """Those of the ``--set`` arguments whose key is a plain word, as the variables of a template."""
    pairs = (text.partition("=") for text in texts)
    return {name: value for name, equals, value in pairs if equals and name.isidentifier()}


def _value(source: Source, text: str, column: int) -> Node:
    if text[:1] in ('"', "'", "[", "{"):
        node = parse_yaml(source, text, column=column)
        assert node is not None
        return node
    return ScalarNode(Mark(source, 1, column), Scalar(text.strip()), True)


def _steps(path: str, start: Mark) -> list[str | int]:
    """``disk[0].target`` -> ``["disk", 0, "target"]``."""
    steps: list[str | int] = []
    at = 0
    for part in path.split("."):
        name, *indexes = part.split("[")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise start.right(at).problem(f"{path!r} is no key", "as in memory, or disk[0].target")
        steps.append(name)
        for index in indexes:
            digits = index.removesuffix("]")
            if not (index.endswith("]") and digits.isascii() and digits.isdigit() and len(digits) < 4):
                raise start.right(at + len(name)).problem(f"{path!r} is no key", "as in disk[0].target")
            steps.append(int(digits))
        at += len(part) + 1
    return steps


def _graft(root: MapNode, steps: list[str | int], value: Node, mark: Mark) -> None:
    node: Node = root
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        child = value if following is None else _child(node, step)
        if child is None or (following is not None and isinstance(child, ScalarNode)):
            child = ListNode(mark, []) if isinstance(following, int) else MapNode(mark, {})
        _put(node, step, child, mark)
        node = child


def _child(node: Node, step: str | int) -> Node | None:
    if isinstance(node, MapNode) and step in node.entries:
        return node.entries[str(step)].value
    if isinstance(node, ListNode) and isinstance(step, int) and step < len(node.items):
        return node.items[step]
    return None


def _put(node: Node, step: str | int, child: Node, mark: Mark) -> None:
    if isinstance(node, MapNode) and isinstance(step, str):
        before = node.entries.get(step)
        kept = before is not None and before.value is child
        node.entries[step] = before if kept and before is not None else Entry(mark, child)
    elif isinstance(node, ListNode) and isinstance(step, int):
        if step > min(len(node.items), _MAX_INDEX):
            raise mark.problem(
                f"there is no entry [{step}]", f"[{len(node.items)}] is the next one that can be added"
            )
        node.items[step : step + 1] = [child]
    else:
        wanted = "an index such as [0]" if isinstance(node, ListNode) else "a key"
        raise mark.problem(f"{step!r} does not fit here: {wanted} is wanted")
