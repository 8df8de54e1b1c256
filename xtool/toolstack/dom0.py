"""Devices of domain 0 itself whose frontend is this process: what disks, interfaces and consoles share.

Facts
-----
* The frontend's nodes lie below ``/local/domain/0/xtool/device``, where the kernel's frontends do not look.
  A backend finds them by the ``frontend`` node of its own directory: Linux's and ours do.
* Both ends are in domain 0: a page is granted to, and a port bound for, the domain that owns it.
* Domain 0 never ends, so nobody would remove what a killed process left: the toolstack's own record names
  the process (``xtool-owner``), and the next one to attach something, or ``xtool gc``, sees to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from xtool.devices.backendkinds import FOLDERS
from xtool.devices.declare import Node, write
from xtool.devices.xenbus import DeviceId, ask_to_close, backend_states, wait_states
from xtool.errors import DeadlineError, DeviceError
from xtool.proto.xenbus import XenbusState
from xtool.proto.xsperms import PRIVATE
from xtool.toolstack import journal
from xtool.toolstack.backends import check_served, stop_backends
from xtool.toolstack.wiring import Record, Wiring, offline, records, remove_taps
from xtool.xenstore.paths import domain, parent

if TYPE_CHECKING:
    from xtool.evtchn.port import EventChannels
    from xtool.grant.port import GrantAllocator
    from xtool.toolstack.host import Host
    from xtool.xenstore.port import Transaction

ROOT = f"{domain(0)}/xtool/device"
#: How long a backend may take to let go, seconds.
_LET_GO = 5.0
#: How long a process of ours may take to let go of a tap device, seconds.
_TAP_TIME = 2.0
_KINDS = ("vbd", "vif", "console")


def frontend_of(device: DeviceId) -> str:
    """Where the frontend's nodes are."""
    return f"{ROOT}/{device.kind}/{device.devid}"


class OwnWiring(Wiring):
    """As for any domain, with the frontend elsewhere."""

    def frontend_of(self, device: DeviceId) -> str:
        return frontend_of(device)

    def nodes(self) -> list[Node]:
        [device] = self.devices
        ours = frontend_of(device)
        found = []
        for node in super().nodes():
            if node.path == device.frontend or node.path.startswith(f"{device.frontend}/"):
                node = node._replace(path=ours + node.path.removeprefix(device.frontend))
            if node.path in (f"{device.backend}/frontend", f"{device.mirror}/frontend"):
                node = node._replace(value=ours)
            found.append(node)
        return [*found, Node(f"{device.mirror}/xtool-owner", _process(os.getpid()), PRIVATE)]


@contextmanager
def open_ports(host: Host) -> Iterator[tuple[EventChannels, GrantAllocator]]:
    """Event channels and shareable pages of this domain, for one frontend."""
    from xtool.evtchn.device import EventDevice
    from xtool.grant.alloc import AllocDevice

    with EventDevice() as events, AllocDevice() as allocator:
        yield events, allocator


def free_number(host: Host, kind: str, folder: str, numbers: Iterable[int]) -> int:
    """The first number no device of domain 0 has. Raises ``DeviceError``. Call it within ``naming``."""
    for devid in numbers:
        device = DeviceId(0, kind, devid, folder)
        if not any(host.store.exists(path) for path in (frontend_of(device), device.backend, device.mirror)):
            return devid
    raise DeviceError(
        f"domain 0 has as many devices of kind {kind} attached as it can", hint="xtool gc removes dead ones"
    )


def declare(host: Host, wiring: Wiring, undo: ExitStack) -> DeviceId:
    """Write the nodes of the one device; ``undo`` takes it away again. Call it within ``naming``.

    Raises ``DeviceError`` if there is one already, and what opening a disk raises.
    """
    [device] = wiring.devices
    check_served(host, [device])
    wiring.open(undo)
    nodes = wiring.nodes()

    def change(tx: Transaction) -> None:
        if tx.exists(device.backend) or tx.exists(frontend_of(device)):
            raise DeviceError(f"there is a {device} already")
        write(tx, nodes)

    host.store.atomically(change)
    undo.callback(forget, host, device)
    return device


def go_offline(host: Host, device: DeviceId) -> None:
    """Tell the backend that the device is not to come back when its frontend closes."""
    host.store.write(f"{device.backend}/online", "0")


def forget(host: Host, device: DeviceId) -> None:
    """Have the backend let go, and remove every node. Never waits long."""
    store = host.store
    with store.batch() as batch:
        ask_to_close(batch, backend_states(store, [device]))
    try:
        wait_states(
            store,
            [device],
            lambda _, state: state in (None, XenbusState.CLOSED),
            _LET_GO,
            "the backend does not let go",
        )
    except DeadlineError:
        pass  # it loses its directory, then
    found = [r for r in records(host, 0, (device.kind,)) if r.device == device]
    offline(host, found)
    frontend = frontend_of(device)
    # Somebody who attaches something meanwhile must find the server running, or gone.
    with journal.naming():
        with store.batch() as batch:
            for path in (frontend, device.backend, device.error, device.mirror):
                batch.rm(path)
        for path in (frontend, device.mirror):
            _prune(host, (parent(path), parent(parent(path)), parent(parent(parent(path)))))
        _prune(host, (parent(device.backend), parent(device.error)))
        remove_taps(host, found or [Record(device, {})], _TAP_TIME)
        if FOLDERS[device.folder].server == "process" and not _served(host):
            stop_backends(host, 0)
    end = time.monotonic() + _LET_GO
    name = f"{device.kind}-0-{device.devid}"
    while name in host.hotplug.in_kernel(0) and time.monotonic() < end:
        time.sleep(0.01)


def recover(host: Host) -> list[DeviceId]:
    """Take away the devices whose process is gone; those it took."""
    found = abandoned(host)
    for device in found:
        forget(host, device)
    return found


def abandoned(host: Host) -> list[DeviceId]:
    """Devices of domain 0 whose process is gone."""
    if not host.store.exists(ROOT):
        return []
    found = []
    for record in records(host, 0, _KINDS):
        owner = host.store.get(f"{record.device.mirror}/xtool-owner")
        if owner is not None and owner != _process(_pid(owner)):
            found.append(record.device)
    return found


def _process(pid: int) -> str:
    """A process, whatever becomes of its number: with the time it started. Empty if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if words[0] == b"Z" else f"{pid} {words[19].decode()}"


def _pid(owner: str) -> int:
    number = owner.partition(" ")[0]
    return int(number) if number.isascii() and number.isdecimal() else 0


def _served(host: Host) -> bool:
    """Whether domain 0 has another device that a process of ours serves."""
    folders = [kind.folder for kind in FOLDERS.values() if kind.server == "process"]
    lists = host.store.list_many([f"{domain(0)}/backend/{folder}/0" for folder in folders])
    return any(lists.values())


def _prune(host: Host, folders: tuple[str, ...]) -> None:
    """Remove those that are empty now, in order; never what every domain has."""
    for path in folders:
        if path.count("/") < 3 and not path.startswith("/libxl/"):
            continue
        if host.store.list_many([path])[path] == ():
            host.store.rm(path)
