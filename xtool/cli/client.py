"""Where the verbs get the toolstack's client from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtool.toolstack.api import Client

    Opener = Callable[[], Client]

_opener: Opener | None = None
_libvirt = ""


def use(opener: Opener | None) -> None:
    """Let ``connect`` give this client; None goes back to the host's own."""
    global _opener, _libvirt
    _opener, _libvirt = opener, ""


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

    ``XTOOL_CONNECT`` chooses another than this host's: ``fake:`` is an empty host in memory.
    """
    if _opener is not None:
        client = _opener()
    else:
        from xtool.toolstack.local import open_client

        client = open_client(os.environ.get("XTOOL_CONNECT") or "xen:")
    try:
        yield client
    finally:
        client.close()
