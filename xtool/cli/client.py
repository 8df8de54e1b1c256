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


def use(opener: Opener | None) -> None:
    """Let ``connect`` give this client; None goes back to the host's own."""
    global _opener
    _opener = opener


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
