"""``ready:``: how ``apply`` knows that a guest does what it is there for, and ``depends_on:``.

Everything that is given must have come true. What a guest prints is its own: a pattern is no regular
expression, so that no guest can make the matching last.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from xtool.config.units import refused, shown, to_name, to_text, to_word, to_words

SUBKEYS = ("console", "tcp", "xenstore", "timeout")
#: Seconds.
DEFAULT_TIMEOUT = 300.0
_UNITS = {"": 1, "ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600}
_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s*(ms|s|min|m|h|)")
#: A path below the domain's own directory in xenstore, and maybe a value.
_NODE = re.compile(r"([A-Za-z0-9_@:-]+(?:/[A-Za-z0-9_@:-]+)*)(?:=(.*))?")
_MAX_NODE, _MAX_DEPENDENCIES = 256, 64


def to_depends(value: Any) -> tuple[str, ...]:
    """One name, or a list of them; each once."""
    names = [to_name(word) for word in to_words(value)]
    if len(names) > _MAX_DEPENDENCIES:
        raise refused(f"{_MAX_DEPENDENCIES} domains at most")
    for name in names:
        if names.count(name) > 1:
            raise refused(f"{shown(name)} stands there twice", "remove one of them")
    return tuple(names)


def _to_pattern(value: Any) -> str:
    text = to_text(value)
    if not text.strip("* "):
        raise refused("a pattern wants something to look for", "as in: console: 'login:'")
    return text


def _to_tcp(value: Any) -> str:
    """``8080``, ``10.0.0.5:8080`` or ``[fd00::5]:8080``."""
    text = to_word(value).strip()
    host, colon, port = text.rpartition(":")
    hint = "write a port, or an address and a port: 10.0.0.5:8080"
    if not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise refused(f"{shown(text)} is no TCP port", hint)
    if not colon:
        return str(int(port))
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        raise refused(f"{shown(host)} is no address", hint) from None
    return f"[{address}]:{int(port)}" if address.version == 6 else f"{address}:{int(port)}"


def _to_node(value: Any) -> str:
    text = to_text(value)
    match = _NODE.fullmatch(text)
    if match is None or len(match[1]) > _MAX_NODE:
        raise refused(
            f"{shown(text)} is no xenstore key of a domain",
            "a path below /local/domain/N, and maybe a value: data/ready, or data/ready=1",
        )
    return text


def _to_seconds(value: Any) -> float:
    text = to_word(value).strip()
    match = _TIME.fullmatch(text)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds <= 86_400:
        raise refused(f"{shown(text)} is no timeout", "write 60s, 5m or 1h; a plain number is seconds")
    return seconds


class ReadyConfig(BaseModel):
    """When a guest counts as ready."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)

    console: Annotated[str, BeforeValidator(_to_pattern)] | None = Field(
        None,
        description="text in a line its console prints (* stands for anything); for console_backend: xtool",
    )
    tcp: Annotated[str, BeforeValidator(_to_tcp)] | None = Field(
        None,
        description="a port that takes connections from the host; with an address, unless vif gives one",
    )
    xenstore: Annotated[str, BeforeValidator(_to_node)] | None = Field(
        None, description="a key below the domain's directory that is there, or has this value: data/ready=1"
    )
    timeout: Annotated[float, BeforeValidator(_to_seconds)] = Field(
        DEFAULT_TIMEOUT, description="how long it may take: 60s, 5m; a plain number is seconds"
    )

    @model_validator(mode="after")
    def _whole(self) -> ReadyConfig:
        if self.console is None and self.tcp is None and self.xenstore is None:
            raise refused("nothing says when it is ready", "give console, tcp or xenstore")
        return self

    def to_dict(self) -> dict[str, Any]:
        """What is not default."""
        return self.model_dump(exclude_defaults=True)

    @property
    def node(self) -> tuple[str, str | None]:
        """The xenstore key, and the value it is to have (None: any)."""
        match = _NODE.fullmatch(self.xenstore or "")
        return (match[1], match[2]) if match else ("", None)


def split_tcp(text: str) -> tuple[str, int]:
    """``10.0.0.5:80`` -> (``10.0.0.5``, 80); the address is empty where none is given."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def matches(pattern: str, line: str) -> bool:
    """Whether the line has the pattern's pieces in their order. Takes time in proportion to the line."""
    at = 0
    for piece in pattern.split("*"):
        found = line.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True
