"""Waiting for devices to get somewhere: both ends of a split driver say how far they are in xenstore.

Facts about the states (``xen/io/xenbus.h``, Linux's blkback and netback, QEMU's xen-bus)
------------------------------------------------------------------------------------------
- Each end writes its own ``state`` and watches the other's. A backend found by its driver goes to InitWait
  and waits for the frontend; nothing more can be expected before the guest runs.
- The backend's folder belongs to domain 0, so its state is the backend's word. The frontend's is whatever
  the guest writes: garbage, or a new value ten thousand times a second. It decides nothing here.
- Linux's blkback reaches InitWait *before* it opens the disk; when that fails it says why in
  ``/local/domain/0/error/backend/...`` and goes to Closing.
- netback makes its network interface when it finds the device, and connects only once somebody has written
  ``hotplug-status`` = ``connected``.
- To take a device away in good order: ``online`` = 0 and ``state`` = Closing at the backend. The frontend
  sees it, finishes, goes to Closed; the backend follows and, not being online, lets go of everything.
  A guest that is paused or refuses does not; nor does Linux before 5.16 while the disk is mounted.
- QEMU removes the backend's folder itself when it lets go. Linux lets go, too, when the folder vanishes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from xtool.errors import DeadlineError, HostError
from xtool.proto import xenbus
from xtool.proto.xenbus import XenbusState
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.xenstore.port import Reader, Store, Transaction, Writer


def parse_state(text: str | None) -> XenbusState:
    """What a ``state`` node says. Nothing, or nonsense, is ``UNKNOWN``; never raises."""
    state = xenbus.parse_state(text)
    return XenbusState.UNKNOWN if state is None else state


class DeviceId(NamedTuple):
    """One device: whose, what the guest takes it for, its number, and the backend's folder name."""

    domid: int
    kind: str  # "vbd", "vif" or "console"
    devid: int
    folder: str  # "vbd", "qdisk", "vif", ...
    backend_domid: int = 0

    @property
    def frontend(self) -> str:
        if self.kind == "console" and self.devid == 0:
            return paths.console(self.domid)  # it alone does not live under device/
        return paths.frontend(self.domid, self.kind, self.devid)

    @property
    def backend(self) -> str:
        return paths.backend(self.backend_domid, self.folder, self.domid, self.devid)

    @property
    def mirror(self) -> str:
        """Where the toolstack's own record is; the guest can neither read nor write it."""
        return paths.libxl_device(self.domid, self.kind, self.devid)

    @property
    def error(self) -> str:
        """Where the backend's driver leaves its last words."""
        below = self.backend.removeprefix(paths.domain(self.backend_domid) + "/")
        return f"{paths.domain(self.backend_domid)}/error/{below}"

    def __str__(self) -> str:
        return f"{self.kind} {self.devid} of domain {self.domid}"


def parse_backend(path: str | None) -> tuple[int, str, int, int] | None:
    """``/local/domain/0/backend/vbd/5/51712`` -> ``(0, "vbd", 5, 51712)``; None if it is no such path."""
    parts = (path or "").split("/")
    if len(parts) != 8 or parts[:3] != ["", "local", "domain"] or parts[4] != "backend" or not parts[5]:
        return None
    numbers = (parts[3], parts[6], parts[7])
    if not all(number.isascii() and number.isdecimal() and len(number) < 10 for number in numbers):
        return None
    return int(parts[3]), parts[5], int(parts[6]), int(parts[7])


def wait_states(
    store: Store,
    devices: Sequence[DeviceId],
    wanted: Callable[[DeviceId, XenbusState | None], bool],
    deadline: float,
    what: str,
    *,
    failed: Iterable[XenbusState] = (),
) -> None:
    """Until ``wanted(device, backend state)`` was true for each; all share ``deadline`` seconds from now.

    The state is None for a backend without a state node. ``wanted`` is asked again only when the store
    changed or a short time has passed (some of it may look at what no watch tells), and no more once it
    was true. A backend in one of the ``failed`` states raises ``HostError`` with what it left as reason;
    time running out raises ``DeadlineError`` saying ``what`` and which devices are late.
    """
    end = time.monotonic() + deadline
    bad = frozenset(failed)
    waiting = {device: f"{device.backend}/state" for device in devices}
    pause = _FIRST_PAUSE
    with ExitStack() as stack:
        watches = [stack.enter_context(store.watch(path)) for path in waiting.values()]
        while waiting:
            states = store.get_many(list(waiting.values()))
            for device, path in list(waiting.items()):
                text = states[path]
                state = None if text is None else parse_state(text)
                if state in bad:
                    raise failure(store, device)
                if wanted(device, state):
                    del waiting[device]
            left = end - time.monotonic()
            if not waiting:
                return
            if left <= 0:
                names = ", ".join(map(str, waiting))
                raise DeadlineError(
                    f"{what} within {deadline:g} s: {names}",
                    hint="the kernel's log (dmesg) or QEMU's (in /var/log/xtool) may say why",
                )
            if store.wait_any(watches, min(left, pause)):
                pause = _FIRST_PAUSE
            else:
                pause = min(pause * 2, _LONGEST_PAUSE)
            for watch in watches:
                watch.pending()


#: Between two looks at what xenstore does not tell, seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1


def failure(store: Store, device: DeviceId) -> HostError:
    """The backend's own words, as an error."""
    said = store.get(f"{device.error}/error") or store.get(f"{device.mirror}/error") or ""
    text = f"the backend of {device} gave up"
    return HostError(f"{text}: {said[:300]}" if said else text, hint="dmesg may tell more")


def ask_to_close(tx: Writer, states: Mapping[DeviceId, XenbusState | None]) -> None:
    """Tell backends that their devices go: those that still are there."""
    for device, state in states.items():
        if state is None:
            continue
        tx.write(f"{device.backend}/online", "0")
        if state is not XenbusState.CLOSED:
            tx.write(f"{device.backend}/state", str(int(XenbusState.CLOSING)))


def backend_states(store: Reader, devices: Sequence[DeviceId]) -> dict[DeviceId, XenbusState | None]:
    """The backends' states; None for one whose folder is gone."""
    nodes = {device: f"{device.backend}/state" for device in devices}
    values = store.get_many(nodes.values())
    return {d: None if values[n] is None else parse_state(values[n]) for d, n in nodes.items()}


def close(store: Store, devices: Sequence[DeviceId], deadline: float, *, patient: frozenset[str]) -> None:
    """Take devices away in good order. Their nodes stay; the caller removes them.

    A device whose backend is not connected is not waited for, unless its folder is in ``patient`` (those
    backends are processes that let go by themselves). Raises ``DeadlineError`` when the guest holds on.
    """

    def change(tx: Transaction) -> list[DeviceId]:
        states = backend_states(tx, devices)
        ask_to_close(tx, states)
        return [
            device
            for device, state in states.items()
            if state in (XenbusState.CONNECTED, XenbusState.CLOSING)
            or (state is not None and device.folder in patient)
        ]

    holding = store.atomically(change)
    wait_states(
        store,
        holding,
        lambda _, state: state in (None, XenbusState.CLOSED),
        deadline,
        "the guest does not let go of its device",
    )


def removal_paths(device: DeviceId) -> tuple[str, ...]:
    """Everything in xenstore about a device that is gone."""
    ends = (device.backend, device.mirror, device.error)
    # Console 0's nodes are the domain's own.
    return ends if (device.kind, device.devid) == ("console", 0) else (device.frontend, *ends)
