"""The nodes of a vif of domain 0 itself, as a toolstack writes them. Whether the kernel's netfront takes a
device is a question of the place: it looks below ``/local/domain/0/device`` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from xtool.proto.xsperms import PRIVATE
from xtool.xenstore.port import Store

_DOM0 = "/local/domain/0"


class NetDevice(NamedTuple):
    """Where both ends have their nodes, and which domain the backend is in."""

    frontend: str
    backend: str
    backend_domid: int = 0


def vif_device(number: int, folder: str) -> NetDevice:
    """A vif of domain 0 itself; ``folder`` says who serves it: ``vif``, ``xtool-vif``."""
    return NetDevice(f"{_DOM0}/xtool/device/vif/{number}", f"{_DOM0}/backend/{folder}/0/{number}")


def declare(store: Store, number: int, folder: str, nodes: Mapping[str, str]) -> NetDevice:
    """Write what a toolstack writes for a vif of domain 0; ``nodes`` are the backend's own (``mac``,
    ``bridge``, ``script``...). Its interface is not put on the bridge here."""
    device = vif_device(number, folder)
    ends = {
        device.frontend: {"backend": device.backend, "backend-id": "0", "handle": str(number), "state": "1"},
        device.backend: {
            "frontend": device.frontend,
            "frontend-id": "0",
            "handle": str(number),
            "online": "1",
            **nodes,
            "state": "1",
        },
    }
    with store.batch() as batch:
        for root, values in ends.items():
            for name, value in values.items():
                batch.write(f"{root}/{name}", value, perms=PRIVATE)
    return device


def undeclare(store: Store, device: NetDevice) -> None:
    """Remove both ends' nodes: the last step, after ``close``."""
    with store.batch() as batch:
        for path in (device.frontend, device.backend):
            batch.rm(path)
    # The folders above are nobody's once the last device is gone: domain 0 never ends.
    for path, depth in ((device.backend, 1), (device.frontend, 3)):
        folder = path.rpartition("/")[0]
        for _ in range(depth):
            if store.list_many([folder])[folder] != ():
                break
            store.rm(folder)
            folder = folder.rpartition("/")[0]
