"""How bytes get to xenstored and back: a Unix socket, or the kernel's ``/dev/xen/xenbus``.

Facts about the two
-------------------
- The daemon's sockets are ``/run/xenstored/socket`` (``/var/run`` is the same folder on most systems). A
  socket's watches and transactions die with it. A client that connects is the control domain.
- ``/dev/xen/xenbus`` passes requests to the daemon over the kernel's own shared ring. The kernel takes
  exactly one message per ``write`` and throws away what follows it; reads may return part of a message.
- That device has one request buffer per open file, and Linux (6.1) lets the next ``write`` overwrite it
  while the request before still waits for room in the ring: pipelined requests reach the daemon mixed
  up. So there is one request at a time on it.
- It never hangs up: with the daemon dead, requests are simply never answered, so only a deadline ends
  them.
- Both are used non-blocking: a client that waits only for writing while the daemon waits only for reading
  would never end.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Protocol

from xtool.errors import NoXenError, PrivilegeError, StoreGoneError

SOCKETS = ("/run/xenstored/socket", "/var/run/xenstored/socket")
DEVICE = "/dev/xen/xenbus"
READ_SIZE = 1 << 16


class Transport(Protocol):
    """A non-blocking byte stream. ``send`` and ``recv`` raise ``OSError`` when the stream is lost."""

    #: False if the next request may be sent only when the one before was answered.
    pipelines: bool

    def send(self, data: bytes) -> int:
        """How many bytes were taken; 0 when it would block."""

    def recv(self) -> bytes | None:
        """Some bytes; ``b""`` when the other side hung up; None when it would block."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class SocketTransport:
    """A connected ``AF_UNIX`` stream socket, which it takes over."""

    pipelines = True

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def send(self, data: bytes) -> int:
        try:
            return self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def recv(self) -> bytes | None:
        try:
            return self._sock.recv(READ_SIZE)
        except BlockingIOError:
            return None

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()


class DeviceTransport:
    """The xenbus device file."""

    pipelines = False

    def __init__(self, path: str = DEVICE) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def send(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0

    def recv(self) -> bytes | None:
        try:
            # The device has no end of file; an empty read means nothing is there yet.
            return os.read(self._fd, READ_SIZE) or None
        except BlockingIOError:
            return None

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def connect_socket(path: str) -> SocketTransport:
    """The daemon at this socket; errors as ``connect_default``."""
    try:
        return _connect(path)
    except OSError as error:
        raise _explain(path, error) from None


def _connect(path: str) -> SocketTransport:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
        return SocketTransport(sock)
    except BaseException:
        sock.close()
        raise


def connect_default() -> Transport:
    """The daemon's socket if there is one, else the xenbus device.

    Raises ``NoXenError`` when neither exists, ``PrivilegeError`` when we may not use it, and
    ``StoreGoneError`` when the socket is there but nobody listens.
    """
    for path in SOCKETS:
        try:
            return _connect(path)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise _explain(path, error) from None
    try:
        return DeviceTransport()
    except OSError as error:
        raise _explain(DEVICE, error) from None


def _explain(path: str, error: OSError) -> Exception:
    if error.errno in (errno.EACCES, errno.EPERM):
        return PrivilegeError(f"no permission to use xenstore at {path}", hint="run as root")
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTDIR):
        return NoXenError(
            "no xenstore on this machine: neither xenstored's socket nor /dev/xen/xenbus is there",
            hint="on a machine without Xen, use the lab: xtool -H lab ...",
        )
    name = errno.errorcode.get(error.errno or 0, str(error))
    return StoreGoneError("connect", path, name, hint="is xenstored running?")
