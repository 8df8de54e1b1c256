"""Limits on what a device may do in a second. They delay, they never drop. Pure."""

from __future__ import annotations

from collections.abc import Callable


class Throttle:
    """``bytes_per_second`` and ``ops_per_second``; 0 is no limit. Bursts of ``burst`` seconds are free.

    What was done is charged afterwards: a debt, to be waited for before the next.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        bytes_per_second: int = 0,
        ops_per_second: int = 0,
        burst: float = 0.1,
    ) -> None:
        self._clock = clock
        self._rates = (bytes_per_second, ops_per_second)
        self._burst = burst
        # When each bucket would be full again: the debt is how far that lies beyond the burst.
        self._full_at = [0.0, 0.0]

    def __bool__(self) -> bool:
        return any(self._rates)

    def charge(self, size: int, ops: int) -> None:
        now = self._clock()
        for index, amount in enumerate((size, ops)):
            if self._rates[index]:
                start = max(now, self._full_at[index])
                self._full_at[index] = start + amount / self._rates[index]

    def wait(self) -> float:
        """Seconds until more may be done; 0: now."""
        now = self._clock()
        return max(0.0, *(full - now - self._burst for full in self._full_at)) if self else 0.0
