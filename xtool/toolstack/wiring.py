"""Bringing devices into service, all side by side, and taking them out again.

``Wiring`` is for devices that are being added, to a domain in the making or to one that runs::

    wiring = Wiring(host, domid, "pvh", disks, vifs)
    wiring.open(undo)                  # loop devices, held open
    ... write wiring.nodes() in a transaction ...
    wiring.ready(deadline)             # every backend is up; one deadline for all

What was added is found again by the toolstack's own tree in xenstore (``records``): nothing that a guest
could have written is asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from xtool.devices.backendkinds import FOLDERS
from xtool.devices.consoles import Console, console_nodes
from xtool.devices.declare import Node
from xtool.devices.hotplug.port import LinkPlan, OpenDisk
from xtool.devices.vbd import PhysicalDevice, Vbd, script_path, vbd_nodes
from xtool.devices.vif import Vif, vif_nodes
from xtool.devices.xenbus import DeviceId, parse_backend, wait_states
from xtool.errors import HostError, XtoolError
from xtool.proto.xenbus import XenbusState
from xtool.toolstack.backends import start_backends
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

#: How long a hotplug script may take, seconds.
SCRIPT_TIME = 30.0
#: How long the kernel may take to let go of a removed device, seconds.
LET_GO_TIME = 10.0


class Wiring:
    """``guest`` is ``pv``, ``pvh`` or ``hvm``. Interfaces without a paravirtual part are no business here,
    but for their tap devices."""

    def __init__(
        self,
        host: Host,
        domid: int,
        guest: str,
        disks: Iterable[Vbd] = (),
        vifs: Iterable[Vif] = (),
        consoles: Iterable[Console] = (),
    ) -> None:
        self._host, self._domid, self._guest = host, domid, guest
        self._disks = tuple(disks)
        self._all_vifs = tuple(vifs)
        self._consoles = tuple(consoles)
        self._vifs = tuple(vif for vif in self._all_vifs if vif.pv)
        self._held: dict[int, OpenDisk] = {}
        self._by_id: dict[DeviceId, Vbd | Vif | Console] = {
            **{disk.id(domid): disk for disk in self._disks},
            **{vif.id(domid): vif for vif in self._vifs},
            **{console.id(domid): console for console in self._consoles},
        }
        self._plugged: set[DeviceId] = set()
        self._end = 0.0

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        return tuple(self._by_id)

    def frontend_of(self, device: DeviceId) -> str:
        """Where the frontend's nodes are."""
        return device.frontend

    def open(self, undo: ExitStack) -> None:
        """Open what the kernel shall serve. Held until its backend has it too; ``undo`` lets go."""
        undo.callback(self.close)
        for disk in self._disks:
            if disk.backend_kind.server == "kernel" and not disk.script and disk.target:
                self._held[disk.devid] = self._host.hotplug.open_disk(
                    disk.target, readonly=disk.readonly, direct_io=disk.direct_io_safe, loop=disk.loop
                )

    def close(self) -> None:
        while self._held:
            self._held.popitem()[1].close()

    def nodes(self) -> list[Node]:
        found = []
        for disk in self._disks:
            held = self._held.get(disk.devid)
            physical = PhysicalDevice(held.path, held.major, held.minor, held.loop) if held else None
            found += vbd_nodes(disk, self._domid, self._guest, physical)
        for vif in self._vifs:
            found += vif_nodes(vif, self._domid)
        for console in self._consoles:
            found += console_nodes(console, self._domid)
        return found

    def stale(self) -> tuple[str, ...]:
        """Backend folders that a former domain of this number may have left."""
        return backend_folders(self._domid, {(d.backend_domid, d.folder) for d in self._by_id})

    def ready(self, deadline: float) -> None:
        """Until every backend is up: what can be done before the guest runs. All share ``deadline`` seconds.

        Raises ``HostError`` with the reason of a backend that gave up, ``DeadlineError``.
        """
        if not self._by_id:
            return
        self._end = time.monotonic() + deadline
        self._make_taps()
        start_backends(self._host, self._domid, self._by_id)
        try:
            wait_states(
                self._host.store,
                self.devices,
                self._look,
                deadline,
                "backends did not come up",
                failed=(XenbusState.CLOSING, XenbusState.CLOSED),
            )
        finally:
            self.close()

    def plug_taps(self) -> None:
        """Put the emulated cards' tap devices on their bridges; QEMU has made them by now."""
        for vif in self._all_vifs:
            if vif.model is not None:
                self._host.hotplug.plug(LinkPlan(vif.tap(self._domid), vif.bridge, mtu=vif.mtu))

    def _look(self, device: DeviceId, state: XenbusState | None) -> bool:
        spec = self._by_id[device]
        if isinstance(spec, Vif):
            return self._look_at_vif(device, spec, state)
        waiting = state in (XenbusState.INIT_WAIT, XenbusState.INITIALISED, XenbusState.CONNECTED)
        if not waiting or isinstance(spec, Console) or spec.backend_kind.server != "kernel":
            return waiting
        if spec.script and device not in self._plugged:
            self._plugged.add(device)
            self._run_script(device, spec.script, ["add"], {})
        if not self._host.hotplug.disk_served(device.domid, device.devid):
            return False
        held = self._held.pop(device.devid, None)
        if held:
            held.close()
        return True

    def _look_at_vif(self, device: DeviceId, vif: Vif, state: XenbusState | None) -> bool:
        if vif.backend_kind.server == "kernel" and device not in self._plugged:
            own = f"vif{device.domid}.{device.devid}"
            if not self._host.hotplug.has_link(own):
                return False
            self._plugged.add(device)
            self._plug(device, vif, own)
        return state in (XenbusState.INIT_WAIT, XenbusState.INITIALISED, XenbusState.CONNECTED)

    def _plug(self, device: DeviceId, vif: Vif, own: str) -> None:
        if vif.script:
            environment = {"vif": own, "netdev": vif.gatewaydev or ""}
            self._run_script(device, vif.script, ["online", "type_if=vif"], environment)
            return
        mtu = self._host.hotplug.plug(LinkPlan(own, vif.bridge, vif.name, vif.mtu))
        with self._host.store.batch() as batch:
            if mtu != vif.mtu:
                batch.write(f"{self.frontend_of(device)}/mtu", str(mtu))
            batch.write(f"{device.backend}/hotplug-status", "connected")

    def _make_taps(self) -> None:
        """The host's ends of interfaces that a process of ours will serve: on their bridges before it
        looks."""
        for device, vif in self._by_id.items():
            if isinstance(vif, Vif) and vif.own_tap:
                name = vif.interface(self._domid)
                self._host.hotplug.make_tap(name)
                self._plug(device, replace(vif, name=None), name)

    def _run_script(
        self, device: DeviceId, script: str, arguments: list[str], environment: Mapping[str, str]
    ) -> None:
        left = max(0.1, min(SCRIPT_TIME, self._end - time.monotonic()))
        run_script(self._host, device, script_path(script), arguments, environment, left)


def run_script(
    host: Host,
    device: DeviceId,
    script: str,
    arguments: list[str],
    environment: Mapping[str, str],
    deadline: float = SCRIPT_TIME,
) -> None:
    """Run a hotplug script for a device, and believe what it reports. Raises ``HostError``."""
    path = f"backend/{device.folder}/{device.domid}/{device.devid}"
    whole = {"XENBUS_PATH": path, "XENBUS_TYPE": device.folder, "XENBUS_BASE_PATH": "backend"}
    host.hotplug.run_script(script, arguments, {**whole, **environment}, deadline)
    status = host.store.get(f"{device.backend}/hotplug-status")
    if status in ("error", "busy"):
        words = host.store.get(f"{device.backend}/hotplug-error") or status
        raise HostError(f"the hotplug script {script} failed: {words[:300]}")


class Record(NamedTuple):
    """A device as the toolstack's own tree has it; ``notes`` are its nodes there, by name."""

    device: DeviceId
    notes: Mapping[str, str]


_NOTES = (
    "params",
    "type",
    "mode",
    "device-type",
    "dev",
    "mac",
    "bridge",
    "vifname",
    "rate",
    "mtu",
    "script",
    "network",
)
_OURS = (
    *("xtool-kind", "xtool-reason", "xtool-format", "xtool-script"),
    *("xtool-bytes-per-second", "xtool-ops-per-second", "rate-in"),
)


def records(host: Host, domid: int, kinds: Iterable[str] = ("vbd", "vif", "console")) -> list[Record]:
    """The domain's disks, interfaces and consoles, by number. Two pipelines, however many there are."""
    folders = {kind: f"{paths.libxl(domid)}/device/{kind}" for kind in kinds}
    lists = host.store.list_many(folders.values())
    places = [
        (kind, int(name))
        for kind, folder in folders.items()
        for name in sorted(lists[folder] or (), key=lambda n: (len(n), n))
        if name.isascii() and name.isdecimal() and len(name) < 10
    ]
    names = ("backend", *_NOTES, *_OURS)
    values = host.store.get_many(
        [f"{folders[kind]}/{devid}/{name}" for kind, devid in places for name in names]
    )
    found = []
    for kind, devid in places:
        notes = {n: v for n in names if (v := values[f"{folders[kind]}/{devid}/{n}"]) is not None}
        parts = parse_backend(notes.get("backend"))
        if parts:
            found.append(Record(DeviceId(domid, kind, devid, parts[1], parts[0]), notes))
    return found


def offline(host: Host, found: Iterable[Record]) -> None:
    """Run the scripts of devices that have one, for the last time. One that fails stops nothing."""
    for record in found:
        script = record.notes.get("xtool-script")
        if not script:
            continue
        vif = record.device.kind == "vif"
        name = f"vif{record.device.domid}.{record.device.devid}"
        try:
            run_script(
                host,
                record.device,
                script,
                ["offline", "type_if=vif"] if vif else ["remove"],
                {"vif": name} if vif else {},
            )
        except XtoolError:
            continue  # the device goes in any case


def remove_taps(host: Host, found: Iterable[Record], deadline: float = 0.0) -> None:
    """Remove the tap devices of interfaces that processes of ours served. Those let go of one by themselves
    when its nodes are gone: wait for that, up to ``deadline`` seconds for all."""
    end = time.monotonic() + deadline
    for record in found:
        device = record.device
        if device.kind != "vif" or FOLDERS[device.folder].server != "process":
            continue
        name = record.notes.get("vifname") or f"vif{device.domid}.{device.devid}"
        while host.real and host.hotplug.has_link(name) and time.monotonic() < end:
            time.sleep(0.01)
        try:
            host.hotplug.remove_tap(name)
        except XtoolError:
            continue  # somebody else's by now


def backend_folders(domid: int, places: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """The folders of a domain's devices, and of the words their drivers may have left."""
    found: list[str] = []
    for backend_domid, folder in sorted(set(places)):
        root = paths.domain(backend_domid)
        found += (f"{root}/backend/{folder}/{domid}", f"{root}/error/backend/{folder}/{domid}")
    return tuple(found)


def all_folders(domid: int) -> tuple[str, ...]:
    """The same for every kind of backend there is in domain 0."""
    return backend_folders(domid, ((0, folder) for folder in FOLDERS))


def stale_backends(host: Host, domid: int) -> tuple[str, ...]:
    """The same for every kind that anybody's backends in domain 0 have: what a former domain of this number
    may have left, of kinds that its successor does not have, either."""
    root = f"{paths.domain(0)}/backend"
    return backend_folders(domid, ((0, kind) for kind in host.store.list_many([root])[root] or ()))


def wait_let_go(host: Host, domid: int, names: Iterable[str] | None = None) -> bool:
    """Until the kernel's backends let go of the domain's devices (or of those named); false if they do not.

    Then loop devices, interfaces and images are free again: for a restart, say.
    """
    end = time.monotonic() + LET_GO_TIME
    wanted = None if names is None else set(names)
    pause = 0.001
    while True:
        left = set(host.hotplug.in_kernel(domid))
        if not (left if wanted is None else left & wanted):
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
