"""Operations: work that lasts, who waits for it, and what became of it.

An operation is carried out by a *runner* (``jobs`` in processes, ``threads`` in this one), which tells it how
far it is. At most ``RUNNING_MAX`` run, ``QUEUED_MAX`` wait for their turn, the next is refused; the last
``HISTORY`` that ended are remembered. Waiting is on the operation's own condition: nobody holds a lock
meanwhile.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace
from threading import Condition, Lock
from typing import Any, Protocol

from xtool.client.records import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Operation, Problem
from xtool.client.wire import problem
from xtool.errors import XtoolError

RUNNING_MAX, QUEUED_MAX, HISTORY = 64, 256, 256
#: Steps of an operation that are kept, and the longest, characters.
LINES_MAX, LINE_MAX = 50, 500
log = logging.getLogger("xtoold")


class TooBusyError(XtoolError):
    """More is asked for at once than this daemon takes."""


class Work:
    """One operation as it goes; ``snapshot`` is what others see. Any thread may call."""

    def __init__(self, operation: Operation, arguments: dict[str, Any], told: Callable[[Operation], None]):
        self.arguments = arguments
        self.cancel_wanted = False
        #: Set by the runner: interrupts what runs.
        self.interrupt: Callable[[], None] = lambda: None
        self._now = operation
        self._changed = Condition()
        self._version = 0
        self._told = told

    @property
    def snapshot(self) -> Operation:
        return self._now

    @property
    def ended(self) -> bool:
        return self._now.state in (DONE, FAILED, CANCELLED)

    def wait(self, deadline: float | None = None) -> Operation:
        """Until it has ended, or ``deadline`` seconds are over."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended, deadline)
        return self._now

    def changes(self, seen: int, deadline: float) -> tuple[int, Operation]:
        """Until it is further than ``seen``, or ``deadline`` seconds are over."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, deadline)
            return self._version, self._now

    # --- what the runner tells
    def _set(self, *, loud: bool = True, **changes: Any) -> None:
        with self._changed:
            if self.ended:
                return
            self._now = replace(self._now, **changes)
            self._version += 1
            self._changed.notify_all()
        if loud:
            self._told(self._now)

    def begun(self) -> None:
        self._set(state=RUNNING, started=time.time())

    def step(self, text: str) -> None:
        text = text[:LINE_MAX]
        lines = (*self._now.lines[-(LINES_MAX - 1) :], text)
        self._set(stage=text, lines=lines, done=0, total=None, fraction=None)

    def advance(self, done: int, total: int | None = None) -> None:
        fraction = min(1.0, done / total) if total else None
        self._set(loud=False, done=done, total=total, fraction=fraction)

    def succeeded(self, result: Any) -> None:
        self._set(state=DONE, ended=time.time(), result=result)

    def failed(self, error: Problem) -> None:
        self._set(state=FAILED, ended=time.time(), error=error)

    def failed_by(self, error: BaseException) -> None:
        if not isinstance(error, XtoolError):
            log.error("%s failed", self._now.method, exc_info=error)
        self.failed(problem(error))

    def cancelled(self) -> None:
        self._set(state=CANCELLED, ended=time.time())


class Runner(Protocol):
    def start(self, work: Work, done: Callable[[], None]) -> None:
        """Begin to carry it out and return; ``done`` is called, from any thread, when it has ended."""

    def close(self) -> None: ...


class Operations:
    """All of them; any thread may call. ``told`` hears of each change but mere progress."""

    def __init__(self, runner: Runner, told: Callable[[Operation], None] = lambda operation: None) -> None:
        self._runner = runner
        self._told = told
        self._lock = Lock()
        self._all: OrderedDict[str, Work] = OrderedDict()
        self._queue: deque[Work] = deque()
        self._running: set[str] = set()
        self._numbers = itertools.count(1)
        # So that the number of one daemon is no other one's after a restart.
        self._mark = secrets.token_hex(3)

    def submit(self, method: str, arguments: dict[str, Any], *, subject: str = "", uid: int = -1) -> Work:
        """Have it carried out, now or when its turn comes. Raises ``TooBusyError``."""
        with self._lock:
            if len(self._queue) >= QUEUED_MAX:
                raise TooBusyError(f"{QUEUED_MAX} operations wait already", hint="try again in a moment")
            number = f"{self._mark}-{next(self._numbers)}"
            record = Operation(number, method, subject, QUEUED, time.time(), uid=uid)
            work = Work(record, arguments, self._told)
            self._all[number] = work
            self._queue.append(work)
        self._told(record)
        self._turn()
        return work

    def _turn(self) -> None:
        while True:
            with self._lock:
                if not self._queue or len(self._running) >= RUNNING_MAX:
                    break
                work = self._queue.popleft()
                self._running.add(work.snapshot.id)
            work.begun()
            try:
                self._runner.start(work, lambda work=work: self._ended(work))  # type: ignore[misc]
            except BaseException as error:
                work.failed_by(error)
                self._ended(work)
        self._forget()

    def _ended(self, work: Work) -> None:
        with self._lock:
            self._running.discard(work.snapshot.id)
        self._turn()

    def _forget(self) -> None:
        with self._lock:
            over = len(self._all) - len(self._running) - len(self._queue) - HISTORY
            if over > 0:
                old = [number for number, work in self._all.items() if work.ended][:over]
                for number in old:
                    del self._all[number]

    def get(self, number: str) -> Work | None:
        with self._lock:
            return self._all.get(number)

    def list(self) -> list[Operation]:
        with self._lock:
            return [work.snapshot for work in self._all.values()]

    def counts(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        with self._lock:
            return sum(not self._all[number].ended for number in self._running), len(self._queue)

    def cancel(self, work: Work) -> Operation:
        """Interrupt it, as Ctrl-C would; it ends when all is undone. What has ended stays so."""
        with self._lock:
            waiting = work in self._queue
            if waiting:
                self._queue.remove(work)
            work.cancel_wanted = True
        if waiting:
            work.cancelled()
        elif not work.ended:
            work.interrupt()
        return work.snapshot

    def close(self) -> None:
        self._runner.close()
