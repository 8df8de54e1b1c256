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

Facts: a pidfd is readable when its process has ended, whoever's child it is.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import gc
import os
import select
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from xtool import libc
from xtool.devicemodel import pidfd
from xtool.toolstack import backends, deathwatch, journal, watchlink
from xtool.toolstack.errand import DONE, WATCH, Errand
from xtool.toolstack.supervise import Fork, Supervisor
from xtool.toolstack.watchlink import is_watcher

if TYPE_CHECKING:
    from xtool.toolstack.api import LifecycleResult

#: A missed announcement is noticed after this many seconds.
_RESCAN = 10.0
#: Pauses before a child that achieved nothing is followed by another, seconds.
_RETRY, _RETRY_MOST = 1.0, 60.0
#: So often the watcher is asked for a domain: one that is started meanwhile may take it up first.
_ASKED = 3


class Eyes(Protocol):
    """``deathwatch.DeathWatch``, or a test's."""

    def fileno(self) -> int: ...

    def drain(self) -> object: ...

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
    # Before our pid can be read: who reads it asks what the process is called.
    libc.set_process_name(backends.keeper_name(domid))
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
        libc.set_process_name(backends.keeper_name(domid))


def _nothing() -> None:
    pass


def _lock(uuid: str, domid: int) -> int:
    """The keeper's lock, -1 if another keeper has it. The watcher is asked to let go of it."""
    for _ in range(_ASKED):
        lock = journal.hold_keeper(uuid, lambda pid: backends._is_ours(pid, domid) or is_watcher(pid))
        if lock >= 0 or not is_watcher(journal.keeper_pid(uuid)):
            return lock
        watchlink.ask(watchlink.GIVE, domid, uuid)
    return -1


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
        self._model = -1  # a pidfd
        self._errand: Errand | None = None
        self._retry = 0.0
        self._pause = 0.0

    def run(self, eyes: Callable[[int, bytes], Eyes]) -> None:
        """Until there is nothing to keep."""
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
                child = self._errand.pidfd if self._errand is not None else -1
                model = self._model if child < 0 and time.monotonic() >= self._retry else -1
                for fd in (awake, watch.fileno(), model, child, self._server_fd()):
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
        if self._errand is not None:
            if pidfd.wait(self._errand.pidfd, 0):
                self._collect(self._errand, watch)
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
        try:
            self._errand = Errand(self._uuid, self.domid, work, self._fork)
        except OSError as error:
            sys.stderr.write(f"{self._uuid}: {error}\n")
            self._put_off()

    def _collect(self, errand: Errand, watch: Eyes) -> None:
        self._errand = None
        said = errand.collect()
        if said == DONE:
            self._over = True
        elif said.isdecimal():
            self._follow(watch, int(said))
        elif said == WATCH and not watch.ended():
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


def _settle(domid: int, uuid: str) -> str:
    """In a child: do what the configuration says of the domain's end."""
    from xtool.toolstack.host import open_host
    from xtool.toolstack.lifecycle import settle

    return said(settle(open_host(), domid, uuid), uuid)


def _device_model(domid: int, uuid: str) -> str:
    """In a child: the domain's QEMU has ended. If that was meant, its end follows, or has come."""
    from xtool.toolstack.host import open_host
    from xtool.toolstack.lifecycle import device_model_ended

    result = device_model_ended(open_host(), domid, uuid)
    return WATCH if result is not None and result.action == "paused" else said(result, uuid)


def said(result: LifecycleResult | None, uuid: str) -> str:
    """The word for it, of ``errand``'s."""
    if result is None:
        return WATCH
    entry = journal.read(uuid)
    if entry is None or entry.settled or result.new_domid is None:
        return DONE  # also when the one that was created anew has another uuid, and so another keeper
    return str(result.new_domid)
