"""Our block, net and console backends against the kernel's, QEMU's and xenconsoled, on one host in one run.

    python3 -m benchmarks.split [-o json] [--quick] [--samples N] PLACE ...   (as root, on a Xen host)

A place is ``split`` (all), ``block``, ``net``, ``console``, or one of those with where the frontend is:
block-guest, block-dom0, block-ours, net-guest, net-dom0. ``--profile`` runs one case of each place on ours
alone, with the backend's process under a profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from benchmarks import blockbench, consolebench, netbench, profiles, report
from benchmarks.bench import Bench
from benchmarks.contest import OURS, BenchError, Outcome, Race, hold
from xtool.errors import XtoolError
from xtool.toolstack.host import open_host
from xtool.toolstack.keeper import reap_children
from xtool.toolstack.local import LocalClient

Place = Callable[[Bench], AbstractContextManager[list[Race]]]
PLACES: dict[str, Place] = {**blockbench.PLACES, **netbench.PLACES, **consolebench.PLACES}
PROFILED = {"block": blockbench.PROFILED, "net": netbench.PROFILED, "console": consolebench.PROFILED}
#: How much longer a profiled sample is: the process's start is in the profile as well.
_PROFILE_SPANS = 8


def chosen(words: list[str]) -> list[str]:
    """The places that words name, in the order they are run. Raises ``ValueError`` for a word that names
    none."""
    found = set()
    for word in words or ["split"]:
        named = {p for p in PLACES if word in ("split", p, p.partition("-")[0])}
        if not named:
            raise ValueError(f"{word} is no place: split, block, net, console, {', '.join(PLACES)}")
        found |= named
    return [place for place in PLACES if place in found]


@dataclass
class Results:
    outcomes: list[Outcome] = field(default_factory=list)
    #: Places that could not be set up or taken down, and why.
    broken: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, str] = field(default_factory=dict)

    def add_failure(self, place: str, error: Exception) -> None:
        self.broken[place] = f"{type(error).__name__}: {str(error)[-2500:]}"
        tell(f"{place} FAILED: {self.broken[place]}")
        if not isinstance(error, (BenchError, AssertionError, XtoolError)):
            traceback.print_exc()


def tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def measure(bench: Bench, place: str, samples: int, pattern: str, quick: bool, results: Results) -> None:
    tell(f"{place}: setting up")
    try:
        with PLACES[place](bench) as races:
            for race in races:
                if (quick and not race.quick) or not fnmatch(race.contest.name.partition(" ")[2], pattern):
                    continue
                results.outcomes.append(hold(race, samples, tell))
    except (BenchError, AssertionError, XtoolError, OSError) as error:
        results.add_failure(place, error)


def take_profile(bench: Bench, place: str, results: Results) -> None:
    """One long sample of one case on ours, between the start and the end of its process."""
    case = PROFILED[place.partition("-")[0]]
    folder = bench.folder / f"profile-{place}"
    tell(f"{place}: profiling {case}")
    try:
        with profiles.profiling(folder), PLACES[place](bench) as races:
            [race] = [race for race in races if race.contest.name.endswith(f" {case}")]
            race.prepare()
            bench.span *= _PROFILE_SPANS
            try:
                sample = race.sides[OURS]()
            finally:
                bench.span //= _PROFILE_SPANS
        head = f"{race.contest.name}: {sample.value:.5g} {race.contest.unit} with the profiler\n"
        results.profiles[place] = head + profiles.text(folder)
    except (BenchError, AssertionError, XtoolError, OSError) as error:
        results.add_failure(f"profile of {place}", error)


@contextmanager
def open_bench(span: int, kind: str) -> Iterator[Bench]:
    before = signal.signal(signal.SIGCHLD, lambda *_: reap_children())
    host = open_host()
    try:
        with tempfile.TemporaryDirectory(prefix="xtool-bench-") as folder:
            yield Bench(host, LocalClient(host), Path(folder), span, kind)
    finally:
        host.close()
        signal.signal(signal.SIGCHLD, before)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--samples", type=int, help="of each backend and case (7, quick 3)")
    parser.add_argument("--span", type=int, default=250, help="milliseconds of one sample (250)")
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer samples")
    parser.add_argument("--case", default="*", help="only cases that match, as in: --case 'read-4k*'")
    parser.add_argument("--guest", choices=("pv", "pvh"), default="pv", help="the guests' type (pv)")
    parser.add_argument("--profile", action="store_true", help="instead: where our process spends its time")
    parser.add_argument("places", nargs="*", metavar="PLACE")
    given = parser.parse_args()
    try:
        given.places = chosen(given.places)
    except ValueError as error:
        parser.error(str(error))
    if given.samples is None:
        given.samples = 3 if given.quick else 7
    if given.samples < 1 or given.span < 1:
        parser.error("--samples and --span are 1 or more")
    return given


def main() -> int:
    given = arguments()
    results = Results()
    # What guests print (tests/xen/guests.py tells it) is no result.
    with redirect_stdout(sys.stderr), open_bench(given.span, given.guest) as bench:
        for place in given.places:
            if given.profile:
                take_profile(bench, place, results)
            else:
                measure(bench, place, given.samples, given.case, given.quick, results)
    deterministic = os.environ.get("XTOOL_BENCH_CLOCK") == "instructions"
    show(results, given.output, deterministic)
    failed = results.broken or any(outcome.failures for outcome in results.outcomes)
    return 1 if failed else 0


def show(results: Results, output: str, deterministic: bool) -> None:
    rows = [row for outcome in results.outcomes for row in outcome.comparisons()]
    costs = report.all_costs(results.outcomes)
    if output == "json":
        found = {
            "deterministic": deterministic,
            "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
            "costs": [row._asdict() for row in costs],
            "failures": {
                f"{outcome.contest.name} on {name}": why
                for outcome in results.outcomes
                for name, why in outcome.failures.items()
            }
            | results.broken,
            "not_measured": [name for outcome in results.outcomes for name in outcome.unjudged()],
            "profiles": results.profiles,
        }
        print(json.dumps(found))
        return
    for place, text in results.profiles.items():
        print(f"== {place}\n{text}\n")
    if results.outcomes:
        print(report.comparisons(rows), end="\n\n")
        print(report.costs(costs, deterministic), end="\n\n")
        print(report.instructions_note(deterministic), end="\n\n")
    print(report.verdicts(results.outcomes, results.broken))


if __name__ == "__main__":
    sys.exit(main())
