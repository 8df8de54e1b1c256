"""Disks: ours, the kernel's blkback and QEMU's qdisk, each with an image of its own in memory.

``block-guest``  a Linux guest with the three disks at once
``block-dom0``   the kernel's frontend in domain 0: no guest takes part. A loop device is the floor
``block-ours``   our frontend in domain 0, which QEMU cannot serve; its own Python is in every figure

Images lie in a tmpfs, so what is measured is the data path and not a disk.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import cpu
from benchmarks.bench import Bench
from benchmarks.contest import OURS, BenchError, Contest, Race, Sample, sample
from benchmarks.cpu import Meter
from benchmarks.dom0 import kernel_disk
from benchmarks.peers import Guest, Here
from tests.xen.guests import wait_state
from xtool.abi.io import BLKIF_OP_READ, BLKIF_OP_WRITE
from xtool.config.single import parse_disk
from xtool.devicemodel.process import find
from xtool.frontends.block import BlockFrontend
from xtool.toolstack.backends import server_pid
from xtool.toolstack.dom0disk import attached

SIZE = 64 << 20
BACKENDS = {OURS: "xvda", "phy": "xvdb", "qdisk": "xvdc"}
#: A loop device, with no split driver in front of it: what can be reached at all.
FLOOR = "loop"
_STRAIGHT = {"qdisk": 1.0}
_DEEP = {"qdisk": 1.0, "phy": 0.5}


@dataclass(frozen=True)
class Case:
    """One kind of load; ``operation`` and ``pattern`` as ``load block`` has them, ``size`` in bytes."""

    name: str
    operation: str
    pattern: str
    size: int
    depth: int
    unit: str
    goals: Mapping[str, float] = field(default_factory=dict)
    quick: bool = True

    @property
    def words(self) -> tuple[object, ...]:
        return self.operation, self.pattern, self.size, self.depth

    def contest(self, place: str) -> Contest:
        return Contest(f"{place} {self.name}", self.unit, True, self.goals, latency=self.depth == 1)


CASES = (
    Case("read-64k", "read", "seq", 64 << 10, 8, "MB/s", _STRAIGHT),
    Case("write-64k", "write", "seq", 64 << 10, 8, "MB/s", _STRAIGHT),
    Case("read-1m", "read", "seq", 1 << 20, 4, "MB/s", _STRAIGHT),
    Case("write-1m", "write", "seq", 1 << 20, 4, "MB/s", _STRAIGHT, quick=False),
    Case("read-4k-depth1", "read", "rand", 4096, 1, "1/s", {"qdisk": 0.8}),
    Case("read-4k-depth32", "read", "rand", 4096, 32, "1/s", _DEEP),
    Case("write-4k-depth32", "write", "rand", 4096, 32, "1/s", _DEEP, quick=False),
    Case("write-flush-4k", "flush", "rand", 4096, 1, "1/s", quick=False),
)
#: What is profiled: the case in which our process has most to do for each byte.
PROFILED = "read-4k-depth32"


def make_image(path: Path) -> Path:
    """Filled, so that no read finds a hole."""
    piece = Random(9).randbytes(1 << 20)
    with open(path, "wb") as file:
        for _ in range(SIZE // len(piece)):
            file.write(piece)
    return path


def _images(bench: Bench) -> dict[str, Path]:
    return {name: make_image(bench.folder / f"{name}.img") for name in BACKENDS}


def _races(place: str, takes: Mapping[str, Callable[[Case], Sample]]) -> list[Race]:
    return [
        Race(case.contest(place), {name: partial(take, case) for name, take in takes.items()}, case.quick)
        for case in CASES
    ]


@contextmanager
def in_guest(bench: Bench) -> Iterator[list[Race]]:
    images = _images(bench)
    disks = ", ".join(f"'{images[n]},raw,{vdev},backendtype={n}'" for n, vdev in BACKENDS.items())
    config = bench.config("block", disk=f"[{disks}]")
    with bench.guest(config) as (console, domid):
        for vdev in BACKENDS.values():
            wait_state(bench.client, config.name, vdev, "connected", 120)
        guest = Guest(console)

        def take(name: str, meter: Meter, case: Case) -> Sample:
            words = ("block", f"/dev/{BACKENDS[name]}", *case.words, bench.span)
            found, spent = meter.during(lambda: guest.run(*words))
            return sample(found, case.unit, spent)

        processes = cpu.names()
        pids = {
            OURS: _server(domid),
            "phy": cpu.blkback_threads(processes, domid, BACKENDS["phy"]),
            "qdisk": _qemu(domid),
        }
        meters = {name: Meter(bench.host.hv, pids[name]) for name in BACKENDS}
        yield _races("block-guest", {name: partial(take, name, meters[name]) for name in BACKENDS})


def _server(domid: int) -> list[int]:
    pid = server_pid(domid)
    return [pid] if pid is not None else []


def _qemu(domid: int) -> list[int]:
    model = find(domid)
    if model is None:
        return []
    model.close()
    return [model.pid]


@contextmanager
def in_dom0(bench: Bench) -> Iterator[list[Race]]:
    with ExitStack() as undo:
        paths: dict[str, tuple[str, Meter]] = {}
        for name, image in _images(bench).items():
            vdev = BACKENDS[name]
            wanted = parse_disk([f"{image},raw,{vdev},backendtype={name}"])
            path, pids = undo.enter_context(kernel_disk(bench.host, wanted))
            if name == OURS:
                pids = _server(0)
            elif name == "phy":
                pids = cpu.blkback_threads(cpu.names(), 0, vdev)
            paths[name] = path, Meter(bench.host.hv, pids)
        floor = str(make_image(bench.folder / "floor.img"))
        held = bench.host.hotplug.open_disk(floor, readonly=False, direct_io=False, loop=True)
        undo.callback(held.close)
        paths[FLOOR] = held.path, Meter(bench.host.hv, [])

        def take(name: str, case: Case) -> Sample:
            path, meter = paths[name]
            found, spent = meter.during(lambda: Here().run("block", path, *case.words, bench.span))
            return sample(found, case.unit, spent)

        yield _races("block-dom0", {name: partial(take, name) for name in paths})


@contextmanager
def by_our_frontend(bench: Bench) -> Iterator[list[Race]]:
    with ExitStack() as undo:
        disks: dict[str, tuple[BlockFrontend, Meter]] = {}
        for name in (OURS, "phy"):
            image = make_image(bench.folder / f"{name}.img")
            wanted = parse_disk([f"{image},raw,xvda,backendtype={name}"])
            disk = undo.enter_context(attached(bench.host, wanted))
            pids = _server(0)
            if name == "phy":
                pids = cpu.blkback_threads(cpu.names(), 0, "xvda")
            disks[name] = disk, Meter(bench.host.hv, pids)

        def take(name: str, case: Case) -> Sample:
            disk, meter = disks[name]
            found, spent = meter.during(lambda: drive(disk, case, bench.span / 1e3))
            return sample(found, case.unit, spent)

        yield _races("block-ours", {name: partial(take, name) for name in disks})


def _wait_event(disk: BlockFrontend) -> None:
    if select.select([disk.fileno()], [], [], 1.0)[0]:
        disk.events_came()


def drive(
    disk: BlockFrontend,
    case: Case,
    seconds: float,
    wait: Callable[[BlockFrontend], None] | None = None,
    deadline: float = 60.0,
) -> dict[str, Any]:
    """The same load as ``load block`` by our frontend; its numbers. ``wait`` waits for an event.
    Raises ``BenchError``."""
    wait = wait or _wait_event
    writing, flushing = case.operation != "read", case.operation == "flush"
    operation = BLKIF_OP_WRITE if writing else BLKIF_OP_READ
    units, dice = disk.size // case.size, Random(3)
    times: list[int] = []
    errors: list[OSError] = []
    state = {"flying": 0, "next": 0}
    begin = time.perf_counter_ns()
    end, last = begin + int(seconds * 1e9), time.monotonic() + seconds + deadline

    def start(view: memoryview) -> None:
        unit = state["next"] % units if case.pattern == "seq" else dice.randrange(units)
        state["next"] += 1
        state["flying"] += 1
        at = time.perf_counter_ns()

        def written(error: OSError | None) -> None:
            if error is not None:
                done(error)
            else:
                disk.submit_flush(done)

        def done(error: OSError | None) -> None:
            state["flying"] -= 1
            if error is not None:
                errors.append(error)  # raised by who drives: a frontend that closes calls this, too
                return
            times.append(time.perf_counter_ns() - at)
            free.append(view)

        disk.submit(operation, unit * case.size, view, written if flushing else done)

    free = [memoryview(bytearray(case.size)) for _ in range(case.depth)]
    while state["flying"] or time.perf_counter_ns() < end:
        while free and time.perf_counter_ns() < end:
            start(free.pop())
        before = len(times)
        disk.poll()
        if errors:
            raise BenchError(f"{case.name}: {errors[0]}")
        if len(times) == before and state["flying"]:
            if time.monotonic() > last:
                raise BenchError(f"{case.name}: {state['flying']} requests without an answer")
            wait(disk)
    ns = time.perf_counter_ns() - begin
    times.sort()
    count = len(times)
    return {
        "ops": count,
        "bytes": count * case.size,
        "ns": ns,
        "p50": times[count // 2],
        "p99": times[count - 1 - count // 100],
    }


PLACES = {"block-guest": in_guest, "block-dom0": in_dom0, "block-ours": by_our_frontend}
