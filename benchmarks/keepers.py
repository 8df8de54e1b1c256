"""Memory of a further keeper, as the kernel counts it: PSS, proportional set size.

    python -m benchmarks.keepers [-n 100] [--where] [-o json]

Forks keepers from a zygote of its own, in folders of its own, and needs no Xen: in place of xenstored there
is a socket that says nothing, in place of the glance at the hypervisor one at a locked page. Everything else
is the keeper's: its lock, log, poll and pidfds. ``further`` is what all of them and the zygote take more than
the zygote took alone, divided by their number; ``after a wake`` the same after each heard an announcement and
looked. On a Xen host, ``tests/xen/test_keepers.py`` measures the real ones.
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


def zygote() -> None:
    """In the zygote's process: its keepers have eyes for the bell only."""
    from xtool.daemon.zygote import main
    from xtool.toolstack import deathwatch, keeping

    keep = keeping.keep
    keeping.keep = lambda *args: keep(*args, eyes=StillEyes)  # type: ignore[assignment]
    deathwatch.device_model_pid = lambda domid: 0
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


def measure(count: int, folder: Path) -> dict[str, object]:
    from xtool import warmlink
    from xtool.toolstack import journal, keeper

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
    domains: list[tuple[int, UUID]] = [(_FIRST + number, uuid4()) for number in range(count)]
    try:
        _until((folder / "run" / "zygote.sock").exists)
        links = []
        for domid, uuid in domains[:2]:  # what is written once only, by whoever is first
            journal.write(journal.Entry(str(uuid), f"bench-{domid}", "pv", "running", domid=domid))
            warmlink.ask_for_keeper(domid, str(uuid))
            links.append(bell.accept()[0])
        time.sleep(0.5)
        first = [pid for _, uuid in domains[:2] if (pid := keeper.pid_of(str(uuid)))]
        before = pss(process.pid) + sum(map(pss, first))
        began = time.monotonic()
        for domid, uuid in domains[2:]:
            journal.write(journal.Entry(str(uuid), f"bench-{domid}", "pv", "running", domid=domid))
            warmlink.ask_for_keeper(domid, str(uuid))
        took = time.monotonic() - began
        links += [bell.accept()[0] for _ in domains[2:]]
        time.sleep(1.0)
        pids = [keeper.pid_of(str(uuid)) for _, uuid in domains]
        further = (pss(process.pid) + sum(map(pss, pids)) - before) / (count - 2)
        example = where(pids[count // 2])
        for _ in range(3):
            for link in links:
                link.send(b"\0" * 40)
            time.sleep(0.5)
        woken = (pss(process.pid) + sum(map(pss, pids)) - before) / (count - 2)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        return {
            "keepers": count,
            "zygote": pss(process.pid),
            "further": round(further),
            "after a wake": round(woken),
            "start": round(took / (count - 2), 6),
            "where": example,
        }
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.keepers", description="Memory of a further keeper.")
    parser.add_argument("-n", type=int, default=100, help="how many")
    parser.add_argument("-o", choices=("table", "json"), default="table")
    parser.add_argument("--where", action="store_true", help="which mappings one alone has pages of")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.n, Path(folder))
    if options.o == "json":
        print(json.dumps(found))
        return 0
    for name in ("further", "after a wake", "zygote"):
        print(f"{name:<14} {int(str(found[name])) / 1024:9.0f} KiB")
    print(f"{'start':<14} {float(str(found['start'])) * 1000:9.2f} ms each")
    if options.where:
        for name, size in found["where"].items():  # type: ignore[attr-defined]
            print(f"  {name:<40} {size / 1024:6.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
