"""A console served by us in xenstore, as data. Pure.

Facts (``xen/io/console.h``, Linux's hvc_xen, what libxl writes, xl.cfg(5) on ``channel``)
------------------------------------------------------------------------------------------
- Console 0 lives at ``/local/domain/N/console``, its backend under ``backend/<folder>/N/0``. The guest writes
  no state for it. Its nodes are written with the domain's (``declare``).
- Additional ones are ``device/console/1`` and on, by xenbus: the guest allocates ring and port. xl calls them
  channels; ``name`` tells the guest what each is for.
- The guest owns ``device/console/N`` and could replace any node there, so nobody may take a tty's name from
  it (XSA-57): ours is in the backend's directory.
"""

from __future__ import annotations

from dataclasses import dataclass

from xtool.devices.backendkinds import KINDS, BackendKind
from xtool.devices.declare import CONSOLE_LIMIT, Node
from xtool.devices.xenbus import DeviceId
from xtool.proto.xenbus import XenbusState
from xtool.proto.xsperms import PRIVATE, owned_by


@dataclass(frozen=True)
class Console:
    """``connection`` is ``pty`` or ``socket``; ``path`` is where the socket of a channel is to be, None for
    our own place."""

    devid: int
    name: str = ""
    connection: str = "pty"
    path: str | None = None
    kind: str = "xtool"

    @property
    def backend_kind(self) -> BackendKind:
        return KINDS["console", self.kind]

    def id(self, domid: int) -> DeviceId:
        return DeviceId(domid, "console", self.devid, self.backend_kind.folder)


def console_nodes(console: Console, domid: int) -> list[Node]:
    """Every node of the console, parents first."""
    device = console.id(domid)
    readable, own = owned_by(0, read=[domid]), owned_by(domid, read=[0])
    shared = [("name", console.name)] if console.name else []
    shared.append(("connection", console.connection))
    places = [("frontend", device.frontend), ("frontend-id", str(domid))]
    nodes = [Node(device.mirror, "", PRIVATE), Node(f"{device.mirror}/backend", device.backend, PRIVATE)]
    nodes += [
        Node(f"{device.mirror}/{n}", v, PRIVATE) for n, v in (*places, *shared, ("xtool-kind", "xtool"))
    ]
    if console.devid:
        front = [
            ("backend", device.backend),
            ("backend-id", "0"),
            ("protocol", "vt100"),
            ("type", "xtool"),
            ("output", console.connection),
            ("limit", str(CONSOLE_LIMIT)),
            *shared,
            ("state", str(int(XenbusState.INITIALISING))),
        ]
        nodes.append(Node(device.frontend, "", own))
        nodes += [Node(f"{device.frontend}/{name}", value, own) for name, value in front]
    nodes.append(Node(device.backend, "", readable))
    back = [*places, ("protocol", "vt100"), *shared, ("online", "1")]
    nodes += [Node(f"{device.backend}/{name}", value, readable) for name, value in back]
    if console.path:
        nodes.append(Node(f"{device.backend}/path", console.path, PRIVATE))
    nodes.append(Node(f"{device.backend}/state", str(int(XenbusState.INITIALISING)), readable))
    return nodes
