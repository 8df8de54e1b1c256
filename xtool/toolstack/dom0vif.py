"""An interface attached to domain 0 itself, to this process: send and receive frames as a guest would.

::

    with attached(host, parse_vif(["bridge=xenbr0"])) as port:
        port.send(frame)
        answer = port.receive(1.0)          # Frame(data, csum_blank, ...), or None

The backend is netback or ours, as ``backendtype`` says. Its end, ``vif0.<n>``, is on the bridge (or is a
passt, with ``network: user``) as long as the block lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

from xtool.frontends.net import NetPort
from xtool.frontends.netnodes import NetDevice
from xtool.toolstack import dom0, journal
from xtool.toolstack.deviceplan import plan_vif
from xtool.toolstack.signals import undone_on_failure

if TYPE_CHECKING:
    from xtool.config import VifConfig
    from xtool.proto.netfeatures import NetOffer
    from xtool.toolstack.host import Host

_MOST = 16


@contextmanager
def attached(
    host: Host, vif: VifConfig, *, deadline: float = 30.0, pages: int = 64, wants: NetOffer | None = None
) -> Iterator[NetPort]:
    """Attach what an interface's specification names; without ``mac`` its address is made up. Detached at
    the end in any case. ``pages`` and ``wants`` as ``NetPort`` takes them.

    Raises what ``plan_vif`` raises, ``HostError`` without the bridge or with the backend's reason,
    ``DeviceError``, ``DeadlineError``.
    """
    dom0.recover(host)
    uuid = str(uuid4())  # for the address: two hosts' must not be the same
    with undone_on_failure() as undo:
        with journal.naming():
            folder = plan_vif(vif, uuid, 0, "pvh").backend_kind.folder
            numbers = range(_MOST) if vif.devid is None else (vif.devid,)
            planned = plan_vif(vif, uuid, dom0.free_number(host, "vif", folder, numbers), "pvh")
            if not planned.script and planned.network != "user":
                host.hotplug.check_bridge(planned.bridge)
            wiring = dom0.OwnWiring(host, 0, "pvh", vifs=[planned])
            device = dom0.declare(host, wiring, undo)
        wiring.ready(deadline)
        events, allocator = undo.enter_context(dom0.open_ports(host))
        place = NetDevice(dom0.frontend_of(device), device.backend)
        port = NetPort(host.store, events, allocator, place, pages=pages, wants=wants)
        undo.callback(port.close)
        undo.callback(dom0.go_offline, host, device)
        port.connect(deadline)
        yield port
