"""What all user-space backends share: one ``Backend`` object per device, in a process per domain.

``xtool.backends.server`` makes the objects, drives them through the xenbus states and ends them. In order::

    backend = backend_type(folder)(context, device, own_nodes)   # opens the image, the tap, the log
    offer()             nodes to be written before InitWait
    connect(nodes)      the frontend's nodes: map the rings, bind; nodes to be written before Connected
    disconnect()        unmap, unbind; offer() and connect() may follow
    close()             let go of the image, the tap, the log

A process that takes over from one that was killed, or was told to stop, finds the state node at Connected::

    resume(nodes)       as connect(), but on rings that are in use: what was in flight is found again
    suspend()           the other side of it: let go, but leave all that a successor needs

Rules for a backend
-------------------
* Any method may raise; the server then closes this device with the error's text as the reason, and no other.
* A handler on the loop raises, or calls ``failed``; both end up in the same place. The server tears down in
  a round of its own, never below the handler that failed.
* ``disconnect``, ``suspend`` and ``close`` may be called in any state, again too, and leave nothing mapped.
* Nothing waits: the process serves all devices of the domain in one thread.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from xtool.backends.loop import Loop
from xtool.devices.xenbus import DeviceId
from xtool.errors import EventChannelError, XtoolError
from xtool.evtchn.dispatch import Handler
from xtool.evtchn.port import EventChannels
from xtool.grant.port import Grants
from xtool.proto.nodes import Nodes
from xtool.proto.xenbus import XenbusState
from xtool.xenstore.port import Store

log = logging.getLogger(__name__)


@dataclass
class BackendContext:
    """What the process has, for all its backends. ``folder`` is where files that outlive it are kept."""

    domid: int
    store: Store
    events: EventChannels
    grants: Grants
    loop: Loop
    folder: Path
    #: Close the device with this error as the reason, soon. The server sets it.
    failed: Callable[[DeviceId, Exception], None] = lambda device, error: None
    #: Write nodes below the device's directory and its state once more, soon: the frontend looks again.
    publish: Callable[[DeviceId, Mapping[str, str]], None] = lambda device, nodes: None


class Backend(ABC):
    """The backend of one device. ``nodes``: its own directory's when it was made; domain 0 wrote them."""

    #: In which states of the frontend its rings are there. A vif's backend waits for Connected alone.
    connect_on: ClassVar[frozenset[XenbusState]] = frozenset({XenbusState.INITIALISED, XenbusState.CONNECTED})

    def __init__(self, context: BackendContext, device: DeviceId, nodes: Nodes) -> None:
        self.context = context
        self.id = device
        self.nodes: Nodes = nodes
        self.complain = Complaints(device)
        self.ports: list[int] = []

    # --- what a device kind does
    @abstractmethod
    def offer(self) -> Mapping[str, str]:
        """Nodes to be written below our directory before InitWait."""

    @abstractmethod
    def connect(self, frontend: Nodes) -> Mapping[str, str]:
        """Attach to the rings the frontend's nodes name; nodes to be written before Connected."""

    @abstractmethod
    def resume(self, frontend: Nodes) -> None:
        """Take over from a process that let go of the rings at whatever instruction."""

    @abstractmethod
    def disconnect(self) -> None:
        """Stop; unmap and unbind everything of the frontend's, forget what a successor would have needed."""

    def suspend(self) -> None:
        """As ``disconnect``, but a successor will ``resume``. Writes nothing into the rings afterwards."""
        self.disconnect()

    @abstractmethod
    def close(self) -> None:
        """Let go of what is ours. Called after ``disconnect`` or ``suspend``."""

    def reconfigure(self, nodes: Nodes) -> None:
        """Domain 0 changed something in our directory: ``nodes`` is how it looks now."""
        self.nodes = nodes

    def describe(self) -> dict[str, Any]:
        """For ``xtool wiring`` and ``block-list``: ring indexes, ports, grants, what is in flight, counters.
        Only what json can hold."""
        return {}

    # --- for use in subclasses
    def failed(self, error: Exception) -> None:
        """Have this device closed; for use in callbacks."""
        self.context.failed(self.id, error)

    def bind(self, remote_port: int, handler: Handler) -> int:
        """Bind the frontend's port and call ``handler`` for its events. Raises ``EventChannelError``."""
        port = self.context.events.bind_interdomain(self.context.domid, remote_port)
        self.ports.append(port)
        self.context.loop.dispatcher.add(port, handler, lambda _, error: self.failed(error))
        return port

    def unbind_all(self) -> None:
        for port in self.ports:
            self.context.loop.dispatcher.remove(port)
            try:
                self.context.events.unbind(port)
            except EventChannelError as error:
                log.warning("%s: %s", self.id, error)
        self.ports.clear()

    def notify(self, port: int) -> None:
        self.context.events.notify(port)


#: Lines about one device in a row, and how long a further one then has to wait, seconds.
_COMPLAINTS, _COMPLAINT_PAUSE = 5, 60.0


class Complaints:
    """Log lines about what a guest does wrong: a few, then one a minute that counts those left out (R19).

    ``count`` counts all of them, ``last`` is the last one's text.
    """

    def __init__(self, device: DeviceId, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self.last = ""
        self._device = device
        self._clock = clock
        self._tokens = float(_COMPLAINTS)
        self._left_out = 0
        self._since = clock()

    def __call__(self, text: str) -> None:
        self.count += 1
        self.last = printable(text)
        now = self._clock()
        self._tokens = min(_COMPLAINTS, self._tokens + (now - self._since) / _COMPLAINT_PAUSE)
        self._since = now
        if self._tokens < 1:
            self._left_out += 1
            return
        self._tokens -= 1
        more = f" ({self._left_out} lines left out)" if self._left_out else ""
        self._left_out = 0
        log.warning("%s: %s%s", self._device, self.last, more)


def printable(text: str, limit: int = 300) -> str:
    """Text that a guest may have had a hand in, fit for a log line and a node (HF 34)."""
    return text[:limit].encode("unicode_escape").decode("ascii")[:limit]


def reason_of(error: Exception) -> str:
    return error.message if isinstance(error, XtoolError) else f"{type(error).__name__}: {error}"


BackendType = Callable[[BackendContext, DeviceId, Nodes], Backend]

#: Folder below ``backend/`` -> (device kind, module, class). Modules are loaded when they are needed.
FOLDERS: dict[str, tuple[str, str, str]] = {
    "xtool-vbd": ("vbd", "xtool.backends.block", "BlockBackend"),
    "xtool-vif": ("vif", "xtool.backends.net", "NetBackend"),
    "xtool-console": ("console", "xtool.backends.console", "ConsoleBackend"),
}


def backend_type(folder: str) -> BackendType:
    """The class that serves the devices of a folder."""
    _, module, name = FOLDERS[folder]
    found: BackendType = getattr(import_module(module), name)
    return found


def read_many(store: Store, root: str, *, below: str = "", limit: int = 2048) -> dict[str, str]:
    """The nodes of a directory by name, and those of its directories whose name begins with ``below`` by
    ``directory/name``. At most ``limit`` nodes: what is more is left out."""
    names = [name for name in _children(store, root) if "/" not in name][:limit]
    if below:
        folders = [name for name in names if name.startswith(below)]
        lists = store.list_many(f"{root}/{name}" for name in folders)
        for folder in folders:
            names += [f"{folder}/{name}" for name in lists[f"{root}/{folder}"] or ()]
        names = names[:limit]
    values = store.get_many(f"{root}/{name}" for name in names)
    return {name: value for name in names if (value := values[f"{root}/{name}"]) is not None}


def _children(store: Store, root: str) -> tuple[str, ...]:
    return store.list_many((root,))[root] or ()
