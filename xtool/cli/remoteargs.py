"""Command lines that are carried out on another host: what of them stays on this one."""

from __future__ import annotations

import secrets

#: Verbs whose first argument is a domain file.
FILE_VERBS = ("create", "check")
#: Options of those verbs that take a value.
_VALUE_OPTIONS = ("--set", "-o", "--output", "--trace", "--trace-format", "--trace-wait")
#: Options that are used up here, where the file is read.
HERE_OPTIONS = ("--vars-file", "--only")


def split_file(argv: list[str]) -> tuple[str | None, list[str], list[str]]:
    """(domain file, ``--set`` values, the other arguments) of a file verb's command line."""
    file: str | None = None
    overrides: list[str] = []
    rest = [argv[0]]
    words = iter(argv[1:])
    for word in words:
        if word == "--":
            file = next(words, file)
            rest += words
        elif word == "--set":
            overrides += [value for value in (next(words, None),) if value is not None]
        elif word.startswith("--set="):
            overrides.append(word[6:])
        elif word in _VALUE_OPTIONS:
            rest += [word, *(value for value in (next(words, None),) if value is not None)]
        elif word.startswith("-") or file is not None:
            rest.append(word)
        else:
            file = word
    return file, overrides, rest


def take_options(argv: list[str], names: tuple[str, ...]) -> tuple[dict[str, list[str]], list[str]]:
    """The values of these options, and the command line without them."""
    taken: dict[str, list[str]] = {name: [] for name in names}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *words]
        elif word in names:
            taken[word] += [value for value in (next(words, None),) if value is not None]
        elif equals and name in names:
            taken[name].append(value)
        else:
            rest.append(word)
            if word in _VALUE_OPTIONS:
                rest += [value for value in (next(words, None),) if value is not None]
    return taken, rest


def split_trace(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The same command line with the file of ``--trace`` in a place of the other host's, and which file here
    it is for."""
    rest: list[str] = []
    files: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        here = next(words, None) if word == "--trace" else word[8:] if word.startswith("--trace=") else None
        if here is None:
            rest.append(word)
            continue
        # The name's end says the format.
        kind = ".otlp" if here.endswith((".otlp", ".otlp.json")) else ".json"
        there = f"/tmp/xtool-trace-{secrets.token_hex(8)}{kind}"
        files.append((there, here))
        rest += ["--trace", there]
    return rest, files
