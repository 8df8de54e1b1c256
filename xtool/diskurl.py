"""Addresses of disks that other programs and hosts have: ``nbd://``, ``http://`` and the like. Pure.

::

    nbd://HOST[:PORT][/EXPORT]              a server's disk, as it is
    nbd+unix:///[EXPORT]?socket=/PATH       the same, on a Unix socket of this host
    http[s]://HOST[:PORT]/PATH[?QUERY]      a file on a web server, read-only
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

NBD_PORT = 10809
#: A node in xenstore takes 4096 bytes, with the format in front.
_LONGEST = 2000
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
#: What RFC 3986 has in a URL: no blank, quote, control character or letter beyond ASCII.
_TEXT = re.compile(r"[A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]+")
_PORTS = {"nbd": NBD_PORT, "http": 80, "https": 443}


class DiskUrl(NamedTuple):
    """``name`` is the export's name, decoded, or a web server's path and query as they are. ``socket`` is
    set for ``nbd+unix`` alone, ``host`` and ``port`` for all others."""

    scheme: str
    host: str
    port: int
    name: str
    socket: str
    text: str

    @property
    def web(self) -> bool:
        return self.scheme in ("http", "https")

    @property
    def identity(self) -> str:
        """The same for two ways to write one address."""
        return f"{self.scheme} {self.socket or f'{self.host}:{self.port}'} {self.name}"


def is_url(target: str) -> bool:
    return _URL.match(target) is not None


def parse_url(target: str) -> DiskUrl:
    """Raises ``ValueError`` with the reason."""
    match = _URL.match(target)
    scheme = match[1].lower() if match else ""
    if scheme not in (*_PORTS, "nbd+unix"):
        raise ValueError("disks come from nbd://, nbd+unix://, http:// and https:// only")
    if len(target) > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST} characters")
    if not _TEXT.fullmatch(target):
        raise ValueError("it has characters that a URL must write as %XX, or a fragment")
    parts = urlsplit(target)  # ValueError for what is no host
    if parts.username is not None or parts.password is not None:
        raise ValueError("it has a user or password, which every process list would show")
    if scheme == "nbd+unix":
        return _unix(parts.netloc, parts.path, parts.query, target)
    if not parts.hostname:
        raise ValueError("it has no host")
    port = parts.port  # ValueError for a number too large
    if port == 0:
        raise ValueError("its port is 0")
    if scheme == "nbd":
        if parts.query:
            raise ValueError("nbd:// takes no ?query")
        name = _decoded(parts.path.removeprefix("/"))
    else:
        name = f"{parts.path}?{parts.query}" if parts.query else parts.path
    return DiskUrl(scheme, parts.hostname, port or _PORTS[scheme], name, "", target)


def _unix(netloc: str, path: str, query: str, target: str) -> DiskUrl:
    try:
        options = dict(parse_qsl(query, strict_parsing=True))
    except ValueError:
        options = {}
    socket = options.get("socket", "")
    if netloc or set(options) != {"socket"} or not socket.startswith("/"):
        raise ValueError("write nbd+unix:///EXPORT?socket=/absolute/path")
    if "\0" in socket or len(socket.encode()) > 107:
        raise ValueError("a socket's path has at most 107 bytes")
    return DiskUrl("nbd+unix", "", 0, _decoded(path.removeprefix("/")), socket, target)


def _decoded(name: str) -> str:
    try:
        text = unquote(name, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("the export's name is not UTF-8") from None
    if "\0" in text:
        raise ValueError("the export's name has a zero byte")
    return text
