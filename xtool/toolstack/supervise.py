"""A domain's backend server as a child that is started again when it dies.

The domain's keeper does this beside its other work; domain 0, and a domain that is not ours, have a small
process of their own for it. A server whose parent was killed is adopted by the next: it goes on, and its end
is seen by its pidfd.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from xtool import libc, paths
from xtool.devicemodel import pidfd
from xtool.toolstack import backends

#: So often, and so many seconds apart, a lock whose holder is not known is tried.
_TRIES, _LOOKED_AT = 10, 0.02

#: ``os.fork``, or another that does the same.
Fork = Callable[[], int]


class Supervisor:
    """Of the server of ``domid``. ``fork`` makes the child."""

    def __init__(self, domid: int, fork: Fork = os.fork) -> None:
        self._domid = domid
        self._fork = fork
        self._lock = -1
        self._pidfd = -1
        self._pid = 0  # 0: not our child
        self._crashes: deque[float] = deque(maxlen=backends.CRASHES)
        self._again = 0.0
        #: Nothing is left to supervise: its domain is gone, or it died too often.
        self.over = False

    def fileno(self) -> int:
        """Readable when the server has ended; -1 while there is none."""
        return self._pidfd

    def begin(self) -> bool:
        """Start the server, or adopt the one there is; False if another process supervises it."""
        paths.run_dir().mkdir(parents=True, exist_ok=True, mode=0o755)
        self._lock = os.open(
            backends._lock(self._domid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )  # closed by the server's end, too
        for _ in range(_TRIES):
            if self._lock_it():
                self._start()
                return True
            if any(backends._is_ours(pid, self._domid) for pid in backends._pids(self._domid)):
                break
            time.sleep(_LOOKED_AT)  # somebody has only just begun, or is only asking whether it is free
        parent, *servers = [*backends._pids(self._domid), 0]
        if parent and backends._is_ours(parent, self._domid):
            return False
        for server in servers:
            with suppress(OSError):
                handle = os.pidfd_open(server) if server else -1
                if handle >= 0 and backends._is_ours(server, self._domid):
                    self._pidfd = handle
                    backends._write_pids(self._domid, os.getpid(), server)
                    return True
                if handle >= 0:
                    os.close(handle)
        return False

    def work(self) -> float | None:
        """Do what is due; seconds until there is more to do, None if only the server's end is awaited."""
        if self.over:
            return None
        if self._pidfd >= 0:
            if not pidfd.wait(self._pidfd, 0):
                return None
            self._ended()
            if self.over:
                return None
        left = self._again - time.monotonic()
        if left > 0:
            return left
        if not self._lock_it():  # one that was forked by nobody we know: it will end as well
            self._again = time.monotonic() + 1.0
            return 1.0
        self._start()
        return None

    def stop(self) -> None:
        """End the server; it lets go of its devices first."""
        self.over = True
        if self._pidfd >= 0:
            pidfd.terminate(self._pidfd)
            if not pidfd.wait(self._pidfd, backends.LET_GO_TIME):
                pidfd.kill(self._pidfd)
                pidfd.wait(self._pidfd, backends.LET_GO_TIME)
            self._reap()

    def _lock_it(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _start(self) -> None:
        backends._write_pids(self._domid, os.getpid())
        # A signal that came between the fork and the child's own handler would be lost to it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self._pid = self._fork()
            if not self._pid:
                _serve(self._domid, self._lock, lean=self._fork is not os.fork)
            self._pidfd = os.pidfd_open(self._pid)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _reap(self) -> int:
        """Its exit status, -1 for an adopted one."""
        status = -1
        if self._pid:
            with suppress(ChildProcessError):
                status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._pidfd)
        self._pid, self._pidfd = 0, -1
        return status

    def _ended(self) -> None:
        if self._reap() == 0:  # its domain is gone
            backends._remove_files(self._domid)
            self.over = True
            return
        self._crashes.append(time.monotonic())
        full = len(self._crashes) == backends.CRASHES
        if full and self._crashes[-1] - self._crashes[0] < backends.CRASH_TIME:
            self.over = True
            backends._park(self._domid)
            return
        self._again = time.monotonic() + backends.RESTART_PAUSE


def supervise(domid: int) -> None:
    """Keep a server running until it ends by itself, or SIGTERM."""
    libc.set_process_name(backends._name(domid))
    told: list[int] = []
    awake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    supervisor = Supervisor(domid)
    if not supervisor.begin():
        return  # somebody was faster
    while not told:
        wait = supervisor.work()
        if supervisor.over:
            return
        poller = select.poll()
        poller.register(awake, select.POLLIN)
        if supervisor.fileno() >= 0:
            poller.register(supervisor.fileno(), select.POLLIN)
        poller.poll(None if wait is None else wait * 1000)
    supervisor.stop()


def _serve(domid: int, lock: int, *, lean: bool) -> None:
    """The forked child; does not return. Of its parent's it has ``lock``, and nothing else open."""
    code = 1
    try:
        os.closerange(3, lock)
        os.closerange(lock + 1, 4096)
        log = os.open(paths.log_dir() / backends.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        os.close(log)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if lean:
            libc.after_lean_fork()
        gc.enable()
        from xtool.backends.profiling import profiled
        from xtool.backends.server import log_to_stderr, serve

        libc.set_process_name(backends._name(domid))
        backends._write_pids(domid, os.getppid(), os.getpid())
        log_to_stderr()
        with profiled(domid):
            serve(domid)
        code = 0
    except BaseException:
        logging.getLogger(__name__).exception("the backends of domain %d ended", domid)
    finally:
        os._exit(code)
