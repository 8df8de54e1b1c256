"""A host and a guest in memory, with the real backend process's parts and the real frontends between them.

Everything runs in one thread: whoever waits for the other end gives it its turn (``Rig.turn``).
"""

from __future__ import annotations

import gc
import select
from collections.abc import Callable, Mapping
from pathlib import Path

from xtool.backends.frame import BackendContext, BackendType, backend_type
from xtool.backends.loop import Loop
from xtool.backends.server import Server
from xtool.devices.declare import write
from xtool.devices.vbd import Vbd, vbd_nodes
from xtool.devices.xenbus import DeviceId
from xtool.fake.events import FakeEventChannels
from xtool.fake.grants import FakeAllocator, FakeGrants
from xtool.fake.machine import FakeMachine
from xtool.fake.store import FakeStoreDaemon
from xtool.frontends.block import BlockFrontend, Place
from xtool.proto.blkif import X86_64, Layout
from xtool.xenstore.client import StoreClient

GUEST = 5
XVDA = 51712


class Clock:
    """Goes on when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """Domain 0 with a backend process of ours, and domain 5. Process and frontends come and go."""

    def __init__(self, folder: Path, types: Callable[[str], BackendType] = backend_type) -> None:
        self.folder = folder
        self.types = types
        self.machine = FakeMachine()
        self.machine.add_domain(GUEST)
        self.daemon = FakeStoreDaemon()
        self.toolstack = StoreClient(self.daemon.connect)
        self.guest = StoreClient(lambda: self.daemon.connect(GUEST))
        self.clock = Clock()
        self.server: Server | None = None
        self._opened: list[FakeEventChannels] = []
        self.start()

    # --- the backend process
    def start(self) -> None:
        """A new process, which finds what there is."""
        self.events: FakeEventChannels = self.machine.events(0)
        self.grants: FakeGrants = self.machine.grants(0)
        self.store = StoreClient(self.daemon.connect)
        self.loop = Loop(self.events, clock=self.clock)
        context = BackendContext(GUEST, self.store, self.events, self.grants, self.loop, self.folder)
        self.server = Server(context, types=self.types)

    def kill(self) -> None:
        """As kill -9: nothing of it runs any more, the kernel takes back what it held."""
        server, self.server = self.server, None
        assert server is not None
        self.events.close()
        self.store.close()
        self.loop.close()
        for device in server.devices.values():
            _drop_views(device)
        server.devices.clear()
        self.loop.dispatcher._entries.clear()
        self.loop.dispatcher._backlog.clear()
        gc.collect()  # objects that were under construction
        self.grants.close()

    def stop(self) -> None:
        """As SIGTERM."""
        server, self.server = self.server, None
        assert server is not None
        server.close()
        self.events.close()
        self.store.close()
        self.loop.close()
        assert not self.grants.live

    def end(self) -> None:
        """The process, the guest and the toolstack: no descriptor is left, for who makes many of these."""
        if self.server is not None:
            self.stop()
        for closing in (*self._opened, self.toolstack, self.guest):
            closing.close()

    def turn(self, seconds: float = 0.0, enough: Callable[[], bool] = lambda: False) -> None:
        """Let the process have a round or a few; so much time passes, or less if there is ``enough``. Its
        timers find the time at which they are due."""
        end = self.clock.now + max(seconds, 0.003)
        due = 0.003
        while True:
            self.clock.now = min(end, self.clock.now + due)
            if self.server is not None:
                for _ in range(3):
                    self.server.step(0)
                due = max(0.003, self.loop._due_in())
            else:
                due = seconds
            if self.clock.now >= end or enough():
                return

    def turns(self, count: int = 40) -> None:
        for _ in range(count):
            self.turn(0.02)

    def describe(self) -> list[dict[str, object]]:
        assert self.server is not None
        return list(self.server.answer("describe"))

    # --- devices
    def add_disk(self, disk: Vbd, more: Mapping[str, str] | None = None) -> DeviceId:
        """What the toolstack does."""
        device = disk.id(GUEST)
        with self.toolstack.batch() as batch:
            write(batch, vbd_nodes(disk, GUEST, "pvh"))
            for name, value in {"xtool-persistent": "1", **(more or {})}.items():
                batch.write(f"{device.backend}/{name}", value)
        return device

    def remove(self, device: DeviceId) -> None:
        with self.toolstack.batch() as batch:
            for path in (device.frontend, device.backend, device.mirror, device.error):
                batch.rm(path)

    def state(self, device: DeviceId) -> str | None:
        return self.toolstack.get(f"{device.backend}/state")

    def frontend(
        self,
        device: DeviceId,
        *,
        connect: bool = True,
        layout: Layout = X86_64,
        ring_order: int = 0,
        queues: int = 1,
        segments: int = 32,
        start: int = 0,
        persistent: bool = False,
        data_pages: int = 256,
    ) -> BlockFrontend:
        events: FakeEventChannels = self.machine.events(GUEST)
        self._opened.append(events)
        allocator: FakeAllocator = self.machine.allocator(GUEST)

        def came() -> bool:
            return bool(select.select([events.fileno()], [], [], 0)[0])

        def relax(seconds: float) -> None:
            self.turn(seconds, came)
            events.unmask(events.pending())

        disk = BlockFrontend(
            self.guest,
            events,
            allocator,
            Place(device.frontend, device.backend),
            layout=layout,
            ring_order=ring_order,
            queues=queues,
            segments=segments,
            start=start,
            persistent=persistent,
            data_pages=data_pages,
            relax=relax,
        )
        if connect:
            disk.connect()
        return disk


def _drop_views(device: object) -> None:
    """A dead process has no views: end those of its rings, without what ``close`` does besides."""
    backend = getattr(device, "_backend", None)
    for queue in getattr(backend, "_queues", ()):
        if queue._ring is not None:
            queue._ring.release()
        if queue._journal is not None:
            queue._journal.close()
    medium = getattr(backend, "medium", None)
    if medium is not None and medium.worker is not None:  # the kernel closes its connection to an NBD server
        medium.interrupt(forget=True)
        medium.image._drop()
        medium.worker.close()
