"""A virtual disk in xenstore, as data. Pure.

Facts (``xen/io/blkif.h``, ``docs/misc/xenstore-paths.pandoc``, and what libxl writes)
--------------------------------------------------------------------------------------
- The frontend's folder is the guest's own and the backend's domain reads it; the backend's folder is the
  backend domain's and the guest reads it. Nodes with paths of this host are for domain 0 alone: no
  frontend needs them.
- ``/libxl/<domid>/device/vbd/<devid>`` is a copy of what the backend was given. No guest can touch it, so
  it is what the toolstack (xl's, too) believes about the device.
- blkback opens ``physical-device`` (``major:minor`` in hexadecimal) as soon as that node is there, for
  writing only when ``mode`` has a ``w``. Its sector counts and features are its own business.
- QEMU takes ``params`` as ``format:path``; xl shows what follows the first colon.
- When xl takes a disk away it runs Xen's ``block`` script, which detaches the loop device itself if the
  backend's ``params`` is a file, and does nothing if it is a block device. Ours lets go by itself, so there
  ``params`` is the loop device; the mirror has the file.
- xl refuses a device whose mirror lacks ``type``, ``dev``, ``removable``, ``mode`` or ``device-type``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xtool.devices.backendkinds import KINDS, BackendKind
from xtool.devices.declare import Node
from xtool.devices.xenbus import DeviceId
from xtool.proto.xenbus import XenbusState
from xtool.proto.xsperms import PRIVATE, Perms, owned_by

#: What xl runs for a disk of ours that it removes; it finds nothing left to do.
BLOCK_SCRIPT = "/etc/xen/scripts/block"
SCRIPT_FOLDER = "/etc/xen/scripts"
#: Backend nodes that tell of this host.
_HOST_NODES = frozenset(
    (
        *("params", "script", "physical-device", "physical-device-path"),
        *("xtool-bytes-per-second", "xtool-ops-per-second", "xtool-persistent"),
    )
)


@dataclass(frozen=True)
class Vbd:
    """One decided disk. ``kind`` and ``reason`` are ``choose_backend``'s; ``target`` None: an empty drive."""

    vdev: str
    devid: int
    target: str | None
    format: str = "raw"
    kind: str = "phy"
    reason: str = ""
    readonly: bool = False
    cdrom: bool = False
    discard: bool | None = None
    direct_io_safe: bool = False
    trusted: bool = True
    shared: bool = False
    script: str | None = None
    #: A file, which a kernel backend needs a loop device for.
    loop: bool = False
    backend_domid: int = 0
    #: Limits, for the backends that have them; None is no limit.
    bytes_per_second: int | None = None
    ops_per_second: int | None = None
    persistent: bool = False

    @property
    def backend_kind(self) -> BackendKind:
        return KINDS["vbd", self.kind]

    def id(self, domid: int) -> DeviceId:
        return DeviceId(domid, "vbd", self.devid, self.backend_kind.folder, self.backend_domid)


@dataclass(frozen=True)
class PhysicalDevice:
    """The block device behind a disk: what was opened, and the loop device's name if it is one."""

    path: str
    major: int
    minor: int
    loop: bool = False


def script_path(script: str) -> str:
    return script if script.startswith("/") else f"{SCRIPT_FOLDER}/{script}"


def params(vbd: Vbd) -> str:
    """What the backend serves, in the form its kind wants."""
    if vbd.backend_kind.name == "phy":
        return vbd.target or ""
    return f"{vbd.format}:{vbd.target}" if vbd.target else ""


def vbd_nodes(vbd: Vbd, domid: int, guest: str, physical: PhysicalDevice | None = None) -> list[Node]:
    """Every node of the disk, parents first. ``guest`` is ``pv``, ``pvh`` or ``hvm``; ``physical`` is set
    for the kernel's backend unless a script finds the device."""
    device = vbd.id(domid)
    readable = owned_by(vbd.backend_domid, read=[domid])
    own = owned_by(domid, read=[vbd.backend_domid])
    backend = list(_backend(vbd, physical))
    nodes = [Node(device.mirror, "", PRIVATE)]
    nodes += [Node(f"{device.mirror}/{n}", v, PRIVATE) for n, v in _links(device)]
    nodes += [Node(f"{device.mirror}/{n}", v, PRIVATE) for n, v in (*backend, *_notes(vbd))]
    nodes.append(Node(device.frontend, "", own))
    nodes += [Node(f"{device.frontend}/{n}", v, own) for n, v in _frontend(vbd, device, guest)]
    nodes.append(Node(device.backend, "", readable))
    nodes.append(Node(f"{device.backend}/frontend", device.frontend, readable))
    nodes.append(Node(f"{device.backend}/frontend-id", str(domid), readable))
    for name, value in backend:
        if name == "params" and physical:
            value = physical.path
        nodes.append(Node(f"{device.backend}/{name}", value, _perms(name, readable)))
    return nodes


def _perms(name: str, readable: Perms) -> Perms:
    return PRIVATE if name in _HOST_NODES and readable[0] == "n0" else readable


def _links(device: DeviceId) -> Iterator[tuple[str, str]]:
    yield "frontend", device.frontend
    yield "backend", device.backend
    yield "frontend-id", str(device.domid)


def _backend(vbd: Vbd, physical: PhysicalDevice | None) -> Iterator[tuple[str, str]]:
    kind = vbd.backend_kind
    if vbd.target is not None or kind.server != "kernel":
        yield "params", params(vbd)
    if kind.name == "phy":
        yield "script", script_path(vbd.script) if vbd.script else BLOCK_SCRIPT
    yield "online", "1"
    yield "removable", "1" if vbd.cdrom else "0"
    yield "bootable", "1"
    yield "dev", vbd.vdev
    yield "type", kind.type
    yield "mode", "r" if vbd.readonly else "w"
    yield "device-type", "cdrom" if vbd.cdrom else "disk"
    if vbd.direct_io_safe:
        yield "direct-io-safe", "1"
    yield "discard-enable", "0" if vbd.readonly or vbd.discard is False else "1"
    yield "specification", "xen"
    yield from limit_nodes(vbd.bytes_per_second, vbd.ops_per_second).items()
    if vbd.persistent:
        yield "xtool-persistent", "1"
    if physical:
        yield "physical-device", f"{physical.major:x}:{physical.minor:x}"
        yield "physical-device-path", physical.path
        yield "hotplug-status", "connected"
    yield "state", str(int(XenbusState.INITIALISING))


def limit_nodes(bytes_per_second: int | None, ops_per_second: int | None) -> dict[str, str]:
    """The backend's nodes for limits; what has none has no node."""
    found = {"xtool-bytes-per-second": bytes_per_second, "xtool-ops-per-second": ops_per_second}
    return {name: str(value) for name, value in found.items() if value}


def _notes(vbd: Vbd) -> Iterator[tuple[str, str]]:
    """What only we read: why this backend, and whether a script must be run when the disk goes."""
    yield "xtool-kind", vbd.kind
    yield "xtool-reason", vbd.reason
    yield "xtool-format", vbd.format
    if vbd.script:
        yield "xtool-script", script_path(vbd.script)


def _frontend(vbd: Vbd, device: DeviceId, guest: str) -> Iterator[tuple[str, str]]:
    yield "backend", device.backend
    yield "backend-id", str(vbd.backend_domid)
    yield "virtual-device", str(vbd.devid)
    yield "device-type", "cdrom" if vbd.cdrom else "disk"
    yield "trusted", str(int(vbd.trusted))
    if guest == "pv":
        # Frontends before Linux 2.6.26 do not say it themselves.
        yield "protocol", "x86_64-abi"
    yield "state", str(int(XenbusState.INITIALISING))
