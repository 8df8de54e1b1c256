"""Where the verbs get the toolstack's client from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtool.apply.described import Described
    from xtool.client.socketclient import SocketClient
    from xtool.toolstack.api import Client

    Opener = Callable[[], Client]
    #: Domains with the files that only this machine has where the client's host has them, or will have them:
    #: it brings them there if the second argument says so.
    Placer = Callable[[list[Described], bool], list[Described]]

_opener: Opener | None = None
_placer: Placer | None = None
_libvirt = ""
_UNIX = "unix:"


def use(opener: Opener | None, placer: Placer | None = None) -> None:
    """Let ``connect`` give this client; None goes back to the host's own."""
    global _opener, _libvirt, _placer
    _opener, _libvirt, _placer = opener, "", placer


def placed(described: list[Described], *, send: bool) -> list[Described]:
    """The domains as they are for the client's host, whose files may lie elsewhere. Raises ``ConfigError``,
    ``HostError``."""
    return described if _placer is None else _placer(described, send)


def use_libvirt(uri: str) -> None:
    """Let ``connect`` give a client for this driver of libvirt's. Raises ``UsageError``."""
    global _opener, _libvirt
    from xtool.drivers.libvirt import open_libvirt
    from xtool.drivers.libvirt.uri import parse_target

    parse_target(uri)
    _opener, _libvirt = (lambda: open_libvirt(uri)), uri


def libvirt_uri() -> str:
    """The driver of libvirt's that ``connect`` uses, "" for Xen's own."""
    return _libvirt


@contextmanager
def connect() -> Iterator[Client]:
    """A client for one verb, closed behind it.

    ``XTOOL_CONNECT`` chooses: ``unix:/path`` is the daemon that listens there, ``unix:`` this host's, started
    if it does not run; ``xen:`` is this process itself, ``fake:`` an empty host in memory. Without it this
    host's daemon does the work if it runs, else this process.
    """
    client = _opener() if _opener is not None else _open(os.environ.get("XTOOL_CONNECT", ""))
    try:
        yield client
    finally:
        client.close()


def shared(client: Client) -> bool:
    """Whether a client that another process opens sees the same host; not so with a host in memory."""
    host = getattr(client, "host", None)
    return host is None or bool(host.real)


def _open(uri: str) -> Client:
    if uri.startswith(_UNIX):
        from xtool.client.socketclient import open_socket

        return open_socket(uri.removeprefix(_UNIX))
    if not uri:
        from xtool.client.start import running

        if running():
            from xtool.cli.either import either

            return either()
    from xtool.toolstack.local import open_client

    return open_client(uri or "xen:")


def daemon_client() -> SocketClient:
    """For verbs that only the daemon can answer: the one ``XTOOL_CONNECT`` names, else this host's."""
    from xtool.client.socketclient import SocketClient

    if _opener is not None and isinstance(client := _opener(), SocketClient):
        return client
    uri = os.environ.get("XTOOL_CONNECT", "")
    return SocketClient(uri.removeprefix(_UNIX) if uri.startswith(_UNIX) else "")


def over(path: str) -> Opener:
    """An opener of the daemon at a socket's path: for ``use``."""

    def opener() -> Client:
        from xtool.client.socketclient import open_socket

        return open_socket(path)

    return opener
