"""The file of a CPU pool: YAML with xl's keys ``name``, ``sched``, ``cpus`` and ``nodes``; pure.

``cpus`` and ``nodes`` are a text (``0-3,^1``), a number, or a list of either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xtool.config.cpus import parse_cpu_list
from xtool.errors import ConfigError, UsageError

KEYS = ("name", "sched", "cpus", "nodes")


def parse_pool(text: str, file: str = "", overrides: Iterable[str] = ()) -> dict[str, str]:
    """Every key as text, missing ones empty. ``overrides`` are ``KEY=VALUE``, and count more than the file.

    Raises ``ConfigError`` for the file, ``UsageError`` for an override.
    """
    values = _from_file(text, file) if text.strip() else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or key not in KEYS:
            raise UsageError(
                f"{override!r} sets nothing of a CPU pool", hint=f"the keys are {', '.join(KEYS)}"
            )
        values[key] = _yaml(value, override)
    result: dict[str, str] = {}
    for key in KEYS:
        given = values.get(key)
        try:
            result[key] = _word(given) if key in ("name", "sched") else _list(key, given)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}", file=file) from None
    return result


def _from_file(text: str, file: str) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"not YAML: {getattr(error, 'problem', None) or error}",
            file=file,
            line=mark.line + 1 if mark else 0,
            column=mark.column + 1 if mark else 0,
        ) from None
    if not isinstance(loaded, dict):
        raise ConfigError(
            "a CPU pool's file has lines of KEY: VALUE", file=file, hint=f"the keys are {', '.join(KEYS)}"
        )
    for key in loaded:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key!r}", file=file, hint=f"the keys are {', '.join(KEYS)}")
    return loaded


def _yaml(value: str, override: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"{override!r} makes no sense", hint='as in: cpus=1-3, or cpus=["1","3"]') from None


def _word(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"a word is wanted, not {value!r}")


def _list(key: str, value: Any) -> str:
    parts = value if isinstance(value, list) else [] if value is None else [value]
    text = ",".join(_word(part).replace(" ", "") for part in parts)
    if text and parse_cpu_list(text) is None:
        raise ValueError(f"{text!r} is no list of {key}; write 0-3,^1")
    return text
