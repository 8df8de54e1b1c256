"""``xtool completion SHELL``: a script for bash, zsh or fish, made from the verbs' own parameters.

Verbs, options and their values stand in the script. Only names of domains and devices are asked for at
each Tab, by ``xtool __complete``, which imports next to nothing; ``-H TARGET`` before the verb is handed on.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from xtool.cli.manual import Command, Parameter, verbs
from xtool.cli.output import write
from xtool.errors import UsageError

SHELLS = ("bash", "zsh", "fish")
#: Options before the verb.
GLOBALS = {
    "-H": "carry the verb out on another host",
    "--host": "carry the verb out on another host",
    "-v": "tell more",
    "--verbose": "tell more",
    "--version": "show the version",
    "--help": "show the verbs",
}
_HOSTS = ("lab", "ssh://")
#: What ``__complete`` is asked for, by the kind of a parameter.
_ASKED = {"domain": "domains", "vdev": "vdevs", "device": "devices"}


def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="Which shell.", show_default=False)],
) -> None:
    """Print a shell's completion script: verbs, options, domains, devices, files.

    \b
    Examples:
      xtool completion bash > /etc/bash_completion.d/xtool
      xtool completion fish > ~/.config/fish/completions/xtool.fish
    """
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shell!r}", hint=f"the shells are {', '.join(SHELLS)}")
    write(script(shell))


def script(shell: str) -> str:
    """The script's text."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](verbs())


def settings() -> tuple[str, ...]:
    """Keys of a domain file, as ``KEY=``."""
    from xtool.config.model import FIELDS

    return tuple(f"{key}=" for key in FIELDS)


def source(parameter: Parameter) -> str:
    """What completes it: ``@domains``, ``@files``, ``@settings``, words, or nothing."""
    if parameter.values:
        return " ".join(parameter.values)
    if parameter.kind in _ASKED:
        return f"@{_ASKED[parameter.kind]}"
    return {"file": "@files", "setting": "@settings"}.get(parameter.kind, "")


def _names(option: Parameter) -> Iterator[str]:
    yield from option.names


def _arguments(one: Command) -> list[str]:
    """What completes each argument in turn; the last one stands for those that follow if it takes several."""
    found = [source(argument) for argument in one.arguments]
    if one.arguments and one.arguments[-1].multiple:
        found.append("...")
    return found


# --- bash -----------------------------------------------------------------------------------------------
def _bash(found: list[Command]) -> str:
    options, values, arguments, below = {}, {}, {}, {}
    for one in found:
        name = " ".join(one.words)
        options[name] = " ".join(word for option in one.options for word in option.names) + " --help"
        for option in one.options:
            values.update({f"{name} {word}": source(option) for word in option.names if not option.flag})
        arguments[name] = "\n".join(kind or "-" for kind in _arguments(one))
        below[name] = " ".join(one.subcommands)
    return _filled(
        "bash",
        VERBS=shlex.quote(" ".join(one.words[0] for one in found if len(one.words) == 1)),
        GLOBALS=shlex.quote(" ".join(GLOBALS)),
        SETTINGS=shlex.quote(" ".join(settings())),
        HOSTS=shlex.quote(" ".join(_HOSTS)),
        OPTIONS=_table(options),
        VALUES=_table(values),
        ARGUMENTS=_table(arguments),
        BELOW=_table(below),
    )


def _table(values: dict[str, str]) -> str:
    rows = (f"\n    [{shlex.quote(key)}]={_ansi(value)}" for key, value in values.items() if value)
    empty = (f"\n    [{shlex.quote(key)}]=''" for key, value in values.items() if not value)
    return "".join((*rows, *empty)) + "\n"


def _ansi(text: str) -> str:
    return shlex.quote(text) if "\n" not in text else "$'" + text.replace("\n", "\\n") + "'"


def _filled(shell: str, **parts: str) -> str:
    """The shell's own part, from ``shells/``, with ``@NAME@`` replaced."""
    text = (Path(__file__).parent / "shells" / f"completion.{shell}").read_text()
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text.rstrip("\n")


# --- zsh ------------------------------------------------------------------------------------------------
def _zsh(found: list[Command]) -> str:
    names = [one for one in found if len(one.words) == 1]
    cases = []
    for one in names:
        below = [other for other in found if other.words[0] == one.words[0] and len(other.words) == 2]
        cases.append(f"    ({one.words[0]})\n{_zsh_case(one, below)}\n        ;;")
    return _filled(
        "zsh",
        VERBS=" ".join(shlex.quote(f"{one.words[0]}:{_plain(one.summary)}") for one in names),
        SETTINGS=" ".join(settings()),
        HOSTS=" ".join(_HOSTS),
        CASES="\n".join(cases),
    )


def _zsh_case(one: Command, below: Iterable[Command]) -> str:
    if not one.subcommands:
        return "        " + _zsh_arguments(one)
    words = " ".join(shlex.quote(f"{other.words[1]}:{_plain(other.summary)}") for other in below)
    lines = [f"        local -a below; below=({words})"]
    lines.append("        if (( CURRENT == 2 )) && [[ $words[2] != -* ]]; then")
    lines.append(f"            _describe -t commands command below; {_zsh_arguments(one)}; return")
    lines.append("        fi")
    lines.append("        shift words; (( CURRENT-- ))")
    lines.append("        case $words[1] in")
    for other in below:
        lines.append(f"        ({other.words[1]}) {_zsh_arguments(other)} ;;")
    lines.append("        esac")
    return "\n".join(lines)


def _zsh_arguments(one: Command) -> str:
    specs = []
    for option in one.options:
        for name in option.names:
            value = "" if option.flag else f":{_plain(option.metavar)}:{_zsh_action(option)}"
            specs.append(shlex.quote(f"*{name}[{_plain(option.help)}]{value}"))
    for number, argument in enumerate(one.arguments, 1):
        where = "*" if argument.multiple else str(number)
        specs.append(shlex.quote(f"{where}:{_plain(argument.metavar)}:{_zsh_action(argument)}"))
    return " ".join(["_arguments", *specs, "'--help[show what it takes]'"])


def _zsh_action(parameter: Parameter) -> str:
    kind = source(parameter)
    if not kind:
        return " "
    if kind == "@files":
        return "_files"
    return f"_xtool_{kind[1:]}" if kind.startswith("@") else f"({kind})"


def _plain(text: str) -> str:
    """Without what ``_arguments`` takes for its own."""
    return "".join(" " if c in ":[]'\"\\`$" else c for c in text)


# --- fish -----------------------------------------------------------------------------------------------
def _fish(found: list[Command]) -> str:
    lines = []
    valued = []
    for one in found:
        at = " ".join(one.words)
        if len(one.words) == 1:
            lines.append(_fish_line("not __xtool_words", f"-a {one.words[0]}", one.summary))
        else:
            where = f"__xtool_argument 1 1 {one.words[0]}"
            lines.append(_fish_line(where, f"-a {one.words[1]}", one.summary))
        for option in one.options:
            flags = " ".join(_fish_flag(name) for name in option.names)
            value = "" if option.flag else _fish_value(source(option))
            lines.append(_fish_line(f"__xtool_at {at}", f"{flags}{value}", option.help))
            valued += [f"{one.words[0]} {name}" for name in option.names if not option.flag]
        for number, argument in enumerate(one.arguments, 1):
            value = _fish_value(source(argument)).removeprefix(" -x")
            if value.strip() and value.strip() != "-r":
                last = 99 if argument.multiple else number
                lines.append(_fish_line(f"__xtool_argument {number} {last} {at}", value.strip(), ""))
            elif source(argument) == "@files":
                lines.append(_fish_line(f"__xtool_argument {number} {number} {at}", "-F", ""))
    return _filled(
        "fish",
        VERBS=" ".join(one.words[0] for one in found if len(one.words) == 1),
        VALUED=" ".join(shlex.quote(word) for word in dict.fromkeys(valued)),
        HOSTS=" ".join(_HOSTS),
        LINES="\n".join(lines),
    )


def _fish_flag(name: str) -> str:
    if name.startswith("--"):
        return f"-l {name[2:]}"
    return f"-s {name[1:]}" if len(name) == 2 else f"-o {name[1:]}"


def _fish_value(kind: str) -> str:
    if kind == "@files":
        return " -r"
    if kind == "@settings":
        return f" -x -a {shlex.quote(' '.join(settings()))}"
    if kind.startswith("@"):
        return f" -x -a '(__xtool_ask {kind[1:]})'"
    return f" -x -a {shlex.quote(kind)}" if kind else " -x"


def _fish_line(condition: str, what: str, text: str) -> str:
    words = f" -d {shlex.quote(_plain(text))}" if text else ""
    return f"complete -c xtool -n {shlex.quote(condition)} {what}{words}"
