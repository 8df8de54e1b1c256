"""What a keeper does: wait for the domain's end, its server's, its QEMU's, and see that the right thing
follows.

It does nothing large itself. What its configuration says is carried out by a child, through ``lifecycle``, so
a keeper stays as small as it was forked, and a child that is killed is followed by another. It ends when its
domain is gone for good, or stays as it is (``preserve``).

SIGTERM ends it and the server with it, which lets its guest's devices wait for the next; SIGUSR1 has it look
whether there is a server or a QEMU to care for now.

It is written for memory: each object that is touched after the fork costs a page of its own, so what runs in
every keeper uses the plain modules below ``signal``, ``pathlib`` and ``contextlib``, and never the garbage
collector.

Facts: a lock taken by ``flock`` belongs to the open file: a child that inherits the descriptor holds it as
well, so children close it. A pidfd is readable when its process has ended, whoever's child it is.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import gc
import os
import select
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn, Protocol

from xtool import libc
from xtool.devicemodel import pidfd
from xtool.toolstack import backends, deathwatch, journal, locks
from xtool.toolstack.supervise import Fork, Supervisor

if TYPE_CHECKING:
    from xtool.toolstack.api import LifecycleResult

#: A missed announcement is noticed after this many seconds.
_RESCAN = 10.0
#: Pauses before a child that achieved nothing is followed by another, seconds.
_RETRY, _RETRY_MOST = 1.0, 60.0

_WATCH, _DONE = "watch", "done"


class Eyes(Protocol):
    """``deathwatch.DeathWatch``, or a test's."""

    def fileno(self) -> int: ...

    def drain(self) -> None: ...

    def ended(self) -> bool: ...

    def follow(self, domid: int, handle: bytes) -> None: ...

    def close(self) -> None: ...


def keep(
    domid: int,
    uuid: str,
    fork: Fork = os.fork,
    ready: Callable[[], None] = lambda: None,
    eyes: Callable[[int, bytes], Eyes] = deathwatch.DeathWatch,
) -> None:
    """Be the domain's keeper until there is nothing to keep; returns at once if it has one already."""
    gc.disable()
    # Whoever finds our pid may send it before there is a handler; the first round looks in any case.
    _signal.signal(_signal.SIGUSR1, _signal.SIG_IGN)
    while True:
        lock = _lock(uuid, domid)
        ready()
        ready = _nothing
        if lock < 0:
            return
        keeping = Keeping(domid, uuid, fork, lock)
        try:
            if not journal.exists(uuid):
                return
            keeping.run(eyes)
        finally:
            if not journal.exists(uuid):
                try:
                    os.unlink(journal.keeper_path(uuid))
                except OSError:
                    pass
            os.close(lock)
        # Whoever created it anew under the same uuid may have found us here still.
        entry = journal.read(uuid)
        if keeping.told or entry is None or entry.settled or entry.domid in (-1, keeping.domid):
            return
        domid = entry.domid


def _nothing() -> None:
    pass


def _lock(uuid: str, domid: int) -> int:
    """The keeper's lock, -1 if another has it."""
    path = journal.keeper_path(uuid)
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # its domain went, and all there was
            return -1
        if not locks.take(lock, partial(_has_keeper, lock, domid)):
            os.close(lock)
            return -1
        # Who held it before us may have removed the file: then this lock is worth nothing.
        if journal._is_at(lock, path):
            break
        os.close(lock)
    os.truncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    return lock


def _has_keeper(lock: int, domid: int) -> bool:
    """Whether the pid in the file is that of a keeper, not what a killed one left."""
    pid = os.pread(lock, 32, 0).strip()
    return pid.isdigit() and backends._is_ours(int(pid), domid)


class Keeping:
    """One keeper's life. ``told``: it was told to end."""

    def __init__(self, domid: int, uuid: str, fork: Fork, lock: int) -> None:
        self.domid = domid
        self.told = False
        self._uuid = uuid
        self._handle = bytes.fromhex(uuid.replace("-", ""))
        self._fork = fork
        self._lock = lock
        self._over = False
        self._look = True
        self._server: Supervisor | None = None
        self._model = -1  # pidfds, and the pipe the child answers through
        self._child = self._answer = -1
        self._child_pid = 0
        self._retry = 0.0
        self._pause = 0.0

    def run(self, eyes: Callable[[int, bytes], Eyes]) -> None:
        """Until there is nothing to keep."""
        libc.set_process_name(backends.keeper_name(self.domid))
        awake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGTERM, self._end)
        _signal.signal(_signal.SIGUSR1, self._again)
        watch = eyes(self.domid, self._handle)
        try:
            while not self.told and not self._over:
                wait = self._round(watch)
                if self.told or self._over:
                    break
                poller = select.poll()
                # A dead QEMU waits until it can be seen to: it must not wake us all the time.
                model = self._model if self._child < 0 and time.monotonic() >= self._retry else -1
                for fd in (awake, watch.fileno(), model, self._child, self._server_fd()):
                    if fd >= 0:
                        poller.register(fd, select.POLLIN)
                poller.poll(wait * 1000)
                try:
                    os.read(awake, 64)
                except BlockingIOError:
                    pass
        finally:
            watch.close()
            _signal.set_wakeup_fd(-1)
            os.close(awake)
            os.close(wake)
            if self.told and self._server is not None:
                self._server.stop()

    def _end(self, _number: int, _frame: object) -> None:
        self.told = True

    def _again(self, _number: int, _frame: object) -> None:
        self._look = True

    def _server_fd(self) -> int:
        return self._server.fileno() if self._server is not None else -1

    def _round(self, watch: Eyes) -> float:
        """Do what is due; seconds until there may be more."""
        watch.drain()
        if self._look:
            self._look = False
            self._look_around()
        wait = _RESCAN
        if self._server is not None:
            due = self._server.work()
            wait = wait if due is None else min(wait, due)
        if self._child >= 0:
            if pidfd.wait(self._child, 0):
                self._collect(watch)
                return 0.0
            return wait
        left = self._retry - time.monotonic()
        if left > 0:
            return min(wait, left)
        if watch.ended():
            self._begin(_settle)
        elif self._model >= 0 and pidfd.wait(self._model, 0):
            os.close(self._model)
            self._model = -1
            self._begin(_device_model)
        return wait

    def _look_around(self) -> None:
        """Is there a server to supervise, a QEMU to watch?"""
        if self._server is None and backends.is_wanted(self.domid):
            server = Supervisor(self.domid, self._fork)
            if server.begin():
                self._server = server
        if self._model < 0:
            pid = deathwatch.device_model_pid(self.domid)
            if pid:
                try:
                    fd = os.pidfd_open(pid)
                except OSError:
                    return
                # The number is only a hint: the command line must be that of this domain's QEMU.
                if pidfd.serves(pid, self.domid):
                    self._model = fd
                else:
                    os.close(fd)

    def _begin(self, work: Callable[[int, str], str]) -> None:
        """Have a child do it; what it has to say it writes into a pipe."""
        answer, say = os.pipe2(os.O_CLOEXEC)
        try:
            pid = self._fork()
        except OSError as error:
            sys.stderr.write(f"{self._uuid}: {error}\n")
            os.close(answer)
            os.close(say)
            self._put_off()
            return
        if pid == 0:
            self._work(work, say)
        os.close(say)
        self._answer, self._child_pid = answer, pid
        self._child = os.pidfd_open(pid)

    def _work(self, work: Callable[[int, str], str], say: int) -> NoReturn:
        """In the child. It holds nothing of the keeper's: not its locks, above all."""
        try:
            _signal.set_wakeup_fd(-1)
            _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)
            _signal.signal(_signal.SIGUSR1, _signal.SIG_DFL)
            os.dup2(say, 3)
            os.closerange(4, 4096)
            if self._fork is not os.fork:
                libc.after_lean_fork()
            gc.enable()
            libc.set_process_name(f"xtool-act-{self.domid}")
            _log_to_stderr()
            os.write(3, work(self.domid, self._uuid).encode())
        except BaseException as error:
            message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
            sys.stderr.write(f"{self._uuid}: {message}\n")
        finally:
            os._exit(0)

    def _collect(self, watch: Eyes) -> None:
        said = os.read(self._answer, 64).decode()
        os.close(self._answer)
        os.close(self._child)
        try:
            os.waitpid(self._child_pid, 0)
        except ChildProcessError:
            pass
        self._child = self._answer = -1
        if said == _DONE:
            self._over = True
        elif said.isdecimal():
            self._follow(watch, int(said))
        elif said == _WATCH and not watch.ended():
            self._pause = 0.0
        elif journal.read(self._uuid) is None:
            self._over = True
        else:
            self._put_off()

    def _put_off(self) -> None:
        self._pause = min(_RETRY_MOST, 2 * self._pause or _RETRY)
        self._retry = time.monotonic() + self._pause

    def _follow(self, watch: Eyes, domid: int) -> None:
        """The domain goes on under another number."""
        self.domid = domid
        self._pause = self._retry = 0.0
        watch.follow(domid, self._handle)
        libc.set_process_name(backends.keeper_name(domid))
        if self._model >= 0:
            os.close(self._model)
            self._model = -1
        self._server = None
        self._look = True


def _log_to_stderr() -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def _settle(domid: int, uuid: str) -> str:
    """In a child: do what the configuration says of the domain's end."""
    from xtool.toolstack.host import open_host
    from xtool.toolstack.lifecycle import settle

    return _said(settle(open_host(), domid, uuid), uuid)


def _device_model(domid: int, uuid: str) -> str:
    """In a child: the domain's QEMU has ended. If that was meant, its end follows, or has come."""
    from xtool.toolstack.host import open_host
    from xtool.toolstack.lifecycle import device_model_ended

    result = device_model_ended(open_host(), domid, uuid)
    return _WATCH if result is not None and result.action == "paused" else _said(result, uuid)


def _said(result: LifecycleResult | None, uuid: str) -> str:
    if result is None:
        return _WATCH
    entry = journal.read(uuid)
    if entry is None or entry.settled or result.new_domid is None:
        return _DONE  # also when the one that was created anew has another uuid, and so another keeper
    return str(result.new_domid)
