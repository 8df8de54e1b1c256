"""A thread that carries out what may take long, one step at a time, so that the loop goes on meanwhile.

It lives until ``close``: a process it starts may depend on it (PR_SET_PDEATHSIG asks for the thread).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from xtool.backends.loop import Fault, Loop
from xtool.errors import DeadlineError

T = TypeVar("T")


class Worker:
    """All methods are for the loop's thread. ``fault`` is told what a step, or what follows it, raises."""

    def __init__(self, loop: Loop, fault: Fault) -> None:
        self._loop = loop
        self._fault = fault
        self._pool = ThreadPoolExecutor(1, "image")
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._step: tuple[Future[Any], Callable[[Any], None]] | None = None
        loop.watch(self._event, self._ended, fault=fault)

    @property
    def busy(self) -> bool:
        return self._step is not None

    def start(self, step: Callable[[], T], then: Callable[[T], None]) -> None:
        """Have ``step`` carried out by the thread, then ``then`` by the loop. Not while ``busy``."""
        assert self._step is None
        future = self._pool.submit(step)
        self._step = (future, then)
        future.add_done_callback(lambda _: os.eventfd_write(self._event, 1))

    def call(self, step: Callable[[], T], seconds: float) -> T:
        """Wait for ``step``; what it raises is raised. Raises ``DeadlineError``."""
        try:
            return self._pool.submit(step).result(seconds)
        except FutureTimeout:
            raise DeadlineError(f"no answer within {seconds:g} s") from None

    def _ended(self, events: int) -> None:
        os.eventfd_read(self._event)
        if self._step is not None and self._step[0].done():
            self.settle()

    def settle(self, *, forget: bool = False) -> None:
        """Wait for the step under way, if there is one. What follows it is done, unless ``forget``."""
        step, self._step = self._step, None
        if step is None:
            return
        future, then = step
        error = future.exception()
        if forget:
            return
        try:
            if error is not None:
                raise error
            then(future.result())
        except Exception as failure:
            self._fault(failure)

    def close(self) -> None:
        """The step under way must have been settled."""
        self._loop.unwatch(self._event)
        self._pool.shutdown()
        if self._event >= 0:
            os.close(self._event)
            self._event = -1
