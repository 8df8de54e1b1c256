"""``xtool gc``: what crashed toolstacks leave behind, whoever they were; found first, removed when asked to.

What is *certain* to be dead belongs to a domain number that Xen does not know, twice in a row (a domain is
made before anything is written about it, and ``PAUSE`` lies between the looks), or to a journal entry
whose lock nobody holds. Only that is removed, and each thing is looked at again right before. What may be
somebody's is named.

``LocalClient.gc`` is another thing: the quick roll-back of our own half-done work that every create begins
with.

Facts
-----
- Xen gives a number again only when all 32,752 have been used.
- A domain that is ``dying`` is held by whoever still maps its pages: its QEMU, say. It is not gone.
- ``xl create`` that is killed leaves a paused domain, with or without nodes. One that is at work looks the
  same.
- libxl keeps a domain's configuration in ``/var/lib/xen/userdata-d.<domid>.<uuid>.*``, and QEMU's sockets as
  ``/run/xen/qmp-libxl-<domid>``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from xtool.errors import XtoolError
from xtool.toolstack import journal
from xtool.toolstack.everydayrecords import Leftover
from xtool.toolstack.names import uuid_text
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

#: Between the two looks, seconds.
PAUSE = 1.0


@dataclass
class Scene:
    """The host at one moment. ``root`` is None where there is no Linux to look at: the host in memory."""

    host: Host
    root: Path | None
    #: Numbers of all domains, dying ones too, and the uuids of all.
    domids: frozenset[int]
    uuids: frozenset[str]
    dying: frozenset[int]
    #: Domains that a live process of ours works on.
    busy: frozenset[int]

    def dead(self, domid: int) -> bool:
        """No domain has this number, and nobody of ours is at work on one that had."""
        return domid not in self.domids and domid not in self.busy

    def gone_now(self, domid: int) -> bool:
        """The same at this very moment."""
        return self.dead(domid) and self.host.hv.domain(domid) is None


Finder = Callable[[Scene], Iterable[Leftover]]
Remover = Callable[[Scene, Leftover], None]


def look(host: Host, root: Path | None) -> Scene:
    states = host.hv.domains()
    busy = []
    for entry in journal.entries():
        if entry.state != "running":
            with journal.locked(entry.uuid, wait=False) as free:
                if not free:
                    busy.append(entry.domid)
    return Scene(
        host,
        root,
        frozenset((0, *(state.domid for state in states))),
        frozenset(uuid_text(state.handle) for state in states),
        frozenset(state.domid for state in states if state.dying),
        frozenset(busy),
    )


def find_leftovers(host: Host, *, root: Path | None = None, pause: float | None = None) -> list[Leftover]:
    """Everything that was left behind, what is certain first. Changes nothing.

    ``root`` is where Linux is looked at (None: this machine, for a real host); ``pause`` between two
    looks, for something has to be there in both.
    """
    _, found = _search(host, root, pause)
    return found


def remove_leftovers(host: Host, *, root: Path | None = None, pause: float | None = None) -> list[Leftover]:
    """Remove what is certain to be dead; everything that was found, with what became of it."""
    from xtool.toolstack.leftover_kinds import REMOVERS

    scene, found = _search(host, root, pause)
    done = []
    for item in found:
        if item.certain:
            try:
                if item.domid is not None and item.kind != "domain" and not scene.gone_now(item.domid):
                    done.append(replace(item, certain=False, problem="a domain of that number is there now"))
                    continue
                REMOVERS[item.kind](scene, item)
                item = replace(item, removed=True)
            except (XtoolError, OSError) as error:
                words = error.message if isinstance(error, XtoolError) else str(error)
                item = replace(item, problem=words)
        done.append(item)
    return done


def _search(host: Host, root: Path | None, pause: float | None) -> tuple[Scene, list[Leftover]]:
    if root is None and host.real:
        root = Path("/")
    scene, first = _once(host, root)
    if not first:
        return scene, []
    wait = (PAUSE if host.real else 0.0) if pause is None else pause
    if wait:
        time.sleep(wait)
        scene, second = _once(host, root)
        before = {(item.kind, item.key) for item in first}
        first = [item for item in second if (item.kind, item.key) in before]
    return scene, sorted(first, key=lambda item: not item.certain)


def _once(host: Host, root: Path | None) -> tuple[Scene, list[Leftover]]:
    """What there is is read before it is asked which domains there are, so that what belongs to one that
    starts at this moment is never taken for dead."""
    from xtool.toolstack.leftover_kinds import FINDERS

    seen = _Seen(host)
    scene = look(host, root)
    found: list[Leftover] = []
    for finder in FINDERS:
        found += finder(scene)
    # What appeared after the look at the domains is none of ours.
    return scene, [item for item in found if item.kind != "xenstore" or item.key in seen.nodes]


class _Seen:
    """Nodes that were in xenstore before the domains were listed."""

    def __init__(self, host: Host) -> None:
        self.nodes = frozenset(path for path, _ in candidates(host))


def candidates(host: Host) -> Iterator[tuple[str, int | str]]:
    """Nodes that belong to a domain, and its number or uuid."""
    store = host.store
    zero = paths.domain(0)
    tops = [
        "/local/domain",
        "/libxl",
        "/vm",
        f"{zero}/device-model",
        f"{zero}/backend",
        f"{zero}/error/backend",
    ]
    lists = store.list_many(tops)
    for top in tops[:4]:
        for name in lists[top] or ():
            if top == "/vm":
                yield f"{top}/{name}", name
            elif number(name) is not None:
                yield f"{top}/{name}", int(name)
    kinds = [f"{top}/{kind}" for top in tops[4:] for kind in lists[top] or () if kind]
    folders = store.list_many(kinds)
    for folder in kinds:
        for name in folders[folder] or ():
            if number(name) is not None:
                yield f"{folder}/{name}", int(name)


def number(text: str) -> int | None:
    """A domain's number, or None."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else None
