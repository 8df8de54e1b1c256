"""Domain 0 in memory with a backend process of ours in a thread, for devices that it has itself."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from xtool.backends.frame import BackendContext, BackendType, backend_type
from xtool.backends.link import Link, LinkSource
from xtool.backends.loop import Loop
from xtool.backends.net import NetBackend
from xtool.backends.server import Server
from xtool.backends.tap import Tap
from xtool.devices.hotplug.fake import FakeKernel
from xtool.fake.hypervisor import FakeHypervisor
from xtool.fake.machine import FakeMachine
from xtool.fake.store import FakeStoreDaemon
from xtool.toolstack import dom0
from xtool.toolstack.host import Host
from xtool.xenstore.client import StoreClient


class DomainZero:
    """``host`` is for the toolstack; frontends get their ports from ``machine``. ``wire`` is what a tap
    device would bring and take."""

    def __init__(self, folder: Path) -> None:
        self.daemon = FakeStoreDaemon()
        self.kernel = FakeKernel(self.daemon)
        self.kernel.deaf |= {"xtool-vbd", "xtool-vif", "xtool-console"}
        self.host = Host(FakeHypervisor(), StoreClient(self.daemon.connect), real=False, hotplug=self.kernel)
        self.machine = FakeMachine()
        self.wire, self.tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wire.settimeout(5)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.before = set(self.daemon.dump())
        self._start()

    def _start(self) -> None:
        self._events, self._grants = self.machine.events(0), self.machine.grants(0)
        self._loop = Loop(self._events)
        self._store = StoreClient(self.daemon.connect)
        context = BackendContext(0, self._store, self._events, self._grants, self._loop, self._folder)
        self.server = Server(context, types=self._type)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def _type(self, folder: str) -> BackendType:
        if folder == "xtool-vif":
            return partial(NetBackend, source=lambda device, nodes: Wire(self.tap))
        return backend_type(folder)

    def _stop(self) -> None:
        self.server.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.server.close()
        self._loop.close()
        assert not self._grants.live
        self._store.close()
        self._events.close()

    def restart(self) -> None:
        """As an upgrade does."""
        self._stop()
        self._start()

    @contextmanager
    def ports(self, host: Host) -> Iterator[tuple[object, object]]:
        with self.machine.events(0) as events, self.machine.allocator(0) as pages:
            yield events, pages

    def close(self) -> None:
        self._stop()
        self.host.close()
        self.wire.close()
        self.tap.close()

    def check_clean(self) -> None:
        """Nothing is left; the backend's thread may still be at it."""
        end = time.monotonic() + 10
        while (left := self.left) or self.machine.frames_used:
            assert time.monotonic() < end, (left, self.machine.frames_used)
            time.sleep(0.01)

    @property
    def left(self) -> set[str]:
        """Nodes that were not there at the beginning; nobody removes the uppermost folders."""
        new = set(self.daemon.dump()) - self.before
        upper = re.compile(r"/local/domain/0(/error)?(/backend(/[a-z-]+)?)?")
        return {path for path in new if not upper.fullmatch(path)}


class WireTap(Tap):
    """A tap device without a kernel: a socket that keeps frames apart."""

    def __init__(self, sock: socket.socket) -> None:
        self.name = "vif0.0"
        self._fd = sock.dup().detach()

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        pass


class Wire(LinkSource):
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._links: list[Link] = []

    def open(self, count: int) -> Sequence[Link]:
        self.close(for_good=False)
        self._links = [WireTap(self._sock) for _ in range(count)]
        return self._links

    def accept(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        pass

    def close(self, *, for_good: bool) -> None:
        for link in self._links:
            link.close()
        self._links = []


@contextmanager
def domain_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DomainZero]:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    world = DomainZero(tmp_path / "run" / "backends")
    monkeypatch.setattr(dom0, "open_ports", world.ports)
    world.tap.setblocking(False)
    try:
        yield world
    finally:
        world.close()
