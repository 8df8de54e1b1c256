"""HTTP/1.1 on sockets: connections in threads, h11 for the protocol, bounds on everything a peer can send.

A request is a head of at most ``HEAD_MAX`` bytes within ``HEAD_TIME`` and a body of at most ``BODY_MAX``
within ``BODY_TIME``; an answer that nobody takes for ``SEND_TIME`` ends the connection. There are at most
``CONNECTIONS`` at once, ``PER_USER`` of one user but root.

Facts about h11: it checks what both sides say and raises ``RemoteProtocolError`` with the status to answer;
after a 101 it stands back, and ``trailing_data`` has what the peer sent behind its request.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock, Thread
from typing import Any

import h11

from xtool.daemon.access import Level, Peer

HEAD_MAX, BODY_MAX = 16 << 10, 1 << 20
HEAD_TIME, BODY_TIME, SEND_TIME, IDLE_TIME = 10.0, 30.0, 30.0, 120.0
CONNECTIONS, PER_USER = 256, 64
_CHUNK = 64 << 10
#: Small, since h11 takes a head of any size that comes at once.
_HEAD_CHUNK = 4 << 10
#: How long what a refused request still sends is taken, seconds.
_LINGER = 1.0
log = logging.getLogger("xtoold")

#: Carries on with the connection after a 101: the socket, and what the peer has sent already.
Takeover = Callable[[socket.socket, bytes], None]


@dataclass(frozen=True)
class Request:
    """``path`` is as it was sent, without the query; header names are in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    peer: Peer


@dataclass
class Response:
    """``body`` is bytes, or pieces to be sent as they come; ``takeover`` goes with status 101."""

    status: int
    content_type: str = "application/json"
    body: bytes | Iterator[bytes] = b""
    headers: dict[str, str] = field(default_factory=dict)
    takeover: Takeover | None = None


class Refused(Exception):
    """A request that is none: answered with ``status``, and the connection ends."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


#: Makes the answer to a request; ``refuse`` the one to a request that is none.
Handler = Callable[[Request], Response]
Refuser = Callable[[int, str], Response]


class Server:
    """``peer_of`` says who is at the other end of a new connection."""

    def __init__(self, handler: Handler, refuse: Refuser, peer_of: Callable[[socket.socket], Peer]) -> None:
        self._handler, self._refuse, self._peer_of = handler, refuse, peer_of
        self._lock = Lock()
        self._open: dict[socket.socket, int] = {}
        self._users: Counter[int] = Counter()
        self._listeners: list[socket.socket] = []
        self.served = 0

    @property
    def connections(self) -> int:
        return len(self._open)

    def listen(self, listener: socket.socket) -> None:
        """Serve what connects there, in threads."""
        self._listeners.append(listener)
        Thread(target=self._accept, args=(listener,), daemon=True, name="accept").start()

    def close(self) -> None:
        """Stop listening, and hang up on everybody."""
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                if listener.fileno() < 0:
                    return
                time.sleep(0.1)  # no descriptors left: others will end
                continue
            try:
                peer = self._peer_of(connection)
                room = self._admit(connection, peer)
                target = self._serve if room else self._turn_away
                Thread(target=target, args=(connection, peer), daemon=True, name="connection").start()
            except (OSError, RuntimeError):
                log.exception("a connection could not be served")
                self._dismiss(connection)

    def _admit(self, connection: socket.socket, peer: Peer) -> bool:
        with self._lock:
            if len(self._open) >= 2 * CONNECTIONS:
                raise OSError("too many connections, even to be told so")
            known = peer.uid == 0 or self._users[peer.uid] < PER_USER
            room = len(self._open) < CONNECTIONS and known
            self._open[connection] = peer.uid
            self._users[peer.uid] += 1
            return room

    def _dismiss(self, connection: socket.socket) -> None:
        with self._lock:
            uid = self._open.pop(connection, None)
            if uid is not None:
                self._users[uid] -= 1
                if not self._users[uid]:
                    del self._users[uid]
        connection.close()

    def _turn_away(self, connection: socket.socket, peer: Peer) -> None:
        try:
            with suppress(OSError, h11.ProtocolError):
                conversation = _Conversation(connection, peer)
                conversation.answer(self._refuse(429, "there are too many connections"), last=True)
        finally:
            self._dismiss(connection)

    def _serve(self, connection: socket.socket, peer: Peer) -> None:
        try:
            self._converse(_Conversation(connection, peer))
        except (OSError, h11.ProtocolError):
            pass  # the peer is gone, or was never one
        except Exception:
            log.exception("a connection failed")
        finally:
            self._dismiss(connection)

    def _converse(self, conversation: _Conversation) -> None:
        while True:
            try:
                request = conversation.request()
            except Refused as refused:
                conversation.answer(self._refuse(refused.status, str(refused)), last=True)
                conversation.drain()
                return
            if request is None:
                return
            self.served += 1
            response = self._handler(request)
            if response.takeover is not None:
                conversation.hand_over(response)
                return
            # Whoever may do nothing keeps no thread of ours.
            if not conversation.answer(response, last=request.peer.level is Level.NOTHING):
                return


class _Conversation:
    """One connection, from request to request."""

    def __init__(self, connection: socket.socket, peer: Peer) -> None:
        self._socket, self._peer = connection, peer
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
        self._end = 0.0

    def request(self) -> Request | None:
        """The next one, None when there is none any more. Raises ``Refused``."""
        self._end = time.monotonic() + IDLE_TIME
        began = False
        while True:
            event = self._next()
            if event is h11.NEED_DATA:
                data = self._receive(began, _HEAD_CHUNK)
                if data and not began:
                    began, self._end = True, time.monotonic() + HEAD_TIME
                self._feed(data)
                if not data and not began:
                    return None
            elif isinstance(event, h11.ConnectionClosed):
                return None
            elif isinstance(event, h11.Request):
                return self._with_body(event)
            else:
                raise Refused(400, "that is no request")

    def _with_body(self, head: h11.Request) -> Request:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        body = bytearray()
        self._end = time.monotonic() + BODY_TIME
        if self._h11.they_are_waiting_for_100_continue:
            self._send(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])))
        while True:
            event = self._next()
            if event is h11.NEED_DATA:
                self._feed(self._receive(True))
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > BODY_MAX:
                    raise Refused(413, f"a body may have {BODY_MAX} bytes")
            else:  # its end, or an upgrade that waits for our word
                break
        path, _, query = head.target.decode("latin-1").partition("?")
        return Request(head.method.decode("latin-1"), path, query, headers, bytes(body), self._peer)

    def _next(self) -> Any:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, f"that is not HTTP: {error}") from None

    def _feed(self, data: bytes) -> None:
        try:
            self._h11.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, f"that is not HTTP: {error}") from None

    def _receive(self, began: bool, size: int = _CHUNK) -> bytes:
        left = self._end - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            return self._socket.recv(size)
        except TimeoutError:
            if not began:
                return b""  # an idle connection: closed without a word
            raise Refused(408, "the request did not come in time") from None

    def answer(self, response: Response, *, last: bool = False) -> bool:
        """Send it; false when the connection ends with it."""
        whole = isinstance(response.body, bytes)
        headers = {"content-type": response.content_type, **response.headers}
        if isinstance(response.body, bytes):
            headers["content-length"] = str(len(response.body))
        if last or self._h11.their_state not in (h11.DONE, h11.IDLE):
            headers["connection"] = "close"
        head = h11.Response(status_code=response.status, headers=list(headers.items()))
        data = self._h11.send(head)
        pieces = [response.body] if isinstance(response.body, bytes) else response.body
        try:
            if not whole:
                self._send(data)
                data = b""
            for piece in pieces:
                data += self._h11.send(h11.Data(piece)) or b"" if piece else b""
                if not whole:
                    self._send(data)
                    data = b""
            self._send(data + (self._h11.send(h11.EndOfMessage()) or b""))
        finally:
            if not isinstance(pieces, list) and hasattr(pieces, "close"):
                pieces.close()
        if self._h11.our_state is h11.MUST_CLOSE or self._h11.their_state is not h11.DONE:
            return False
        self._h11.start_next_cycle()
        return True

    def drain(self) -> None:
        """Take what is still being sent, for a moment: else the answer could be lost with it."""
        self._socket.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _LINGER
        while (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            if not self._socket.recv(_CHUNK):
                return

    def hand_over(self, response: Response) -> None:
        assert response.takeover is not None
        head = h11.InformationalResponse(status_code=101, headers=list(response.headers.items()))
        data = self._h11.send(head)
        rest, _ = self._h11.trailing_data
        try:
            self._send(data)
        finally:  # of a peer that is gone, too: it holds a console that is to be let go
            self._socket.settimeout(None)
            response.takeover(self._socket, rest)

    def _send(self, data: bytes | None) -> None:
        if data:
            self._socket.settimeout(SEND_TIME)
            self._socket.sendall(data)
