"""Our own user-space backends, as the toolstack sees them: a process per domain that serves those of its
devices whose backend kind says ``process``.

Seam: the processes are not there yet, so ``backendtype: xtool`` is refused on a real host. On the host in
memory the fake kernel serves these devices like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from xtool.devices.backendkinds import FOLDERS
from xtool.devices.xenbus import DeviceId
from xtool.errors import UsageError

if TYPE_CHECKING:
    from xtool.toolstack.host import Host


def ours(devices: Iterable[DeviceId]) -> list[DeviceId]:
    """The devices that processes of ours serve."""
    return [device for device in devices if FOLDERS[device.folder].server == "process"]


def check_served(host: Host, devices: Iterable[DeviceId]) -> None:
    """Refuse, before anything is made, what no process of ours can serve on this host."""
    if ours(devices) and host.real:
        raise UsageError(
            "backendtype: xtool cannot be used yet", hint="leave backendtype out, or use phy, qdisk or vif"
        )


def start_backends(host: Host, domid: int, devices: Iterable[DeviceId]) -> None:
    """See that a process serves these devices of the domain; returns at once, their states tell the rest."""
    check_served(host, devices)


def stop_backends(host: Host, domid: int) -> None:
    """End the domain's backend process, if it has one."""
