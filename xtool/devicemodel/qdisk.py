"""QEMU as nothing but a disk backend: the command line for a PV or PVH guest. Pure.

Facts about QEMU's machine ``xenpv``
------------------------------------
- It emulates nothing and touches none of the guest's memory; with ``-xen-attach`` it serves the backends it
  finds in ``/local/domain/0/backend/qdisk/<domid>``, also those that come later. One process serves all the
  disks of its domain.
- An HVM guest's device model does the same beside its emulation, so an HVM guest needs no second QEMU.
- It turns file locking off for these disks, because the same image may be an emulated disk as well: that
  nobody else writes to it is the toolstack's business.
"""

from __future__ import annotations

from dataclasses import dataclass

from xtool.devicemodel.argv import options
from xtool.devicemodel.spec import VncSpec


@dataclass(frozen=True)
class QdiskSpec:
    """The process for one domain. ``serial`` and ``vnc`` are what a device model has and this has not."""

    name: str
    uuid: str
    serial: tuple[str, ...] = ()
    vnc: VncSpec | None = None
    #: Words put at the end of the command line as they are.
    extra: tuple[str, ...] = ()


def build_qdisk_argv(spec: QdiskSpec, domid: int, binary: str, qmp_fd: int) -> list[str]:
    """The whole command line. ``qmp_fd``: QEMU's number of an already listening socket for QMP."""
    return [
        binary,
        *("-xen-domid", str(domid), "-xen-attach"),
        *("-name", options(guest=spec.name)),
        *("-uuid", spec.uuid),
        *("-no-shutdown", "-nodefaults", "-no-user-config"),
        *("-chardev", options("socket", id="qmp", fd=qmp_fd, server="on", wait="off")),
        *("-mon", options(chardev="qmp", mode="control")),
        *("-display", "none", "-machine", "xenpv"),
        *spec.extra,
    ]
