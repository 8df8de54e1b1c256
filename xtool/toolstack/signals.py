"""Undoing in peace: what must not be interrupted once it has begun."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as an exception, so that undo stacks unwind. ``code`` is the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


@contextmanager
def undone_on_failure() -> Iterator[ExitStack]:
    """An ``ExitStack`` whose callbacks run when the block fails or is interrupted, and then to the end.

    While the block runs, SIGTERM and SIGHUP interrupt it like Ctrl-C does. While it is undone, all three
    are put off. Call ``pop_all()`` on the stack when there is nothing to undo any more.
    """
    undo = ExitStack()
    with _handled({signal.SIGTERM: _raise, signal.SIGHUP: _raise}):
        try:
            yield undo
        except BaseException:
            with _handled(dict.fromkeys(_STOPPING, signal.SIG_IGN)):
                undo.close()
            raise
        undo.close()


@contextmanager
def _handled(handlers: dict[signal.Signals, object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
