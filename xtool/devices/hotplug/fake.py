"""The host's kernel in memory: block and net backends on the fake xenstored, loop devices, bridges.

It goes through the states as Linux's blkback and netback and QEMU's disk backend do (``xenbus.py`` lists
what they do), at once, within the request that caused it. Files are the real ones of this machine: only
looked at, never opened.

Tests play with ``bridges``, ``drivers`` (domains whose frontends connect), ``stubborn`` (domains that do not
let go of a device), ``refusing`` (folder -> the backend's last words) and ``deaf`` (folders nobody serves).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from xtool.devices.backendkinds import FOLDERS, TargetFacts
from xtool.devices.hotplug import sharing
from xtool.devices.hotplug.port import LinkPlan
from xtool.devices.xenbus import DeviceId, parse_backend
from xtool.errors import HostError
from xtool.fake.store import FakeStoreDaemon
from xtool.proto.xenbus import XenbusState
from xtool.xenstore.client import StoreClient

_LOOP = "/dev/loop"


class Script(NamedTuple):
    """A hotplug script that was run."""

    path: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass
class _Served:
    """A device a backend has found."""

    connected: bool = False
    disk: str | None = None


@dataclass
class FakeDisk:
    path: str
    major: int
    minor: int
    loop: bool
    kernel: FakeKernel

    def close(self) -> None:
        self.kernel.let_go(self.path, "toolstack")


@dataclass
class FakeLink:
    bridge: str | None = None
    mtu: int = 1500
    device: DeviceId | None = None
    tap: bool = False


@dataclass
class _World:
    bridges: dict[str, int] = field(default_factory=lambda: {"xenbr0": 1500})
    links: dict[str, FakeLink] = field(default_factory=dict)
    #: Loop device -> its file, whether it may write, and who holds it.
    loops: dict[str, tuple[str, bool, set[object]]] = field(default_factory=dict)


class FakeKernel:
    """``Hotplug``, and the drivers behind it."""

    def __init__(self, daemon: FakeStoreDaemon) -> None:
        self.drivers: set[int] = set()
        self.stubborn: set[int] = set()
        self.refusing: dict[str, str] = {}
        self.deaf: set[str] = set()
        self.scripts: list[Script] = []
        self.served: dict[DeviceId, _Served] = {}
        self._world = _World()
        self._store = StoreClient(daemon.connect)
        self._queue: list[str] = []
        self._busy = False
        daemon.listeners.append(self._changed)

    @property
    def bridges(self) -> dict[str, int]:
        return self._world.bridges

    @property
    def links(self) -> dict[str, FakeLink]:
        return self._world.links

    @property
    def loops(self) -> dict[str, tuple[str, bool, set[object]]]:
        return self._world.loops

    # --- what the toolstack asks for ------------------------------------------------------------------
    def look_at(self, target: str | None) -> TargetFacts:
        return sharing.look_at(target)

    def identity(self, target: str) -> frozenset[str]:
        return sharing.identity(target)

    def users(self, target: str) -> list[tuple[str, bool]]:
        same = sharing.identity(target)
        return [
            (device, writes)
            for device, (file, writes, _) in self.loops.items()
            if same & sharing.identity(file)
        ]

    def open_disk(self, target: str, *, readonly: bool, direct_io: bool, loop: bool) -> FakeDisk:
        if sharing.look_at(target).kind != ("file" if loop else "block"):
            raise HostError(f"cannot open {target}")
        if not loop:
            return FakeDisk(target, 8, 0, False, self)
        number = next(n for n in range(1000) if f"{_LOOP}{n}" not in self.loops)
        path = f"{_LOOP}{number}"
        self.loops[path] = (target, not readonly, {"toolstack"})
        return FakeDisk(path, 7, number, True, self)

    def let_go(self, path: str, holder: object) -> None:
        """The last one to let go of a loop device ends it (autoclear)."""
        if path in self.loops:
            self.loops[path][2].discard(holder)
            if not self.loops[path][2]:
                del self.loops[path]

    def disk_served(self, domid: int, devid: int) -> bool:
        device = DeviceId(domid, "vbd", devid, "vbd")
        return device in self.served and self.served[device].disk is not None

    def has_link(self, name: str) -> bool:
        return name in self.links

    def check_bridge(self, name: str) -> None:
        if name not in self.bridges:
            raise HostError(f"this host has no bridge {name}", hint="make one, or set bridge:")

    def make_tap(self, name: str) -> None:
        self.links.setdefault(name, FakeLink(tap=True))

    def remove_tap(self, name: str) -> None:
        if name in self.links and self.links[name].tap:
            del self.links[name]

    def plug(self, plan: LinkPlan) -> int:
        self.check_bridge(plan.bridge)
        if plan.interface not in self.links:
            raise HostError(f"the interface {plan.interface} is not there")
        link = self.links.pop(plan.interface)
        link.bridge, link.mtu = plan.bridge, plan.mtu or self.bridges[plan.bridge]
        self.links[plan.name or plan.interface] = link
        return link.mtu

    def run_script(
        self, script: str, arguments: list[str], environment: Mapping[str, str], deadline: float
    ) -> None:
        """A script that does its work: it reports a device 8:16 for a disk, ``connected`` for all."""
        self.scripts.append(Script(script, tuple(arguments), dict(environment)))
        backend = f"/local/domain/0/{environment['XENBUS_PATH']}"
        if arguments[0] not in ("add", "online"):
            return
        with self._at_work():
            if "/vbd/" in backend:
                self._store.write(f"{backend}/physical-device", "8:10")
            self._store.write(f"{backend}/hotplug-status", "connected")

    def in_kernel(self, domid: int) -> list[str]:
        return sorted(
            f"{d.kind}-{d.domid}-{d.devid}"
            for d in self.served
            if d.domid == domid and FOLDERS[d.folder].server == "kernel"
        )

    # --- what the drivers do --------------------------------------------------------------------------
    def run_drivers(self, domid: int) -> None:
        """The guest's frontends come up."""
        self.drivers.add(domid)
        with self._at_work():
            for device in [d for d in self.served if d.domid == domid]:
                self._look(device)

    def _changed(self, path: str) -> None:
        self._queue.append(path)
        if not self._busy:
            with self._at_work():
                pass

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """What our own requests change is looked at afterwards, not within them."""
        if self._busy:
            yield
            return
        self._busy = True
        try:
            yield
            while self._queue:
                self._look_at(self._queue.pop(0))
        finally:
            self._busy = False

    def _look_at(self, changed: str) -> None:
        parts = parse_backend("/".join(changed.split("/")[:8]))
        if parts and parts[1] in FOLDERS:
            folder = FOLDERS[parts[1]]
            self._look(DeviceId(parts[2], folder.device, parts[3], folder.folder, parts[0]))
        elif changed.startswith("/local/domain/0/backend"):
            for device in list(self.served):  # a whole folder went
                self._look(device)

    def _look(self, device: DeviceId) -> None:
        base = device.backend
        names = ("state", "online", "physical-device", "physical-device-path", "hotplug-status", "handle")
        nodes = self._store.get_many([f"{base}/{name}" for name in (*names, "script")])
        state, online = nodes[f"{base}/state"], nodes[f"{base}/online"]
        served = self.served.get(device)
        if state is None:
            if served:
                self._unregister(device, removes=False)
        elif served is None:
            if state == "1" and online == "1" and device.folder not in self.deaf:
                self._probe(device, nodes)
        elif state == "5" and online == "0":
            if not (served.connected and device.domid in self.stubborn):
                self._close(device)
        else:
            self._go_on(device, served, nodes)

    def _probe(self, device: DeviceId, nodes: Mapping[str, str | None]) -> None:
        base = device.backend
        words = self.refusing.get(device.folder)
        if device.folder == "vif" and None in (nodes[f"{base}/handle"], nodes[f"{base}/script"]):
            words = "2 reading script"
        if words:
            self._store.write(f"{device.error}/error", words)
            self._store.write(f"{base}/state", str(int(XenbusState.CLOSING)))
            return
        self.served[device] = _Served()
        if device.folder == "vif":
            self.links[f"vif{device.domid}.{device.devid}"] = FakeLink(device=device)
        self._store.write(f"{base}/state", str(int(XenbusState.INIT_WAIT)))
        self._go_on(device, self.served[device], nodes)

    def _go_on(self, device: DeviceId, served: _Served, nodes: Mapping[str, str | None]) -> None:
        base = device.backend
        physical = nodes[f"{base}/physical-device"]
        if device.folder == "vbd" and served.disk is None and physical:
            served.disk = nodes[f"{base}/physical-device-path"] or physical
            if served.disk in self.loops:
                self.loops[served.disk][2].add(device)
        ready = nodes[f"{base}/hotplug-status"] == "connected" or device.folder != "vif"
        if device.domid in self.drivers and ready and not served.connected:
            served.connected = True
            for end in (device.frontend, base):
                self._store.write(f"{end}/state", str(int(XenbusState.CONNECTED)))

    def _close(self, device: DeviceId) -> None:
        for end in (device.frontend, device.backend):
            self._store.write(f"{end}/state", str(int(XenbusState.CLOSED)))
        self._unregister(device, removes=FOLDERS[device.folder].server == "qemu")

    def _unregister(self, device: DeviceId, *, removes: bool) -> None:
        served = self.served.pop(device)
        if served.disk:
            self.let_go(served.disk, device)
        for name in [name for name, link in self.links.items() if link.device == device]:
            del self.links[name]
        if removes:
            self._store.rm(device.backend)
