"""The reference of verbs, ``docs/verbs.md``, out of what ``manual`` reads.

``python -m xtool.cli.verbpage docs/verbs.md`` writes the page; a test compares it, so that it cannot drift
from the verbs themselves.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from xtool.cli.app import LOCAL_ONLY, XEN_ONLY
from xtool.cli.manpages import GLOBALS
from xtool.cli.manual import Command, Parameter, usage, verbs

_HEAD = """# Verbs

Made from the verbs' own help by `scripts/docs write`. `xtool VERB --help` prints the same, and
`scripts/man` makes man pages of it. A verb may be shortened as long as it is unambiguous.
[Exit codes](exit-codes.md) are the same for all.
"""


def page() -> str:
    """The whole page."""
    return "\n".join(_lines(verbs())) + "\n"


def _lines(found: list[Command]) -> Iterator[str]:
    yield _HEAD
    yield "Before the verb:\n"
    yield "| Option | Meaning |"
    yield "|---|---|"
    for name, text in GLOBALS:
        yield f"| `{name}` | {_cell(text)} |"
    yield "\n| Verb | What it does |"
    yield "|---|---|"
    for one in found:
        if len(one.words) == 1:
            yield f"| [`{one.words[0]}`](#{one.words[0]}) | {_cell(one.summary)} |"
    for one in found:
        yield from _command(one)


def _command(one: Command) -> Iterator[str]:
    yield f"\n{'#' * (1 + len(one.words))} {' '.join(one.words)}\n"
    yield f"```text\nxtool {usage(one)}\n```"
    for paragraph in one.text or (one.summary,):
        yield f"\n{_text(paragraph)}"
    if where := _where(one):
        yield f"\n{where}"
    if one.parameters:
        yield "\n| | Meaning | Default |"
        yield "|---|---|---|"
    for parameter in (*one.arguments, *one.options):
        default = f"`{parameter.default}`" if parameter.default else ""
        yield f"| {_names(parameter)} | {_cell(parameter.help)} | {default} |"
    if one.examples:
        yield "\n```sh"
        yield from one.examples
        yield "```"


def _where(one: Command) -> str:
    if len(one.words) > 1:
        return ""
    if one.words[0] in LOCAL_ONLY:
        return "Acts on this machine: `-H` makes no difference."
    return "Needs a Xen host: not by libvirt." if one.words[0] in XEN_ONLY else ""


def _names(parameter: Parameter) -> str:
    value = "" if parameter.flag or not parameter.option else f" {parameter.metavar}"
    names = parameter.names if parameter.option else (parameter.metavar,)
    return _code(", ".join(names) + value)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """Text as Markdown: what would be HTML or emphasis is not."""
    parts = re.split(r"(``?[^`]+``?)", text)
    return "".join(part if at % 2 else re.sub(r"([<*_\[\]])", r"\\\1", part) for at, part in enumerate(parts))


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(page())
