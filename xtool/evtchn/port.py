"""What an owner of event channels may ask for: a Protocol.

``xtool.evtchn.device`` implements it on /dev/xen/evtchn, ``xtool.fake.events`` in memory; the tests in
``tests/contract`` run on both.

A port is masked from the moment ``pending`` reports it until ``unmask``. Events that arrive meanwhile are
kept by Xen as one: after ``unmask`` the port is reported once more. So nothing is lost and nothing piles up.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, TypeVar

_S = TypeVar("_S")

#: How many ports one read or write of the device takes.
PORTS_AT_ONCE = 1024


class EventChannels(Protocol):
    """A set of ports of this domain. Every call raises ``EventChannelError`` when it is refused.

    Ports bound here are closed by ``close``, and by the kernel when the process ends.
    """

    def bind_unbound(self, domid: int) -> int:
        """A new port that ``domid`` may bind to: what a frontend puts into xenstore."""

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        """Connect to a port that ``domid`` keeps for us; our end. An event may be pending at once: Xen
        makes one up, since the other side may have notified before we were there."""

    def bind_virq(self, virq: int) -> int:
        """A port for a virtual interrupt of this domain (a ``VIRQ_*`` number), on vCPU 0."""

    def unbind(self, port: int) -> None:
        """Close the port. The other end becomes unbound: the same peer may bind to it again."""

    def notify(self, port: int) -> None:
        """Send an event to the other end. Without one it is dropped, and that is no error."""

    def pending(self, limit: int = PORTS_AT_ONCE) -> list[int]:
        """Ports with an event, at most ``limit`` (but all at once when the kernel lost count); does not wait.
        Each is masked now."""

    def unmask(self, ports: Iterable[int]) -> None:
        """Let the ports report again. Ports that are not ours, or not masked, do no harm."""

    def fileno(self) -> int:
        """For select: readable when ``pending`` has something."""

    def restrict(self, domid: int) -> None:
        """From now on only ``bind_interdomain`` with ``domid``, and what is bound already. Cannot be
        undone."""

    def close(self) -> None:
        """Close all ports. May be called again."""

    def __enter__(self: _S) -> _S: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
