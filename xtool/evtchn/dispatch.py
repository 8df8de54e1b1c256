"""Thousands of ports, a handler each, no port able to starve another.

Work goes in rounds. In a round each port that has something to do is called once, with a budget: how much it
may do before it gives way. Its verdict says what becomes of the port:

=======  =========================================================================================
DONE     nothing is left: the port is unmasked at the end of the round (one write for all of them)
MORE     the budget is used up: the port stays masked and is called again in the next round
IDLE     there was nothing to do. Once in a while that is normal; a port that does it again and again
         (a peer that only notifies) is unmasked later and later, up to ``IDLE_DELAY_MAX``
=======  =========================================================================================

A port is masked from its event until the unmask, so a flood of events costs one call per round. An event
that comes while the port is masked is reported after the unmask: a handler that looked once more before it
said DONE misses nothing.
"""

from __future__ import annotations

import heapq
import logging
import select
import time
from collections.abc import Callable
from enum import Enum
from itertools import count

from xtool.evtchn.port import PORTS_AT_ONCE, EventChannels

log = logging.getLogger(__name__)

#: Rounds in a row a port may find nothing to do before it is slowed down.
IDLE_FREE = 16
#: Seconds added for each further one, and the most it can come to.
IDLE_DELAY = 0.001
IDLE_DELAY_MAX = 0.020


class Verdict(Enum):
    DONE = "done"
    MORE = "more"
    IDLE = "idle"


#: Called with the budget. None counts as DONE.
Handler = Callable[[int], "Verdict | None"]
#: Called with the port and what its handler raised; closes the device the port belongs to.
Fault = Callable[[int, Exception], None]


class _Entry:
    __slots__ = ("fault", "handler", "idle")

    def __init__(self, handler: Handler, fault: Fault | None) -> None:
        self.handler = handler
        self.fault = fault
        self.idle = 0


class Dispatcher:
    """Calls handlers for the events of ``channels``. ``budget`` is handed to every handler: units of work
    (requests, frames) per round, as the handlers understand it. For one thread.

    Alone: ``while running: dispatcher.run_once(1.0)``. In a loop of your own: wait for ``fileno()`` to be
    readable, at most ``timeout()`` seconds, then call ``dispatch()``.
    """

    def __init__(
        self, channels: EventChannels, *, budget: int = 64, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.channels = channels
        self.budget = budget
        self._clock = clock
        self._entries: dict[int, _Entry] = {}
        self._backlog: dict[int, _Entry] = {}  # to be called in the next round
        self._late: list[tuple[float, int, int, _Entry]] = []  # to be unmasked then
        self._serial = count()  # entries cannot be compared
        self._poll = select.poll()
        self._poll.register(channels.fileno(), select.POLLIN)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, port: int, handler: Handler, fault: Fault | None = None) -> None:
        """Call ``handler`` for the port's events, and once in the next round whatever happens: what came
        before may have been read already.

        When the handler raises, the port is removed (it stays bound and masked) and ``fault`` is told.
        """
        self._entries[port] = self._backlog[port] = _Entry(handler, fault)

    def remove(self, port: int) -> None:
        """Forget the port, which may be done inside its own handler. It stays bound."""
        self._entries.pop(port, None)
        self._backlog.pop(port, None)

    def fileno(self) -> int:
        return self.channels.fileno()

    def timeout(self) -> float | None:
        """How long the loop may sleep, seconds: 0 when work is waiting, None for as long as it likes."""
        if self._backlog:
            return 0.0
        if self._late:
            return max(0.0, self._late[0][0] - self._clock())
        return None

    def run_once(self, timeout: float) -> int:
        """Wait for events up to ``timeout`` seconds and do one round; how many handlers were called."""
        own = self.timeout()
        self._poll.poll(1000 * (timeout if own is None else min(own, timeout)))
        return self.dispatch()

    def dispatch(self) -> int:
        """One round with what is there; how many handlers were called. Does not wait."""
        done = self._due()
        todo = list(self._backlog.items())
        for port in self.channels.pending(PORTS_AT_ONCE):
            entry = self._entries.get(port)
            if entry is not None and port not in self._backlog:
                todo.append((port, entry))
        self._backlog = {}
        called = position = 0
        try:
            for port, entry in todo:
                if self._entries.get(port) is entry:  # an earlier handler may have removed it
                    self._call(port, entry, done)
                    called += 1
                position += 1
        finally:
            # Only Ctrl-C and its like come here early: nothing is forgotten then.
            for port, entry in todo[position:]:
                if self._entries.get(port) is entry:
                    self._backlog.setdefault(port, entry)
            if done:
                self.channels.unmask(done)
        return called

    def _call(self, port: int, entry: _Entry, done: list[int]) -> None:
        try:
            verdict = entry.handler(self.budget)
        except Exception as error:
            self._failed(port, entry, error)
            return
        if self._entries.get(port) is not entry:
            return
        if verdict is Verdict.IDLE:
            entry.idle += 1
            if entry.idle > IDLE_FREE:
                delay = min(IDLE_DELAY * (entry.idle - IDLE_FREE), IDLE_DELAY_MAX)
                heapq.heappush(self._late, (self._clock() + delay, next(self._serial), port, entry))
                return
        else:
            entry.idle = 0
        if verdict is Verdict.MORE:
            self._backlog[port] = entry
        else:
            done.append(port)

    def _due(self) -> list[int]:
        """Ports whose punishment is over."""
        ports = []
        now = self._clock() if self._late else 0.0
        while self._late and self._late[0][0] <= now:
            _, _, port, entry = heapq.heappop(self._late)
            if self._entries.get(port) is entry:
                ports.append(port)
        return ports

    def _failed(self, port: int, entry: _Entry, error: Exception) -> None:
        if self._entries.get(port) is entry:
            self.remove(port)
        if entry.fault is None:
            log.error("event channel %d: its handler failed and was removed", port, exc_info=error)
            return
        try:
            entry.fault(port, error)
        except Exception:
            log.exception("event channel %d: closing its device failed as well", port)
