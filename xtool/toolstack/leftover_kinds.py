"""Each kind of leftover: how it is found, and how it is removed. The order is that of removal.

Processes go first, for they hold the rest; xenstore's nodes last of what a domain had, for they tell of it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from xtool import paths
from xtool.devicemodel import pidfd
from xtool.devices.hotplug import loop, tap
from xtool.errors import HostError
from xtool.toolstack import journal
from xtool.toolstack.everydayrecords import Leftover
from xtool.toolstack.leftovers import Finder, Remover, Scene, candidates, number
from xtool.xenstore.paths import backend, domain

#: How long a process may take to end before it is killed, seconds.
_GRACE = 5.0
_LOOP_CLR_FD = 0x4C01
_INTERFACE = re.compile(r"(?:vif|tap)(\d{1,5})\.(\d{1,5})(-emu)?")
_RUN_FILES = re.compile(
    r"qmp-(\d+)\.sock|backend-(\d+)\.(?:lock|pid|sock)|\.backend-(\d+)\.(?:pid|sock)\.\d+"
    r"|console-(\d+)(?:-\d+)?\.(?:sock|feed)"
)
_XL_FILES = re.compile(r"qmp-libxl-(\d+)|qemu-xen-(\d+)|qmp-proxy-(\d+)")
_USERDATA = re.compile(r"userdata-[dn]\.(\d+)\.([0-9a-f-]{36})\..*")


# --- domains --------------------------------------------------------------------------------------------
def domains(scene: Scene) -> Iterator[Leftover]:
    """Ours that are half-built or half-gone, and anybody's that look so."""
    host = scene.host
    known = {entry.uuid: entry for entry in journal.entries()}
    for entry in known.values():
        with journal.locked(entry.uuid, wait=False) as free:
            if not free:
                continue
        if entry.state != "running":
            words = "a create was killed" if entry.state == "creating" else "a destroy was killed"
            yield Leftover("domain", entry.name, f"{words} half-way", True, entry.uuid, entry.domid)
        elif entry.uuid not in scene.uuids:
            why = "the journal of a domain that is gone"
            yield Leftover("domain", entry.name, why, True, entry.uuid, entry.domid)
    for state in host.hv.domains():
        uuid = str(UUID(bytes=state.handle))
        if state.domid == 0 or uuid in known:
            continue
        if state.dying:
            why = "it is dying: somebody still has pages of it mapped (its QEMU, or a backend)"
            yield Leftover("domain", f"domain {state.domid}", why, False, uuid, state.domid)
        elif state.paused and not state.cpu_time and not host.store.get(f"{domain(state.domid)}/name"):
            why = "it has no name and never ran: a create under way, or killed. xtool destroy ends it"
            yield Leftover("domain", f"domain {state.domid}", why, False, uuid, state.domid)


def remove_domain(scene: Scene, item: Leftover) -> None:
    from xtool.toolstack.destroy import recover

    recover(scene.host)
    if journal.read(item.key) is not None:
        raise HostError(f"{item.what} could not be rolled back")


# --- processes ------------------------------------------------------------------------------------------
def processes(scene: Scene) -> Iterator[Leftover]:
    """QEMUs and backend processes whose domain is gone."""
    for pid, domid, what in _serving(scene):
        if domid in scene.dying:
            why = "its domain is dying, and it may be what keeps it from going"
            yield Leftover("process", f"{what}, pid {pid}", why, False, f"{pid}", domid)
        elif scene.dead(domid):
            yield Leftover("process", f"{what}, pid {pid}", f"domain {domid} is gone", True, f"{pid}", domid)


def _serving(scene: Scene) -> Iterator[tuple[int, int, str]]:
    if scene.root is None:
        return
    proc = scene.root / "proc"
    for name in os.listdir(proc) if proc.is_dir() else ():
        if not name.isdecimal():
            continue
        try:
            words = (proc / name / "cmdline").read_bytes().split(b"\0")
            comm = (proc / name / "comm").read_text().strip()
        except OSError:
            continue
        own = comm.removeprefix("xtool-be-")
        if own != comm and number(own) is not None:
            yield int(name), int(own), "a backend process of xtool's"
        elif b"qemu" in words[0] and b"-xen-domid" in words[:-1]:
            domid = number(words[words.index(b"-xen-domid") + 1].decode(errors="replace"))
            if domid is not None:
                yield int(name), domid, "QEMU"


def remove_process(scene: Scene, item: Leftover) -> None:
    pid = int(item.key)
    fd = os.pidfd_open(pid)
    try:
        # Asked with the descriptor held: from then on the number means no other process.
        if (pid, item.domid) not in [(p, d) for p, d, _ in _serving(scene)]:
            return
        pidfd.terminate(fd)
        if not pidfd.wait(fd, _GRACE):
            pidfd.kill(fd)
            if not pidfd.wait(fd, _GRACE):
                raise HostError(f"process {pid} cannot be killed", hint="it hangs in the kernel")
        pidfd.reap(fd)
    finally:
        os.close(fd)


# --- domain 0's own devices -------------------------------------------------------------------------------
def own_devices(scene: Scene) -> Iterator[Leftover]:
    """Disks, interfaces and consoles that a process attached to domain 0 itself, and died."""
    from xtool.toolstack.dom0 import abandoned

    for device in abandoned(scene.host):
        why = "the process that attached it to domain 0 is gone"
        yield Leftover("device", f"{device.kind} {device.devid}", why, True, f"{device.kind} {device.devid}")


def remove_own_device(scene: Scene, item: Leftover) -> None:
    from xtool.toolstack.dom0 import recover

    recover(scene.host)


# --- loop devices ---------------------------------------------------------------------------------------
def loops(scene: Scene) -> Iterator[Leftover]:
    """Loop devices that no disk of a domain's uses: certain where a dead domain's backend names them."""
    if scene.root is None:
        return
    folder = scene.root / "sys/block"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    used = _named_by_backends(scene)
    for name in names:
        try:
            file = (folder / name / "loop/backing_file").read_text().strip()
        except OSError:
            continue
        owner = used.get(f"/dev/{name}")
        if owner is not None and not scene.dead(owner):
            continue
        if _in_use(scene, name):
            continue
        if owner is not None:
            yield Leftover("loop", f"/dev/{name} ({file})", f"domain {owner} is gone", True, name, owner)
        elif not _clears_itself(folder / name):
            why = "no domain's disk uses it, nor does the host; who made it is not known"
            yield Leftover("loop", f"/dev/{name} ({file})", why, False, name)


def _named_by_backends(scene: Scene) -> dict[str, int]:
    """Loop device -> the domain whose backend's nodes name it; one that is alive wins."""
    store = scene.host.store
    root = f"{domain(0)}/backend/vbd"
    domids = [int(name) for name in store.list_many([root])[root] or () if number(name) is not None]
    lists = store.list_many([f"{root}/{domid}" for domid in domids])
    places = [
        (domid, backend(0, "vbd", domid, int(name)))
        for domid in domids
        for name in lists[f"{root}/{domid}"] or ()
        if name.isdecimal()
    ]
    names = ("node", "physical-device-path", "physical-device")
    values = store.get_many([f"{place}/{name}" for _, place in places for name in names])
    found: dict[str, int] = {}
    for domid, place in sorted(places, key=lambda p: not scene.dead(p[0])):
        node, path, device = (values[f"{place}/{name}"] or "" for name in names)
        major, _, minor = device.partition(":")
        if major == f"{loop.LOOP_MAJOR:x}" and re.fullmatch(r"[0-9a-f]{1,5}", minor):
            found[f"/dev/loop{int(minor, 16)}"] = domid
        for text in (node, path):
            if text.startswith("/dev/loop"):
                found[text] = domid
    return found


def _in_use(scene: Scene, name: str) -> bool:
    """A mount, device-mapper or anybody who has it open for himself."""
    assert scene.root is not None
    holders = scene.root / "sys/block" / name / "holders"
    if holders.is_dir() and os.listdir(holders):
        return True
    path = scene.root / "dev" / name
    try:
        if not stat.S_ISBLK(path.stat().st_mode):
            return False
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _clears_itself(folder: Path) -> bool:
    """It lets go of its file on the last close, so somebody has it open."""
    try:
        return (folder / "loop/autoclear").read_text().strip() == "1"
    except OSError:
        return False


def remove_loop(scene: Scene, item: Leftover) -> None:
    assert scene.root is not None
    if not (scene.root / "sys/block" / item.key / "loop/backing_file").exists():
        return  # it went with its domain
    if _named_by_backends(scene).get(f"/dev/{item.key}") not in (None, item.domid):
        raise HostError(f"/dev/{item.key} is another domain's now")
    if _in_use(scene, item.key):
        raise HostError(f"/dev/{item.key} is in use")
    fd = os.open(scene.root / "dev" / item.key, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _LOOP_CLR_FD, 0)
    finally:
        os.close(fd)


# --- interfaces -----------------------------------------------------------------------------------------
def interfaces(scene: Scene) -> Iterator[Leftover]:
    """Taps and vifs named after a domain that is gone. netback's go with their nodes."""
    if scene.root is None:
        return
    folder = scene.root / "sys/class/net"
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        match = _INTERFACE.fullmatch(name)
        if match is None or not scene.dead(int(match[1])):
            continue
        is_tap = (folder / name / "tun_flags").exists()
        why = f"domain {match[1]} is gone"
        if not is_tap:
            why += "; the kernel still has it, and lets go when its backend's nodes do"
        yield Leftover("interface", name, why, is_tap, name, int(match[1]))


def remove_interface(scene: Scene, item: Leftover) -> None:
    tap.remove(item.key)
    if os.path.exists(f"/sys/class/net/{item.key}"):
        raise HostError(f"{item.key} is still there: a process has it open")


# --- files ----------------------------------------------------------------------------------------------
def files(scene: Scene) -> Iterator[Leftover]:
    """Sockets, pid and lock files, and libxl's notes."""
    run = paths.run_dir()
    for path, domid in _numbered(run, _RUN_FILES):
        if scene.dead(domid) and not _locked(path):
            yield _file(path, domid)
    backends = run / "backends"
    for name in sorted(os.listdir(backends)) if backends.is_dir() else ():
        owner = number(name)
        if owner is not None and scene.dead(owner) and not _locked(run / f"backend-{owner}.lock"):
            yield _file(backends / name, owner)
    if scene.root is None:
        return
    for path, domid in _numbered(scene.root / "run/xen", _XL_FILES):
        if scene.dead(domid):
            yield _file(path, domid)
    library = scene.root / "var/lib/xen"
    for name in sorted(os.listdir(library)) if library.is_dir() else ():
        match = _USERDATA.fullmatch(name)
        if match and scene.dead(int(match[1])) and match[2] not in scene.uuids:
            yield _file(library / name, int(match[1]))


def _file(path: Path, domid: int) -> Leftover:
    return Leftover("file", str(path), f"domain {domid} is gone", True, str(path), domid)


def _numbered(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, int]]:
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        match = pattern.fullmatch(name)
        digits = next((group for group in match.groups() if group), "") if match else ""
        if (domid := number(digits)) is not None:
            yield folder / name, domid


def _locked(path: Path) -> bool:
    """Whether a process holds it: a backend's lock."""
    if path.suffix != ".lock":
        return False
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def remove_file(scene: Scene, item: Leftover) -> None:
    path = Path(item.key)
    if path.is_dir() and not path.is_symlink():
        if any(path.glob("nbd-*")):
            from xtool.backends.nbdsource import sweep

            sweep(path)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- xenstore -------------------------------------------------------------------------------------------
def nodes(scene: Scene) -> Iterator[Leftover]:
    """Folders of domains that are gone, below every root where toolstacks and backends write."""
    referred = _referred(scene)
    for path, owner in candidates(scene.host):
        if isinstance(owner, int):
            if scene.dead(owner):
                yield Leftover("xenstore", path, f"domain {owner} is gone", True, path, owner)
        elif path not in referred and owner not in scene.uuids and not _has_entry(owner):
            certain = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", owner) is not None
            yield Leftover("xenstore", path, "no domain has this uuid", certain, path)


def _referred(scene: Scene) -> set[str]:
    """``/vm`` nodes that a domain names as its own: one may have another name than its uuid."""
    names = [f"{domain(domid)}/vm" for domid in scene.domids]
    return {path for path in scene.host.store.get_many(names).values() if path}


def _has_entry(uuid: str) -> bool:
    return journal.read(uuid) is not None


def remove_node(scene: Scene, item: Leftover) -> None:
    if item.domid is None:
        uuids = {str(UUID(bytes=state.handle)) for state in scene.host.hv.domains()}
        if item.key.removeprefix("/vm/") in uuids or item.key in _referred(scene):
            raise HostError(f"{item.key} is somebody's now")
    scene.host.store.rm(item.key)


FINDERS: tuple[Finder, ...] = (domains, own_devices, processes, loops, interfaces, files, nodes)
REMOVERS: dict[str, Remover] = {
    "domain": remove_domain,
    "device": remove_own_device,
    "process": remove_process,
    "loop": remove_loop,
    "interface": remove_interface,
    "file": remove_file,
    "xenstore": remove_node,
}
