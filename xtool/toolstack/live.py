"""What a domain's backend process says of its devices, and why a device is not served.

Facts: the process answers as long as its loop runs; one that hangs in an image that hangs does not. After
its last death the reason stands in xenstore alone (``backends.server.park``), where Linux's backends write
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from xtool.backends.control import ask
from xtool.devices.backendkinds import FOLDERS
from xtool.devices.xenbus import DeviceId
from xtool.errors import DeadlineError, HostError

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

#: Gives what the backends of a domain say. Raises ``DeadlineError``, ``HostError``.
Ask = Callable[[int], list[dict[str, Any]]]
#: How long a list waits for them, seconds.
_PATIENCE = 1.0
_IDENTITY = ("folder", "kind", "domid", "devid", "state", "reason")
#: States in which the reason that stands in xenstore is not an old one.
_NOT_SERVED = ("closing", "closed", "gone", "unknown")


class Live:
    """Asked once for all devices of a domain, and only if one of them is ours."""

    def __init__(
        self, host: Host, domid: int, devices: Iterable[DeviceId], ask_backends: Ask | None = None
    ) -> None:
        self._host = host
        self._told: dict[tuple[str, int], dict[str, Any]] = {}
        self._trouble = ""
        devices = list(devices)
        if ask_backends is None and host.real:
            ask_backends = _ask
        if ask_backends is None or not any(_is_ours(device) for device in devices):
            return
        try:
            for line in ask_backends(domid):
                self._told[str(line.get("folder")), int(line.get("devid", -1))] = line
        except (DeadlineError, HostError) as error:
            self._trouble = error.message

    def told(self, device: DeviceId) -> dict[str, Any]:
        """Rings, what is in flight, counters; {} for a device that is not ours, or when nobody answers."""
        line = self._told.get((device.folder, device.devid), {})
        return {name: value for name, value in line.items() if name not in _IDENTITY}

    def problem(self, device: DeviceId, state: str) -> str:
        """Why the device is not served, as far as anybody said so; or that nobody answers."""
        line = self._told.get((device.folder, device.devid), {})
        if line.get("reason"):
            return str(line["reason"])
        if state in _NOT_SERVED and (reason := self._host.store.get(f"{device.error}/error")):
            return reason
        return self._trouble if _is_ours(device) else ""


def _ask(domid: int) -> list[dict[str, Any]]:
    return ask(domid, deadline=_PATIENCE)


def _is_ours(device: DeviceId) -> bool:
    kind = FOLDERS.get(device.folder)
    return kind is not None and kind.server == "process"


def in_flight(told: dict[str, Any]) -> int:
    """Requests, or frames from the guest, that are not answered yet."""
    found = 0
    for queue in told.get("queues", ()):
        tx = queue.get("tx", {})
        found += queue.get("unanswered", 0) + queue.get("pending", 0) + tx.get("in_flight", 0)
    return found
