"""Operations in threads of this process: for a host in memory, which no other process could share.

Facts: an exception can be raised in another thread of CPython; it comes with that thread's next bytecode, so
not while it waits in the kernel. Taking back one never raised leaves CPython 3.11 looking for it before
every instruction, and cProfile then hangs. On a real host ``jobs`` is used, where a signal ends every wait.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from threading import Lock, Thread, get_ident

from xtool.daemon.carry import carry_out
from xtool.daemon.hosts import Hosts
from xtool.daemon.operations import Work


class Cancelled(BaseException):
    """What Ctrl-C is to a process."""


class ThreadRunner:
    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    def start(self, work: Work, done: Callable[[], None]) -> None:
        Thread(target=self._run, args=(work, done), daemon=True, name=f"op-{work.snapshot.id}").start()

    def close(self) -> None:
        pass

    def _run(self, work: Work, done: Callable[[], None]) -> None:
        interrupter = _Interrupter(get_ident())
        outcome: Callable[[], None]
        try:
            work.interrupt = interrupter.interrupt
            if work.cancel_wanted:
                raise Cancelled
            with self._hosts.client() as client:
                result = carry_out(client, work.snapshot.method, work.arguments, work)
            outcome = partial(work.succeeded, result)
        except Cancelled:
            outcome = work.cancelled
        except BaseException as error:
            outcome = partial(work.failed_by, error)
        while True:
            try:
                interrupter.end()
                break
            except Cancelled:
                pass
        outcome()
        done()


class _Interrupter:
    """Raises ``Cancelled`` in a thread, once, and not any more after ``end``."""

    def __init__(self, thread: int) -> None:
        self._thread = ctypes.c_ulong(thread)
        self._lock = Lock()
        self._over = False

    def interrupt(self) -> None:
        with self._lock:
            if not self._over:
                self._over = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, ctypes.py_object(Cancelled))

    def end(self) -> None:
        with self._lock:
            if self._over:  # raised, and perhaps not come yet
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, None)
            self._over = True
