"""One small file per domain: what we meant to do with it, so that nothing is lost when we die.

The file is written and synced *before* the domain is created, and the domain carries the same uuid as its
handle: a domain that has no other trace is still recognised as ours, and half-built. Files are written
to a temporary name and renamed. Whoever works on a domain holds a lock on ``<uuid>.lock``; an entry in
state ``creating`` whose lock is free belongs to a process that died.

::

    /run/xtool/domains/<uuid>.json     {"version": 1, "state": "creating", "name": ..., "config": {...}}
    /run/xtool/domains/<uuid>.lock
    /run/xtool/domains/<uuid>.keeper    locked by the domain's keeper, or by the watcher; holds its pid
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from xtool import paths, warmlink
from xtool.errors import HostError
from xtool.toolstack import locks

VERSION = 1
State = Literal["creating", "running", "destroying"]


@dataclass(frozen=True)
class Entry:
    uuid: str
    name: str
    type: str
    state: State
    domid: int = -1
    #: ``DomainConfig.to_dict``: what a restart creates again.
    config: dict[str, Any] | None = None
    #: A change of a running domain's devices that is under way: ``{"kind": "vbd", "devid": 51712}``.
    pending: dict[str, Any] | None = None
    version: int = VERSION
    #: What is to follow once it is gone: ``restart``. Whoever finds it half-done goes on with it.
    then: str = ""
    #: What was done with it when it ended, if it stays as it is: ``preserved``. Nobody need keep it.
    settled: str = ""
    #: Its starts and ends, for ``toolstack.backoff``, and what it was last told or found.
    history: dict[str, Any] | None = None
    #: Where an ``xtool apply`` that made it found it described (``machine:path``).
    source: str = ""
    #: Keys of ``config`` that count at its next start, and the value it runs with.
    waiting: dict[str, Any] | None = None

    @property
    def keeper(self) -> int:
        """The process that carries out its on_poweroff, on_reboot, ... actions; 0 if there is none."""
        return keeper_pid(self.uuid)


def _folder() -> Path:
    return paths.run_dir() / "domains"


def _file(uuid: str) -> Path:
    return _folder() / f"{uuid}.json"


def write(entry: Entry) -> None:
    """Store the entry atomically and durably. Raises ``HostError`` when the file system refuses."""
    folder = _folder()
    temporary = folder / f".{entry.uuid}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(temporary, "w") as file:
            json.dump(asdict(entry), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, _file(entry.uuid))
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HostError(
            f"cannot write {_file(entry.uuid)}: {error.strerror}",
            hint=f"xtool keeps its state in {paths.run_dir()}: make room there, or set XTOOL_RUN_DIR",
        ) from error


def read(uuid: str) -> Entry | None:
    """The entry, or None if there is none or it is damaged: then Xen and xenstore are what is known."""
    try:
        raw = json.loads(_file(uuid).read_text())
        if raw.get("version") != VERSION or raw.get("uuid") != uuid:
            return None
        raw.pop("keeper", None)  # of before there were files for that
        return Entry(**raw)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def uuids() -> list[str]:
    """Those that have an entry, damaged or not."""
    try:
        names = sorted(os.listdir(_folder()))
    except OSError:
        return []
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def entries() -> list[Entry]:
    return [entry for uuid in uuids() if (entry := read(uuid))]


def remove(uuid: str) -> None:
    """Forget the domain, its cloud-init seed too; its lock file goes when the lock is let go, its keeper's
    with the keeper."""
    seed = paths.seed_file(uuid)
    seed.unlink(missing_ok=True)
    seed.with_name(f"{seed.name}.new").unlink(missing_ok=True)  # of a process that was killed
    _file(uuid).unlink(missing_ok=True)
    if not keeper_pid(uuid):  # it was killed
        Path(keeper_path(uuid)).unlink(missing_ok=True)


def sweep() -> None:
    """Remove what a process that was killed left beside the entries: half-written files, and locks of
    domains that never got one."""
    try:
        names = os.listdir(_folder())
    except OSError:
        return
    entered = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    for name in names:
        if name.startswith("."):
            pid = name.rpartition(".")[2]
            if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
                (_folder() / name).unlink(missing_ok=True)
        elif name.endswith(".keeper") and name[:-7] not in entered:
            if not keeper_pid(name[:-7]):
                (_folder() / name).unlink(missing_ok=True)
        elif name.endswith(".lock") and name != "names.lock" and name[:-5] not in entered:
            with locked(name[:-5], wait=False):
                pass  # letting go of it removes it


def exists(uuid: str) -> bool:
    """Whether there is an entry, damaged or not. For keepers: it touches next to nothing."""
    return os.access(f"{warmlink.run_dir()}/domains/{uuid}.json", os.F_OK)


def keeper_path(uuid: str) -> str:
    return f"{warmlink.run_dir()}/domains/{uuid}.keeper"


def keeper_pid(uuid: str) -> int:
    """The pid of the domain's keeper or of the watcher, whoever looks after it; 0 if nobody does. For a
    moment after one took it, it may be that of the one before."""
    try:
        fd = os.open(keeper_path(uuid), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return 0
    except BlockingIOError:
        return _pid_in(fd)
    finally:
        os.close(fd)


def hold_keeper(uuid: str, is_holder: Callable[[int], bool]) -> int:
    """Be who looks after the domain: take its keeper's lock, and write our pid. The descriptor, or -1 if
    another has it, or all there was of the domain is gone. ``is_holder`` says whether the process of a pid
    that was found in the file will keep the lock; else it may be left over, and who holds the lock only ask.
    """
    path = keeper_path(uuid)
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return -1
        if not locks.take(lock, lambda lock=lock: is_holder(_pid_in(lock))):  # type: ignore[misc]
            os.close(lock)
            return -1
        # Who held it before us may have removed the file: then this lock is worth nothing.
        if _is_at(lock, path):
            break
        os.close(lock)
    os.truncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    return lock


def _pid_in(lock: int) -> int:
    word = os.pread(lock, 32, 0).strip()
    return int(word) if word.isdigit() else 0


def update(uuid: str, **changes: Any) -> None:
    entry = read(uuid)
    if entry:
        write(replace(entry, **changes))


def change_config(uuid: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Another configuration for when the domain is started again; nothing where none is kept."""
    entry = read(uuid)
    if entry is not None and entry.config is not None:
        write(replace(entry, config=change(entry.config)))


@contextmanager
def locked(uuid: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the domain's lock; yields False if ``wait`` is false and somebody else holds it.

    The lock file goes when the domain has no entry (any more): nobody's lock outlives its domain.
    """
    path = _folder() / f"{uuid}.lock"
    with _flock(path, wait) as ours:
        try:
            yield ours
        finally:
            if ours and not _file(uuid).exists():
                path.unlink(missing_ok=True)


@contextmanager
def naming() -> Iterator[None]:
    """Hold the lock under which names are looked up and reserved."""
    with _flock(_folder() / "names.lock", True):
        yield


@contextmanager
def _flock(path: Path, wait: bool) -> Iterator[bool]:
    while True:
        fd = _open_lock(path)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            # Who held it before us may have removed the file: then this lock is worth nothing.
            if _is_at(fd, path):
                yield True
                return
        finally:
            os.close(fd)


def _open_lock(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"cannot use {path}: {error.strerror}", hint="run as root, or set XTOOL_RUN_DIR"
        ) from error


def _is_at(fd: int, path: Path | str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
