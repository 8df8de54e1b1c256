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
from xtool.backends.consolelog import DATA, RECORD_MAX, SKIPPED, Piece, parse

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


class _Replay:
    """Pieces of a log as bytes for a viewer, a chunk at a time."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces

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
            data = b"".join(_shown(record.kind, record.data, record.skipped) for record in records)
            if data:
                return data
        return b""

    def close(self) -> None:
        while self._pieces:
            os.close(self._pieces.pop().fd)


def _shown(kind: int, data: bytes, skipped: int) -> bytes:
    if kind == SKIPPED:
        return f"\r\n[{skipped} bytes were printed too fast to be kept]\r\n".encode()
    return data if kind == DATA else b""


class _Viewer:
    def __init__(self, fd: int, close: Callable[[], None], replay: _Replay, *, patient: bool) -> None:
        self.fd = fd
        self.close_fd = close
        self.replay: _Replay | None = replay
        self.patient = patient  # a pty: loses bytes, but stays
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
    """Listens at ``path`` (None: no socket); ``replay`` gives the log for a new viewer.

    Raises ``OSError`` when the socket cannot be made.
    """

    def __init__(
        self, path: Path | None, replay: Callable[[], list[Piece]], *, backlog: int = BACKLOG
    ) -> None:
        self.path = path
        self.input = bytearray()
        self.cut = 0  # viewers that were left behind
        self.tty: str | None = None
        self._replay, self._backlog = replay, backlog
        self._epoll = select.epoll()
        self._viewers: dict[int, _Viewer] = {}
        self._listening: socket.socket | None = None
        if path is not None:
            self._listening = _listen(path)
            self._epoll.register(self._listening, select.EPOLLIN)

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

    def show(self, data: bytes) -> None:
        """The guest printed this."""
        for viewer in list(self._viewers.values()):
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
            if self._listening is not None and fd == self._listening.fileno():
                self._accept()
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
        if self._listening is not None:
            self._listening.close()
            self._listening = None
            if self.path is not None:
                self.path.unlink(missing_ok=True)
        if not self._epoll.closed:
            self._epoll.close()

    def _accept(self) -> None:
        assert self._listening is not None
        try:
            peer, _ = self._listening.accept()
        except OSError:
            return
        if len(self._viewers) >= MOST_VIEWERS:
            peer.close()
            return
        peer.setblocking(False)
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

    def _receive(self, viewer: _Viewer) -> None:
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
