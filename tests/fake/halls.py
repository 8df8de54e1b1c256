"""What stands in for Xen where the watcher is a real process: a folder with a file per domain, called by its
number and uuid, that says whether it is ``up`` or has ``ended``."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

from xtool.hypercall.glance import Domains, domain_key
from xtool.toolstack import journal, keeper

#: Processes are called by these numbers: another run of these tests beside this one has others.
FIRST = 10000 + os.getpid() % 180 * 100


def until(check: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def running(name: str) -> list[int]:
    """Pids of processes called so that are no zombies."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and comm(int(entry)) == name:
            try:
                state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z":
                found.append(int(entry))
    return found


class Eyes:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fileno(self) -> int:
        return -1

    def drain(self) -> bool:
        return False

    def domains(self) -> Domains:
        found = Domains(set(), set())
        for name in os.listdir(self.folder / "domains"):
            number, uuid = name.split(".")
            key = domain_key(int(number), UUID(uuid).bytes)
            try:
                state = (self.folder / "domains" / name).read_text()
            except OSError:
                continue
            (found.running if state == "up" else found.ended).add(key)
        return found

    def close(self) -> None:
        pass


class KeeperEyes:
    """What a keeper sees of the same."""

    def __init__(self, folder: Path, domid: int, handle: bytes) -> None:
        self._all = Eyes(folder)
        self.follow(domid, handle)

    def follow(self, domid: int, handle: bytes) -> None:
        self._key = domain_key(domid, handle)

    def fileno(self) -> int:
        return -1

    def drain(self) -> None:
        pass

    def ended(self) -> bool:
        return self._key not in self._all.domains().running

    def close(self) -> None:
        pass


class Hall:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "domains").mkdir(parents=True)
        self.uuids: dict[int, str] = {}
        self.host: Any = SimpleNamespace(real=True, hv=SimpleNamespace(domain=self._state))

    def _state(self, domid: int) -> Any:
        return SimpleNamespace(handle=UUID(self.uuids[domid]).bytes)

    def make(self, count: int) -> list[tuple[int, str]]:
        """So many domains run that nobody looks after yet."""
        made = []
        for _ in range(count):
            domid, uuid = FIRST + len(self.uuids), str(uuid4())
            self.put(domid, uuid, "up")
            journal.write(journal.Entry(uuid, f"hall-{domid}", "pv", "running", domid=domid))
            made.append((domid, uuid))
        return made

    def put(self, domid: int, uuid: str, state: str = "") -> None:
        self.uuids[domid] = uuid
        path = self.folder / "domains" / f"{domid}.{uuid}"
        if state:
            new = self.folder / f"new-{domid}"
            new.write_text(state)
            new.replace(path)
        else:
            path.unlink(missing_ok=True)

    def end(self, domid: int) -> None:
        self.put(domid, self.uuids[domid], "ended")

    def words(self) -> list[str]:
        path = self.folder / "words"
        return path.read_text().split() if path.exists() else []

    def say(self, word: str) -> None:
        with (self.folder / "words").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{word}\n")

    def forget(self, domid: int, uuid: str) -> None:
        """It is destroyed, by whoever calls this."""
        journal.remove(uuid)
        self.put(domid, uuid)

    def pids(self) -> set[int]:
        """Of all who look after a domain; 0 if nobody looks after one."""
        return {keeper.pid_of(uuid) for uuid in journal.uuids()}
