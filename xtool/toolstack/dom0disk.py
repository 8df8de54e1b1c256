"""A disk attached to domain 0 itself, to this process: look into a guest's image, or exercise a backend.

::

    with attached(host, disk_from({"target": "/srv/web.img", "vdev": "xvda"})) as disk:
        first = disk.pread(4096, 0)

``frontends/file.py`` makes a Python file of it, ``frontends/nbd.py`` an NBD export.

Facts
-----
* QEMU's disk backend (since 4.0) cannot serve domain 0 in this way: it puts the frontend's path together
  itself, below ``device``, where the kernel's blkfront would take it.
* Reading what somebody else writes harms nobody, but what is read need not fit together, and a host's page
  cache may be behind what the guest's own cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from xtool.devices.backendkinds import KINDS
from xtool.errors import UsageError
from xtool.frontends.block import BlockFrontend, Place
from xtool.toolstack import dom0, journal
from xtool.toolstack.deviceplan import plan_disk
from xtool.toolstack.images import check_free
from xtool.toolstack.signals import undone_on_failure

if TYPE_CHECKING:
    from xtool.config import DiskConfig
    from xtool.devices.vbd import Vbd
    from xtool.toolstack.host import Host

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
    force_share: bool = False,
) -> Iterator[BlockFrontend]:
    """Attach what a disk specification names; ``vdev`` does not matter. Detached at the end in any case.

    ``persistent`` lets the backend keep our pages mapped. ``force_share`` reads an image although
    somebody else writes to it; the disk has to be read-only.

    Raises what ``plan_disk`` and ``check_free`` raise, ``UsageError`` for a backend that cannot serve domain
    0, ``HostError`` with the backend's reason, ``DeadlineError``.
    """
    dom0.recover(host)
    vbd = _plan(host, disk)
    if force_share and not vbd.readonly:
        raise UsageError("what others write to can only be read", hint="add ro to the disk")
    with undone_on_failure() as undo:
        with journal.naming():
            if not force_share:
                check_free(host, [vbd], "")
            numbers = range(_FIRST, _FIRST + _MOST * _STEP, _STEP)
            vbd = replace(vbd, persistent=persistent)
            devid = dom0.free_number(host, "vbd", vbd.backend_kind.folder, numbers)
            wiring = dom0.OwnWiring(host, 0, "pvh", disks=[replace(vbd, devid=devid)])
            device = dom0.declare(host, wiring, undo)
        wiring.ready(deadline)
        events, allocator = undo.enter_context(dom0.open_ports(host))
        place = Place(dom0.frontend_of(device), device.backend)
        front = BlockFrontend(
            *(host.store, events, allocator, place),
            ring_order=ring_order,
            queues=queues,
            persistent=persistent,
        )
        undo.callback(front.close)
        undo.callback(dom0.go_offline, host, device)
        front.connect(deadline)
        yield front


def _plan(host: Host, disk: DiskConfig) -> Vbd:
    """As for a guest's, but not by QEMU: ours serves what it can read and nobody asked QEMU for."""
    vbd = plan_disk(disk, host.targets([disk.target]))
    if vbd.backend_kind.server != "qemu":
        return vbd
    ours = KINDS["vbd", "xtool"]
    if disk.backendtype is not None or disk.format not in ours.formats:
        raise UsageError(
            "QEMU's disk backend cannot serve domain 0 itself",
            hint="use backendtype: xtool, or phy; they read " + ", ".join(ours.formats),
        )
    return replace(vbd, kind=ours.name, reason="QEMU's disk backend cannot serve domain 0 itself")
