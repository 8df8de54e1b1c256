"""The loop a backend process lives in: event channels, file descriptors and timers, in one thread.

Ports go through ``Loop.dispatcher``; a round of it and a look at the descriptors take turns, so neither
starves the other. A callback that raises is removed and its ``fault`` is told; the loop goes on.
"""

from __future__ import annotations

import heapq
import logging
import os
import select
import time
from collections.abc import Callable
from itertools import count

from xtool.evtchn.dispatch import Dispatcher
from xtool.evtchn.port import EventChannels

log = logging.getLogger(__name__)

READ = select.POLLIN
WRITE = select.POLLOUT

#: Told what a callback raised.
Fault = Callable[[Exception], None]
#: Called with what ``poll`` said of the descriptor: ``READ``, ``WRITE``, ``select.POLLHUP``...
OnReady = Callable[[int], None]


class Timer:
    """What ``call_later`` gives. ``cancel`` may be called at any time, again too."""

    __slots__ = ("callback", "fault")

    def __init__(self, callback: Callable[[], None], fault: Fault | None) -> None:
        self.callback: Callable[[], None] | None = callback
        self.fault = fault

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """``clock`` gives seconds and never goes back. For one thread, but for ``wake``."""

    def __init__(
        self, channels: EventChannels, *, budget: int = 64, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.dispatcher = Dispatcher(channels, budget=budget, clock=clock)
        self.clock = clock
        self._poll = select.poll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake, READ)
        self._poll.register(self.dispatcher.fileno(), READ)
        self._ready: dict[int, tuple[OnReady, Fault | None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._serial = count()  # timers cannot be compared

    # --- descriptors
    def watch(self, fd: int, callback: OnReady, events: int = READ, fault: Fault | None = None) -> None:
        """Call ``callback`` whenever ``fd`` is ready; replaces what was said of ``fd`` before.

        The callback should take no more than a bounded amount at a time: it is called again.
        """
        self._poll.register(fd, events)
        self._ready[fd] = (callback, fault)

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; call it before the descriptor is closed. It need not be watched."""
        if self._ready.pop(fd, None) is not None:
            self._poll.unregister(fd)

    # --- time
    def call_later(self, seconds: float, callback: Callable[[], None], fault: Fault | None = None) -> Timer:
        timer = Timer(callback, fault)
        heapq.heappush(self._timers, (self.clock() + seconds, next(self._serial), timer))
        return timer

    def call_soon(self, callback: Callable[[], None], fault: Fault | None = None) -> Timer:
        """In the next round, outside of whoever asks for it."""
        return self.call_later(0.0, callback, fault)

    # --- running
    def wake(self) -> None:
        """Make ``run_once`` return. From any thread, or a signal handler."""
        os.eventfd_write(self._wake, 1)

    def run_once(self, timeout: float) -> None:
        """Wait for something to do for at most ``timeout`` seconds, and do one round of it."""
        timeout = min(timeout, self._due_in())
        own = self.dispatcher.timeout()
        if own is not None:
            timeout = min(timeout, own)
        # Rounded up: a timer that is due in half a millisecond must not be polled for in a tight loop.
        ready = self._poll.poll(-(-1000 * timeout // 1) if timeout > 0 else 0)
        self.dispatcher.dispatch()
        for fd, events in ready:
            if fd == self._wake:
                os.eventfd_read(self._wake)
                continue
            entry = self._ready.get(fd)
            if entry is not None:
                self._descriptor(fd, events, *entry)
        self._run_timers()

    def _descriptor(self, fd: int, events: int, callback: OnReady, fault: Fault | None) -> None:
        try:
            callback(events)
        except Exception as error:
            self.unwatch(fd)
            _tell(fault, error)

    def _due_in(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - self.clock()) if self._timers else float(1 << 20)

    def _run_timers(self) -> None:
        now = self.clock()
        due = []
        # Those that are added meanwhile wait for the next round.
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for timer in due:
            callback, timer.callback = timer.callback, None
            if callback is None:
                continue
            try:
                callback()
            except Exception as error:
                _tell(timer.fault, error)

    def close(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1


def _tell(fault: Fault | None, error: Exception) -> None:
    if fault is None:
        log.error("a callback of the loop failed and was removed", exc_info=error)
        return
    try:
        fault(error)
    except Exception:
        log.exception("closing after a failed callback failed as well")
