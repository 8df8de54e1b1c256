"""The process that serves a domain's devices whose backends are ours.

::

    python -m xtool.backends.server DOMID        # in the foreground; SIGTERM lets go
    serve(domid)                                 # the same, in a forked child

It watches ``backend/<folder>/<domid>`` for each kind of ours, and each device's frontend state. A device that
cannot be served is closed with a reason and hurts no other.

SIGTERM stops it without touching a state node: rings and guests stay as they are, and whoever comes next
takes them over. The same happens when it is killed.

Facts about xenstore here
-------------------------
- A guest may write its state as often as it likes. Each watch keeps one pending path per node; the
  connection is looked at no more often than every ``STORE_GAP``, a device no more than every ``LOOK_GAP``.
- The toolstack removes a device's directory when it is gone. Writing a node there would bring it back, so
  each write is a transaction that looks first.
- When xenstored goes away, rings are served on. It is tried again each second; then everything is looked at.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from xtool import paths
from xtool.backends.control import ControlSocket, socket_path
from xtool.backends.device import STORE_AWAY, Device, remembers
from xtool.backends.frame import FOLDERS, BackendContext, BackendType, backend_type, reason_of
from xtool.backends.loop import Loop
from xtool.devices.xenbus import DeviceId
from xtool.errors import XtoolError
from xtool.proto.xenbus import XenbusState
from xtool.xenstore.paths import domain
from xtool.xenstore.port import Store, Watch

log = logging.getLogger(__name__)

#: Least time between two looks at the connection to xenstored while it is busy, seconds.
STORE_GAP = 0.002
#: How long xenstored may be away before it is tried again, seconds; twice as long each further time. Rings
#: are served in these pauses, and wait (``STORE_DEADLINE``) while one that hangs is tried.
STORE_RETRY, STORE_RETRY_MOST = 1.0, 16.0
#: How long one round may sleep, seconds.
_ROUND = 10.0
#: How long xenstored may leave a request of ours unanswered, seconds: the rings wait meanwhile.
STORE_DEADLINE = 5.0
LOG_SIZE = 1 << 20


class Server:
    """``context.failed`` is set here. ``types`` gives the class for a folder; tests give their own."""

    def __init__(
        self,
        context: BackendContext,
        folders: Iterable[str] = FOLDERS,
        types: Callable[[str], BackendType] = backend_type,
    ) -> None:
        self._context = context
        self._types = types
        self._kinds = {folder: FOLDERS[folder][0] for folder in folders}
        self.devices: dict[tuple[str, int], Device] = {}
        self._watches: dict[str, Watch] = {}
        self._store_fd = -1
        self._store_ready = True
        self._store_at = 0.0
        self._store_pause = 0.0  # not 0: it is away
        self._quiet_until = 0.0
        self._idle_look = 0.0
        self._rescan = True
        self._stopped = False
        #: It stopped because its domain is gone: nobody is to follow.
        self.domain_gone = False
        context.failed = self._failed
        context.publish = self._publish

    # --- running
    def run(self) -> None:
        """Until ``stop``."""
        while not self._stopped:
            self.step(_ROUND)

    @property
    def stopped(self) -> bool:
        """Told to stop, or its domain is gone."""
        return self._stopped

    def stop(self) -> None:
        """From any thread, or a signal handler."""
        self._stopped = True
        self._context.loop.wake()

    def step(self, timeout: float) -> None:
        """One round: rings, descriptors, timers, and what xenstore told. Sleeps at most ``timeout`` s."""
        self._context.loop.run_once(min(timeout, self._control()))

    def _control(self) -> float:
        """Do what xenstore asks for; seconds until there is more to do."""
        now = self._context.loop.clock()
        until = max(self._store_at, self._quiet_until)
        if now < until:
            return until - now
        try:
            self._take_events()
            if not self.devices and now >= self._idle_look:
                self._idle_look = now + _ROUND
                self._rescan = True  # the domain may be gone, which no watch of ours tells
            self._follow_folders()
            soonest = self._work(now)
            if self._store_pause:
                log.warning("xenstore: it is back")
                self._store_pause = 0.0
            self._quiet_until = now + soonest
            return soonest
        except STORE_AWAY as error:
            if not self._store_pause:
                log.warning("xenstore: %s", reason_of(error))
            self._store_pause = min(STORE_RETRY_MOST, 2 * self._store_pause or STORE_RETRY)
            self._store_at = self._context.loop.clock() + self._store_pause
            self._context.loop.unwatch(self._store_fd)
            self._store_fd = -1
            self._rescan = True
            for device in self.devices.values():
                device.own_changed = device.frontend_changed = True
            return self._store_pause

    def _take_events(self) -> None:
        store, loop = self._context.store, self._context.loop
        fd = store.fileno()
        if fd != self._store_fd:
            loop.unwatch(self._store_fd)
            self._store_fd = fd
            self._store_ready = True
        if self._store_ready:
            self._store_ready = False
            for watch in self._watches.values():
                if not watch.has_pending():
                    self._dirty(watch.pending())  # takes in what came, for all watches
                    break
            loop.watch(fd, self._events_came)

    def _events_came(self, events: int) -> None:
        # Not read here, and not looked at again at once: a guest's writes must not fill our time.
        self._store_ready = True
        self._context.loop.unwatch(self._store_fd)
        self._store_at = max(self._store_at, self._context.loop.clock() + STORE_GAP)
        self._quiet_until = 0.0

    def _follow_folders(self) -> None:
        for folder in self._kinds:
            if folder not in self._watches:
                path = f"{domain(0)}/backend/{folder}/{self._context.domid}"
                self._watches[folder] = self._context.store.watch(path)
        for watch in self._watches.values():
            if watch.has_pending():
                self._dirty(watch.pending())
        for key, device in list(self.devices.items()):
            if device.gone:
                device.let_go(successor=False)
                del self.devices[key]
                self._rescan = True
        if self._rescan:
            self._rescan = False
            try:
                self._scan()
            except STORE_AWAY:
                self._rescan = True
                raise

    def _dirty(self, changed: Iterable[str]) -> None:
        for path in changed:
            parts = path.split("/")  # "", local, domain, 0, backend, folder, domid, devid, node
            device = (
                self.devices.get((parts[5], int(parts[7]))) if len(parts) > 7 and _small(parts[7]) else None
            )
            if device is None:
                self._rescan = True
            else:
                device.own_changed = True

    def _scan(self) -> None:
        roots = {folder: f"{domain(0)}/backend/{folder}/{self._context.domid}" for folder in self._kinds}
        lists = self._context.store.list_many(roots.values())
        found = {(folder, int(n)) for folder, root in roots.items() for n in lists[root] or () if _small(n)}
        if not found and not remembers(self._context.store):
            return
        if not found and self._domain_is_gone():
            self._stopped = self.domain_gone = True
        for key in set(self.devices) - found:
            self.devices.pop(key).let_go(successor=False)
        for folder, devid in sorted(found - set(self.devices)):
            kind = self._kinds[folder]
            where = DeviceId(self._context.domid, kind, devid, folder)
            device = Device(self._context, self._class(folder), where)
            self.devices[folder, devid] = device
            try:
                device.start()
            except STORE_AWAY:
                # Half of it may be done: begin again from what xenstore says then.
                device.let_go(successor=True)
                del self.devices[folder, devid]
                raise
            if device.gone:  # being made or removed at this moment: its next change tells
                device.let_go(successor=False)
                del self.devices[folder, devid]

    def _domain_is_gone(self) -> bool:
        domid = self._context.domid
        return bool(domid) and not self._context.store.exists(domain(domid))

    def _class(self, folder: str) -> BackendType:
        def make(context: BackendContext, device: DeviceId, nodes: Any) -> Any:
            return self._types(folder)(context, device, nodes)  # a missing module is that device's fault

        return make

    def _work(self, now: float) -> float:
        soonest = _ROUND
        for device in list(self.devices.values()):
            due = device.due_in(now)
            if due == 0.0:
                device.work(now)
                due = device.due_in(now)
            if due is not None:
                soonest = min(soonest, due)
            if device.gone:
                soonest = 0.0
        waiting = self._rescan or any(watch.has_pending() for watch in self._watches.values())
        return 0.0 if waiting else soonest

    def _failed(self, where: DeviceId, error: Exception) -> None:
        device = self.devices.get((where.folder, where.devid))
        if device is not None and device.pending_error is None:
            device.pending_error = error
            self._quiet_until = 0.0
            self._context.loop.wake()

    def _publish(self, where: DeviceId, nodes: Mapping[str, str]) -> None:
        device = self.devices.get((where.folder, where.devid))
        if device is not None:
            device.publish(nodes)
            self._quiet_until = 0.0
            self._context.loop.wake()

    # --- telling and ending
    def answer(self, word: str) -> Iterator[dict[str, Any]]:
        """What the control socket says. Raises ``KeyError`` for a word it does not know."""
        if word != "describe":
            raise KeyError(word)
        return iter([device.describe() for device in self.devices.values()])

    def close(self) -> None:
        """Let go of everything, for a successor to take over."""
        for device in self.devices.values():
            device.let_go(successor=True)
        self.devices.clear()
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
        self._context.loop.unwatch(self._store_fd)
        self._store_fd = -1


def _small(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 10


def serve(domid: int) -> bool:
    """Serve the domain's devices until SIGTERM, or until the domain is gone: then it returns true.

    Raises ``NoXenError``, ``PrivilegeError``, ``StoreError``.
    """
    from xtool.evtchn.device import EventDevice
    from xtool.grant.device import GrantDevice
    from xtool.xenstore.client import open_store

    with (
        open_store(deadline=STORE_DEADLINE) as store,
        EventDevice() as events,
        GrantDevice() as grants,
    ):
        loop = Loop(events)
        folder = paths.run_dir() / "backends" / str(domid)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        server = Server(BackendContext(domid, store, events, grants, loop, folder))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        control = ControlSocket(loop, socket_path(domid), server.answer)
        try:
            server.run()
        finally:
            control.close()
            server.close()
            loop.close()
        return server.domain_gone


def park(store: Store, domid: int, reason: str) -> None:
    """Close the domain's devices in xenstore, for nobody serves them any more."""
    for folder, (kind, _, _) in FOLDERS.items():
        root = f"{domain(0)}/backend/{folder}/{domid}"
        for name in store.list_many((root,))[root] or ():
            if not _small(name):
                continue
            device = DeviceId(domid, kind, int(name), folder)
            with store.batch() as batch:
                batch.write(f"{device.error}/error", reason)
                batch.write(f"{device.backend}/state", str(int(XenbusState.CLOSED)))


class _Capped(logging.StreamHandler[Any]):
    """At most ``LOG_SIZE`` bytes a day: what guests cause is rate-limited before; this is the last resort."""

    def __init__(self) -> None:
        super().__init__()
        self._left = LOG_SIZE
        self._day = 0

    def emit(self, record: logging.LogRecord) -> None:
        day = int(record.created) // 86400
        if day != self._day:
            self._day, self._left = day, LOG_SIZE
        if self._left > 0:
            self._left -= len(self.format(record))
            super().emit(record)


def log_to_stderr() -> None:
    """What a server has to say goes to its standard error."""
    handler = _Capped()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def main() -> int:
    parser = argparse.ArgumentParser(prog="xtool.backends.server", description="Serve a domain's devices.")
    parser.add_argument("domid", type=int)
    domid = parser.parse_args().domid
    log_to_stderr()
    try:
        serve(domid)
    except XtoolError as error:
        sys.stderr.write(f"{error.message}\n")
        return error.exit_code
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
