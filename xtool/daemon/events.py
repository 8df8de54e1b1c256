"""Events: a bounded ring that any number of listeners read, each from where it is.

A listener is nothing but a place in the ring, so a slow one costs no memory: what it missed is told as one
``lost`` event with their number. Ids are ``<run>-<number>``: a listener that comes back with the id of
another run of the daemon is told that it lost nobody knows how many.

What guests can cause is limited per domain: more than ``BURST`` events at once, and ``RATE`` per second after
that, are counted and told as ``suppressed``. Else one guest could push everybody's events out of the ring.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from threading import Condition
from typing import Any

from xtool.client.records import Event

RING = 4096
RATE, BURST = 20.0, 60.0
#: Kinds that a guest can cause by itself, as often as it likes.
_GUESTS = ("device.state", "domain.renamed")


@dataclass
class _Bucket:
    tokens: float
    at: float
    dropped: int = 0


class Events:
    """Any thread may call."""

    def __init__(self, size: int = RING, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ring: deque[Event] = deque(maxlen=size)
        self._changed = Condition()
        self._run = secrets.token_hex(4)
        self._last = 0
        self._buckets: dict[int, _Bucket] = {}
        self._clock = clock
        self._closed = False

    @property
    def last_id(self) -> str:
        return f"{self._run}-{self._last}"

    def publish(self, kind: str, **values: Any) -> None:
        """``values`` are members of ``Event``."""
        self.put(Event("", time.time(), kind, **values))

    def put(self, event: Event) -> None:
        with self._changed:
            if event.kind in _GUESTS and not self._allowed(event):
                return
            if event.kind == "domain.destroyed":
                self._buckets.pop(event.domid, None)
            self._append(event)
            self._changed.notify_all()

    def _append(self, event: Event) -> None:
        self._last += 1
        self._ring.append(replace(event, id=self.last_id))

    def _allowed(self, event: Event) -> bool:
        now = self._clock()
        bucket = self._buckets.setdefault(event.domid, _Bucket(BURST, now))
        bucket.tokens = min(BURST, bucket.tokens + (now - bucket.at) * RATE)
        bucket.at = now
        if bucket.tokens < 1:
            bucket.dropped += 1
            return False
        bucket.tokens -= 1
        if bucket.dropped:
            self._append(replace(event, kind="suppressed", details={"count": bucket.dropped}))
            bucket.dropped = 0
        return True

    def close(self) -> None:
        """Every listener ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def follow(
        self, after: str = "", *, since: float | None = None, live: bool = True, patience: float = 15.0
    ) -> Iterator[Event | None]:
        """Events behind the one with the id ``after`` (empty: those to come, or those since ``since``,
        seconds since the epoch). None each ``patience`` seconds without one. Not ``live``: up to now only."""
        known, at = self._place(after, since)
        if not known:
            yield self._lost(None)
        while True:
            with self._changed:
                if live:
                    self._wait(at, patience)
                first = self._last - len(self._ring) + 1
                missed = max(0, first - at - 1)
                at += missed
                found = [self._ring[number - first] for number in range(at + 1, self._last + 1)]
                closed = self._closed
            if missed:
                yield self._lost(missed)
            yield from found
            at += len(found)
            if not found:
                if closed or not live:
                    return
                yield None

    def _wait(self, at: int, patience: float) -> None:
        self._changed.wait_for(lambda: self._closed or self._last > at, patience)

    def _place(self, after: str, since: float | None) -> tuple[bool, int]:
        """Whether it is known what came after that, and the number of the last event that is not wanted."""
        with self._changed:
            oldest = self._last - len(self._ring)
            if after:
                run, _, number = after.rpartition("-")
                if run == self._run and number.isascii() and number.isdecimal() and len(number) < 19:
                    return True, min(int(number), self._last)
                return False, oldest
            if since is None:
                return True, self._last
            early = sum(1 for event in self._ring if event.time < since)
            return True, oldest + early

    def _lost(self, count: int | None) -> Event:
        return Event(self.last_id if count is None else "", time.time(), "lost", details={"count": count})
