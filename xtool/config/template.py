"""jinja2 in domain files: text and variables in, YAML text out, with the place each piece came from.

Only a text with ``{{`` or ``{%`` in it is a template; jinja2 is loaded for no other. Undefined variables are
errors, the environment is sandboxed, and no file is read: ``extends:`` is how domain files share.

Facts about jinja2 that shape this module:

- The syntax tree has the line of every piece of literal text and of every expression. Marks (a NUL, the
  place, a NUL) are put before each piece of literal text on its line, and before each expression; what was
  rendered is cut at the marks again, and so each column of each line knows its original place. NUL can be
  in no YAML text, and values that have one are refused.
- What a macro, ``call``, ``filter`` or ``set`` block captures is a value to the rest of the template, so it
  gets no marks: it stands where it is used.
- ``root_render_func`` raises the exception itself; the frames of template code have the file name
  ``<template>``, and the template knows which of its lines each belongs to.
- The sandbox bounds ``range`` but not repetition (``'a' * n``) and powers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from xtool.config.nodes import MAX_TEXT, Mark, Segment, Source, parse_yaml
from xtool.config.problems import did_you_mean
from xtool.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.sandbox import SandboxedEnvironment

_MARK = "\0"
_SYNTAX_HINT = "to write {{ or {% themselves: {{ '{{' }}, or {% raw %} around them"


class Rendered(NamedTuple):
    """The YAML text, and the segments of each of its lines."""

    text: str
    places: list[list[Segment]]


def is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def variables(sets: Mapping[str, str], files: Sequence[tuple[Source, str]]) -> dict[str, Any]:
    """The variables of a template: later ``files`` (YAML maps) win over earlier ones, ``sets`` over all, and
    ``env`` is the environment. Raises ``ConfigError``."""
    found: dict[str, Any] = {}
    for source, text in files:
        found |= _from_file(source, text)
    found |= {name: _typed(value) for name, value in sets.items()}
    return {**found, "env": dict(os.environ)}


def _from_file(source: Source, text: str) -> dict[str, Any]:
    import yaml

    root = parse_yaml(source, text)  # the checks; nothing deep or circular gets past it
    if root is None:
        return {}
    if root.KIND != "a map of keys":
        raise root.mark.problem("a file of variables is a map", "write lines such as bridge: xenbr0")
    try:
        plain = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise root.mark.problem(f"not valid YAML: {error}") from None
    if "env" in plain:
        raise root.mark.problem("env is the environment and cannot be a variable", "use another name")
    return {str(name): value for name, value in plain.items()}


def _typed(text: str) -> Any:
    """A word of the command line: a number or switch where it looks like one, YAML where it begins so."""
    if text[:1] in ("[", "{", '"', "'"):
        source = Source("--set", text, role="--set")
        return _from_file(source, f"value: {text}")["value"]
    if text in ("true", "false"):
        return text == "true"
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 19 else text


def names_used(text: str) -> frozenset[str]:
    """The variables a template asks for; none if it is no template or does not parse."""
    if not is_template(text):
        return frozenset()
    from jinja2 import TemplateSyntaxError, meta

    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(text)))
    except TemplateSyntaxError:
        return frozenset()


def render(source: Source, text: str, values: Mapping[str, Any]) -> Rendered:
    """Raises ``ConfigError`` with the place in ``text``: for its syntax, for a variable that is not defined,
    and for anything else that goes wrong while it is rendered."""
    from jinja2 import TemplateSyntaxError, UndefinedError

    environment = _environment()
    if _MARK in text:
        line = text[: text.index(_MARK)].count("\n") + 1
        raise Mark(source, line, 1).problem("the character U+0000 is not allowed in YAML")
    try:
        tree = environment.parse(text)
    except TemplateSyntaxError as error:
        raise Mark(source, error.lineno, 1).problem(f"jinja2: {error.message}", _SYNTAX_HINT) from None
    except RecursionError:
        raise Mark(source, 1, 1).problem("jinja2: nested too deeply") from None
    _Marker(text).walk(tree)
    template = environment.from_string(tree)
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.root_render_func(template.new_context(dict(values))):
            pieces.append(piece)
            size += len(piece)
            if size > 8 * MAX_TEXT:
                raise Mark(source, 1, 1).problem("jinja2: this renders to more than a domain file may be")
    except ConfigError:
        raise
    except UndefinedError as error:
        message = str(error.message or "a value is not defined")
        name = message.split("'")[1] if message.startswith("'") and message.count("'") > 1 else ""
        hint = (name and did_you_mean(name, values)) or "give it: --set NAME=VALUE, or --vars-file"
        raise _where(source, template, error).problem(f"jinja2: {message}", hint) from None
    except Exception as error:  # whatever an expression can raise: the file is wrong, not we
        text_of = str(error) or type(error).__name__
        raise _where(source, template, error).problem(f"jinja2: {text_of}") from None
    return _cut("".join(pieces))


def _where(source: Source, template: Any, error: BaseException) -> Mark:
    line = 1
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = int(template.get_corresponding_lineno(frame.tb_lineno))
        frame = frame.tb_next
    shown = source.line(line) or ""
    return Mark(source, line, max(shown.find("{{"), shown.find("{%"), 0) + 1)


class _Marker:
    """Puts marks into a syntax tree, walking it in the order of the text."""

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n").replace("\r", "\n")
        self._starts = [0]
        for line in self._text.split("\n"):
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._at = 0

    def walk(self, node: nodes.Node) -> None:
        from jinja2 import nodes

        if isinstance(node, (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)):
            return
        if isinstance(node, nodes.Output):
            node.nodes = list(self._marked(node))
            return
        for child in node.iter_child_nodes():
            self.walk(child)

    def _marked(self, output: nodes.Output) -> Iterator[nodes.Expr]:
        from jinja2 import nodes

        for child in output.nodes:
            if not isinstance(child, nodes.TemplateData):
                line, column = self._find("{{", child.lineno)
                yield nodes.TemplateData(f"{_MARK}{line},{column},1{_MARK}", lineno=child.lineno)
                yield child
                continue
            line, column = self._find(child.data, child.lineno)
            self._at += len(child.data)
            parts = []
            for number, piece in enumerate(child.data.split("\n")):
                parts.append(f"{_MARK}{line + number},{1 if number else column},0{_MARK}{piece}")
            yield nodes.TemplateData("\n".join(parts), lineno=child.lineno)

    def _find(self, piece: str, line: int) -> tuple[int, int]:
        """Line and column of the next ``piece``, which stands on that line."""
        start = self._starts[min(line, len(self._starts) - 1) - 1]
        found = self._text.find(piece, max(self._at, start))
        if found < 0 or found >= self._starts[min(line, len(self._starts) - 1)]:
            found = start
        self._at = found
        return line, found - start + 1


def _cut(text: str) -> Rendered:
    """Take the marks out again."""
    head, *rest = text.split(_MARK)
    out: list[str] = [head]
    places: list[list[Segment]] = [[] for _ in head.split("\n")]
    column = len(head) - head.rfind("\n")
    for mark, piece in zip(rest[::2], rest[1::2], strict=True):
        line, original, fixed = map(int, mark.split(","))
        places[-1].append(Segment(column, line, original, bool(fixed)))
        out.append(piece)
        if "\n" not in piece:
            column += len(piece)
            continue
        # Lines that an expression made all stand where it stands; other lines begin with a mark.
        places.extend([Segment(1, line, original, True)] for _ in range(piece.count("\n")))
        column = len(piece) - piece.rfind("\n")
    return Rendered("".join(out), places)


@cache
def _environment() -> SandboxedEnvironment:
    from jinja2 import StrictUndefined
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and (abs(right) > 64 or abs(left) > 1 << 64):
                raise SecurityError("this power is too large")
            if operator == "*":
                for one, other in ((left, right), (right, left)):
                    if hasattr(one, "__len__") and len(one) * int(other) > MAX_TEXT:
                        raise SecurityError("this repeats a value too often")
            return super().call_binop(context, operator, left, right)

    return Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_final,
    )


def _final(value: Any) -> Any:
    """How a value stands in YAML: switches in lower case, lists and maps as JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, (list, tuple, dict)):
        import json

        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and _MARK in value:
        raise ValueError("a value has the character U+0000")
    return value
