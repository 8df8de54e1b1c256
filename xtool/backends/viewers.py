"""Those who look at a console: any number on a Unix socket, each at its own pace, and a pty.

A viewer gets what is kept since the boot and then everything as it comes; what it sends goes to the guest.
Both are plain bytes. Who does not read is left behind: a socket is closed when ``BACKLOG`` bytes wait for it,
a pty loses what it has no room for. So neither the guest nor another viewer ever waits for one.

Facts
-----
* An epoll descriptor can itself be polled, so all of this is one descriptor (``fileno``) to the loop above.
* A pty's master reads EIO after the last user closed it; we keep its other side open, so it never does.
* Whoever may connect to a Unix socket is decided by the permissions of the socket (0600) and its folder.
"""

from __future__ import annotations

import os
import select
import socket
import tty
from collections.abc import Callable
from pathlib import Path

from xtool import paths
from xtool.backends.consolefeed import HELLO_SIZE, Position, parse_hello, shown
from xtool.backends.consolelog import DATA, RECORD_MAX, Piece, Record, encode, parse
from xtool.errors import RemoteProtocolError

#: Bytes that may wait for one viewer beside the log; bytes of input that may wait for the guest.
BACKLOG = 1 << 20
INPUT_MAX = 4096
MOST_VIEWERS = 16
#: The newest bytes that are kept for who opens the pty.
PTY_BACKLOG = 64 << 10
_CHUNK = 65536


def socket_path(domid: int, number: int = 0) -> Path:
    """Where viewers connect to."""
    return paths.run_dir() / (f"console-{domid}-{number}.sock" if number else f"console-{domid}.sock")


#: A part of the log, and how each of its records is to be sent.
Past = tuple[list[Piece], Callable[[Record], bytes]]


class _Replay:
    """Pieces of a log as bytes for a viewer, a chunk at a time."""

    def __init__(self, pieces: list[Piece], show: Callable[[Record], bytes] = shown) -> None:
        self._pieces = pieces
        self._show = show

    def next(self) -> bytes:
        """The next bytes; empty at the end."""
        while self._pieces:
            piece = self._pieces[0]
            raw = os.pread(piece.fd, min(2 * RECORD_MAX, piece.stop - piece.start), piece.start)
            records, size = parse(raw)
            if not records:
                os.close(self._pieces.pop(0).fd)
                continue
            self._pieces[0] = piece._replace(start=piece.start + size)
            data = b"".join(map(self._show, records))
            if data:
                return data
        return b""

    def close(self) -> None:
        while self._pieces:
            os.close(self._pieces.pop().fd)


class _Viewer:
    def __init__(
        self, fd: int, close: Callable[[], None], replay: _Replay | None, *, patient: bool, feed: bool = False
    ) -> None:
        self.fd = fd
        self.close_fd = close
        self.replay = replay
        self.patient = patient  # a pty: loses bytes, but stays
        self.feed = feed  # gets records
        self.hello: bytearray | None = bytearray() if feed else None  # until it is whole
        self.waiting = bytearray()  # of the replay
        self.live = bytearray()
        self.events = 0
        self.talks = True  # it may still send something

    def send(self) -> bool:
        """Write what can be written now; false when the viewer is gone."""
        while True:
            if not self.waiting and self.replay is not None:
                self.waiting += self.replay.next()
                if not self.waiting:
                    self.replay.close()
                    self.replay = None
            out = self.waiting or self.live
            if not out:
                return True
            try:
                with memoryview(out) as view:
                    sent = os.write(self.fd, view[:_CHUNK])
            except BlockingIOError:
                return True
            except OSError:
                return False
            del out[:sent]

    @property
    def behind(self) -> bool:
        return bool(self.waiting or self.live or self.replay)

    def close(self) -> None:
        if self.replay is not None:
            self.replay.close()
        self.close_fd()


class Viewers:
    """Listens at ``path`` (None: no socket); ``replay`` gives the log for a new viewer. At ``feed`` it
    listens for those that come back, to whom ``past`` gives the log from their position on.

    Raises ``OSError`` when a socket cannot be made.
    """

    def __init__(
        self,
        path: Path | None,
        replay: Callable[[], list[Piece]],
        *,
        feed: Path | None = None,
        past: Callable[[Position | None], Past] | None = None,
        backlog: int = BACKLOG,
    ) -> None:
        self.path, self.feed = path, feed
        self.input = bytearray()
        self.cut = 0  # viewers that were left behind
        self.tty: str | None = None
        self._replay, self._past, self._backlog = replay, past, backlog
        self._epoll = select.epoll()
        self._viewers: dict[int, _Viewer] = {}
        self._listening: dict[int, tuple[socket.socket, Path]] = {}
        try:
            for place in (feed, path):  # whoever finds the second may count on the first
                if place is not None:
                    sock = _listen(place)
                    self._listening[sock.fileno()] = sock, place
                    self._epoll.register(sock, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._viewers)

    def fileno(self) -> int:
        """Readable when ``ready`` should be called."""
        return self._epoll.fileno()

    def open_pty(self) -> str:
        """One more viewer: a pty; the name for its users."""
        master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(master, False)
        self.tty = os.ttyname(slave)

        def close() -> None:
            os.close(master)
            os.close(slave)

        self._add(_Viewer(master, close, _Replay([]), patient=True))
        return self.tty

    def show(self, record: Record) -> None:
        """The guest printed this, or its console was connected."""
        framed = b""
        for viewer in list(self._viewers.values()):
            if viewer.feed:
                if viewer.hello is not None:
                    continue  # the log has it
                data = framed = framed or encode(record)
            else:
                data = record.data if record.kind == DATA else b""
            if not data:
                continue
            if viewer.patient:
                del viewer.live[: max(0, len(viewer.live) + len(data) - PTY_BACKLOG)]
            elif len(viewer.live) + len(data) > self._backlog:
                self.cut += 1
                self._remove(viewer)
                continue
            viewer.live += data
            if len(viewer.live) == len(data):  # else it is waiting to become writable already
                self._send(viewer)

    def ready(self) -> bool:
        """See to new viewers and to those with something to do; true if there is input for the guest."""
        for fd, events in self._epoll.poll(0, 64):
            if fd in self._listening:
                self._accept(*self._listening[fd])
                continue
            viewer = self._viewers.get(fd)
            if viewer is None:
                continue
            if events & select.EPOLLIN and viewer.talks:
                self._receive(viewer)
            elif events & (select.EPOLLHUP | select.EPOLLERR):
                self._remove(viewer)
                continue
            if events & select.EPOLLOUT and fd in self._viewers:
                self._send(viewer)
        return bool(self.input)

    def taken(self, count: int) -> None:
        """``count`` bytes of the input are in the guest's hands."""
        full = len(self.input) >= INPUT_MAX
        del self.input[:count]
        if full and len(self.input) < INPUT_MAX:
            for viewer in self._viewers.values():
                self._wait_for(viewer)

    def close(self) -> None:
        """Let everybody go. May be called again."""
        for viewer in list(self._viewers.values()):
            viewer.send()
            self._remove(viewer)
        while self._listening:
            sock, place = self._listening.popitem()[1]
            sock.close()
            place.unlink(missing_ok=True)
        if not self._epoll.closed:
            self._epoll.close()

    def _accept(self, sock: socket.socket, place: Path) -> None:
        try:
            peer, _ = sock.accept()
        except OSError:
            return
        if len(self._viewers) >= MOST_VIEWERS:
            peer.close()
            return
        peer.setblocking(False)
        if place == self.feed:
            self._add(_Viewer(peer.fileno(), peer.close, None, patient=False, feed=True))
            return
        try:
            pieces = self._replay()
        except OSError:  # it can be looked at without its past
            pieces = []
        self._add(_Viewer(peer.fileno(), peer.close, _Replay(pieces), patient=False))

    def _add(self, viewer: _Viewer) -> None:
        self._viewers[viewer.fd] = viewer
        viewer.events = select.EPOLLIN
        self._epoll.register(viewer.fd, viewer.events)
        self._send(viewer)

    def _send(self, viewer: _Viewer) -> None:
        if viewer.send():
            self._wait_for(viewer)
        else:
            self._remove(viewer)

    def _wait_for(self, viewer: _Viewer) -> None:
        events = select.EPOLLIN if viewer.talks and len(self.input) < INPUT_MAX else 0
        events |= select.EPOLLOUT if viewer.behind else 0
        if events != viewer.events:
            viewer.events = events
            self._epoll.modify(viewer.fd, events)

    def _greet(self, viewer: _Viewer) -> None:
        """Take the first bytes of one who comes back; give it what it has not seen."""
        assert viewer.hello is not None and self._past is not None
        try:
            data = os.read(viewer.fd, HELLO_SIZE - len(viewer.hello))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        viewer.hello += data
        if data and len(viewer.hello) < HELLO_SIZE:
            return
        try:
            if not data:
                raise RemoteProtocolError("it left")
            viewer.replay = _Replay(*self._past(parse_hello(bytes(viewer.hello))))
        except (OSError, RemoteProtocolError):  # it may try again
            self._remove(viewer)
            return
        viewer.hello = None
        self._send(viewer)

    def _receive(self, viewer: _Viewer) -> None:
        if viewer.hello is not None:
            self._greet(viewer)
            return
        room = INPUT_MAX - len(self.input)
        if room > 0:
            try:
                data = os.read(viewer.fd, room)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data and not viewer.patient:
                viewer.talks = False
                self._wait_for(viewer)
            self.input += data
        if len(self.input) >= INPUT_MAX:
            for other in self._viewers.values():
                self._wait_for(other)

    def _remove(self, viewer: _Viewer) -> None:
        del self._viewers[viewer.fd]
        self._epoll.unregister(viewer.fd)
        viewer.close()


def _listen(path: Path) -> socket.socket:
    """A socket at ``path`` that only its owner may connect to."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    if path.is_socket():
        path.unlink()  # a former process's; anything else makes bind fail
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(8)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock
