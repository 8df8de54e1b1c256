"""One measurement of the split drivers, taken from each backend in turn: what was measured, what it cost, and
how ours compares. Knows nothing of Xen.

``sides`` are backends by name; ``OURS`` is ours. They alternate sample by sample, so that what changes on the
host hits all of them. A side that fails is left out from there on and says why; the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from benchmarks.stats import Comparison, compare

OURS = "xtool"
GIB = 1 << 30
#: What begins the line in which ``load`` says what it found.
MARK = "LOAD {"


class BenchError(Exception):
    """A measurement that could not be taken; the text says what was seen last."""


class Sample(NamedTuple):
    """``value`` is in the contest's unit. ``ns`` is how long it took, ``p50`` and ``p99`` are latencies in
    nanoseconds (0: none), ``cpu`` is nanoseconds of CPU time by who spent it."""

    value: float
    ops: int = 0
    bytes: int = 0
    ns: int = 0
    p50: int = 0
    p99: int = 0
    cpu: Mapping[str, int] = {}


@dataclass(frozen=True)
class Contest:
    """``goals`` are ratios to reach, by the name of the backend ours is compared with."""

    name: str
    unit: str
    at_least: bool = True
    goals: Mapping[str, float] = field(default_factory=dict)
    #: Compare the median latency as well.
    latency: bool = False


@dataclass
class Outcome:
    contest: Contest
    samples: dict[str, list[Sample]]
    failures: dict[str, str]

    def comparisons(self) -> list[Comparison]:
        """Ours with each of the others."""
        contest, ours = self.contest, self.samples.get(OURS) or []
        found = []
        for rival, theirs in self.samples.items():
            if rival == OURS or not ours or not theirs:
                continue
            found.append(
                compare(
                    f"{contest.name} / {rival}",
                    [s.value for s in ours],
                    [s.value for s in theirs],
                    contest.goals.get(rival),
                    unit=contest.unit,
                    scale=1.0,
                    at_least=contest.at_least,
                )
            )
            if contest.latency:
                name = f"{contest.name} latency / {rival}"
                mine, other = [float(s.p50) for s in ours], [float(s.p50) for s in theirs]
                found.append(compare(name, mine, other, unit="µs", scale=1e-3))
        return found

    def unjudged(self) -> list[str]:
        """Goals nothing can be said about, for one of the two could not be measured."""
        judged = {c.name for c in self.comparisons()}
        names = (f"{self.contest.name} / {rival}" for rival in self.contest.goals)
        return [name for name in names if name not in judged]


class Cost(NamedTuple):
    """Medians of one backend in one contest. None where it cannot be said. ``ns_per_op`` is the time of the
    whole machine, which in a deterministic lab is its instructions, idle time included."""

    contest: str
    backend: str
    value: float
    unit: str
    p50_us: float | None
    p99_us: float | None
    ns_per_op: float | None
    backend_s_per_gib: float | None
    dom0_s_per_gib: float | None


def cost(contest: Contest, backend: str, samples: list[Sample]) -> Cost:
    def middle(values: list[float]) -> float | None:
        return median(values) if values else None

    def cpu(who: str) -> float | None:
        spent = [(s.cpu[who] / 1e9, s.bytes) for s in samples if who in s.cpu and s.bytes]
        return middle([seconds * GIB / size for seconds, size in spent])

    return Cost(
        contest.name,
        backend,
        median(s.value for s in samples),
        contest.unit,
        middle([s.p50 / 1e3 for s in samples if s.p50]),
        middle([s.p99 / 1e3 for s in samples if s.p99]),
        middle([s.ns / s.ops for s in samples if s.ops and s.ns]),
        cpu("backend"),
        cpu("dom0"),
    )


@dataclass(frozen=True)
class Race:
    """A contest with who takes part. ``prepare`` is called before its first sample; ``quick``: it is run even
    when time is short."""

    contest: Contest
    sides: Mapping[str, Callable[[], Sample]]
    quick: bool = True
    prepare: Callable[[], None] = lambda: None


def hold(race: Race, samples: int, tell: Callable[[str], None] = lambda text: None) -> Outcome:
    """Take ``samples`` of each side in turn, after one that is thrown away."""
    contest = race.contest
    outcome = Outcome(contest, {name: [] for name in race.sides}, {})
    try:
        race.prepare()
    except Exception as error:
        outcome.failures = dict.fromkeys(race.sides, f"preparing it: {_words(error)}")
        tell(f"{contest.name} FAILED {outcome.failures}")
        return outcome
    for number in range(samples + 1):
        for name, take in race.sides.items():
            if name in outcome.failures:
                continue
            try:
                sample = take()
            except Exception as error:  # whatever it is, the other sides can be measured
                outcome.failures[name] = _words(error)
                # What was measured before the end is no fair sample of what it does.
                outcome.samples[name].clear()
                tell(f"{contest.name} on {name} FAILED: {outcome.failures[name]}")
                continue
            if number:
                outcome.samples[name].append(sample)
    for name, taken in outcome.samples.items():
        if taken:
            tell(f"{contest.name} on {name}: {median(s.value for s in taken):.4g} {contest.unit}")
    return outcome


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[-2500:]}"


def parse_load(text: str) -> dict[str, Any]:
    """The numbers ``load`` printed, from all that a console showed. Raises ``BenchError`` with its tail."""
    lines = [line[line.index(MARK) :] for line in text.splitlines() if MARK in line]
    if not lines:
        raise BenchError(f"load printed no result; seen: {text[-2000:]!r}")
    try:
        found = json.loads(lines[-1].removeprefix("LOAD ").strip())
    except ValueError:
        raise BenchError(f"load's result cannot be read: {lines[-1]!r}; seen: {text[-2000:]!r}") from None
    if "error" in found:
        raise BenchError(f"load failed: {found['error']}")
    for name in ("ops", "bytes", "ns"):
        if not isinstance(found.get(name), int) or found[name] < 0:
            raise BenchError(f"load's result has no {name}: {lines[-1]!r}")
    return dict(found)


def sample(found: Mapping[str, Any], unit: str, cpu: Mapping[str, int] | None = None) -> Sample:
    """A sample in ``unit`` from load's numbers. Raises ``BenchError`` for a run in which nothing happened."""
    ops, size, ns = found["ops"], found["bytes"], found["ns"]
    if not ops or not ns:
        raise BenchError(f"nothing came through: {dict(found)}")
    per_second = 1e9 / ns
    value = {
        "MB/s": size * per_second / 1e6,
        "kB/s": size * per_second / 1e3,
        "Mb/s": size * 8 * per_second / 1e6,
        "1/s": ops * per_second,
        "µs": found.get("p50", 0) / 1e3,
    }[unit]
    if value <= 0:
        raise BenchError(f"no {unit} in {dict(found)}")
    return Sample(value, ops, size, ns, found.get("p50", 0), found.get("p99", 0), cpu or {})
