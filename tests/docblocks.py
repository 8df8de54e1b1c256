"""The fenced blocks of the documentation, and the commands in them: for the tests that load and run them.

A block's language is the word behind the fence. ``title="web.yaml"`` behind it is the file the block shows;
blocks further down the page may use it. An HTML comment ``<!-- docs: ... -->`` on the line before the fence
says what cannot be seen from the block:

for ``yaml``
    ``part of a pvh guest``: keys alone; the rest of a guest of that type is added. ``template``: a file that
    others extend. ``variables A=1 B=x``: the values its jinja2 gets. ``not a domain file: WHAT``: only its
    YAML is checked.
for ``sh`` and ``console``
    ``on a host``: every command is carried out, in order, on a host in memory. ``exit status 3``, or
    ``on a host, exit status 20``: what the commands carried out end with. ``output varies``: what a
    ``console`` block shows is not compared.
for ``python``
    ``a script: WHAT``: compiled, not run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^( *)```([^\n`]*)$")
_MARK = re.compile(r"^\s*<!-- docs: (.*?) -->\s*$")
_TITLE = re.compile(r'title="([^"]+)"')
_BREAKS = ("|", "||", "&&", ";", "&", "(", ")")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is where its text begins."""

    page: str
    line: int
    language: str
    title: str
    mark: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One program's words, without redirections; ``output`` is the file its output goes to."""

    words: tuple[str, ...]
    output: str = ""
    piped: bool = False  # its input, or its output, is another program's
    expected: tuple[str, ...] = ()  # what a console block shows behind it
    line: int = 0

    @property
    def ours(self) -> bool:
        return self.words[:1] == ("xtool",)


def pages() -> list[Path]:
    """The pages a reader sees: those of ``docs/`` and of the root."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path) -> list[Block]:
    """A page's blocks. Raises ``AssertionError`` where a fence does not end."""
    found: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    page = str(path.relative_to(ROOT))
    at = 0
    while at < len(lines):
        if not (opened := _FENCE.match(lines[at])):
            at += 1
            continue
        indent, info = opened[1], opened[2].strip()
        end = at + 1
        while end < len(lines) and lines[end].strip() != "```":
            end += 1
        assert end < len(lines), f"{page}:{at + 1}: this fence does not end"
        mark = _MARK.match(lines[at - 1]) if at else None
        title = _TITLE.search(info)
        text = "".join(f"{line.removeprefix(indent)}\n" for line in lines[at + 1 : end])
        language = info.split()[0] if info else ""
        found.append(Block(page, at + 2, language, title[1] if title else "", mark[1] if mark else "", text))
        at = end + 1
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a ``sh`` or ``console`` block. Raises ``ValueError`` where a shell would not."""
    found: list[Command] = []
    for line, text, shown in _logical_lines(block):
        made = list(simple(text, line))
        if made and shown:
            made[-1] = Command(made[-1].words, made[-1].output, made[-1].piped, tuple(shown), line)
        found += made
    return found


def _logical_lines(block: Block) -> Iterator[tuple[int, str, list[str]]]:
    """(line, command, what is shown behind it)."""
    console = block.language == "console"
    lines = block.text.splitlines()
    at = 0
    while at < len(lines):
        text, line = lines[at], block.line + at
        at += 1
        if console:
            if not text.startswith(("$ ", "# ")):
                raise ValueError(f"{block.page}:{line}: a console block begins with a prompt, '$ '")
            text = text[2:]
        while text.endswith("\\"):
            text, at = text[:-1] + " " + lines[at].removeprefix("> "), at + 1
        shown = []
        while console and at < len(lines) and not lines[at].startswith(("$ ", "# ")):
            shown.append(lines[at])
            at += 1
        yield line, text, shown


def simple(text: str, line: int = 0) -> Iterator[Command]:
    """The commands of one line. Raises ``ValueError``."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    output, piped = "", False
    tokens = list(lexer)
    at = 0
    while at <= len(tokens):
        token = tokens[at] if at < len(tokens) else ";"
        at += 1
        if token in (">", ">>", ">&", "<"):
            if words and words[-1] in ("1", "2") and token != "<":
                number = words.pop()
                output = output if number == "2" else tokens[at]
            elif token == ">":
                output = tokens[at]
            at += 1
        elif token in _BREAKS:
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words[:1] == ["sudo"]:
                del words[0]
            if words:
                yield Command(tuple(words), output, piped or token == "|", (), line)
            words, output, piped = [], "", token == "|"
        else:
            words.append(token)


def same(expected: tuple[str, ...], said: str) -> bool:
    """Line by line, however wide the columns; a line ``...`` is any number of lines."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    pattern = ""
    for line in expected:
        if line.strip() == "...":
            pattern += r"(?:.*\n)*"
        elif line.strip():
            pattern += re.escape(" ".join(line.split())) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None
