"""Man pages in man(7), out of what ``manual`` reads; ``scripts/man`` writes them.

Facts: a line that begins with a dot or an apostrophe is a request, so ``\\&`` stands before it; ``\\-`` is
the dash that can be copied into a shell, and a backslash is ``\\e``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xtool import __version__
from xtool.cli.manual import Command, Parameter, usage, verbs

SECTION = 1
GLOBALS = (
    (
        "-H TARGET",
        "carry the verb out on another host: lab, lab:NAME or ssh://user@host",
    ),
    ("-v", "tell more, and show tracebacks of bugs"),
    ("--version", "show the version"),
    ("-h, --help", "show the verbs; after a verb, what it takes"),
)


def write_all(folder: Path) -> list[Path]:
    """``xtool.1`` and one page per verb (``xtool-VERB.1``); the files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = verbs()
    pages = {"xtool.1": overview(found)}
    for one in found:
        if len(one.words) == 1:
            below = [other for other in found if other.words[0] == one.words[0] and len(other.words) == 2]
            pages[f"xtool-{one.words[0]}.1"] = page(one, below)
    for name, text in pages.items():
        (folder / name).write_text(text)
    return [folder / name for name in pages]


def overview(found: list[Command]) -> str:
    lines = [_title("xtool"), ".SH NAME", "xtool \\- builds and runs Xen domains", ".SH SYNOPSIS"]
    lines += [".B xtool", _text("[-H TARGET] [-v] VERB [ARGUMENTS]..."), ".SH DESCRIPTION"]
    lines.append(_text("A toolstack for the Xen hypervisor: its own domain builder, its own backends."))
    lines.append(_text("A verb may be shortened as long as it is unambiguous."))
    lines.append(".SH VERBS")
    for one in found:
        if len(one.words) == 1:
            lines += [".TP", f".BR xtool\\-{_text(one.words[0])} (1)", _text(one.summary)]
    lines.append(".SH OPTIONS")
    for name, text in GLOBALS:
        lines += [".TP", f".B {_text(name)}", _text(text)]
    lines += [
        ".SH EXIT STATUS",
        _text("0 when it did what it was asked; docs/exit-codes.md lists the others."),
    ]
    return "\n".join(lines) + "\n"


def page(one: Command, below: list[Command]) -> str:
    verb = one.words[0]
    summary = one.summary.rstrip(".")
    lines = [_title(f"xtool-{verb}"), ".SH NAME", f"xtool\\-{_text(verb)} \\- {_text(summary)}"]
    lines += [".SH SYNOPSIS", f".B xtool {_text(usage(one))}"]
    for other in below:
        lines += [".br", f".B xtool {_text(usage(other))}"]
    lines.append(".SH DESCRIPTION")
    for number, paragraph in enumerate(one.text or (one.summary,)):
        lines += [*([".PP"] if number else []), _text(paragraph)]
    lines += _parameters(one)
    for other in below:
        lines += [f".SH COMMAND: {_text(other.words[1]).upper()}"]
        for number, paragraph in enumerate(other.text):
            lines += [*([".PP"] if number else []), _text(paragraph)]
        lines += _parameters(other, ".SS")
    examples = [*one.examples, *(line for other in below for line in other.examples)]
    if examples:
        lines += [".SH EXAMPLES", ".EX", *(_text(line) for line in examples), ".EE"]
    lines += [".SH SEE ALSO", ".BR xtool (1)"]
    return "\n".join(lines) + "\n"


def _parameters(one: Command, heading: str = ".SH") -> Iterator[str]:
    for title, listed in (("ARGUMENTS", one.arguments), ("OPTIONS", one.options)):
        if listed:
            yield f"{heading} {title}"
        for parameter in listed:
            yield ".TP"
            yield f".B {_text(_names(parameter))}"
            yield _text(_about(parameter))


def _names(parameter: Parameter) -> str:
    if not parameter.option:
        return parameter.metavar
    value = "" if parameter.flag else f" {parameter.metavar}"
    return ", ".join(parameter.names) + value


def _about(parameter: Parameter) -> str:
    text = parameter.help or "."
    return f"{text} Default: {parameter.default}." if parameter.default else text


def _title(name: str) -> str:
    return f'.TH {_text(name.upper())} {SECTION} "" "xtool {_text(__version__)}" "xtool"'


def _text(text: str) -> str:
    """Text that roff takes for text."""
    made = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    made = made.replace("~", "\\(ti").replace("^", "\\(ha")
    return f"\\&{made}" if made[:1] in (".", "'") else made
