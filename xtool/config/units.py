"""What a value may look like: sizes, numbers, switches, words, text, paths.

Each function here is a pydantic "before" validator: it takes what stands in the file (``Scalar``), or the
plain value a program hands over, and returns the value or raises ``Refused``. Sizes become bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ValidationInfo
from pydantic_core import PydanticCustomError

from xtool.config.cpus import parse_cpu_list
from xtool.config.problems import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_UNITS = {"": MIB, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_TRUE = frozenset(("1", "true", "yes", "on"))
_FALSE = frozenset(("0", "false", "no", "off"))
MAX_WORDS = 4096
#: A request has up to 1 MiB: with less a guest would wait for one longer than Linux takes for alive.
LEAST_BYTES, MOST_BYTES = 64 * KIB, TIB
MOST_OPS = 10**9
#: VNC's port is 5900 and the display's number.
MAX_DISPLAY = 65535 - 5900


def refused(message: str, hint: str | None = None) -> PydanticCustomError:
    """An error pydantic carries to ``load.py``, which knows where the value stands."""
    return PydanticCustomError("refused", "{message}", {"message": message, "hint": hint})


def knowing(check: F, **known: Any) -> F:
    """``check`` with what it knows of its values, for the JSON Schema: ``choices``, ``bounds``."""
    for name, value in known.items():
        setattr(check, name, value)
    return check


def shown(value: Any) -> str:
    """A value as an error message quotes it."""
    if isinstance(value, dict):
        return "a map of keys"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, str):
        text = value if len(value) <= 60 else value[:57] + "..."
        return ascii(str(text)) if not text.isprintable() else f"'{text}'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_size(value: Any) -> int:
    """``256`` (MiB, as in xl), ``256MiB``, ``2G``... -> bytes; whole MiB only."""
    if isinstance(value, str):
        text = value.strip()
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ").strip()
        word = text[len(digits) :].strip() if digits else text
        unit = _UNITS.get(word.lower())
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 12:
            raise refused(f"{shown(value)} is not a size", "write MiB as a plain number, or 256MiB, 2GiB")
        if unit is None:
            near = {"kb": "KiB", "mb": "MiB", "gb": "GiB", "tb": "TiB", "b": "MiB"}.get(word.lower())
            raise refused(
                f"{shown(value)} has an unknown unit: {word}",
                f"write {near}" if near else "the units are KiB, MiB, GiB, TiB (or K, M, G, T)",
            )
        size = int(digits) * unit
        if size % MIB:
            raise refused(f"{shown(value)} is not a whole number of MiB")
        return size
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise refused(f"{value} is not a size: it is negative")
        return value * MIB
    raise refused(f"a size is wanted, not {shown(value)}", "write MiB as a plain number, or 256MiB, 2GiB")


def to_byte_rate(value: Any) -> int | None:
    """``20MiB``, ``512K``, or a number of bytes -> bytes per second; ``none`` and 0 are no limit: None."""
    text = str(value).strip()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ").strip()
    word = text[len(digits) :].strip().lower()
    if text.lower() == "none":
        return None
    unit = _UNITS.get(word) if word else 1
    if isinstance(value, bool) or not (digits.isascii() and digits.isdigit()) or len(digits) > 15 or not unit:
        raise refused(f"{shown(value)} is not a number of bytes", "write 20MiB, 512KiB, or none")
    return _limit(int(digits) * unit, LEAST_BYTES, MOST_BYTES, "bytes a second", "64KiB to 1TiB, or none")


def to_op_rate(value: Any) -> int | None:
    """A number of operations per second; ``none`` and 0 are no limit: None."""
    if isinstance(value, str) and value.strip().lower() == "none":
        return None
    return _limit(to_int(value), 1, MOST_OPS, "operations a second", f"1 to {MOST_OPS}, or none")


def _limit(rate: int, least: int, most: int, what: str, possible: str) -> int | None:
    if rate and not least <= rate <= most:
        raise refused(f"{rate} {what} is out of range", f"{possible} is possible")
    return rate or None


def to_int(value: Any) -> int:
    """Decimal or ``0x`` hexadecimal."""
    if isinstance(value, str):
        text = value.strip()
        if getattr(value, "quoted", False):
            raise refused(f"a number is wanted, not the text {shown(value)}", "remove the quotes")
        sign, digits = (-1, text[1:]) if text[:1] == "-" else (1, text)
        try:
            if digits.isascii() and digits.isdigit() and len(digits) <= 18:
                return sign * int(digits, 10)
            if digits[:2] == "0x" and digits[2:].isalnum() and len(digits) <= 18:
                return sign * int(digits[2:], 16)
        except ValueError:
            pass
        raise refused(f"a number is wanted, not {shown(value)}")
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise refused(f"a number is wanted, not {shown(value)}")


def to_bool(value: Any) -> bool:
    """YAML's true and false (and their synonyms), or xl's 1 and 0."""
    if isinstance(value, bool):
        return value
    word = str(value).lower() if isinstance(value, (str, int)) else ""
    if getattr(value, "quoted", False) and word in _TRUE | _FALSE:
        raise refused(f"true or false is wanted, not the text {shown(value)}", "remove the quotes")
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise refused(f"true or false is wanted, not {shown(value)}")


def to_text(value: Any) -> str:
    """Any printable text on one line; it must survive the way to C strings and xenstore."""
    if not isinstance(value, str):
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise refused(f"text is wanted, not {shown(value)}")
    text = str.__str__(value)
    for char in text:
        if ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or 0xD800 <= ord(char) < 0xE000:
            raise refused(f"{char!a} is not allowed in text")
    if len(text) > MAX_WORDS:
        raise refused(f"this text is too long: {len(text)} characters, {MAX_WORDS} at most")
    return text


def to_word(value: Any) -> str:
    """Text that is not empty."""
    text = to_text(value)
    if not text.strip():
        raise refused("text is wanted here, it is empty")
    return text


def to_path(value: Any, info: ValidationInfo) -> str:
    """A file of this machine; relative to the domain file's folder (context ``base_dir``), made absolute."""
    path = to_word(value)
    if path.startswith("~"):
        raise refused(f"{shown(path)}: ~ is not expanded here", "write the whole path")
    base = getattr(value, "base", None) or (info.context or {}).get("base_dir") or os.getcwd()
    return os.path.normpath(os.path.join(base, path))


def to_program(value: Any, info: ValidationInfo) -> str:
    """A path if it has a slash, else the name of a program to be looked up."""
    word = to_word(value)
    return to_path(value, info) if "/" in word else word


def to_words(value: Any) -> tuple[str, ...]:
    """A list of texts, or one text alone, as xl takes it."""
    if isinstance(value, str):
        return (to_word(value),)
    if isinstance(value, (list, tuple)):
        return tuple(to_word(item) for item in value)
    raise refused(f"text or a list of texts is wanted, not {shown(value)}")


def to_choice(choices: Sequence[str], later: Sequence[str] = ()) -> Callable[[Any], str]:
    """One of ``choices``; those ``later`` are known to xl and not acted upon by xtool yet."""

    def check(value: Any) -> str:
        word = str.__str__(value) if isinstance(value, str) else shown(value)
        if word in later:
            raise refused(f"xl's {word} is not supported by xtool yet", f"use {', '.join(choices)}")
        if word not in choices:
            hint = did_you_mean(word, choices) or f"use {', '.join(choices)}"
            raise refused(f"{shown(word)} is not one of {', '.join(choices)}", hint)
        return word

    return knowing(check, choices=list(choices))


def to_name(value: Any) -> str:
    """A domain's name: a word for xenstore and the command line, told apart from domain ids and uuids."""
    name = to_word(value)
    if name != name.strip():
        raise refused(f"the name {shown(name)} begins or ends with a space")
    if "/" in name:
        raise refused(
            f"the name {shown(name)} has a slash", "names stand in xenstore paths: use another character"
        )
    if name.isdigit():
        raise refused(f"the name {shown(name)} is a number", "a number means a domain id: add a letter")
    if len(name) == 36 and [len(part) for part in name.split("-")] == [8, 4, 4, 4, 12]:
        raise refused(f"the name {shown(name)} looks like a uuid", "use uuid: for it")
    if len(name.encode()) > 255:
        raise refused("the name is longer than 255 bytes")
    return name


def to_firmware(words: Sequence[str]) -> Callable[[Any, ValidationInfo], str]:
    """One of ``words``, or a path (something with a slash)."""

    def check(value: Any, info: ValidationInfo) -> str:
        word = to_word(value)
        if "/" in word:
            return to_path(value, info)
        return to_choice(words, later=("rombios", "pvgrub32", "pvgrub64"))(word)

    return knowing(check, choices=list(words))


def to_cpus(value: Any) -> str | tuple[str, ...]:
    """One CPU list for all vCPUs, or a list with one for each."""
    if isinstance(value, (list, tuple)):
        return tuple(_cpu_list(item) for item in value)
    return _cpu_list(value)


def to_boot(value: Any) -> str:
    """QEMU's boot order: ``c``, ``d``, ``n``, each once at most."""
    word = to_word(value)
    if set(word) - set("cdn") or len(set(word)) != len(word):
        raise refused(f"{shown(word)} is no boot order", "use c (disk), d (CD), n (network), as in dc")
    return word


def split_listen(text: str) -> tuple[str, int | None]:
    """``address[:display]`` -> both; an IPv6 address with a display stands in brackets."""
    host, colon, display = text.rpartition(":")
    if colon and display.isascii() and display.isdigit() and (":" not in host or host.endswith("]")):
        return host.strip("[]"), int(display[:6])
    return text.strip("[]"), None


def to_listen(value: Any) -> str:
    """An IP address QEMU's VNC server listens on, and maybe a display number."""
    import ipaddress

    text = to_word(value).strip()
    host, display = split_listen(text)
    try:
        if host != "localhost":
            ipaddress.ip_address(host)
    except ValueError:
        raise refused(f"{shown(text)} is no address to listen on", "write 127.0.0.1, or 0.0.0.0:1") from None
    if display is not None and display > MAX_DISPLAY:
        raise refused(f"the display {display} is out of range", f"0 to {MAX_DISPLAY} is possible")
    return text


def _cpu_list(value: Any) -> str:
    text = to_word(value).replace(" ", "")
    if parse_cpu_list(text) is None:
        raise refused(f"{shown(text)} is not a list of CPUs", "write 0-3,^1 or nodes:0 or all")
    return text


def between(low: int, high: int, unit: int = 1, name: str = "") -> Callable[[int], int]:
    """An "after" validator: ``low <= value <= high``; shown in units of ``unit``."""

    def check(value: int) -> int:
        if not low <= value <= high:
            text = f"{value // unit}{name} is out of range"
            raise refused(text, f"{low // unit} to {high // unit}{name} is possible")
        return value

    return knowing(check, bounds=(low, high))


Size = Annotated[int, BeforeValidator(to_size)]
ByteRate = Annotated[int | None, BeforeValidator(to_byte_rate)]
OpRate = Annotated[int | None, BeforeValidator(to_op_rate)]
Int = Annotated[int, BeforeValidator(to_int)]
Bool = Annotated[bool, BeforeValidator(to_bool)]
Text = Annotated[str, BeforeValidator(to_text)]
Word = Annotated[str, BeforeValidator(to_word)]
Path = Annotated[str, BeforeValidator(to_path)]
Program = Annotated[str, BeforeValidator(to_program)]
Words = Annotated[tuple[str, ...], BeforeValidator(to_words)]
