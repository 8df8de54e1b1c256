"""Where the watcher is asked for something: its end of the conversation in ``watchlink``.

Who asks is root, or could not connect; all the same nobody can hold up the watcher: a few are heard at a
time, each says what it wants in one message and within seconds, and its answer fits into the socket.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from xtool.toolstack import watchlink

#: So many are heard at a time, and one may take so long to say what it wants, seconds.
_LINKS, _LINK_TIME = 64, 5.0
_BACKLOG = 256
_LONGEST = 256


class Desk:
    """Listens from the start. ``answer(what, domid, uuid)`` gives one of ``watchlink``'s bytes."""

    def __init__(self, answer: Callable[[bytes, int, str], bytes]) -> None:
        self._answer = answer
        #: Those that have not said yet what they want, and until when they may.
        self.busy: dict[int, tuple[socket.socket, float]] = {}
        path = watchlink.socket_path()
        folder, name = os.path.split(path)
        for left in os.listdir(folder):  # of one that was killed at this
            if left.startswith(f"{name}."):
                os.unlink(f"{folder}/{left}")
        temporary = f"{path}.{os.getpid()}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(temporary)
        os.chmod(temporary, 0o600)  # nobody can connect before it listens
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        os.replace(temporary, path)

    def filenos(self) -> list[int]:
        """What to wait for."""
        listener = [self._listener.fileno()] if len(self.busy) < _LINKS else []
        return [*listener, *self.busy]

    def hear(self) -> None:
        """Answer all that have said something."""
        now = time.monotonic()
        while len(self.busy) < _LINKS:
            try:
                link, _ = self._listener.accept()
            except OSError:  # nobody more, or no descriptors
                break
            link.setblocking(False)
            self.busy[link.fileno()] = link, now + _LINK_TIME
        for fd, (link, until) in list(self.busy.items()):
            if self._answered(link) or now >= until:
                link.close()
                del self.busy[fd]

    def _answered(self, link: socket.socket) -> bool:
        """Whether it has said what it wants."""
        try:
            words = link.recv(_LONGEST).decode("ascii", "replace").split(" ")
            if len(words) == 4 and words[0].encode() == watchlink.MAGIC:
                answer = self._answer(words[1].encode(), int(words[2]), _checked(words[3]))
                link.send(answer, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            pass  # it has gone, or talks nonsense
        return True

    def close(self) -> None:
        """Who comes from now on finds nobody; those that wait see the end of the stream."""
        try:
            os.unlink(watchlink.socket_path())
        except OSError:
            pass
        self._listener.close()
        for link, _ in self.busy.values():
            link.close()


def _checked(uuid: str) -> str:
    """Raises ``ValueError`` for what is no uuid: it becomes a file's name."""
    if [len(part) for part in uuid.split("-")] != [8, 4, 4, 4, 12]:
        raise ValueError(uuid)
    bytes.fromhex(uuid.replace("-", ""))
    return uuid
