"""What happens to the domains of this host, whoever made them, as events.

One thread, one host of its own. It looks at Xen's list of domains when xenstored announces something and
every ``RESCAN`` seconds besides, at a domain's devices and their states when a watch on them fires, and tells
the difference to what it saw.

Facts: ``@introduceDomain`` and ``@releaseDomain`` name nobody and several may come as one, so what they mean
is found out by comparing (a domid with its uuid is one domain). ``@releaseDomain`` also comes when a domain
shuts down. Nobody announces a pause. ``/libxl/N/device`` is the toolstack's (xl's and ours); a guest cannot
write there, nor to its name. A backend's state node is the backend's word, but a guest can make it change as
often as it likes: ``events`` limits that, and the pause between two looks bounds what a look costs.
"""

from __future__ import annotations

import logging
import os
import select
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event as Flag
from threading import Thread
from typing import TYPE_CHECKING

from xtool.client.records import Event
from xtool.daemon.adopt import has_keeper
from xtool.daemon.events import Events
from xtool.devices.xenbus import parse_backend, parse_state
from xtool.errors import XtoolError
from xtool.proto.xenbus import XenbusState
from xtool.toolstack import journal, watchlink
from xtool.toolstack.names import uuid_text
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.hypercall.port import DomainState
    from xtool.toolstack.host import Host
    from xtool.xenstore.port import Watch

#: How often is looked without any announcement, and the least time between two looks, seconds.
RESCAN, PAUSE = 2.0, 0.05
#: How often the keepers are looked after, seconds.
KEEPER_PERIOD = 10.0
#: Pause after a look that failed, seconds.
_RETRY = 1.0
#: Devices of one domain that are followed, and domains that are remembered after their end.
DEVICES_MAX, PAST_MAX = 256, 256
#: How long what has come from xenstored may take to be read, seconds.
_TAKE = 0.001
#: How long a domain that is being built may have no name before it is told of without one, seconds.
_NAMELESS = 10.0
log = logging.getLogger("xtoold")


@dataclass
class _Device:
    kind: str
    devid: int
    backend: str
    state: str = ""
    watch: Watch | None = None


@dataclass
class _Seen:
    """A domain as it was at the last look. ``told``: its creation was."""

    uuid: str
    since: float
    managed: bool
    name: str = ""
    paused: bool = True
    shutdown: str = ""
    started: bool = False
    told: bool = False
    unkept: bool = False
    devices: dict[str, _Device] = field(default_factory=dict)
    watches: list[Watch] = field(default_factory=list)


class Watcher:
    """``lost_keeper`` is told the names of domains of ours that nobody looks after any more: as many as the
    one process had that died."""

    def __init__(
        self,
        open_host: Callable[[], Host],
        events: Events,
        lost_keeper: Callable[[list[str]], None] = lambda names: None,
    ) -> None:
        self._open, self._events, self._lost_keeper = open_host, events, lost_keeper
        self._domains: dict[int, _Seen] = {}
        self._past: OrderedDict[str, int] = OrderedDict()
        self._work: dict[Watch, Callable[[Host], None]] = {}
        self._first = True
        self._stop = Flag()
        self._awake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._let_go = weakref.finalize(self, os.close, self._awake)
        self._keepers_at = time.monotonic()
        self._checking = Thread()
        self._thread = Thread(target=self._run, daemon=True, name="watcher")
        #: Set after the first look: from then on nothing is missed.
        self.ready = Flag()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.look_now()

    def look_now(self) -> None:
        """Something was done to a domain: do not wait for an announcement. Any thread may call."""
        os.eventfd_write(self._awake, 1)

    @property
    def count(self) -> int:
        """Domains there are."""
        return len(self._domains)

    def _run(self) -> None:
        said = ""
        while not self._stop.is_set():
            host = None
            try:
                host = self._open()
                self._watch(host)
            except (XtoolError, OSError) as error:
                if str(error) != said:  # once, not every second of an outage
                    said = str(error)
                    log.warning("watching the domains is interrupted: %s", error)
            except Exception:
                log.exception("watching the domains failed")
            finally:
                if host is not None:
                    host.close()
            self._stop.wait(_RETRY)

    def _watch(self, host: Host) -> None:
        """Over one connection to xenstored."""
        self._work = {
            host.store.watch(paths.INTRODUCE_DOMAIN): self._scan,
            host.store.watch(paths.RELEASE_DOMAIN): self._scan,
        }
        for domid, seen in self._domains.items():
            if seen.told:
                self._follow(host, domid, seen)
        scanned = -RESCAN
        while not self._stop.is_set():
            fired = [watch for watch in self._work if watch.has_pending()]
            for watch in fired:
                watch.pending()
            work = list(dict.fromkeys(self._work[watch] for watch in fired))
            if self._scan not in work and time.monotonic() - scanned >= RESCAN:
                work.insert(0, self._scan)
            if self._scan in work:
                scanned = time.monotonic()
            for look in work:
                look(host)
            self._first = False
            self.ready.set()
            self._look_after_keepers(host)
            self._stop.wait(PAUSE)
            if not any(watch.has_pending() for watch in self._work):
                left = max(0.0, scanned + RESCAN - time.monotonic())
                ready, _, _ = select.select([host.store.fileno(), self._awake], [], [], left)
                if self._awake in ready:
                    os.eventfd_read(self._awake)
                    scanned = -RESCAN
                if host.store.fileno() in ready:
                    host.store.wait_any(list(self._work), _TAKE)

    # --- domains
    def _scan(self, host: Host) -> None:
        now = {state.domid: state for state in host.hv.domains() if not state.dying}
        for domid, seen in list(self._domains.items()):
            if domid not in now or uuid_text(now[domid].handle) != seen.uuid:
                self._gone(host, domid, seen)
        for domid, state in now.items():
            seen = self._domains.get(domid) or self._appeared(host, domid, uuid_text(state.handle))
            if not seen.told and not self._tell_created(host, domid, seen):
                continue
            self._compare(domid, seen, state)

    def _appeared(self, host: Host, domid: int, uuid: str) -> _Seen:
        seen = _Seen(uuid, time.monotonic(), journal.read(uuid) is not None)
        self._domains[domid] = seen
        return seen

    def _tell_created(self, host: Host, domid: int, seen: _Seen) -> bool:
        name = host.store.get(f"{paths.domain(domid)}/name") or ("Domain-0" if domid == 0 else "")
        if not name and time.monotonic() - seen.since < _NAMELESS and not self._first:
            return False  # its creator has not got that far
        seen.name, seen.told = name, True
        self._follow(host, domid, seen)
        self._tell("domain.created", domid, seen)
        if self._first:  # what it has now is no news
            self._devices(host, domid, seen)
        old = self._past.pop(seen.uuid, None)
        if old is not None:
            self._tell("domain.rebooted", domid, seen, old_domid=old)
        return True

    def _gone(self, host: Host, domid: int, seen: _Seen) -> None:
        del self._domains[domid]
        for watch in [*seen.watches, *(d.watch for d in seen.devices.values() if d.watch)]:
            self._unwatch(watch)
        if not seen.told:
            return
        for device in seen.devices.values():
            self._tell("device.detached", domid, seen, kind=device.kind, devid=device.devid)
        self._tell("domain.destroyed", domid, seen)
        if seen.shutdown == "reboot":
            self._past[seen.uuid] = domid
            while len(self._past) > PAST_MAX:
                self._past.popitem(last=False)

    def _compare(self, domid: int, seen: _Seen, state: DomainState) -> None:
        paused, shutdown = state.paused, state.shutdown_reason
        if shutdown != seen.shutdown:
            seen.shutdown = shutdown
            if shutdown:
                self._tell("domain.shutdown", domid, seen, reason=shutdown)
        if paused != seen.paused and not shutdown:
            seen.paused = paused
            if not paused:
                self._tell("domain.unpaused" if seen.started else "domain.started", domid, seen)
                seen.started = True
            else:
                self._tell("domain.paused", domid, seen)

    def _follow(self, host: Host, domid: int, seen: _Seen) -> None:
        """Watch what belongs to it."""
        for device in seen.devices.values():
            device.watch = None
        name = host.store.watch(f"{paths.domain(domid)}/name")
        devices = host.store.watch(f"{paths.libxl(domid)}/device")
        seen.watches = [name, devices]
        self._work[name] = lambda host: self._rename(host, domid, seen)
        self._work[devices] = lambda host: self._devices(host, domid, seen)

    def _unwatch(self, watch: Watch) -> None:
        self._work.pop(watch, None)
        watch.close()

    def _rename(self, host: Host, domid: int, seen: _Seen) -> None:
        name = host.store.get(f"{paths.domain(domid)}/name")
        if name and name != seen.name and self._domains.get(domid) is seen:
            old, seen.name = seen.name, name
            self._tell("domain.renamed", domid, seen, old_name=old)

    # --- devices
    def _devices(self, host: Host, domid: int, seen: _Seen) -> None:
        if self._domains.get(domid) is not seen:
            return
        now = self._listed(host, domid)
        for key in [key for key in seen.devices if key not in now]:
            device = seen.devices.pop(key)
            if device.watch:
                self._unwatch(device.watch)
            self._tell("device.detached", domid, seen, kind=device.kind, devid=device.devid)
        for key, device in now.items():
            if key not in seen.devices:
                seen.devices[key] = device
                self._tell("device.attached", domid, seen, kind=device.kind, devid=device.devid)
            known = seen.devices[key]
            if known.watch is None and known.backend:
                known.watch = host.store.watch(f"{known.backend}/state")
                look = self._work[known.watch] = self._state_look(domid, seen, known)
                if self._first:
                    look(host)

    def _listed(self, host: Host, domid: int) -> dict[str, _Device]:
        """The devices in the toolstack's own tree."""
        root = f"{paths.libxl(domid)}/device"
        kinds = host.store.list_many([root])[root] or ()
        numbers = host.store.list_many([f"{root}/{kind}" for kind in kinds])
        nodes = [f"{folder}/{number}" for folder, found in numbers.items() for number in found or ()][
            :DEVICES_MAX
        ]
        backends = host.store.get_many([f"{node}/backend" for node in nodes])
        found = {}
        for node in nodes:
            kind, devid = node.split("/")[-2:]
            backend = backends[f"{node}/backend"]
            if devid.isascii() and devid.isdecimal() and len(devid) < 10:
                known = backend if parse_backend(backend) else ""
                found[f"{kind}/{devid}"] = _Device(kind, int(devid), known or "")
        return found

    def _state_look(self, domid: int, seen: _Seen, device: _Device) -> Callable[[Host], None]:
        def look(host: Host) -> None:
            state = parse_state(host.store.get(f"{device.backend}/state"))
            word = "" if state is XenbusState.UNKNOWN else state.name.lower().replace("_", "-")
            if word != device.state:
                device.state = word
                if word:
                    self._tell("device.state", domid, seen, kind=device.kind, devid=device.devid, state=word)

        return look

    # --- keepers
    def _look_after_keepers(self, host: Host) -> None:
        if not host.real or time.monotonic() - self._keepers_at < KEEPER_PERIOD:
            return
        self._keepers_at = time.monotonic()
        lost = []
        for domid, seen in self._domains.items():
            if not seen.managed or seen.shutdown or time.monotonic() - seen.since < KEEPER_PERIOD:
                continue
            unkept, seen.unkept = seen.unkept, not has_keeper(seen.uuid)
            if seen.unkept and not unkept:
                self._tell("keeper", domid, seen, state="lost")
                lost.append(seen.name)
        if lost:
            self._lost_keeper(lost)
        if not self._checking.is_alive():  # the answer of one that hangs is waited for
            self._checking = Thread(target=watchlink.check, daemon=True, name="check of the watcher")
            self._checking.start()

    def _tell(self, event: str, domid: int, seen: _Seen, **details: object) -> None:
        if self._first:
            return  # what was there before us did not happen now
        self._events.put(
            Event("", time.time(), event, domid, seen.name, seen.uuid, seen.managed, dict(details))
        )
