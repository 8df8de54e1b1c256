"""Ratios of medians with bootstrap confidence intervals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Comparison:
    """Times in milliseconds; ``ratio`` is ours divided by theirs, with its 95 % interval."""

    name: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    samples: int
    goal: float | None

    @property
    def verdict(self) -> str:
        """A goal counts as met only if the worse end of the interval meets it."""
        if self.goal is None:
            return ""
        return "met" if self.high <= self.goal else "missed"


def compare(
    name: str, ours: Sequence[float], theirs: Sequence[float], goal: float | None = None
) -> Comparison:
    """``ours`` and ``theirs`` are seconds, taken alternately."""
    chance = random.Random(1)
    ratios = sorted(
        median(chance.choices(ours, k=len(ours))) / median(chance.choices(theirs, k=len(theirs)))
        for _ in range(2000)
    )
    return Comparison(
        name,
        median(ours) * 1e3,
        median(theirs) * 1e3,
        median(ours) / median(theirs),
        ratios[50],
        ratios[-51],
        min(len(ours), len(theirs)),
        goal,
    )
