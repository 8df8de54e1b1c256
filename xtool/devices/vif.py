"""A virtual network interface in xenstore, as data. Pure.

Facts (``xen/io/netif.h``, Linux's netback, and what libxl writes)
------------------------------------------------------------------
- netback refuses a device without ``handle`` or ``script``, whether or not anybody runs the script; it
  names its interface ``vif<domid>.<handle>``.
- It connects only when ``hotplug-status`` says ``connected``, which whoever put the interface on a bridge
  writes; the toolstack makes the node empty, so that it is there to be watched.
- ``rate`` is ``bytes,microseconds``: so many bytes are credited each interval. Both are 32-bit numbers.
- ``mtu`` in the frontend's folder tells the guest; it may read, not write it.
- A Linux interface has a name of 15 bytes at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from xtool.devices.backendkinds import KINDS, BackendKind
from xtool.devices.declare import Node
from xtool.devices.vbd import script_path
from xtool.devices.xenbus import DeviceId
from xtool.proto.xenbus import XenbusState
from xtool.proto.xsperms import PRIVATE, owned_by

VIF_SCRIPT = "/etc/xen/scripts/vif-bridge"
DEFAULT_BRIDGE = "xenbr0"
DEFAULT_MTU = 1500
#: Bytes of an interface's name (IFNAMSIZ less the final zero).
NAME_MAX = 15
#: Xen's own prefix for addresses made up (OUI 00:16:3e).
_OUI = "00:16:3e"


@dataclass(frozen=True)
class Vif:
    """One decided interface. ``rate`` is (bytes per interval, interval in µs); ``mtu`` None is the bridge's.

    ``model`` is the emulated card beside it (HVM), None for none; ``name`` None is netback's own name.
    """

    devid: int
    mac: str
    bridge: str = DEFAULT_BRIDGE
    kind: str = "vif"
    reason: str = ""
    mtu: int | None = None
    rate: tuple[int, int] | None = None
    name: str | None = None
    model: str | None = None
    #: Whether the guest gets a paravirtual interface, beside the emulated card if there is one.
    pv: bool = True
    ip: str | None = None
    gatewaydev: str | None = None
    vlan: str | None = None
    script: str | None = None
    trusted: bool = True
    backend_domid: int = 0
    #: ``bridge``, or ``user``: through a process (passt), with nothing set up on the host.
    network: str = "bridge"
    forwards: tuple[str, ...] = ()
    mac_filter: bool = True
    queues: int = 1
    #: What the guest may be sent; as ``rate``.
    rate_in: tuple[int, int] | None = None

    @property
    def backend_kind(self) -> BackendKind:
        return KINDS["vif", self.kind]

    def id(self, domid: int) -> DeviceId:
        return DeviceId(domid, "vif", self.devid, self.backend_kind.folder, self.backend_domid)

    def interface(self, domid: int) -> str:
        """The host's end, as it is called in the end."""
        return self.name or f"vif{domid}.{self.devid}"

    @property
    def own_tap(self) -> bool:
        """Whether its end in the host is a tap device that the toolstack makes."""
        return self.pv and self.backend_kind.server == "process" and self.network != "user"

    def tap(self, domid: int) -> str:
        """QEMU's end of the emulated card."""
        if self.name:
            return f"{self.name[: NAME_MAX - 4]}-emu"
        name = f"vif{domid}.{self.devid}-emu"
        return name if len(name) <= NAME_MAX else f"v{domid}.{self.devid}-emu"


def stable_mac(uuid: str, devid: int) -> str:
    """An address within Xen's OUI: always the same for this domain and device, seldom another's.

    The 4th byte is below 0x80, as libxl makes it.
    """
    raw = sha256(f"{uuid}/{devid}".encode()).digest()
    return f"{_OUI}:{raw[0] & 0x7F:02x}:{raw[1]:02x}:{raw[2]:02x}"


def rate_text(node: str) -> str:
    """What a ``rate`` node says, as in a domain file: bytes per second and the interval."""
    count, comma, interval = node.partition(",")
    if not (comma and count.isdecimal() and interval.isdecimal()) or len(node) > 24 or not int(interval):
        return ""
    return f"{int(count) * 1_000_000 // int(interval)}B/s@{int(interval)}us"


def vif_nodes(vif: Vif, domid: int) -> list[Node]:
    """Every node of the interface, parents first."""
    device = vif.id(domid)
    readable = owned_by(vif.backend_domid, read=[domid])
    own = owned_by(domid, read=[vif.backend_domid])
    backend = list(_backend(vif))
    nodes = [Node(device.mirror, "", PRIVATE)]
    for name, value in (
        ("frontend", device.frontend),
        ("backend", device.backend),
        ("frontend-id", str(domid)),
        *backend,
        *_notes(vif),
    ):
        nodes.append(Node(f"{device.mirror}/{name}", value, PRIVATE))
    nodes.append(Node(device.frontend, "", own))
    nodes += [Node(f"{device.frontend}/{n}", v, own) for n, v in _frontend(vif, device)]
    nodes.append(Node(f"{device.frontend}/mtu", str(vif.mtu or DEFAULT_MTU), readable))
    nodes.append(Node(device.backend, "", readable))
    nodes.append(Node(f"{device.backend}/frontend", device.frontend, readable))
    nodes.append(Node(f"{device.backend}/frontend-id", str(domid), readable))
    for name, value in backend:
        private = name in ("script", "forwards") and vif.backend_domid == 0
        nodes.append(Node(f"{device.backend}/{name}", value, PRIVATE if private else readable))
    return nodes


def _backend(vif: Vif) -> Iterator[tuple[str, str]]:
    yield "script", script_path(vif.script) if vif.script else VIF_SCRIPT
    if vif.name:
        yield "vifname", vif.name
    yield "mac", vif.mac
    for name, value in (("ip", vif.ip), ("gatewaydev", vif.gatewaydev), ("vlan", vif.vlan)):
        if value:
            yield name, value
    if vif.rate:
        yield "rate", f"{vif.rate[0]},{vif.rate[1]}"
    if vif.mtu:
        yield "mtu", str(vif.mtu)
    if vif.network == "user":
        yield "network", vif.network
        if vif.forwards:
            yield "forwards", " ".join(vif.forwards)
    else:
        yield "bridge", vif.bridge
    if vif.rate_in:
        yield "rate-in", f"{vif.rate_in[0]},{vif.rate_in[1]}"
    if not vif.mac_filter:
        yield "mac-filter", "0"
    if vif.queues > 1:
        yield "queues", str(vif.queues)
    yield "handle", str(vif.devid)
    yield "type", "vif_ioemu" if vif.model else "vif"
    yield "online", "1"
    yield "hotplug-status", ""
    yield "state", str(int(XenbusState.INITIALISING))


def _notes(vif: Vif) -> Iterator[tuple[str, str]]:
    yield "xtool-kind", vif.kind
    yield "xtool-reason", vif.reason
    if vif.script:
        yield "xtool-script", script_path(vif.script)


def _frontend(vif: Vif, device: DeviceId) -> Iterator[tuple[str, str]]:
    yield "backend", device.backend
    yield "backend-id", str(vif.backend_domid)
    yield "handle", str(vif.devid)
    yield "mac", vif.mac
    yield "trusted", str(int(vif.trusted))
    yield "state", str(int(XenbusState.INITIALISING))
