"""What the daemon does on its start, and when a keeper died: recovery, and a keeper for each domain of ours.

Domains of xl or libvirt have no journal entry: they are shown, and nothing else is done with them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from xtool.errors import DomainNotFoundError
from xtool.progress import Progress
from xtool.toolstack import journal, keeper
from xtool.toolstack.api import LifecycleResult
from xtool.toolstack.local import LocalClient

if TYPE_CHECKING:
    from xtool.toolstack.api import Client


def adopt(client: Client, progress: Progress) -> list[LifecycleResult]:
    """Finish what killed processes left half-done, then give back their keepers to the domains of ours."""
    done = list(client.gc())
    if not (isinstance(client, LocalClient) and client.host.real):
        return done  # a host in memory has no processes
    everyone = getattr(keeper, "ensure_all", None)
    if everyone is not None:  # these keepers carry out the actions of those that have ended
        given = everyone(client.host)
        return [*done, *(LifecycleResult(entry.domid, entry.name, "adopted") for entry in given)]
    for info in client.list():
        entry = journal.read(info.uuid) if info.managed else None
        if entry is None or entry.state != "running":
            continue
        if info.state in ("shutdown", "crashed"):
            progress.step(f"{info.name} has ended: carrying out its action")
            try:
                settled = client.settle(info.domid, info.uuid)
            except DomainNotFoundError:
                settled = None
            if settled is not None and settled.action != "preserved":
                done.append(settled)
            if settled is None or settled.new_domid is None:
                continue
            ensure_keeper(settled.new_domid, info.uuid)
        elif ensure_keeper(info.domid, info.uuid):
            done.append(LifecycleResult(info.domid, info.name, "adopted"))
    return done


# --- the seam to keepers: ``ensure``, ``ensure_all`` and ``pid_of`` of toolstack.keeper, where it has them
def ensure_keeper(domid: int, uuid: str) -> bool:
    """See that a keeper is with the domain; whether one was started. Forks, so it is not for threads."""
    ensure = getattr(keeper, "ensure", None)
    if ensure is not None:
        return bool(ensure(domid, uuid))
    if keeper_of(uuid):
        return False
    keeper.start_keeper(domid, uuid)
    return True


def keeper_of(uuid: str) -> int:
    """The pid of the domain's keeper, 0 if it has none that lives."""
    known = getattr(keeper, "pid_of", None)
    if known is not None:
        return int(known(uuid))
    entry = journal.read(uuid)
    return entry.keeper if entry is not None and entry.keeper > 0 and _is_python(entry.keeper) else 0


def has_keeper(uuid: str) -> bool:
    return keeper_of(uuid) > 0


def _is_python(pid: int) -> bool:
    """Numbers are used again: one that has become another program's is no keeper."""
    try:
        return "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False
