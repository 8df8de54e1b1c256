"""A console attached to domain 0 itself, to this process: print and read as a guest does.

::

    with attached(host, name="org.example.test") as console:
        console.print(b"hello\\n", deadline=1)
        typed = console.read(deadline=10)

Its viewers connect to ``backends.viewers.socket_path(0, n)``, or to ``path``.

Facts
-----
* The backend is ours: xenconsoled serves no console but a domain's first, and looks at domains from 1 up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from xtool.devices.consoles import Console
from xtool.frontends.console import ConsoleDevice
from xtool.toolstack import dom0, journal
from xtool.toolstack.signals import undone_on_failure

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

_MOST = 16


@contextmanager
def attached(
    host: Host,
    *,
    name: str = "",
    connection: str = "socket",
    path: str | None = None,
    deadline: float = 30.0,
) -> Iterator[ConsoleDevice]:
    """Attach a console, as ``channel`` in a domain file gives one to a guest. Detached at the end in any
    case.

    Raises ``HostError`` with the backend's reason, ``DeviceError``, ``DeadlineError``.
    """
    dom0.recover(host)
    with undone_on_failure() as undo:
        with journal.naming():
            folder = Console(1).backend_kind.folder
            number = dom0.free_number(host, "console", folder, range(1, 1 + _MOST))
            console = Console(number, name, connection, path)
            wiring = dom0.OwnWiring(host, 0, "pvh", consoles=[console])
            device = dom0.declare(host, wiring, undo)
        wiring.ready(deadline)
        events, allocator = undo.enter_context(dom0.open_ports(host))
        front = ConsoleDevice(allocator, events, 0)
        undo.callback(front.close)
        undo.callback(dom0.go_offline, host, device)
        front.publish(host.store, dom0.frontend_of(device), device.backend, deadline)
        yield front
