"""A disk attached to domain 0 itself, to this process: look into a guest's image, or exercise a backend.

::

    with attached(host, disk_from({"target": "/srv/web.img", "vdev": "xvda"})) as disk:
        first = disk.pread(4096, 0)

Facts
-----
* The frontend's nodes lie below ``/local/domain/0/xtool/device``, where the kernel's blkfront does not look.
  A backend finds them by the ``frontend`` node of its own directory: Linux's blkback and ours do.
* QEMU's disk backend (since 4.0) does not: it puts the frontend's path together itself, below ``device``. So
  it cannot serve domain 0 in this way.
* Both ends are in domain 0: a page is granted to, and a port bound for, the domain that owns it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from xtool.devices.declare import Node, write
from xtool.devices.vbd import PhysicalDevice, Vbd, vbd_nodes
from xtool.devices.xenbus import DeviceId, ask_to_close, backend_states, wait_states
from xtool.errors import DeadlineError, DeviceError, UsageError
from xtool.frontends.block import BlockFrontend, Place
from xtool.proto.xenbus import XenbusState
from xtool.toolstack import journal
from xtool.toolstack.backends import check_served, start_backends, stop_backends
from xtool.toolstack.deviceplan import plan_disk
from xtool.toolstack.images import check_free
from xtool.xenstore.paths import domain, parent

if TYPE_CHECKING:
    from xtool.config import DiskConfig
    from xtool.devices.hotplug.port import OpenDisk
    from xtool.grant.port import GrantAllocator
    from xtool.toolstack.host import Host
    from xtool.xenstore.port import Transaction

ROOT = f"{domain(0)}/xtool/device/vbd"
#: xvda, and the step to the next whole disk.
_FIRST, _STEP = 51712, 16
_MOST = 16


@contextmanager
def attached(
    host: Host,
    disk: DiskConfig,
    *,
    deadline: float = 30.0,
    ring_order: int = 1,
    queues: int = 1,
    persistent: bool = False,
) -> Iterator[BlockFrontend]:
    """Attach what a disk specification names; ``vdev`` does not matter. Detached at the end in any case.
    ``persistent``: let the backend keep our pages mapped.

    Raises what ``plan_disk`` and ``check_free`` raise, ``UsageError`` for a backend that cannot serve domain
    0, ``HostError`` with the backend's reason, ``DeadlineError``.
    """
    from xtool.evtchn.device import EventDevice
    from xtool.grant.alloc import AllocDevice

    vbd = plan_disk(disk, host.targets([disk.target]))
    if vbd.backend_kind.server == "qemu":
        raise UsageError(
            "QEMU's disk backend cannot serve domain 0 itself", hint="use backendtype: xtool, or phy"
        )
    held: OpenDisk | None = None
    with journal.naming():
        check_free(host, [vbd], "")
        vbd, device = _numbered(host, vbd)
        check_served(host, [device])
        if vbd.backend_kind.server == "kernel" and vbd.target:
            held = host.hotplug.open_disk(
                vbd.target, readonly=vbd.readonly, direct_io=vbd.direct_io_safe, loop=vbd.loop
            )
        frontend = f"{ROOT}/{device.devid}"
        nodes = _nodes(vbd, device, frontend, held)

        def declare(tx: Transaction) -> None:
            if tx.exists(device.backend) or tx.exists(frontend):
                raise DeviceError(f"there is a {device} already")
            write(tx, nodes)

        try:
            host.store.atomically(declare)
        except BaseException:
            if held:
                held.close()
            raise
    try:
        start_backends(host, 0, [device])
        with EventDevice() as events, AllocDevice() as allocator:
            shares: GrantAllocator = allocator
            place = Place(frontend, device.backend)
            front = BlockFrontend(
                host.store,
                events,
                shares,
                place,
                ring_order=ring_order,
                queues=queues,
                persistent=persistent,
            )
            try:
                front.connect(deadline)
                yield front
            finally:
                host.store.write(f"{device.backend}/online", "0")
                front.close()
    finally:
        _forget(host, device, frontend)
        if held:
            held.close()


def _numbered(host: Host, vbd: Vbd) -> tuple[Vbd, DeviceId]:
    """The disk with a number nobody uses."""
    for devid in range(_FIRST, _FIRST + _MOST * _STEP, _STEP):
        wanted = replace(vbd, devid=devid)
        device = wanted.id(0)
        if not host.store.exists(f"{ROOT}/{devid}") and not host.store.exists(device.backend):
            return wanted, device
    raise DeviceError(f"domain 0 has {_MOST} disks attached already")


def _nodes(vbd: Vbd, device: DeviceId, frontend: str, held: OpenDisk | None) -> list[Node]:
    """As for any domain, with the frontend elsewhere."""
    physical = PhysicalDevice(held.path, held.major, held.minor, held.loop) if held else None
    found = []
    for node in vbd_nodes(vbd, 0, "pvh", physical):
        if node.path.startswith(device.frontend):
            node = node._replace(path=frontend + node.path.removeprefix(device.frontend))
        if node.path in (f"{device.backend}/frontend", f"{device.mirror}/frontend"):
            node = node._replace(value=frontend)
        found.append(node)
    return found


def _forget(host: Host, device: DeviceId, frontend: str) -> None:
    """Have the backend let go, and remove every node. Never waits long."""
    store = host.store
    with store.batch() as batch:
        ask_to_close(batch, backend_states(store, [device]))
    try:
        wait_states(
            store,
            [device],
            lambda _, state: state in (None, XenbusState.CLOSED),
            5.0,
            "the backend does not let go",
        )
    except DeadlineError:
        pass  # it loses its directory, then
    with store.batch() as batch:
        for path in (frontend, device.backend, device.error, device.mirror):
            batch.rm(path)
    for path in (frontend, device.mirror):
        _prune(host, (parent(path), parent(parent(path)), parent(parent(parent(path)))))
    _prune(host, (parent(device.backend), parent(device.error)))
    end = time.monotonic() + 5.0
    name = f"vbd-0-{device.devid}"
    while name in host.hotplug.in_kernel(0) and time.monotonic() < end:
        time.sleep(0.01)
    if device.folder.startswith("xtool-") and not store.exists(parent(device.backend)):
        stop_backends(host, 0)


def _prune(host: Host, folders: tuple[str, ...]) -> None:
    """Remove those that are empty now, in order; never what every domain has."""
    for path in folders:
        if path.count("/") < 3 and not path.startswith("/libxl/"):
            continue
        if host.store.list_many([path])[path] == ():
            host.store.rm(path)
