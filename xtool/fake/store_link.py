"""One connection to the fake daemon: a byte queue each way, and an eventfd so that ``poll`` works."""

from __future__ import annotations

import errno
import os
import weakref
from threading import RLock
from typing import TYPE_CHECKING

from xtool.errors import RemoteProtocolError
from xtool.proto.xenstore import Op, PacketParser, encode, strings

if TYPE_CHECKING:
    from xtool.fake.store import FakeStoreDaemon, View

#: Held while bytes move and requests are carried out, so that several threads may have connections.
_LOCK = RLock()


class FakeLink:
    """Both ends of a connection: the client's is ``send``/``recv``/``fileno``/``close``, the rest is the
    daemon's. ``chunk`` bounds how many bytes one ``send`` or ``recv`` moves: tests set it to 1."""

    pipelines = True

    def __init__(self, daemon: FakeStoreDaemon, domid: int) -> None:
        self.domid = domid
        self.watches: list[tuple[str, str]] = []
        self.fresh_watch: tuple[str, str] | None = None
        self.transactions: dict[int, View] = {}
        self.chunk = 1 << 16
        self._daemon = daemon
        self._parser = PacketParser()
        self._replies = bytearray()
        self._hung_up = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._let_go = weakref.finalize(self, os.close, self._fd)

    # --- the client's end

    def send(self, data: bytes) -> int:
        if self._hung_up:
            raise BrokenPipeError(errno.EPIPE, "the fake daemon is gone")
        data = data[: self.chunk]
        with _LOCK:
            self._parser.receive_data(data)
            try:
                while not self._daemon.hung and (packet := self._parser.next_packet()) is not None:
                    self._daemon.handle(self, packet)
            except RemoteProtocolError:
                self.hang_up()
        return len(data)

    def recv(self) -> bytes | None:
        with _LOCK:
            if not self._replies:
                return b"" if self._hung_up else None
            data = bytes(self._replies[: self.chunk])
            del self._replies[: self.chunk]
            if not self._replies and not self._hung_up:
                os.eventfd_read(self._fd)
            return data

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        with _LOCK:
            if self._fd >= 0:
                self._let_go()
                self._fd = -1
                self._hung_up = True
                if self in self._daemon.links:
                    self._daemon.links.remove(self)

    # --- the daemon's end

    def push(self, data: bytes) -> None:
        """Queue bytes for the client; raw bytes, so tests can push nonsense."""
        if self._fd >= 0:
            if not self._replies:
                os.eventfd_write(self._fd, 1)
            self._replies += data

    def push_event(self, path: str, token: str) -> None:
        self.push(encode(Op.WATCH_EVENT, 0, strings(path, token)))

    def hang_up(self) -> None:
        self._hung_up = True
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)
