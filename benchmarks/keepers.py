"""Memory of a further domain for who looks after it, as the kernel counts it: PSS, proportional set size.

    python -m benchmarks.keepers [-n 100] [--where] [-o json]      a keeper each
    python -m benchmarks.keepers --watcher [-n 100] [-o json]      the watcher for all: bare domains

Forks keepers, or the watcher, from a zygote of its own, in folders of its own, and needs no Xen: in place of
xenstored there is a socket that says nothing, in place of the glance at the hypervisor one at a locked page.
Everything else is real: locks, logs, polls, pidfds. ``further`` is what all of them and the zygote take more
than they took for two domains, divided by their number; ``after a wake`` the same after each heard an
announcement and looked. On a Xen host, ``tests/xen/test_keepers.py`` measures the real ones.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

_FIRST = 100


class StillEyes:
    """Real descriptors, and the same calls as ``DeathWatch`` makes, but nothing ever ends."""

    def __init__(self, domid: int, handle: bytes) -> None:
        from xtool.xenstore.transport import connect_socket

        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._page[:16] = handle
        self._domid = domid
        self._link = connect_socket(os.environ["XTOOL_KEEPER_BELL"])
        from xtool.proto.xenstore import Op, encode, strings

        self._link.send(encode(Op.WATCH, 1, strings("@releaseDomain", "end")))

    def fileno(self) -> int:
        return self._link.fileno()

    def drain(self) -> None:
        while data := self._link.recv():
            if len(data) < 4096:
                return

    def ended(self) -> bool:
        return int.from_bytes(self._page[16:20], "little") != 0

    def follow(self, domid: int, handle: bytes) -> None:
        self._domid = domid

    def close(self) -> None:
        self._link.close()


class StillLookout:
    """The same for the watcher: all its domains run."""

    def __init__(self) -> None:
        self._one = StillEyes(0, bytes(16))
        self.fileno, self.close = self._one.fileno, self._one.close

    def drain(self) -> bool:
        self._one.drain()
        return True

    def domains(self) -> object:
        from xtool.hypercall.glance import Domains, domain_key
        from xtool.toolstack import journal

        alive = {domain_key(e.domid, UUID(e.uuid).bytes) for e in journal.entries()}
        return Domains(alive, set())


def zygote() -> None:
    """In the zygote's process: its keepers and its watcher have eyes for the bell only."""
    from xtool.daemon.zygote import main
    from xtool.toolstack import deathwatch, keeping, watching

    keep, watch = keeping.keep, watching.watch
    keeping.keep = lambda *args: keep(*args, StillEyes)  # type: ignore
    watching.watch = lambda *args: watch(*args, StillLookout)  # type: ignore
    deathwatch.device_model_pid = lambda domid: 0
    deathwatch.device_models = lambda domids: set()
    sys.argv[:] = ["zygote"]
    main()


def pss(pid: int) -> int:
    """Bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


def where(pid: int) -> dict[str, int]:
    """Bytes only this process has, by what is mapped there."""
    found: Counter[str] = Counter()
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = os.path.basename(words[5]) if len(words) > 5 else "anonymous"
        elif words[0] == "Private_Dirty:":
            found[name] += int(words[1]) << 10
    return {name: size for name, size in found.most_common() if size}


def _until(check: object, seconds: float = 60.0) -> object:
    end = time.monotonic() + seconds
    while not (found := check()):  # type: ignore[operator]
        if time.monotonic() > end:
            raise SystemExit("that did not happen within a minute: see keeper.log")
        time.sleep(0.02)
    return found


@contextmanager
def _bench(folder: Path, count: int) -> Iterator[tuple[int, socket.socket]]:
    """A zygote's pid, and the bell that all it forks connect to."""
    bell = socket.socket(socket.AF_UNIX)
    bell.bind(str(folder / "bell"))
    bell.listen(count)
    os.environ["XTOOL_RUN_DIR"] = str(folder / "run")
    os.environ["XTOOL_LOG_DIR"] = str(folder / "log")
    os.environ["XTOOL_KEEPER_BELL"] = str(folder / "bell")
    root = str(Path(__file__).resolve().parents[1])
    program = "from benchmarks.keepers import zygote; zygote()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": root}, cwd=root
    )
    try:
        _until((folder / "run" / "zygote.sock").exists)
        yield process.pid, bell
    finally:
        process.terminate()
        process.wait()


def measure(count: int, folder: Path) -> dict[str, object]:
    """A keeper for each of ``count`` domains."""
    from xtool import warmlink
    from xtool.toolstack import journal, keeper

    domains: list[tuple[int, UUID]] = [(_FIRST + number, uuid4()) for number in range(count)]
    with _bench(folder, count) as (zygote_pid, bell):
        links = []
        for domid, uuid in domains[:2]:  # what is written once only, by whoever is first
            journal.write(journal.Entry(str(uuid), f"bench-{domid}", "pv", "running", domid=domid))
            warmlink.ask_for_keeper(domid, str(uuid))
            links.append(bell.accept()[0])
        time.sleep(0.5)
        first = [pid for _, uuid in domains[:2] if (pid := keeper.pid_of(str(uuid)))]
        before = pss(zygote_pid) + sum(map(pss, first))
        began = time.monotonic()
        for domid, uuid in domains[2:]:
            journal.write(journal.Entry(str(uuid), f"bench-{domid}", "pv", "running", domid=domid))
            warmlink.ask_for_keeper(domid, str(uuid))
        took = time.monotonic() - began
        links += [bell.accept()[0] for _ in domains[2:]]
        time.sleep(1.0)
        pids = [keeper.pid_of(str(uuid)) for _, uuid in domains]
        further = (pss(zygote_pid) + sum(map(pss, pids)) - before) / (count - 2)
        example = where(pids[count // 2])
        for _ in range(3):
            for link in links:
                link.send(b"\0" * 40)
            time.sleep(0.5)
        woken = (pss(zygote_pid) + sum(map(pss, pids)) - before) / (count - 2)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        return {
            "keepers": count,
            "zygote": pss(zygote_pid),
            "further": round(further),
            "after a wake": round(woken),
            "start": round(took / (count - 2), 6),
            "where": example,
        }


def measure_watcher(count: int, folder: Path) -> dict[str, object]:
    """One watcher for ``count`` domains."""
    from xtool.toolstack import journal, keeper, watchlink

    def add(domid: int) -> None:
        uuid = str(uuid4())
        journal.write(journal.Entry(uuid, f"bench-{domid}", "pv", "running", domid=domid))
        if not watchlink.take(domid, uuid, keeper.start_watcher):
            raise SystemExit("the watcher refused a domain: see keeper.log")

    with _bench(folder, count) as (zygote_pid, bell):
        alone = pss(zygote_pid)
        for number in range(2):
            add(_FIRST + number)
        link = bell.accept()[0]
        time.sleep(0.5)
        pid = watchlink.pid()
        before = pss(zygote_pid) + pss(pid)
        began = time.monotonic()
        for number in range(2, count):
            add(_FIRST + number)
        took = time.monotonic() - began
        time.sleep(0.5)
        further = (pss(zygote_pid) + pss(pid) - before) / (count - 2)
        for _ in range(3):
            link.send(b"\0" * 40)
            time.sleep(0.5)
        woken = (pss(zygote_pid) + pss(pid) - before) / (count - 2)
        where_it_is = where(pid)
        os.kill(pid, signal.SIGTERM)
        return {
            "domains": count,
            "zygote": alone,
            "watcher": before - alone,
            "further": round(further),
            "after a wake": round(woken),
            "start": round(took / (count - 2), 6),
            "where": where_it_is,
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.keepers", description="Memory of a further domain.")
    parser.add_argument("--watcher", action="store_true", help="bare domains: one watcher for all")
    parser.add_argument("-n", type=int, default=100, help="how many")
    parser.add_argument("-o", choices=("table", "json"), default="table")
    parser.add_argument("--where", action="store_true", help="which mappings one alone has pages of")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = (measure_watcher if options.watcher else measure)(options.n, Path(folder))
    if options.o == "json":
        print(json.dumps(found))
        return 0
    for name in ("further", "after a wake", "zygote", *(["watcher"] if options.watcher else [])):
        print(f"{name:<14} {int(str(found[name])) / 1024:9.0f} KiB")
    print(f"{'start':<14} {float(str(found['start'])) * 1000:9.2f} ms each")
    if options.where:
        for name, size in found["where"].items():  # type: ignore[attr-defined]
            print(f"  {name:<40} {size / 1024:6.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
