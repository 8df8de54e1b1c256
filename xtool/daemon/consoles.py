"""A domain's console over an HTTP connection that was upgraded: bytes both ways, so that it works through a
forwarded socket.

What is behind it is what a viewer on this host would open: the feed of a console backend of ours (then both
sides speak ``backends.consolefeed`` over it, which survives a restart of the backend), its socket, or a pty,
which is locked against other readers meanwhile.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import ExitStack

from xtool.devices.console import console_lock, open_tty
from xtool.errors import DomainError
from xtool.toolstack.api import ConsoleTarget

PROTOCOL = "xtool-console"
_CHUNK, _PENDING = 16 << 10, 64 << 10


class Relay:
    """``form`` is ``feed`` or ``bytes``: what goes over it."""

    def __init__(self, fd: int, form: str, held: ExitStack) -> None:
        self.form = form
        self._fd, self._held = fd, held

    def run(self, connection: socket.socket, first: bytes) -> None:
        """Copy until one side ends."""
        with self._held:
            connection.setblocking(False)
            _copy(connection.fileno(), self._fd, first)


def open_relay(target: ConsoleTarget) -> Relay:
    """Raises ``DomainError`` when the console cannot be opened, or somebody else has it."""
    with ExitStack() as held:
        path = target.feed or target.socket
        if path:
            link = held.enter_context(socket.socket(socket.AF_UNIX))
            try:
                link.connect(path)
            except OSError as error:
                raise DomainError(
                    f"cannot connect to {path}: {error.strerror}", hint="is its backend process running?"
                ) from None
            link.setblocking(False)
            fd = link.fileno()
        else:
            held.enter_context(console_lock(target.domid))
            fd = open_tty(target.tty)
            held.callback(os.close, fd)
        return Relay(fd, "feed" if target.feed else "bytes", held.pop_all())
    raise AssertionError


def _copy(user: int, guest: int, first: bytes) -> None:
    """``first`` was read from the user already."""
    waiting = {user: bytearray(), guest: bytearray(first)}  # by where it goes
    other = {user: guest, guest: user}
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, 0)
    while True:
        for fd, pending in waiting.items():
            room = len(waiting[other[fd]]) < _PENDING
            poll.modify(fd, (select.POLLIN if room else 0) | (select.POLLOUT if pending else 0))
        for fd, what in poll.poll():
            try:
                if what & select.POLLOUT:
                    del waiting[fd][: os.write(fd, waiting[fd][:_CHUNK])]
                if what & select.POLLIN:
                    data = os.read(fd, _CHUNK)
                    if not data:
                        return
                    waiting[other[fd]] += data
                elif what & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                    return
            except BlockingIOError:
                continue
            except OSError:
                return
