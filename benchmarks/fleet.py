"""The engine against xl: one guest, one guest beside a hundred, many at once, what each costs domain 0.

    python3 -m benchmarks.fleet [-o json] [--samples N] [--guests N] [PART ...]      (as root, on a Xen host)

``PARTS`` says what each part measures. ``api`` is a request to a running xtoold, ``cold`` a whole ``xtool``
process, ``xl`` a whole ``xl`` process; they take turns, and a row is told as soon as it is there. The guests
that stand by in ``cold``, ``list`` and ``growth`` are ours, paused, of 8 MiB: the same for all sides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

from benchmarks.contest import BenchError
from benchmarks.report import comparisons
from benchmarks.sides import PREFIX, Api, Bench, Commands, Side, timed
from benchmarks.stats import Comparison, Figure, added, compare, slope
from xtool.client.socketclient import SocketClient

#: How many guests stand by, in ``growth``: at each one guest is created and destroyed by all sides.
STEPS = (1, 10, 50, 100, 150)
#: Guests made at the same time in ``storm``.
LANES = (1, 4, 8)


# --- the parts ------------------------------------------------------------------------------------------
def api(bench: Bench) -> None:
    """P1: create to paused, 128 MiB, by a request to a running xtoold; goal 0.5 of xl's. And its end."""
    creates, destroys = bench.turns(("api", "xl"))
    bench.row(compare("create, api", creates["api"], creates["xl"], 0.5))
    bench.row(compare("destroy, api", destroys["api"], destroys["xl"], 1.0))


def cold(bench: Bench) -> None:
    """P2: the same as a whole process, with no guest (goal 1.2) and with a hundred (0.6)."""
    for standing, goal in ((0, 1.2), (bench.guests, 0.6)):
        bench.stand_by(standing)
        creates, _ = bench.turns(("cold", "xl"))
        bench.row(compare(f"create, cold, {standing} guests", creates["cold"], creates["xl"], goal))


def lists(bench: Bench) -> None:
    """P4: list all guests, 1 and a hundred of them; goals at a hundred 0.2 by request, 0.5 as a process."""
    for standing in (1, bench.guests):
        bench.stand_by(standing)
        taken: dict[str, list[float]] = {name: [] for name in bench.sides()}
        for number in range(bench.samples + 1):
            for name, side in bench.sides().items():
                seconds = timed(side.list_all)
                if number:
                    taken[name].append(seconds)
        goals = {"api": 0.2, "cold": 0.5} if standing == bench.guests else {}
        for name in ("api", "cold"):
            bench.row(compare(f"list, {name}, {standing} guests", taken[name], taken["xl"], goals.get(name)))


def growth(bench: Bench) -> None:
    """P3: create beside 1 to 150 guests: what each further guest adds (goal 0.15 of what it adds to xl's
    create), and the create beside the most (0.25)."""
    points: dict[str, dict[int, list[float]]] = {"api": {}, "xl": {}}
    steps = sorted({min(step, bench.guests * 3 // 2) for step in STEPS})
    for standing in steps:
        bench.stand_by(standing)
        creates, _ = bench.turns(("api", "xl"), max(3, bench.samples // 2), memory=8)
        for name, taken in creates.items():
            points[name][standing] = taken
        last = compare(f"create, api, {standing} guests", creates["api"], creates["xl"],
                       0.25 if standing == steps[-1] else None)  # fmt: skip
        bench.row(last)
    bench.row(slope("create, growth per guest", points["api"], points["xl"], 0.15))


def devices(bench: Bench) -> None:
    """P6, P7: what an interface, a disk, both add to a create (goal 0.15 of what they add to xl's), both
    against the dearer of the two (1.3), and the end of such guests (0.3, 0.4)."""
    taken: dict[str, dict[str, list[float]]] = {}
    ends: dict[str, dict[str, list[float]]] = {}
    kinds = {"bare": {}, "vif": {"vif": True}, "vbd": {"disk": True}, "both": {"vif": True, "disk": True}}
    for kind, keys in kinds.items():
        taken[kind], ends[kind] = bench.turns(("api", "xl"), **keys)
        bench.tell(
            f"{kind}: {median(taken[kind]['api']) * 1e3:.1f} / {median(taken[kind]['xl']) * 1e3:.1f} ms"
        )
    bare = taken["bare"]
    for kind in ("vif", "vbd", "both"):
        sides = [(taken[kind][side], bare[side]) for side in ("api", "xl")]
        bench.row(added(f"create, {kind} adds", sides[0], sides[1], 0.15))
    one = max(("vif", "vbd"), key=lambda kind: median(taken[kind]["api"]))
    both, single = (taken["both"]["api"], bare["api"]), (taken[one]["api"], bare["api"])
    bench.row(added(f"create, both add / {one} adds, ours", both, single, 1.3))
    for kind, goal in (("bare", 1.0), ("vif", 0.3), ("vbd", 0.4), ("both", None)):
        bench.row(compare(f"destroy, {kind}", ends[kind]["api"], ends[kind]["xl"], goal))


def hvm(bench: Bench) -> None:
    """P7: a guest with a QEMU: its end (goal 0.1)."""
    creates, destroys = bench.turns(("api", "xl"), max(3, bench.samples // 2), kind="hvm")
    bench.row(compare("create, hvm", creates["api"], creates["xl"], 0.8))
    bench.row(compare("destroy, hvm", destroys["api"], destroys["xl"], 0.1))


def memory(bench: Bench) -> None:
    """P14: memory of domain 0's processes per guest (PSS of them all, xenstored included): a bare one (goal
    0.2 MiB), one with an interface and a disk (3 MiB). xl's beside it."""
    count = max(2, bench.guests // 5)
    both: dict[str, Any] = {"vif": True, "disk": True}
    kinds: tuple[tuple[str, dict[str, Any], float, tuple[str, ...]], ...] = (
        ("bare", {}, 0.2, ("api", "xl")),
        ("vif and vbd of the kernel", both, 3.0, ("api", "xl")),
        ("vif and vbd of ours", {**both, "ours": True}, 3.0, ("api",)),
    )
    for kind, keys, goal, sides in kinds:
        found = {}
        for name in sides:
            side = bench.sides()[name]
            names = [f"{PREFIX}-mem-{name}-{n}" for n in range(count + 1)]
            made = []
            try:
                # What the first one alone brings, the watcher of bare guests say, is not the others'.
                side.create(bench.wanted(names[0], memory=8, **keys))
                made.append(names[0])
                before = _settled(bench.pss)
                for each in names[1:]:
                    side.create(bench.wanted(each, memory=8, **keys))
                    made.append(each)
                found[name] = (_settled(bench.pss) - before) / count / (1 << 20)
            finally:
                for each in made:
                    side.destroy(each)
        bench.figure(Figure(f"memory per guest, {kind}", found["api"], "MiB", goal))
        if "xl" in found:
            bench.figure(Figure(f"memory per guest, {kind}, xl", found["xl"], "MiB", None))


def _settled(pss: Callable[[], int]) -> int:
    """As soon as it does not change any more, by more than a part in a thousand."""
    last = pss()
    for _ in range(20):
        sleep(0.5)
        now = pss()
        if abs(now - last) <= last / 1000:
            return now
        last = now
    return last


def storm(bench: Bench) -> None:
    """P15: guests that start at once, until the last one runs: so many requests at a time (goal 0.6 of xl,
    one after the other; 1.3 times as fast as our own one after the other). Only in the ordinary lab
    (``--wall``) do processors work at the same time."""
    count, rounds = max(2, bench.guests // 2), 3
    taken: dict[str, list[float]] = {name: [] for name in (*(f"{n} at once" for n in LANES), "xl")}
    for number in range(rounds):
        for lanes in LANES:
            taken[f"{lanes} at once"].append(_storm(bench, bench.api, count, lanes))
        taken["xl"].append(_storm(bench, bench.xl, count, 1))
        bench.tell(
            f"storm {number + 1} of {rounds}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in taken.items())
        )
    for lanes in LANES:
        mine = taken[f"{lanes} at once"]
        bench.row(
            compare(f"storm of {count}, {lanes} at once", mine, taken["xl"], 0.6 if lanes > 1 else None)
        )
    bench.row(
        compare(f"storm of {count}, {LANES[1]} at once / 1", taken[f"{LANES[1]} at once"],
                taken["1 at once"], 1 / 1.3)
    )  # fmt: skip


def _storm(bench: Bench, side: Side, count: int, lanes: int) -> float:
    names = [f"{PREFIX}-storm-{n}" for n in range(count)]
    wanted = [bench.wanted(name, memory=8, paused=False) for name in names]
    if isinstance(side, Commands):
        for each in wanted:
            side.prepare(each)
    queue, failed, made = list(wanted), [], []
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not queue:
                    return
                each = queue.pop(0)
            try:
                side.create(each)
                made.append(each.name)
            except Exception as error:
                failed.append(f"{each.name}: {error}")

    threads = [threading.Thread(target=work) for _ in range(lanes)]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    try:
        seconds = timed(run)
    finally:
        for name in made:
            side.destroy(name)
    if failed:
        raise BenchError(f"{len(failed)} of {count} failed: {failed[0]}")
    return seconds


#: In the order in which they are run: with few guests first. ``list`` is called so on the command line.
PARTS: dict[str, Callable[[Bench], None]] = {
    "api": api,
    "devices": devices,
    "hvm": hvm,
    "memory": memory,
    "storm": storm,
    "cold": cold,
    "list": lists,
    "growth": growth,
}


def run(bench: Bench, parts: Sequence[str]) -> dict[str, str]:
    """What failed: part -> why. The other parts go on."""
    broken = {}
    for name in parts:
        bench.tell(f"== {name}")
        try:
            PARTS[name](bench)
        except Exception as error:  # whatever it is, the rows there are count
            broken[name] = f"{type(error).__name__}: {str(error)[-1000:]}"
            bench.tell(f"{name} FAILED: {broken[name]}")
    bench.leave()
    return broken


# --- a real host ------------------------------------------------------------------------------------------
def processes_pss() -> int:
    """Bytes, of all processes but this one. Raises ``OSError`` when nothing can be read."""
    total = 0
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        try:
            lines = Path(f"/proc/{entry}/smaps_rollup").read_text().splitlines()
        except OSError:  # a kernel thread, or one that ended
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    if not total:
        raise OSError("no process' memory can be read: be root")
    return total


@contextmanager
def xtoold(folder: Path) -> Iterator[str]:
    """A daemon of our own; its socket."""
    path = folder / "xtoold.sock"
    read, write = os.pipe()
    argv = [sys.executable, "-m", "xtool.daemon", "--socket", str(path), "--ready-fd", str(write)]
    process = subprocess.Popen(argv, pass_fds=(write,))
    os.close(write)
    ready = os.read(read, 1)
    os.close(read)
    if not ready:
        raise BenchError(f"xtoold did not come up: status {process.wait()}; is another one running?")
    try:
        yield str(path)
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.fleet", description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
        epilog="\n".join(f"{name:8} {part.__doc__}" for name, part in PARTS.items()),
    )  # fmt: skip
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--samples", type=int, default=9, help="of each side in each comparison")
    parser.add_argument("--guests", type=int, default=100, help="how many 'a hundred' is; others follow")
    parser.add_argument("parts", nargs="*", choices=[[], "fleet", *PARTS], metavar="PART")
    given = parser.parse_args()
    parts = [name for name in PARTS if name in given.parts] or list(PARTS)
    from benchmarks.dom0 import bridge

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = stack.enter_context(xtoold(folder))
        above = stack.enter_context(bridge("xtbench9", "10.99.9.1"))
        side = Api(lambda: SocketClient(path))
        bench = Bench(
            side,
            Commands("xtool", folder),
            Commands("xl", folder),
            given.samples,
            given.guests,
            above,
            folder,
            processes_pss,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
        try:
            broken = run(bench, parts)
        finally:
            for name in side.names():
                if name.startswith(f"{PREFIX}-"):
                    side.destroy(name)
    if given.output == "json":
        found: list[Comparison | Figure] = [*bench.rows, *bench.figures]
        rows = [{**asdict(row), "verdict": row.verdict} for row in found]
        print(json.dumps({"rows": rows, "failures": broken}))
    else:
        print(comparisons(bench.rows))
        for figure in bench.figures:
            print(f"{figure.name:44} {figure.value:10.4g} {figure.unit:4} {figure.verdict}")
        for name, why in broken.items():
            print(f"FAILED {name}: {why}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
