"""What each verb takes, read from Typer's own parameters: for man pages and for the shells' completion.

``verbs()`` imports every verb's module, which is slow: it is for ``scripts/man`` and ``xtool completion``,
whose results are files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xtool.cli.app import VERBS, command_of


@dataclass(frozen=True)
class Parameter:
    """An option (``names`` begin with dashes) or an argument. ``values``: what it takes, when that is a
    choice; ``kind``: ``domain``, ``file``, ``vdev``, ``device``, ``setting``, or empty."""

    names: tuple[str, ...]
    metavar: str
    help: str
    flag: bool
    required: bool
    multiple: bool
    values: tuple[str, ...]
    kind: str
    default: str = ""

    @property
    def option(self) -> bool:
        return self.names[0].startswith("-")


@dataclass(frozen=True)
class Command:
    """A verb, or a verb of a sub-app (``words`` are two then). ``text`` is its help without the examples."""

    words: tuple[str, ...]
    summary: str
    text: tuple[str, ...]
    examples: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    subcommands: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.option)

    @property
    def arguments(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if not p.option)


def verbs() -> list[Command]:
    """Every verb, sub-apps' verbs behind their app."""
    found: list[Command] = []
    for verb, known in VERBS.items():
        found += _commands(verb, known.summary, command_of(verb))
    return found


def command(words: tuple[str, ...]) -> Command:
    """One of them. Raises ``KeyError``."""
    for one in _commands(words[0], VERBS[words[0]].summary, command_of(words[0])):
        if one.words == words:
            return one
    raise KeyError(words)


def _commands(verb: str, summary: str, made: Any) -> Iterator[Command]:
    below = getattr(made, "commands", {})
    # An app without a callback of its own takes nothing; what Typer adds to it is not ours to tell.
    yield _command((verb,), summary, made, tuple(below))
    for name, one in below.items():
        text = _paragraphs(one.help or "")[0]
        first = text[0] if text else ""
        yield _command((verb, name), first, one, ())


def _command(words: tuple[str, ...], summary: str, made: Any, below: tuple[str, ...]) -> Command:
    text, examples = _paragraphs(made.help or "")
    parameters = tuple(_parameter(param) for param in made.params if not getattr(param, "hidden", False))
    return Command(words, summary, text, examples, parameters, below)


def _paragraphs(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(paragraphs, examples) of a docstring: what follows ``Examples:`` is one example a line."""
    before, *rest = re.split(r"(?mi)^examples:[ ]*$", text.replace("\b\n", ""), maxsplit=1)
    after = "\n".join(rest)
    paragraphs = tuple(" ".join(part.split()) for part in before.split("\n\n") if part.strip())
    return paragraphs, tuple(line.strip() for line in after.splitlines() if line.strip())


_CHOICE = re.compile(r"[a-z0-9-]+(\|[a-z0-9-]+)+")
_DOMAIN = re.compile(r"\[?DOMAIN\]?(\.\.\.)?")
_FILE = re.compile(r"\[?(FILE|TARGET|PATH)\]?")


def _parameter(param: Any) -> Parameter:
    argument = param.param_type_name == "argument"
    metavar = str(param.metavar or "")
    if not metavar and not getattr(param, "is_flag", False):
        metavar = param.type.name.upper() if not argument else str(param.name).upper()
    values = tuple(metavar.split("|")) if _CHOICE.fullmatch(metavar) else ()
    kind = "domain" if _DOMAIN.fullmatch(metavar) else "file" if _FILE.fullmatch(metavar) else ""
    others = {"VDEV": "vdev", "DEVICE": "device", "KEY=VALUE": "setting", "KEY=VALUE...": "setting"}
    kind = others.get(metavar, kind)
    names = (str(param.name),) if argument else (*param.opts, *param.secondary_opts)
    default = param.default if not callable(param.default) else None
    shown = "" if argument or default in (None, False, "", ()) or param.is_flag else str(default)
    return Parameter(
        names,
        metavar,
        str(getattr(param, "help", "") or ""),
        bool(getattr(param, "is_flag", False)),
        bool(param.required),
        param.nargs == -1 or bool(getattr(param, "multiple", False)),
        values,
        kind,
        shown,
    )


def usage(one: Command) -> str:
    """``block-attach [OPTION]... DOMAIN SPEC...``."""
    words = [*one.words]
    if one.options:
        words.append("[OPTION]...")
    words += [argument.metavar for argument in one.arguments]
    if one.subcommands:
        words.append("[COMMAND]")
    return " ".join(words)
