"""What the watcher does: one process for all bare domains, those with neither a backend server of ours nor a
QEMU. It waits for their ends, and has a child do what the configuration says of each.

It holds the lock of each of them that a keeper would hold, so who asks who looks after a domain need not know
which it is. A domain that gets its first server or QEMU gets a keeper, which asks the watcher for the lock
(``watchlink``). As it starts it takes up all bare domains that nobody looks after; it ends with the last one.
It has no state: it can be killed at any moment, and who looks next starts another.

At most ``_AT_ONCE`` children build or destroy at a time, the other ends wait in turn; one that takes long is
not counted any more, so whatever hangs holds up nobody else. A reboot loop's pauses are waited for here, not
in a child. The lock is let go of also while a child is at work for the domain: what it does is done under the
domain's own lock, by whoever comes first.

SIGTERM ends it, without anybody starting another at once. SIGUSR1 has it look for domains that are to have a
server by now: the word of an xtool that knows of keepers only.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Protocol

from xtool import libc
from xtool.errors import XtoolError
from xtool.hypercall.glance import Domains, domain_key
from xtool.toolstack import backends, deathwatch, journal, keeper, locks, watchlink
from xtool.toolstack.errand import DONE, Errand, more_descriptors
from xtool.toolstack.watchdesk import Desk

#: A missed announcement is noticed after this many seconds.
_RESCAN = 10.0
#: So many children work at a time; one that works for longer, in seconds, is not among them.
_AT_ONCE, _LONG = 8, 20.0
#: Pauses before a child that achieved nothing is followed by another, seconds.
_RETRY, _RETRY_MOST = 1.0, 60.0
#: A domain that is gone is left to whoever destroyed it for so many seconds.
_GONE = 0.1
#: Whoever has it started asks for something within so many seconds.
_FIRST = 2.0
#: Most descriptors it wants, and how many of them are not for domains' locks.
_DESCRIPTORS, _SPARE = 1 << 14, 256
#: What a child says of a pause, and what is added to it: it must be over the next time, seconds.
_LATER, _MARGIN = "later ", 0.05


class Eyes(Protocol):
    """``deathwatch.Lookout``, or a test's."""

    def fileno(self) -> int: ...
    def drain(self) -> bool: ...
    def domains(self) -> Domains: ...
    def close(self) -> None: ...


def watch(
    fork: Callable[[], int] = os.fork,
    ready: Callable[[], None] = lambda: None,
    eyes: Callable[[], Eyes] = deathwatch.Lookout,
) -> None:
    """Be the watcher until there is nothing to watch; returns at once if there is one already.

    ``ready`` is called when it listens, and all that was unwatched is watched.
    """
    _signal.signal(_signal.SIGUSR1, _signal.SIG_IGN)
    libc.set_process_name(watchlink.NAME)
    lock = _lock()
    if lock < 0:
        ready()
        return
    try:
        watching = Watching(fork, eyes(), more_descriptors(_DESCRIPTORS))
        try:
            watching.take_up()
            ready()
            watching.run()
        finally:
            watching.close()
    finally:
        os.close(lock)


def _lock() -> int:
    """The watcher's lock, -1 if another has it. One that is just ending listens no more."""
    lock = os.open(watchlink.lock_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if not locks.take(lock, watchlink.listening):
        os.close(lock)
        return -1
    os.truncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    return lock


class _Watched:
    """A domain. ``resting``: its restart waits until a pause of a reboot loop is over."""

    __slots__ = ("busy", "domid", "key", "lock", "pause", "resting")

    def __init__(self, lock: int) -> None:
        self.lock = lock
        self.busy = self.resting = False
        self.pause = 0.0

    def follow(self, domid: int, uuid: str) -> None:
        self.domid = domid
        self.key = domain_key(domid, bytes.fromhex(uuid.replace("-", ""))) if domid >= 0 else b""
        self.pause = 0.0


class Watching:
    """``most``: how many descriptors it may have."""

    def __init__(self, fork: Callable[[], int], eyes: Eyes, most: int) -> None:
        self._fork, self._eyes, self._most = fork, eyes, most
        self._told = False
        self._domains: dict[str, _Watched] = {}
        self._queue: dict[str, None] = {}  # uuids of those that have ended, in turn
        self._later: dict[str, float] = {}  # uuid -> when
        self._errands: dict[int, tuple[Errand, _Watched]] = {}  # by pidfd
        self._desk = Desk(self._answer)
        self._look, self._said = False, ""
        self._scan_at = 0.0
        self._stale = True
        self._unsure = False  # whether there is one to take up
        self._rescan_at = time.monotonic() + _RESCAN
        self._stay = time.monotonic() + _FIRST
        # From before anybody can read our pid.
        self._awake, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGTERM, self._end)
        _signal.signal(_signal.SIGUSR1, self._again)

    # --- from start to end
    def close(self) -> None:
        """Let go of everything. Who comes now finds nobody listening, and starts another."""
        for one in self._domains.values():
            os.close(one.lock)
        self._domains.clear()
        self._desk.close()
        self._eyes.close()
        _signal.set_wakeup_fd(-1)
        os.close(self._awake)
        os.close(self._wake)

    def run(self) -> None:
        """Until there is nothing to watch."""
        ready: set[int] = set()
        while True:
            wait = self._round(ready)
            if self._told or (self._idle() and time.monotonic() >= self._stay):
                return
            poller = select.poll()
            for fd in (self._awake, self._eyes.fileno(), *self._desk.filenos(), *self._errands):
                if fd >= 0:
                    poller.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poller.poll(max(0.0, wait) * 1000)}
            if self._awake in ready:
                os.read(self._awake, 64)

    def _end(self, _number: int, _frame: object) -> None:
        self._told = True

    def _again(self, _number: int, _frame: object) -> None:
        self._look = True

    def _idle(self) -> bool:
        return not (self._domains or self._errands or self._desk.busy or self._unsure)

    def _round(self, ready: set[int]) -> float:
        """Do what is due; seconds until there may be more."""
        for fd in ready & self._errands.keys():
            self._collect(*self._errands.pop(fd))
        self._desk.hear()
        now = time.monotonic()
        if self._eyes.drain():
            self._stale = True
        if self._look or now >= self._rescan_at:
            self._look, self._stale, self._rescan_at = False, True, now + _RESCAN
            self._look_around()
        if self._stale and now >= self._scan_at:
            self._scan(now)
        for uuid in [uuid for uuid, due in self._later.items() if due <= now]:
            del self._later[uuid]
            self._queue[uuid] = None
        self._act(now)
        return self._wait() - time.monotonic()

    def _wait(self) -> float:
        """When there may be more to do."""
        now = time.monotonic()
        times = [self._rescan_at, *self._later.values()]
        if self._stale:
            times.append(max(now, self._scan_at))
        if self._queue or self._desk.busy or self._eyes.fileno() < 0:
            times.append(now + _RETRY)
        if self._idle():
            times.append(max(now, self._stay))
        return min(times)

    # --- domains come and go
    def take_up(self) -> None:
        """Watch over all bare domains that nobody looks after."""
        unkept = [uuid for uuid in journal.uuids() if not journal.keeper_pid(uuid)]
        entries = [entry for uuid in unkept if (entry := journal.read(uuid))]
        wanting = [entry for entry in entries if keeper.wants_one(entry)]
        # Somebody is restarting one just now, and may be killed.
        self._unsure = any(entry.then and entry not in wanting for entry in entries)
        lacking = [entry for entry in wanting if not backends.is_wanted(entry.domid)]
        if not lacking:
            return
        try:
            served = deathwatch.device_models([entry.domid for entry in lacking])
        except (XtoolError, OSError) as error:
            self._complain(error)
            self._unsure = True  # asked again, when xenstored is back
            return
        for entry in lacking:
            if entry.domid not in served:
                self._take(entry.domid, entry.uuid)

    def _take(self, domid: int, uuid: str) -> bytes:
        if uuid in self._domains:
            return watchlink.YES  # perhaps under another number: that shows when it looks
        if len(self._domains) >= self._most - _SPARE or backends.is_wanted(domid):
            return watchlink.NO
        lock = journal.hold_keeper(uuid, lambda pid: backends._is_ours(pid, domid))
        if lock < 0:
            return watchlink.YES if journal.keeper_pid(uuid) else watchlink.NO
        one = self._domains[uuid] = _Watched(lock)
        one.follow(domid, uuid)
        self._stale = True
        return watchlink.YES

    def _give(self, uuid: str) -> None:
        one = self._domains.pop(uuid, None)
        if one is not None:
            self._queue.pop(uuid, None)
            self._later.pop(uuid, None)
            os.close(one.lock)

    def _drop(self, uuid: str) -> None:
        """There is nothing more to do for it."""
        domid = self._domains[uuid].domid
        if not journal.exists(uuid):
            try:
                os.unlink(journal.keeper_path(uuid))
            except OSError:
                pass
        self._give(uuid)
        # Whoever created it anew under the same uuid may have found us here still.
        entry = journal.read(uuid)
        if entry is not None and _runs(entry) and entry.domid != domid:
            self._take(entry.domid, uuid)

    def _look_around(self) -> None:
        """Give away those that are not bare any more: nobody may have told us."""
        for uuid, one in self._domains.items():
            if not one.busy and one.domid >= 0 and backends.is_wanted(one.domid):
                self._begin(uuid, one, _hand_over)
        if self._unsure:
            self.take_up()

    def _complain(self, error: Exception) -> None:
        """Once, not as often as it is tried."""
        if str(error) != self._said:
            self._said = str(error)
            sys.stderr.write(f"watcher: {error}\n")

    # --- ends
    def _scan(self, now: float) -> None:
        """Who has ended?"""
        try:
            there = self._eyes.domains()
        except (XtoolError, OSError) as error:
            self._complain(error)
            self._scan_at = now + _RETRY
            return
        self._stale, self._said = False, ""
        for uuid, one in self._domains.items():
            if one.busy or uuid in self._queue:
                continue
            if one.key in there.running:
                one.pause = 0.0
                self._later.pop(uuid, None)
            elif uuid in self._later:
                if one.resting and one.key not in there.ended:
                    self._later[uuid] = now  # destroyed while it waited
            elif one.key in there.ended:
                self._queue[uuid] = None
            else:
                self._later[uuid] = now + _GONE

    def _act(self, now: float) -> None:
        """Have children do what is due."""
        at_work = sum(1 for errand, _ in self._errands.values() if now - errand.began < _LONG)
        while self._queue and at_work < _AT_ONCE:
            uuid = next(iter(self._queue))
            del self._queue[uuid]
            one = self._domains[uuid]
            if one.busy:  # being handed over
                continue
            one.resting = False
            entry = journal.read(uuid)
            if entry is None and not journal.exists(uuid):
                self._drop(uuid)
            elif entry is not None and _runs(entry) and entry.domid != one.domid:
                one.follow(entry.domid, uuid)  # somebody was faster
                self._stale = True
            elif entry is not None and entry.state != "running" and _is_at_work(uuid):
                self._later[uuid] = now + _GONE
            elif not self._begin(uuid, one, _settle):
                return
            else:
                at_work += 1

    def _begin(self, uuid: str, one: _Watched, work: Callable[[int, str], str]) -> bool:
        try:
            errand = Errand(uuid, one.domid, work, self._fork, self._most)
        except OSError as error:
            sys.stderr.write(f"{uuid}: {error}\n")
            self._put_off(uuid, one)
            return False
        one.busy = True
        self._errands[errand.pidfd] = errand, one
        return True

    def _collect(self, errand: Errand, one: _Watched) -> None:
        said, uuid = errand.collect(), errand.uuid
        one.busy = False
        self._stale = True  # what happened meanwhile is seen now
        if self._domains.get(uuid) is not one:
            return  # a keeper's by now
        if said == DONE or journal.read(uuid) is None:
            self._drop(uuid)
        elif said.isdecimal():
            one.follow(int(said), uuid)
        elif said.startswith(_LATER):
            one.resting = True
            self._later[uuid] = time.monotonic() + float(said.removeprefix(_LATER))
        else:  # if it runs, the next look takes it back
            self._put_off(uuid, one)

    def _put_off(self, uuid: str, one: _Watched) -> None:
        one.pause = min(_RETRY_MOST, 2 * one.pause or _RETRY)
        self._later[uuid] = time.monotonic() + one.pause

    # --- who asks
    def _answer(self, what: bytes, domid: int, uuid: str) -> bytes:
        if what == watchlink.TAKE and 0 <= domid < 0x7FF0:
            self._stay = 0.0
            return self._take(domid, uuid)
        if what == watchlink.GIVE:
            self._give(uuid)
            return watchlink.YES
        return watchlink.NO


def _hand_over(domid: int, uuid: str) -> str:
    """In a child: the domain needs a keeper by now."""
    keeper.look_again(domid, uuid)
    return ""


def _runs(entry: journal.Entry) -> bool:
    return entry.state == "running" and not entry.settled and entry.domid >= 0


def _is_at_work(uuid: str) -> bool:
    """Whether somebody is destroying or restarting it just now."""
    with journal.locked(uuid, wait=False) as free:
        return not free


class _Later(Exception):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def _settle(domid: int, uuid: str) -> str:
    """In a child: do what the configuration says of the domain's end. A pause before that is not for it."""
    from xtool.toolstack.host import open_host
    from xtool.toolstack.keeping import said
    from xtool.toolstack.lifecycle import settle

    def later(seconds: float) -> None:
        raise _Later(seconds + _MARGIN)

    try:
        result = settle(open_host(), domid, uuid, pause=later)
    except _Later as pause:
        return f"{_LATER}{pause.seconds:.3f}"
    word = said(result, uuid)
    if word.isdecimal():
        keeper.look_again(int(word), uuid)  # it may have come back with a server or a QEMU
    return word
