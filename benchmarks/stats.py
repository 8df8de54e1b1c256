"""Ratios of medians with bootstrap confidence intervals."""

from __future__ import annotations

import random
from collections.abc import Sequence
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
