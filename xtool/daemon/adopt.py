"""What the daemon does on its start, and when a keeper or the watcher died: recovery, and somebody who looks
after each domain of ours.

Domains of xl or libvirt have no journal entry: they are shown, and nothing else is done with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtool.progress import Progress
from xtool.toolstack import keeper
from xtool.toolstack.api import LifecycleResult
from xtool.toolstack.local import LocalClient

if TYPE_CHECKING:
    from xtool.toolstack.api import Client


def adopt(client: Client, progress: Progress) -> list[LifecycleResult]:
    """Finish what killed processes left half-done, then have all domains of ours looked after. The actions of
    those that have ended meanwhile are carried out then. Forks, so it is not for threads."""
    done = list(client.gc())
    if not (isinstance(client, LocalClient) and client.host.real):
        return done  # a host in memory has no processes
    progress.step("looking after the keepers")
    given = keeper.ensure_all(client.host)
    return [*done, *(LifecycleResult(entry.domid, entry.name, "adopted") for entry in given)]


def has_keeper(uuid: str) -> bool:
    """Whether somebody looks after the domain."""
    return keeper.pid_of(uuid) > 0
