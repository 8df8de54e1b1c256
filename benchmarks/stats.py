"""Ratios of medians with bootstrap confidence intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Comparison:
    """Medians in ``unit``; ``ratio`` is ours divided by theirs, with its 95 % interval.

    ``at_least``: more is better, as of rates; else less is, as of times.
    """

    name: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    samples: int
    goal: float | None
    unit: str = "ms"
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """A goal counts as met only if the worse end of the interval meets it."""
        if self.goal is None:
            return ""
        return "met" if (self.low >= self.goal if self.at_least else self.high <= self.goal) else "missed"


def compare(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    goal: float | None = None,
    *,
    unit: str = "ms",
    scale: float = 1e3,
    at_least: bool = False,
) -> Comparison:
    """``ours`` and ``theirs``, taken alternately, times ``scale`` are in ``unit``: by default they are
    seconds."""
    chance = random.Random(1)
    ratios = sorted(
        median(chance.choices(ours, k=len(ours))) / median(chance.choices(theirs, k=len(theirs)))
        for _ in range(2000)
    )
    return Comparison(
        name,
        median(ours) * scale,
        median(theirs) * scale,
        median(ours) / median(theirs),
        ratios[50],
        ratios[-51],
        min(len(ours), len(theirs)),
        goal,
        unit,
        at_least,
    )


@dataclass(frozen=True)
class Figure:
    """One value against a goal that is no ratio: less is better."""

    name: str
    value: float
    unit: str
    goal: float | None

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        return f"(goal {self.goal:g}: {'met' if self.value <= self.goal else 'missed'})"


#: Samples with something, and without it.
Pair = tuple[Sequence[float], Sequence[float]]


def added(name: str, ours: Pair, theirs: Pair, goal: float | None = None) -> Comparison:
    """What something adds to ours, divided by what it adds to theirs; seconds in, milliseconds out."""

    def more(pair: Pair) -> float:
        return median(pair[0]) - median(pair[1])

    def again(pair: Pair, chance: random.Random) -> float:
        return more(tuple(chance.choices(part, k=len(part)) for part in pair))  # type: ignore[arg-type]

    samples = min(len(part) for part in (*ours, *theirs))
    again_ours, again_theirs = (lambda chance, pair=pair: again(pair, chance) for pair in (ours, theirs))
    return _resampled(name, more(ours), more(theirs), goal, again_ours, again_theirs, samples)


def slope(
    name: str,
    ours: Mapping[int, Sequence[float]],
    theirs: Mapping[int, Sequence[float]],
    goal: float | None = None,
) -> Comparison:
    """What one more guest adds, by least squares through the medians: samples in seconds by number of
    guests. At least two numbers."""

    def again(points: Mapping[int, Sequence[float]], chance: random.Random) -> float:
        return gradient({n: median(chance.choices(taken, k=len(taken))) for n, taken in points.items()})

    first, second = ({n: median(taken) for n, taken in points.items()} for points in (ours, theirs))
    samples = min(map(len, (*ours.values(), *theirs.values())))
    again_ours, again_theirs = (lambda chance, pts=pts: again(pts, chance) for pts in (ours, theirs))
    return _resampled(name, gradient(first), gradient(second), goal, again_ours, again_theirs, samples)


def gradient(points: Mapping[int, float]) -> float:
    """Of the line through these points that is nearest to them."""
    x_middle, y_middle = sum(points) / len(points), sum(points.values()) / len(points)
    spread = sum((x - x_middle) ** 2 for x in points)
    return sum((x - x_middle) * (y - y_middle) for x, y in points.items()) / spread


def _resampled(
    name: str,
    ours: float,
    theirs: float,
    goal: float | None,
    again: Callable[[random.Random], float],
    others: Callable[[random.Random], float],
    samples: int,
) -> Comparison:
    """Where theirs is not above zero, nothing can be said: the ratio is infinite and the goal missed."""
    chance = random.Random(1)

    def ratio(mine: float, other: float) -> float:
        return mine / other if other > 0 else math.inf

    ratios = sorted(ratio(again(chance), others(chance)) for _ in range(2000))
    return Comparison(
        name, ours * 1e3, theirs * 1e3, ratio(ours, theirs), ratios[50], ratios[-51], samples, goal
    )
