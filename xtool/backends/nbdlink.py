"""One connection to an NBD server: a batch of requests under way at the same time, and deadlines.

Facts about libnbd
------------------
* Calls that begin with ``aio_`` never wait; ``aio_notify_read`` and ``aio_notify_write`` do what can be done
  when the descriptor is ready, and call what was given for the completion. ``aio_connect_tcp`` alone may
  wait, for the name of the host.
* The memory of a request is used until its completion, or until the handle is gone: no other way takes a
  request back. A handle has no ``close``: it goes with its last reference.
* An error of the server's comes to the completion as an errno. ENOTCONN is libnbd's own: the connection is
  gone. ESHUTDOWN is a server that is about to go.
* What is out of bounds is refused with EINVAL before it is sent.
* Structured replies are not asked for: with them QEMU's server hangs up when a read fails, instead of saying
  that it failed.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from xtool.backends.libnbd import binding

#: An NBD request's length has 32 bits; this is far below, and a multiple of any granularity.
TRIM_MOST = 1 << 30


class LinkGoneError(Exception):
    """There is no connection, with the reason. ``locked``: somebody has the image open still."""

    def __init__(self, reason: str, *, locked: bool = False) -> None:
        super().__init__(reason)
        self.locked = locked


class CancelledError(Exception):
    """Told to stop waiting."""


class Op(NamedTuple):
    """``kind``: ``read``, ``write``, ``flush`` or ``trim``. ``length`` is the memory's where there is any."""

    kind: str
    offset: int
    length: int
    view: memoryview | bytes = b""


class Cancel:
    """Ends waits in another thread, until ``clear``."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    def set(self) -> None:
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

    def wait(self, seconds: float) -> None:
        """Sleep. Raises ``CancelledError``."""
        if self._poll.poll(max(0.0, 1000 * seconds)):
            raise CancelledError

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class NbdLink:
    """A connected handle. ``connect`` begins it (``aio_connect_...``), ``patience`` seconds may pass until it
    is ready. Raises ``LinkGoneError`` and ``CancelledError``, as the methods do. For one thread."""

    def __init__(
        self, connect: Callable[[Any], object], name: str, cancel: Cancel, *, patience: float
    ) -> None:
        self._cancel = cancel
        self._error: type[Exception] = binding().Error
        handle = self._handle = binding().NBD()
        try:
            handle.set_export_name(name)
            # Memory that was not filled is never given to a guest: no need to clear it first.
            handle.set_pread_initialize(False)
            handle.set_request_structured_replies(False)
            connect(handle)
            self._drive(lambda: not (handle.aio_is_connecting() or handle.aio_is_negotiating()), patience)
            if not handle.aio_is_ready():
                raise LinkGoneError("the server does not take the connection")
            self.size: int = handle.get_size()
            self.readonly: bool = handle.is_read_only()
            self.can_flush: bool = handle.can_flush()
            self.can_trim: bool = handle.can_trim()
            self.least: int = handle.get_block_size(binding().SIZE_MINIMUM) or 1
            self.preferred: int = handle.get_block_size(binding().SIZE_PREFERRED) or 4096
        except self._error as error:
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> LinkGoneError:
        """libnbd's error as ours, without the name of the function it comes from."""
        text = str(error.args[0]) if error.args else str(error)
        return LinkGoneError(text.partition(": ")[2] or text)

    def _drive(self, done: Callable[[], bool], patience: float, progress: Callable[[], int] = int) -> None:
        """Let the connection work until ``done``; ``patience`` seconds may pass without ``progress``."""
        handle, both = self._handle, binding()
        before = progress()
        until = time.monotonic() + patience
        while not done():
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise LinkGoneError("the server closed the connection")
            direction = handle.aio_get_direction()
            reads = direction & both.AIO_DIRECTION_READ
            writes = direction & both.AIO_DIRECTION_WRITE
            wait = select.poll()
            wait.register(self._cancel.fd, select.POLLIN)
            fd = handle.aio_get_fd()
            wait.register(fd, (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0))
            ready = dict(wait.poll(max(0.0, 1000 * (until - time.monotonic()))))
            if self._cancel.fd in ready:
                raise CancelledError
            events = ready.get(fd, 0)
            if reads and events & (select.POLLIN | select.POLLHUP):
                handle.aio_notify_read()
            elif writes and events & (select.POLLOUT | select.POLLHUP | select.POLLERR):
                handle.aio_notify_write()  # a connection that was refused is told here
            elif events:
                raise LinkGoneError("the connection broke")
            now = progress()
            if now != before:
                before = now
                until = time.monotonic() + patience
            elif time.monotonic() >= until:
                raise LinkGoneError(f"no answer within {patience:g} s")

    def run(self, ops: Sequence[Op], patience: float) -> list[OSError | None]:
        """Carry out all of them at once. After an exception the link must be dropped, and none of them counts
        as done."""
        results: list[OSError | None] = [None] * len(ops)
        lost = False
        left = len(ops)

        def ended(number: int, code: int) -> None:
            nonlocal left, lost
            left -= 1
            if code in (errno.ENOTCONN, errno.ESHUTDOWN):
                lost = True
            if code:
                results[number] = OSError(code, os.strerror(code))

        try:
            for number, op in enumerate(ops):
                try:
                    self._submit(op, _completion(ended, number))
                except self._error as error:
                    ended(number, int(error.args[1]) or errno.EIO)
            self._drive(lambda: not left or lost, patience, lambda: left)
        except self._error as error:
            raise self._gone(error) from None
        if lost:
            raise LinkGoneError("the server closed the connection")
        return results

    def _submit(self, op: Op, completion: Callable[[Any], int]) -> None:
        handle = self._handle
        if op.kind == "read":
            handle.aio_pread(op.view, op.offset, completion=completion)
        elif op.kind == "write":
            handle.aio_pwrite(op.view, op.offset, completion=completion)
        elif op.kind == "flush":
            handle.aio_flush(completion=completion)
        else:
            handle.aio_trim(op.length, op.offset, completion=completion)

    def drop(self) -> None:
        """Close the connection. What was under way may be carried out or not."""
        self._handle = None


def _completion(ended: Callable[[int, int], None], number: int) -> Callable[[Any], int]:
    def completion(error: Any) -> int:
        ended(number, error.value)
        return 1  # libnbd may forget the request

    return completion
