"""All that is wrong with one domain file, at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xtool.errors import ConfigError


class ConfigErrors(ConfigError):
    """Several problems of one file. It reads as the first of them; ``problems`` has each."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        first = problems[0]
        super().__init__(
            first.message,
            file=first.file,
            line=first.line,
            column=first.column,
            source=first.source,
            hint=first.hint,
            key=first.key,
        )
        self.problems = tuple(problems)


def problems_of(error: ConfigError) -> tuple[ConfigError, ...]:
    """The single problems of ``error``: itself, or what it collects."""
    return error.problems if isinstance(error, ConfigErrors) else (error,)


def raise_problems(problems: Sequence[ConfigError]) -> None:
    """Raise what was collected: nothing, the one ``ConfigError``, or a ``ConfigErrors`` in file order."""
    if problems:
        raise collected(problems)


def collected(problems: Sequence[ConfigError]) -> ConfigError:
    """At least one problem as one error: itself, or a ``ConfigErrors`` in file order."""
    if len(problems) == 1:
        return problems[0]
    files = [problem.file for problem in problems]
    return ConfigErrors(sorted(problems, key=lambda p: (files.index(p.file), p.line, p.column)))


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The hint ``did you mean X?`` if ``word`` is close to one of ``known``."""
    close = close_word(word, known)
    return f"did you mean {close}?" if close else None


def close_word(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``word`` is probably a misspelling of."""
    import difflib  # only ever needed on the way to an error

    close = difflib.get_close_matches(word[:100].lower(), list(known), n=1, cutoff=0.6)
    return close[0] if close else None
