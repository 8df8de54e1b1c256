"""Limits on what a device may do in a second. They delay, they never drop. Pure.

A limit is a bucket that holds ``burst`` seconds of its rate and fills at that rate. What was done is charged
afterwards, so the last request of a burst may overdraw the bucket by its own size; the debt is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: More than anybody asks for at once.
NO_LIMIT = 1 << 62
#: Less to wait is nothing, seconds: added to a clock's reading it may be lost in rounding.
_SOON = 1e-6


class Throttle:
    """``bytes_per_second`` and ``ops_per_second``; 0 is no limit. ``clock`` gives seconds."""

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

    @property
    def rates(self) -> tuple[int, int]:
        """Bytes and operations per second; 0 is no limit."""
        return self._rates

    def set(self, bytes_per_second: int = 0, ops_per_second: int = 0, burst: float | None = None) -> None:
        """Other limits from now on. What was used under the old ones is not forgotten, unless a limit was
        not there before, or is not any more."""
        now = self._clock()
        rates = (bytes_per_second, ops_per_second)
        for index, (old, new) in enumerate(zip(self._rates, rates, strict=True)):
            used = max(0.0, self._full_at[index] - now) * old
            self._full_at[index] = now + used / new if new else 0.0
        self._rates = rates
        self._burst = self._burst if burst is None else burst

    def charge(self, size: int, ops: int) -> None:
        now = self._clock()
        for index, amount in enumerate((size, ops)):
            if self._rates[index]:
                start = max(now, self._full_at[index])
                self._full_at[index] = start + amount / self._rates[index]

    def wait(self) -> float:
        """Seconds until more may be done; 0: now."""
        if not self:
            return 0.0
        now = self._clock()
        wait = max(full - now - self._burst for full in self._full_at)
        return wait if wait > _SOON else 0.0

    def room(self) -> tuple[int, int]:
        """Bytes and operations that are left in the buckets, 0 at least."""
        now = self._clock()
        bytes_left, ops_left = (
            max(0, int((now + self._burst - max(now, full)) * rate)) if rate else NO_LIMIT
            for rate, full in zip(self._rates, self._full_at, strict=True)
        )
        return bytes_left, ops_left


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Line:
    """Those who wait for one throttle, in the order in which they came: nobody is passed over.

    Whoever finds the line ``busy``, or the throttle saying wait, joins it; its callback is called when its
    turn comes, does one share of work, charges for it, and joins again if there is more. ``call_later`` is
    the loop's.
    """

    def __init__(
        self, throttle: Throttle, call_later: Callable[[float, Callable[[], None]], Cancellable]
    ) -> None:
        self._throttle = throttle
        self._call_later = call_later
        self._waiting: dict[object, Callable[[], None]] = {}
        self._timer: Cancellable | None = None

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def join(self, who: object, callback: Callable[[], None]) -> None:
        """Wait at the end of the line; somebody who is in it keeps the place."""
        self._waiting.setdefault(who, callback)
        if self._timer is None:
            self._arm()

    def leave(self, who: object) -> None:
        self._waiting.pop(who, None)

    def hurry(self) -> None:
        """The throttle has other limits: look again now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            self._arm()

    def _arm(self) -> None:
        self._timer = self._call_later(self._throttle.wait(), self._due)

    def _due(self) -> None:
        self._timer = None
        # Those who join again while we go through the line wait for the next time.
        for who in list(self._waiting):
            if self._throttle.wait() > 0:
                break
            callback = self._waiting.pop(who, None)
            if callback is not None:
                callback()
        if self._waiting and self._timer is None:
            self._arm()
