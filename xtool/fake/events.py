"""/dev/xen/evtchn in memory: the ``EventChannels`` of one domain of a ``FakeMachine``."""

from __future__ import annotations

import errno
import os
import weakref
from collections import deque
from collections.abc import Iterable
from types import TracebackType

from xtool.abi.xen import DOMID_FIRST_RESERVED
from xtool.errors import EventChannelError
from xtool.evtchn.port import PORTS_AT_ONCE
from xtool.fake.machine import Channel, FakeMachine


class FakeEventChannels:
    """One open device. ``fileno`` is a real descriptor that select can wait for."""

    def __init__(self, machine: FakeMachine, domid: int) -> None:
        self._machine = machine
        self._domid = domid
        self._ring: deque[int] = deque()
        self._signal = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._let_go = weakref.finalize(self, os.close, self._signal)
        self._restricted: int | None = None
        self._closed = False
        #: How often each port was notified, for tests.
        self.notified: dict[int, int] = {}

    def push(self, port: int) -> None:
        """The machine has an event for us. Called with its lock held."""
        self._ring.append(port)
        if len(self._ring) == 1:
            os.eventfd_write(self._signal, 1)

    # --- binding ------------------------------------------------------------------------------------
    def _allowed(self, operation: str, domid: int | None) -> None:
        if self._closed:
            raise EventChannelError(operation, errno.EBADF)
        if self._restricted is not None and domid != self._restricted:
            raise EventChannelError(operation, errno.EACCES)

    def bind_unbound(self, domid: int) -> int:
        self._allowed(f"a new event channel for domain {domid}", None)
        return self._machine.alloc_unbound(self._domid, domid, self)

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        self._allowed(f"binding to event channel {remote_port} of domain {domid}", domid)
        return self._machine.bind_interdomain(self._domid, domid, remote_port, self)

    def bind_virq(self, virq: int) -> int:
        self._allowed(f"binding VIRQ {virq}", None)
        return self._machine.bind_virq(self._domid, virq, self)

    def _own(self, operation: str, port: int) -> Channel:
        guest = self._machine.guests.get(self._domid)
        channel = guest.ports.get(port) if guest else None
        if channel is None or channel.owner is not self:
            raise EventChannelError(operation, errno.ENOTCONN)
        return channel

    def unbind(self, port: int) -> None:
        with self._machine.lock:
            self._own(f"closing event channel {port}", port)
            self._machine.close_port(self._domid, port)

    def restrict(self, domid: int) -> None:
        operation = f"restricting event channels to domain {domid}"
        if self._restricted is not None:
            raise EventChannelError(operation, errno.EACCES)
        if not 0 < domid < DOMID_FIRST_RESERVED:
            raise EventChannelError(operation, errno.EINVAL)
        self._restricted = domid

    # --- events -------------------------------------------------------------------------------------
    def notify(self, port: int) -> None:
        with self._machine.lock:
            self._own(f"notifying event channel {port}", port)
            self.notified[port] = self.notified.get(port, 0) + 1
            self._machine.send(self._domid, port)

    def pending(self, limit: int = PORTS_AT_ONCE) -> list[int]:
        with self._machine.lock:
            found = [self._ring.popleft() for _ in range(min(limit, PORTS_AT_ONCE, len(self._ring)))]
            if found and not self._ring:
                os.eventfd_read(self._signal)
        return found

    def unmask(self, ports: Iterable[int]) -> None:
        with self._machine.lock:
            guest = self._machine.guests.get(self._domid)
            for port in ports:
                channel = guest.ports.get(port) if guest else None
                if channel is not None and channel.owner is self and not channel.enabled:
                    channel.enabled = True
                    self._machine.deliver(port, channel)

    def fileno(self) -> int:
        return self._signal

    def close(self) -> None:
        with self._machine.lock:
            if self._closed:
                return
            self._closed = True
            guest = self._machine.guests.get(self._domid)
            for port in [p for p, c in guest.ports.items() if c.owner is self] if guest else ():
                self._machine.close_port(self._domid, port)
            self._ring.clear()
            self._let_go()
            self._signal = -1

    def __enter__(self) -> FakeEventChannels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
