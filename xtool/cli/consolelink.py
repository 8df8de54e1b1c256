"""Where a console's bytes come from and go to: a tty, the feed of a backend of ours, or a daemon that has one
of these on its host.

A feed is connected again when its server is restarted or dies, and goes on behind the last byte we had. What
was typed and not yet handed to the server waits; what the dying server had not given to the guest is lost.
"""

from __future__ import annotations

import os
import socket
import time

from xtool.backends.consolefeed import Feed
from xtool.devices.console import open_tty
from xtool.errors import DomainError, HostError
from xtool.toolstack.api import ConsoleTarget

#: How long a console's socket may take to appear, seconds.
_CONNECT_TIME = 5.0
#: How long its server may be away, seconds: it is started again within one, but not at once on a busy host.
AWAY_TIME = 60.0
#: Pause between two attempts to connect, seconds.
_PAUSE = 0.05


class Link:
    """``fd`` is for both ways and non-blocking, -1 while the server is away. ``final``: it will not come
    back. ``taken`` counts the bytes read.

    Raises ``DomainError`` when the console cannot be opened.
    """

    pause = _PAUSE

    def __init__(self, target: ConsoleTarget) -> None:
        self.final = not target.feed
        self.taken = 0
        self._feed = Feed() if target.feed else None
        self._path, self._socket = target.via or target.feed or target.socket, target.socket
        self._target = target
        self._away_since = self._tried = time.monotonic()
        self._taken_before = 0
        self.fd = self._first() if self._path else open_tty(target.tty)

    def _first(self) -> int:
        end = time.monotonic() + _CONNECT_TIME
        while True:
            try:
                return self._connect()
            except OSError as error:
                known = self._feed is not None and not self._target.via
                if known and os.path.exists(self._socket) and not os.path.exists(self._path):
                    # A backend of before there were feeds.
                    self._path, self._feed, self.final = self._socket, None, True
                elif time.monotonic() < end:  # its server may be starting, again even
                    time.sleep(_PAUSE)
                else:
                    raise DomainError(
                        f"cannot connect to {self._path}: {error.strerror}",
                        hint="is its backend process running?",
                    ) from None

    def _through_daemon(self) -> socket.socket:
        from xtool.client.socketclient import SocketClient

        target = self._target
        try:
            return SocketClient(target.via).open_console(str(target.domid), target.kind, target.number)[0]
        except HostError as error:  # it is away, as a server may be
            raise ConnectionRefusedError(0, error.message) from None

    def _connect(self) -> int:
        link = self._through_daemon() if self._target.via else socket.socket(socket.AF_UNIX)
        try:
            if not self._target.via:
                link.connect(self._path)
            if self._feed is not None:
                link.sendall(self._feed.connected())
            link.setblocking(False)
        except BaseException:
            link.close()
            raise
        return link.detach()

    def read(self, count: int) -> bytes | None:
        """What came, which may be nothing to show; None at the end. Raises ``OSError``,
        ``RemoteProtocolError``."""
        data = os.read(self.fd, count)
        self.taken += len(data)
        if not data:
            return None
        return self._feed.receive(data) if self._feed is not None else data

    def lost(self) -> bool:
        """The other side is gone; true if it is for good."""
        if self.final:
            return True
        self.close()
        self._tried = time.monotonic()
        if self.taken != self._taken_before:  # else nobody has served us meanwhile
            self._away_since, self._taken_before = self._tried, self.taken
        return False

    def try_again(self, now: float) -> bool:
        """Connect if there is somebody; false when nobody came for too long."""
        if now - self._tried < _PAUSE:
            return True
        self._tried = now
        try:
            self.fd = self._connect()
        except OSError:
            return not self.final and now - self._away_since < AWAY_TIME
        return True

    def close(self) -> None:
        """May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
