"""YAML text to a tree whose every key and value knows where it stands.

Facts about PyYAML and YAML that shape this module:

- The event parser keeps its own stack; the composer and constructor above it recurse, so that deep
  nesting becomes a ``RecursionError`` and aliases can blow up exponentially. So only events are used,
  nesting is bounded, and anchors, aliases and tags are refused.
- YAML 1.1 reads ``00:16:3e`` style text and ``on`` by shape, whatever the key wants. So scalars stay text
  here (with a note whether they were quoted), and the key's own type decides what they mean.
- The last of two equal keys would win silently; here the second is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from xtool.errors import ConfigError

MAX_DEPTH = 16
MAX_TEXT = 1 << 20


class Segment(NamedTuple):
    """From ``column`` of a rendered line on, the text is the original's at ``line``, ``original``. A
    ``fixed`` segment came out of an expression: all of it stands where the expression stands."""

    column: int
    line: int
    original: int
    fixed: bool


class Source:
    """A text that problems point into: a file, or one ``--set`` argument.

    ``role`` says what it is: ``file``, ``template``, ``host default`` or ``--set``. Relative paths in it are
    relative to ``folder``. ``where`` names the host whose file it is, if it is another. ``places`` has the
    segments of each line when what is parsed was rendered from ``text``: problems point into the original.
    """

    def __init__(
        self,
        name: str,
        text: str,
        *,
        role: str = "file",
        folder: str | None = None,
        where: str = "",
        places: list[list[Segment]] | None = None,
    ) -> None:
        self.name = f"{name} of {where}" if where else name
        self.where = where
        self.role = role
        self.folder = folder
        self._text = text
        self._places = places
        self._lines: list[str] | None = None

    def straight(self, line: int, first: int, last: int) -> bool:
        """Whether these columns stand in the original as they stand in the parsed text."""
        if self._places is None:
            return True
        (line_a, a), (line_b, b) = self.place(line, first), self.place(line, last)
        return line_a == line_b and b - a == last - first

    def place(self, line: int, column: int) -> tuple[int, int]:
        """Where in the original text a place of the parsed text is."""
        if self._places is None or not 1 <= line <= len(self._places):
            return line, column
        found = None
        for segment in self._places[line - 1]:
            if segment.column > column and found is not None:
                break
            found = segment
        if found is None:
            return line, column
        return found.line, found.original + (0 if found.fixed else max(column - found.column, 0))

    def line(self, number: int) -> str | None:
        """Line ``number`` (from 1) without its end, or None."""
        if self._lines is None:
            self._lines = self._text.split("\n")
        if 1 <= number <= len(self._lines):
            return self._lines[number - 1].rstrip("\r")
        return None


class Mark(NamedTuple):
    """A place; line and column count from 1."""

    source: Source
    line: int
    column: int

    def problem(self, message: str, hint: str | None = None, *, key: str = "") -> ConfigError:
        return ConfigError(
            message,
            file=self.source.name,
            line=self.line,
            column=self.column,
            source=self.source.line(self.line),
            hint=hint,
            key=key,
        )

    def right(self, columns: int) -> Mark:
        return self._replace(column=self.column + columns)


class Scalar(str):
    """The text of a scalar; ``quoted`` tells ``"1"`` from ``1``."""

    quoted: bool
    #: The folder a relative path is relative to; None: that of the domain file.
    base: str | None

    def __new__(cls, text: str, quoted: bool = False, base: str | None = None) -> Scalar:
        self = super().__new__(cls, text)
        self.quoted = quoted
        self.base = base
        return self

    @property
    def empty(self) -> bool:
        """No value written (or YAML's null)."""
        return not self.quoted and self in ("", "~", "null", "Null", "NULL")


@dataclass
class Node:
    mark: Mark
    KIND: ClassVar[str] = ""

    def data(self) -> Any:
        """Plain lists, dicts and ``Scalar``s, without marks."""
        raise NotImplementedError


@dataclass
class ScalarNode(Node):
    value: Scalar
    #: The scalar is written on one line as it is, so columns inside it can be pointed at.
    verbatim: bool = False
    KIND: ClassVar[str] = "text"

    def data(self) -> Scalar:
        return self.value


@dataclass
class ListNode(Node):
    items: list[Node]
    KIND: ClassVar[str] = "a list"

    def data(self) -> list[Any]:
        return [item.data() for item in self.items]


class Entry(NamedTuple):
    mark: Mark  # of the key
    value: Node


@dataclass
class MapNode(Node):
    entries: dict[str, Entry]
    KIND: ClassVar[str] = "a map of keys"

    def data(self) -> dict[str, Any]:
        return {key: entry.value.data() for key, entry in self.entries.items()}

    def text(self, key: str) -> str | None:
        """The text of scalar ``key``, None if it is missing or no scalar."""
        entry = self.entries.get(key)
        return str(entry.value.value) if entry and isinstance(entry.value, ScalarNode) else None


def find_node(root: Node, loc: tuple[str | int, ...]) -> Node | None:
    """The value at ``loc``, None if there is none."""
    node = root
    for step in loc:
        if isinstance(node, MapNode) and step in node.entries:
            node = node.entries[str(step)].value
        elif isinstance(node, ListNode) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
        else:
            return None
    return node


def find_mark(root: Node, loc: tuple[str | int, ...]) -> Mark:
    """Where the value at ``loc`` stands, or the nearest thing around it that is written."""
    mark = root.mark
    node = root
    for step in loc:
        if isinstance(node, MapNode) and step in node.entries:
            node = node.entries[str(step)].value
        elif isinstance(node, ListNode) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
        else:
            break
        mark = node.mark
    return mark


def parse_yaml(source: Source, text: str, *, column: int = 1) -> Node | None:
    """The tree of ``text``'s single document, None if it is empty.

    ``column`` is where ``text`` begins on the first line of ``source``. Raises ``ConfigError``.
    """
    roots = parse_documents(source, text, column=column)
    if len(roots) > 1:
        second = roots[1].mark
        raise second.problem("one document is wanted here", "remove what follows the ---")
    return roots[0] if roots else None


def parse_documents(source: Source, text: str, *, column: int = 1) -> list[Node]:
    """The trees of all documents of ``text``; an empty one is an empty scalar. Raises ``ConfigError``."""
    import yaml

    if len(text) > MAX_TEXT:
        raise Mark(source, 1, 1).problem("this is too large for a domain file")
    try:
        return _Builder(source, column).build(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.reader.ReaderError as error:
        before = text[: error.position] if isinstance(error.position, int) else ""
        line = before.count("\n") + 1
        at = len(before) - (before.rfind("\n") + 1) + (column if line == 1 else 1)
        message = f"the character {error.character!r} is not allowed in YAML"
        if isinstance(error.character, int):
            message = f"the character U+{error.character:04X} is not allowed in YAML"
        raise Mark(source, *source.place(line, at)).problem(message) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context_mark and (error.context or "").startswith("while scanning"):
            mark = error.context_mark  # where the word began that never ended well
        place = _mark(source, mark, column) if mark else Mark(source, 1, 1)
        parts = [part for part in (error.context, error.problem) if part]
        raise place.problem("not valid YAML: " + ", ".join(parts), _yaml_hint(parts)) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # ValueError: \U escapes beyond Unicode, which PyYAML leaves to chr().
        raise Mark(source, 1, 1).problem(f"not valid YAML: {error}") from None


def _yaml_hint(parts: list[str]) -> str | None:
    text = " ".join(parts)
    if "'\\t'" in text:
        return "indent with spaces, not tabs"
    if "could not find expected ':'" in text:
        return "write key: value"
    if "mapping values are not allowed" in text or "cannot start any token" in text:
        return "put the value in quotes"
    return None


def _mark(source: Source, mark: Any, column: int) -> Mark:
    return Mark(source, *source.place(mark.line + 1, mark.column + (column if mark.line == 0 else 1)))


def _joined(text: str) -> str:
    """JSON writes a character beyond U+FFFF as two escapes, which YAML reads one by one."""
    if not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return text  # half a pair: the key's type refuses it


class _Builder:
    """Walks events, not recursing: ``stack`` holds the open lists and maps."""

    def __init__(self, source: Source, column: int) -> None:
        self.source = source
        self.column = column
        self.roots: list[Node] = []
        self.stack: list[Node] = []
        self.keys: list[ScalarNode | None] = []  # the key waiting for its value, per open collection

    def build(self, events: Iterator[Any]) -> list[Node]:
        for event in events:
            kind = type(event).__name__
            if kind in ("SequenceEndEvent", "MappingEndEvent"):
                self.stack.pop()
                self.keys.pop()
            elif kind in ("ScalarEvent", "SequenceStartEvent", "MappingStartEvent", "AliasEvent"):
                self._node(kind, event)
        return self.roots

    def _node(self, kind: str, event: Any) -> None:
        mark = _mark(self.source, event.start_mark, self.column)
        if kind == "AliasEvent" or event.anchor:
            raise mark.problem("anchors and aliases are not allowed here", "write the value out")
        if event.tag not in (None, "!"):
            raise mark.problem("tags are not allowed here", "remove the tag, write the plain value")
        node: Node
        if kind == "ScalarEvent":
            quoted = event.style is not None
            start, end = event.start_mark, event.end_mark
            raw = start.line == end.line and (
                end.column - start.column - 2 * quoted == len(event.value)
                and self.source.straight(start.line + 1, start.column + 1, end.column)
            )
            node = ScalarNode(mark, Scalar(_joined(event.value), quoted, self.source.folder), raw)
        elif kind == "SequenceStartEvent":
            node = ListNode(mark, [])
        else:
            node = MapNode(mark, {})
        self._attach(node)
        if not isinstance(node, ScalarNode):
            if len(self.stack) >= MAX_DEPTH:
                raise mark.problem("nested too deeply")
            self.stack.append(node)
            self.keys.append(None)

    def _attach(self, node: Node) -> None:
        if not self.stack:
            self.roots.append(node)
            return
        parent = self.stack[-1]
        if isinstance(parent, ListNode):
            parent.items.append(node)
            return
        assert isinstance(parent, MapNode)
        key = self.keys[-1]
        if key is None:
            if not isinstance(node, ScalarNode) or node.value.empty:
                raise node.mark.problem("a key must be a word")
            before = parent.entries.get(node.value)
            if before:
                raise node.mark.problem(
                    f"the key {node.value} is given twice",
                    f"it is already on line {before.mark.line}: remove one of them",
                )
            self.keys[-1] = node
        else:
            parent.entries[str(key.value)] = Entry(key.mark, node)
            self.keys[-1] = None
