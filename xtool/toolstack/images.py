"""Nobody writes to an image that somebody else has open: found out before anything is made.

Who uses an image is asked three times over: the journal (our domains, also those being created), the
toolstack's tree in xenstore (xl's domains as well), and the host itself (loop devices, mounts). The caller
holds ``journal.naming()``, so that of two who ask at once only one is told that it is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from xtool.devices.vbd import Vbd
from xtool.devices.xenbus import DeviceId
from xtool.errors import ImageInUseError
from xtool.toolstack import journal
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host


class User(NamedTuple):
    """Somebody who has a target open. ``what`` is for the reader."""

    target: str
    writes: bool
    what: str


def check_free(host: Host, disks: Iterable[Vbd], uuid: str) -> None:
    """Raises ``ImageInUseError`` when a disk of domain ``uuid`` cannot be had beside what is in use."""
    wanted = [disk for disk in disks if disk.target is not None and not disk.shared and not disk.script]
    if not wanted:
        return
    _among_themselves(host, wanted)
    known = [*_journal_users(uuid), *_store_users(host, uuid)]
    for disk in wanted:
        assert disk.target is not None
        same = host.hotplug.identity(disk.target)
        for user in known:
            clashes = user.writes or not disk.readonly
            if clashes and (user.target == disk.target or same & host.hotplug.identity(user.target)):
                raise _in_use(disk, user.what)
        for what, writes in host.hotplug.users(disk.target):
            if writes or not disk.readonly:
                raise _in_use(disk, what)


def _among_themselves(host: Host, disks: list[Vbd]) -> None:
    seen: list[tuple[Vbd, frozenset[str]]] = []
    for disk in disks:
        assert disk.target is not None
        same = host.hotplug.identity(disk.target)
        for other, names in seen:
            if names & same and not (disk.readonly and other.readonly):
                raise _in_use(disk, f"its own disk {other.vdev}")
        seen.append((disk, same))


def _in_use(disk: Vbd, who: str) -> ImageInUseError:
    how = "for reading" if disk.readonly else "for writing"
    return ImageInUseError(
        f"disk {disk.vdev}: {disk.target} cannot be used {how}: {who} has it open",
        hint="two who write to one disk destroy it. For a cluster file system: shared: true on both",
    )


def _journal_users(uuid: str) -> Iterator[User]:
    for entry in journal.entries():
        if entry.uuid == uuid:
            continue
        for disk in (entry.config or {}).get("disk", ()):
            target = disk.get("target") if isinstance(disk, dict) else None
            if target and not disk.get("shared"):
                readonly = disk.get("access") == "ro" or disk.get("devtype") == "cdrom"
                yield User(target, not readonly, f"the domain {entry.name!r}")


def _store_users(host: Host, uuid: str) -> Iterator[User]:
    """Disks of every domain as the private tree has them: three pipelines, however many there are."""
    store = host.store
    domids = (
        [int(name) for name in store.list("/libxl") if name.isdecimal()] if store.exists("/libxl") else []
    )
    folders = {domid: f"{paths.libxl(domid)}/device/vbd" for domid in domids}
    lists = store.list_many(folders.values())
    mirrors = [
        DeviceId(domid, "vbd", int(name), "").mirror
        for domid, folder in folders.items()
        for name in lists[folder] or ()
        if name.isdecimal()
    ]
    names = ("params", "mode", "dev")
    values = store.get_many(
        [f"{mirror}/{name}" for mirror in mirrors for name in names]
        + [f"{paths.domain(domid)}/vm" for domid in domids]
    )
    managed = {paths.vm(entry.uuid) for entry in journal.entries()} | {paths.vm(uuid)}
    for mirror in mirrors:
        domid = mirror.split("/")[2]
        params = values[f"{mirror}/params"]
        if not params or values[f"{paths.domain(int(domid))}/vm"] in managed:
            continue  # the journal knows it better
        target = params if params.startswith("/") else params.partition(":")[2]
        writes = "w" in (values[f"{mirror}/mode"] or "w")
        yield User(target, writes, f"domain {domid} ({values[f'{mirror}/dev']})")
