"""The guest's end of a console, in user space: reads what a backend sends, writes what a guest would print.

::

    with ConsoleDevice(allocator, events, 0) as console:
        console.publish(store, frontend, backend, deadline=5)    # an additional console, by xenbus
        console.print(b"hello\\n", deadline=1)
        console.read(deadline=1)

For whoever wants to test a backend, or to talk to one that serves another domain's channel. Console 0 of a
domain has no xenbus states: hand its ``ring-ref`` and ``port`` over instead of ``publish``.
"""

from __future__ import annotations

import select
import time
from types import TracebackType
from typing import TYPE_CHECKING

from xtool.errors import DeadlineError, RemoteProtocolError
from xtool.proto.consolering import ConsoleFrontend
from xtool.proto.xenbus import Action, FrontendMachine, XenbusState

if TYPE_CHECKING:
    from xtool.evtchn.port import EventChannels
    from xtool.grant.port import GrantAllocator
    from xtool.xenstore.port import Store


class ConsoleDevice:
    """A page for ``backend_domid`` with a console ring in it, and a port. Every method raises ``RingError``
    when the backend's indexes make no sense."""

    def __init__(self, allocator: GrantAllocator, events: EventChannels, backend_domid: int) -> None:
        self._events = events
        self._shared = allocator.share(backend_domid, 1)
        self._ring: ConsoleFrontend | None = None
        self._port = -1
        self._frontend = ""
        self._store: Store | None = None
        try:
            self._ring = ConsoleFrontend(self._shared.view[:])
            self._port = events.bind_unbound(backend_domid)
        except BaseException:
            self.close()
            raise

    @property
    def nodes(self) -> dict[str, str]:
        """What the backend has to be told."""
        return {"ring-ref": str(self._shared.refs[0]), "port": str(self._port)}

    @property
    def ring(self) -> ConsoleFrontend:
        assert self._ring is not None
        return self._ring

    def publish(self, store: Store, frontend: str, backend: str, deadline: float) -> None:
        """Tell the backend through xenstore and wait until it is connected, ``deadline`` seconds at most.

        Raises ``DeadlineError``, and ``RemoteProtocolError`` when the backend closes instead.
        """
        end = time.monotonic() + deadline
        machine = FrontendMachine()
        self._store, self._frontend = store, frontend
        store.write(f"{frontend}/state", str(int(XenbusState.INITIALISING)))
        with store.watch(f"{backend}/state") as watch:
            while True:
                for action in machine.backend_changed(store.get(f"{backend}/state")):
                    self._act(store, frontend, action)
                if machine.state is XenbusState.CONNECTED:
                    return
                if machine.state in (XenbusState.CLOSING, XenbusState.CLOSED):
                    raise RemoteProtocolError(f"the backend {backend} closes the console")
                if not watch.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                    raise DeadlineError(f"the backend {backend} did not connect within {deadline:g} s")

    def _act(self, store: Store, frontend: str, action: Action) -> None:
        if action is Action.PUBLISH:
            with store.batch() as batch:
                for name, value in self.nodes.items():
                    batch.write(f"{frontend}/{name}", value)
                batch.write(f"{frontend}/state", str(int(XenbusState.INITIALISED)))
        elif action is Action.CONNECT:
            store.write(f"{frontend}/state", str(int(XenbusState.CONNECTED)))

    def write(self, data: bytes) -> int:
        """Print what fits now; how much."""
        count = self.ring.write(data)
        if count:
            self._events.notify(self._port)
        return count

    def print(self, data: bytes, deadline: float) -> None:
        """Print all of it. Raises ``DeadlineError`` when the backend does not take it in time."""
        end = time.monotonic() + deadline
        left = memoryview(data)
        while True:
            left = left[self.write(bytes(left[:4096])) :]
            if not left:
                return
            self._wait(end, f"the backend left {len(left)} bytes in the console ring")

    def take(self) -> bytes:
        """What the backend has sent, which may be nothing."""
        data = self.ring.read()
        if data:
            self._events.notify(self._port)
        return data

    def read(self, deadline: float) -> bytes:
        """The same, waiting until there is something. Raises ``DeadlineError``."""
        end = time.monotonic() + deadline
        while not (data := self.take()):
            self._wait(end, "the console's backend sent nothing")
        return data

    def _wait(self, end: float, what: str) -> None:
        left = end - time.monotonic()
        if left <= 0:
            raise DeadlineError(what)
        # Unmasked first: an event that came before is then reported at once.
        self._events.unmask([self._port])
        select.select([self._events.fileno()], [], [], left)
        self._events.pending()

    def close(self) -> None:
        """Take page and port back. May be called again."""
        if self._store is not None:
            self._store.write(f"{self._frontend}/state", str(int(XenbusState.CLOSED)))
            self._store = None
        if self._port >= 0:
            self._events.unbind(self._port)
            self._port = -1
        if self._ring is not None:
            self._ring.release()
            self._ring = None
        self._shared.close()

    def __enter__(self) -> ConsoleDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
