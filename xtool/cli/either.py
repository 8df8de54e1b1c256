"""This host's daemon for what it does, this process for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from xtool.client.routes import IN_PROCESS
from xtool.client.socketclient import SocketClient

if TYPE_CHECKING:
    from xtool.toolstack.api import Client


class _Either(SocketClient):
    def __init__(self) -> None:
        super().__init__()
        self._local: Client | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in IN_PROCESS:
            return super().__getattr__(name)
        if self._local is None:
            from xtool.toolstack.local import open_client

            self._local = open_client()
        return getattr(self._local, name)

    def close(self) -> None:
        super().close()
        if self._local is not None:
            self._local.close()


def either() -> Client:
    """``Client``."""
    return cast("Client", _Either())
