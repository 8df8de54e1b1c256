"""xl.cfg text to settings. Pure; knows the grammar, not the keys.

Facts about the grammar (xl's lexer and parser, ``libxlu_cfg_l.l`` and ``_y.y``):

- A setting is ``name = value`` or ``name += value``; a line's end or ``;`` ends it, and may stand alone.
  Names begin with a lower-case letter and go on with those, digits, ``.`` and ``_``.
- A value is a string, a number word (a digit, then digits, ``a`` to ``f`` and ``x``) or a list in brackets.
  Lists hold values, lists too; a comma may stand at their end, and lines may end after ``[``, a value or a
  comma.
- Strings have either quote and one line. ``\\`` escapes quotes and itself and makes ``\\a \\b \\f \\n \\r \\t
  \\v``; any other character after it is an error. Numeric escapes are in the lexer but put nothing into the
  string, or fail: they are refused here.
- ``#`` begins a comment; xl wants a line's end after one (here the end of the file will do).
- Of a name given twice the last counts; ``+=`` puts strings together, and lists.
- A carriage return is no white space: files with Windows' line ends are errors.
- Numbers are texts until somebody asks for one: C's ``strtol`` with base 0, so ``010`` is eight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from xtool.config.nodes import ListNode, Mark, Node, Scalar, ScalarNode, Source
from xtool.errors import ConfigError

MAX_DEPTH = 8
_TOKEN = re.compile(
    r"""(?P<space>[ \t]+)|(?P<newline>\n|\#[^\n]*(?:\n|\Z))
    |(?P<name>[a-z][._0-9a-z]*)|(?P<number>[0-9][0-9a-fx]*)
    |(?P<add>\+=)|(?P<punctuation>[,\[\]=;])|(?P<string>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")""",
    re.VERBOSE,
)
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_ESCAPE = re.compile(r"\\(.)")
_NUMBER = re.compile(r"[ \t]*([+-]?)(?:0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9][0-9]*))")


class Token(NamedTuple):
    kind: str
    text: str
    mark: Mark


class Setting(NamedTuple):
    """One setting, those added to it with ``+=`` included; ``repeated``: an earlier one lost to it."""

    name: str
    mark: Mark
    value: Node
    repeated: Mark | None = None


def to_long(text: str) -> int | None:
    """What ``strtol`` with base 0 makes of the whole text, None if it is no number."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, sixteen, eight, ten = match.groups()
    digits, base = (sixteen, 16) if sixteen else (ten, 10) if ten else (eight or "0", 8)
    value = int(digits, base) * (-1 if sign == "-" else 1)
    return value if -(1 << 63) <= value < 1 << 63 else None


def parse_xlcfg(source: Source, text: str) -> tuple[list[Setting], list[ConfigError]]:
    """The settings in order of their (last) names, and what is no xl.cfg; after an error, the parser goes on
    with the next line, as xl's does."""
    return _Parser(source, text).parse()


class _Parser:
    def __init__(self, source: Source, text: str) -> None:
        self._tokens = list(_tokens(source, text))
        self._at = 0
        self._settings: dict[str, Setting] = {}
        self._errors: list[ConfigError] = []

    def parse(self) -> tuple[list[Setting], list[ConfigError]]:
        while self._next.kind != "end":
            try:
                if not self._take("newline", ";"):
                    self._assignment()
            except ConfigError as error:
                self._errors.append(error)
                while self._next.kind not in ("newline", "end"):
                    self._at += 1
        return list(self._settings.values()), self._errors

    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    def _take(self, *kinds: str) -> Token | None:
        token = self._next
        if token.kind not in kinds:
            return None
        self._at += 1
        return token

    def _assignment(self) -> None:
        name = self._take("name")
        if name is None:
            raise self._unexpected("a name is wanted here", "as in: memory = 512")
        operator = self._take("=", "+=")
        if operator is None:
            raise self._unexpected(f"= is wanted after {name.text}")
        value = self._value(0)
        if self._next.kind not in ("newline", ";", "end"):
            raise self._unexpected("the line should end here", "texts need quotes")
        self._store(name, operator.kind, value)

    def _store(self, name: Token, operator: str, value: Node) -> None:
        before = self._settings.pop(name.text, None)
        if before is None:
            self._settings[name.text] = Setting(name.text, name.mark, value)
        elif operator == "=":
            self._settings[name.text] = Setting(name.text, name.mark, value, before.mark)
        elif isinstance(before.value, ListNode) and isinstance(value, ListNode):
            whole = ListNode(before.value.mark, [*before.value.items, *value.items])
            self._settings[name.text] = Setting(name.text, before.mark, whole, before.repeated)
        elif isinstance(before.value, ScalarNode) and isinstance(value, ScalarNode):
            joined = ScalarNode(before.value.mark, Scalar(before.value.value + value.value, True))
            self._settings[name.text] = Setting(name.text, before.mark, joined, before.repeated)
        else:
            self._settings[name.text] = before
            raise name.mark.problem(f"{name.text}: a list cannot be added to a text, nor a text to a list")

    def _value(self, depth: int) -> Node:
        token = self._take("string", "number")
        if token is not None:
            verbatim = token.kind == "number" or "\\" not in token.text
            text = _dequote(token) if token.kind == "string" else token.text
            return ScalarNode(token.mark, Scalar(text, token.kind == "string"), verbatim)
        opening = self._take("[")
        if opening is None:
            raise self._unexpected("a value is wanted here", 'texts need quotes: name = "web"')
        if depth >= MAX_DEPTH:
            raise opening.mark.problem("nested too deeply")
        items: list[Node] = []
        self._lines()
        while not self._take("]"):
            items.append(self._value(depth + 1))
            self._lines()
            comma = self._take(",")
            self._lines()
            if comma is None and self._next.kind != "]":
                raise self._unexpected("a comma or ] is wanted here", "a list ends with ]")
        return ListNode(opening.mark, items)

    def _lines(self) -> None:
        while self._take("newline"):
            pass

    def _unexpected(self, message: str, hint: str | None = None) -> ConfigError:
        token = self._next
        if token.kind == "bad":
            return token.mark.problem(token.text)
        got = "the end of the file" if token.kind == "end" else "the end of the line"
        got = got if token.kind in ("end", "newline") else repr(token.text[:30])
        return token.mark.problem(f"{message}, not {got}", hint)


def _tokens(source: Source, text: str) -> Iterator[Token]:
    at, line, start = 0, 1, 0
    while at < len(text):
        mark = Mark(source, line, at - start + 1)
        match = _TOKEN.match(text, at)
        if match is None:
            yield Token("bad", _complaint(text[at], text, at), mark)
            at += 1
            while at < len(text) and text[at] != "\n":  # as xl: the rest of the line is lost
                at += 1
            continue
        kind, word = str(match.lastgroup), match[0]
        at = match.end()
        if kind == "newline":
            yield Token("newline", word, mark)
            line, start = line + 1, at
        elif kind == "add":
            yield Token("+=", word, mark)
        elif kind != "space":
            yield Token(word if kind == "punctuation" else kind, word, mark)
    yield Token("end", "", Mark(source, line, at - start + 1))


def _complaint(char: str, text: str, at: int) -> str:
    if char == "\r":
        return "a carriage return: xl does not read files with Windows' line ends"
    if char in "'\"":
        return "this text has no end on its line"
    if char.isupper():
        return "names are in lower case, and texts need quotes"
    if char in "+-.():":
        return f"{char!r} cannot stand here: xl.cfg looks like Python, but is not; texts need quotes"
    return f"the character {char!a} cannot stand here"


def _dequote(token: Token) -> str:
    def one(match: re.Match[str]) -> str:
        char = match[1]
        if char in "\"'\\":
            return char
        if char in _ESCAPES:
            return _ESCAPES[char]
        what = "numeric escapes do not work in xl.cfg" if char in "x01234567" else f"\\{char} is no escape"
        raise token.mark.problem(f"{what}", "write the character itself; a backslash is \\\\")

    return _ESCAPE.sub(one, token.text[1:-1])
