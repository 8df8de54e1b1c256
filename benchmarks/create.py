"""Creating and destroying guests, against ``xl create -p`` and ``xl destroy`` on the same host.

Ours is the toolstack's own verb in a process that is already running (its interpreter start is printed
apart); xl is timed as the process it is. The two alternate, so that what changes on the host hits both.

    python3 -m benchmarks.create [-o json] [--samples N] [CASE ...]     (as root, on a Xen host)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter

from benchmarks.stats import Comparison, compare
from xtool import paths
from xtool.config import parse_config
from xtool.toolstack.api import Client, CreateOptions
from xtool.toolstack.local import open_client

GUESTS = Path(__file__).resolve().parents[1] / "build" / "guest"
NAME = "xtool-bench"


@dataclass(frozen=True)
class Case:
    """One kind of guest. ``goals`` are the ratios to reach: first create, repeated create, destroy."""

    name: str
    type: str
    memory: int
    kernel: str | None = None
    ramdisk: str | None = None
    extra: dict[str, object] = field(default_factory=dict)
    first: float | None = None
    repeat: float | None = None
    destroy: float | None = 1.0

    def ours(self) -> str:
        keys: dict[str, object] = {"name": NAME, "type": self.type, "memory": self.memory, **self.extra}
        if self.kernel:
            keys["kernel"] = str(GUESTS / self.kernel)
        if self.ramdisk:
            keys["ramdisk"] = str(GUESTS / self.ramdisk)
        return json.dumps(keys)

    def xl(self) -> str:
        keys: dict[str, object] = {"name": NAME + "-xl", "type": self.type, "memory": self.memory}
        keys |= self.extra
        if self.kernel:
            keys["kernel"] = str(GUESTS / self.kernel)
        if self.ramdisk:
            keys["ramdisk"] = str(GUESTS / self.ramdisk)
        return "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()) + "\n"


CASES = (
    Case("tiny-pv", "pv", 128, "tiny-pv.elf", repeat=0.5),
    Case("tiny-pvh", "pvh", 128, "tiny-pvh.elf"),
    Case("linux-pv", "pv", 256, "vmlinuz-generic", "initramfs.cpio.gz", first=1.1, repeat=0.1),
    Case("linux-pvh", "pvh", 256, "vmlinuz-generic", "initramfs.cpio.gz", first=1.1, repeat=0.1),
    Case("hvm", "hvm", 128, extra={"serial": "pty", "vga": "stdvga"}, repeat=0.8, destroy=0.1),
)


def timed(action: Callable[[], object]) -> float:
    began = perf_counter()
    action()
    return perf_counter() - began


class Runner:
    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        self.folder = folder

    def ours(self, case: Case) -> tuple[float, float]:
        """Seconds of create and of destroy."""
        config = parse_config(case.ours(), f"{case.name}.yaml", "/")
        options = CreateOptions(paused=True)
        create = timed(lambda: self.client.create(config, options))
        return create, timed(lambda: self.client.destroy(NAME))

    def xl(self, case: Case) -> tuple[float, float]:
        file = self.folder / f"{case.name}.cfg"
        file.write_text(case.xl())
        create = timed(lambda: _run("xl", "create", "-p", "-q", str(file)))
        return create, timed(lambda: _run("xl", "destroy", NAME + "-xl"))

    def measure(self, case: Case, samples: int) -> Iterator[Comparison]:
        self.xl(case)  # file caches warm for both
        first = []
        if case.first is not None:
            for _ in range(max(3, samples // 3)):
                shutil.rmtree(paths.cache_dir() / "kernels", ignore_errors=True)
                first.append(self.ours(case))
        else:
            self.ours(case)
        pairs = []
        for _ in range(samples):
            gc.collect()
            pairs.append((self.ours(case), self.xl(case)))
        ours, theirs = [p[0] for p in pairs], [p[1] for p in pairs]
        if first:
            yield compare(
                f"{case.name} create, first", [f[0] for f in first], [t[0] for t in theirs], case.first
            )
        yield compare(f"{case.name} create", [o[0] for o in ours], [t[0] for t in theirs], case.repeat)
        yield compare(f"{case.name} destroy", [o[1] for o in ours], [t[1] for t in theirs], case.destroy)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def cold_start(samples: int) -> dict[str, float]:
    """Milliseconds of whole processes, for information: what a command costs before it does anything."""
    commands = {
        "python3 -S -c pass": ["python3", "-S", "-c", "pass"],
        "xtool list": ["xtool", "list"],
        "xl list": ["xl", "list"],
    }
    found = {}
    for name, argv in commands.items():
        times = sorted(timed(lambda argv=argv: _run(*argv)) for _ in range(max(3, samples // 2)))  # type: ignore[misc]
        found[name] = times[len(times) // 2] * 1e3
    return found


def peak_memory(client_uri: str = "xen:") -> dict[str, int]:
    """Peak resident KiB of a process that builds one guest, by guest type and memory (MiB)."""
    found = {}
    for kind in ("pv", "pvh"):
        for memory in (64, 1024):
            case = Case("memory", kind, memory, f"tiny-{kind}.elf")
            child = os.fork()
            if child == 0:
                client = open_client(client_uri)
                client.create(parse_config(case.ours(), "memory.yaml", "/"), CreateOptions(paused=True))
                client.destroy(NAME)
                with open("/tmp/xtool-bench-peak", "w") as file:
                    file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
                os._exit(0)
            os.waitpid(child, 0)
            with open("/tmp/xtool-bench-peak") as file:
                found[f"{kind} {memory}"] = int(file.read())
            os.unlink("/tmp/xtool-bench-peak")
    return found


def table(rows: list[Comparison]) -> str:
    lines = [f"{'':28} {'xtool ms':>10} {'xl ms':>10} {'ratio':>7} {'95 %':>15} {'goal':>6}"]
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:g}"
        interval = f"{row.low:.3f}-{row.high:.3f}"
        lines.append(
            f"{row.name:28} {row.ours:10.1f} {row.theirs:10.1f} {row.ratio:7.3f} {interval:>15} {goal:>6}"
            f" {row.verdict}"
        )
    return "\n".join(lines)


@contextmanager
def _client() -> Iterator[Client]:
    client = open_client()
    try:
        yield client
    finally:
        client.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="peak memory of builds, too")
    parser.add_argument("cases", nargs="*", choices=[[], *(c.name for c in CASES)])
    arguments = parser.parse_args()
    chosen = [c for c in CASES if not arguments.cases or c.name in arguments.cases]
    rows: list[Comparison] = []
    with tempfile.TemporaryDirectory() as folder, _client() as client:
        runner = Runner(client, Path(folder))
        for case in chosen:
            for row in runner.measure(case, arguments.samples):
                rows.append(row)
                print(f"{row.name}: {row.ratio:.3f}", file=sys.stderr, flush=True)
    start = cold_start(arguments.samples)
    memory = peak_memory() if arguments.memory else {}
    if arguments.output == "json":
        print(json.dumps({"rows": [asdict(r) for r in rows], "cold_ms": start, "peak_kib": memory}))
        return 0
    print(table(rows))
    print("\nWhole processes (ms): " + ", ".join(f"{name} {ms:.0f}" for name, ms in start.items()))
    if memory:
        print("Peak memory of a build (KiB): " + ", ".join(f"{k} MiB {v}" for k, v in memory.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
