"""Carrying out one operation on a client, wherever that is: a verb, or one of the daemon's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xtool.client.wire import plain
from xtool.daemon.endpoints import endpoints
from xtool.progress import Progress
from xtool.toolstack import journal

if TYPE_CHECKING:
    from xtool.toolstack.api import Client

#: The daemon's own: recovery, and somebody to look after every domain of ours.
ADOPT = "adopt"


def carry_out(client: Client, method: str, arguments: Mapping[str, Any], progress: Progress) -> Any:
    """What it returned, as plain values. ``arguments`` are plain, too."""
    if method == ADOPT:
        from xtool.daemon.adopt import adopt

        return plain(adopt(client, progress))
    endpoint = endpoints()[method]
    checked = endpoint.again(plain(arguments))
    if method != "create":
        return plain(endpoint.call(client, checked, progress))
    before = {entry.uuid for entry in journal.entries()}
    try:
        return plain(endpoint.call(client, checked, progress))
    except Exception:
        raise
    except BaseException:  # interrupted: perhaps when there was nothing to undo any more
        name = arguments["config"].get("name") if isinstance(arguments.get("config"), dict) else None
        for entry in journal.entries():
            if entry.uuid not in before and entry.name == name and entry.state == "running":
                client.destroy(entry.uuid)
        raise
