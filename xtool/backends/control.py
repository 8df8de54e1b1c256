"""The socket on which a backend process tells what it does: JSON lines, for domain 0's root alone.

A client sends one line, ``{"do": "describe"}``, and gets one line per device and the end of the stream. What
one client may send, how many there may be and how long each may take is bounded; none of them can hold the
rings up.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from xtool import paths
from xtool.backends.loop import READ, WRITE, Loop, Timer
from xtool.errors import DeadlineError, HostError

MAX_CLIENTS = 8
MAX_REQUEST = 4096
#: Most a client reads of an answer, bytes.
MAX_ANSWER = 8 << 20
#: How long a client may take to ask and to read, seconds.
CLIENT_TIME = 5.0

Answer = Callable[[str], Iterable[dict[str, Any]]]


def socket_path(domid: int) -> Path:
    return paths.run_dir() / f"backend-{domid}.sock"


class ControlSocket:
    """Listens at ``path``. ``answer`` gets the word after ``do`` and gives lines; ``KeyError``: unknown."""

    def __init__(self, loop: Loop, path: Path, answer: Answer) -> None:
        self._loop = loop
        self._path = path
        self._answer = answer
        self._clients: set[_Client] = set()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # Under a name of our own first: whoever finds the socket may already connect, and only root can.
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        before = os.umask(0o177)
        try:
            self._socket.bind(str(fresh))
        finally:
            os.umask(before)
        self._socket.listen(MAX_CLIENTS)
        fresh.replace(path)
        self._inode = path.stat().st_ino
        loop.watch(self._socket.fileno(), self._accept)

    def _accept(self, events: int) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return
        if len(self._clients) >= MAX_CLIENTS:
            connection.close()
            return
        self._clients.add(_Client(self, connection))

    def lines(self, request: bytes) -> bytes:
        try:
            word = json.loads(request)["do"]
            return b"".join(json.dumps(line).encode() + b"\n" for line in self._answer(str(word)))
        except (ValueError, KeyError, TypeError, RecursionError):  # the last one: brackets without end
            return b'{"error": "what?"}\n'

    def gone(self, client: _Client) -> None:
        self._clients.discard(client)

    @property
    def loop(self) -> Loop:
        return self._loop

    def close(self) -> None:
        for client in list(self._clients):
            client.close()
        if self._socket.fileno() >= 0:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == self._inode:  # not a successor's
                    self._path.unlink()


class _Client:
    def __init__(self, control: ControlSocket, connection: socket.socket) -> None:
        self._control = control
        self._socket = connection
        self._socket.setblocking(False)
        self._request = b""
        self._answer = b""
        self._timer: Timer = control.loop.call_later(CLIENT_TIME, self.close)
        control.loop.watch(connection.fileno(), self._readable, READ, lambda error: self.close())

    def _readable(self, events: int) -> None:
        data = self._socket.recv(MAX_REQUEST)
        self._request += data
        if not data or len(self._request) > MAX_REQUEST:
            self.close()
        elif b"\n" in self._request:
            self._answer = self._control.lines(self._request.partition(b"\n")[0])
            self._control.loop.watch(self._socket.fileno(), self._writable, WRITE, lambda error: self.close())

    def _writable(self, events: int) -> None:
        if events & select.POLLERR:
            self.close()
            return
        self._answer = self._answer[self._socket.send(self._answer) :]
        if not self._answer:
            self.close()

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._timer.cancel()
            self._control.loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._control.gone(self)


def ask(domid: int, word: str = "describe", deadline: float = CLIENT_TIME) -> list[dict[str, Any]]:
    """What the domain's backend process answers; [] if there is none.

    Raises ``HostError`` for an answer that makes no sense, ``DeadlineError``.
    """
    end = time.monotonic() + deadline
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(deadline)
        try:
            link.connect(str(socket_path(domid)))
            link.sendall(json.dumps({"do": word}).encode() + b"\n")
            raw = b""
            while (data := link.recv(1 << 16)) and len(raw) < MAX_ANSWER:
                raw += data
                link.settimeout(max(0.01, end - time.monotonic()))
            lines = [json.loads(line) for line in raw.splitlines()]
        except (FileNotFoundError, ConnectionRefusedError):
            return []
        except TimeoutError:
            raise DeadlineError(
                f"the backends of domain {domid} did not answer within {deadline:g} s"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise HostError(f"the backends of domain {domid} answered nonsense: {error}") from None
    return [line for line in lines if isinstance(line, dict)]
