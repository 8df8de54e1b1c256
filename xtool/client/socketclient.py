"""A client of xtoold over its Unix socket, with the standard library only.

``SocketClient`` has every method of ``toolstack.api.Client`` that is in the table of routes: the method's own
arguments become the request. Long verbs are followed as operations; Ctrl-C (or SIGTERM) cancels the operation
and waits until what it had begun is undone.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode

from xtool.client import start
from xtool.client.records import CANCELLED, DaemonStatus, Event, Operation
from xtool.client.routes import IN_PROCESS, LONG, ROUTES, Route, in_query, words_in
from xtool.client.wire import arguments, error_of, plain, record, returned
from xtool.errors import HostError, RemoteProtocolError, UsageError, XtoolError
from xtool.progress import SILENT, Progress

if TYPE_CHECKING:
    from xtool.toolstack.api import Client

#: How long a cancelled operation may take to undo what it had begun, seconds.
UNDO_TIME = 300.0
#: How long the daemon may take to answer a plain question, seconds. Verbs have deadlines of their own.
_LINE_MAX = 16 << 20


class OperationCancelledError(XtoolError):
    """Somebody else cancelled it."""


class _Connection(http.client.HTTPConnection):
    """``http.client`` over a Unix socket; ``begin`` starts the daemon, once, where that is possible."""

    def __init__(self, path: str, begin: Callable[[], None] | None) -> None:
        super().__init__("localhost")
        self._path, self._begin = path, begin

    def connect(self) -> None:
        link = start.connect(self._path)
        if link is None and self._begin is not None:
            self._begin()
            link = start.connect(self._path)
        if link is None:
            raise HostError(f"nobody listens on {self._path}", hint="xtool daemon run, on that host")
        self.sock = link


class SocketClient:
    """``path`` empty: this host's daemon, which is started if it does not run."""

    def __init__(self, path: str = "") -> None:
        self.path = path or str(start.socket_path())
        self._begin = None if path else start.start
        self._connection = _Connection(self.path, self._begin)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> SocketClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        route = ROUTES.get(name)
        if route is None:
            if name in IN_PROCESS:
                raise UsageError(
                    f"{name.replace('_', '-')} cannot be done through xtoold: {IN_PROCESS[name]}",
                    hint="on the host itself: XTOOL_CONNECT=xen: xtool ...",
                )
            raise AttributeError(name)
        return lambda *args, **kwargs: self._call(route, args, kwargs)

    # --- verbs
    def _call(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        listener = kwargs.pop("progress", SILENT)
        names = arguments(route.method)
        if len(args) == len(names) + 1:
            *args, listener = args  # type: ignore[assignment]
        given = dict(zip(names, args, strict=False)) | kwargs
        path, query, body = _request(route, given)
        if route.how == LONG:
            begun = record(Operation, self._ask(route.http, path + query, body))
            return self._result(route, self._follow(begun, listener))
        if returned_items(route.method) is not None:
            return self._stream(route, path + query)
        answer = record(returned(route.method), self._ask(route.http, path + query, body))
        if route.method == "console" and self._begin is None:  # paths of the daemon's host, wherever that is
            return replace(answer, via=self.path)
        return answer

    def _result(self, route: Route, ended: Operation) -> Any:
        if ended.error is not None:
            raise error_of(plain(ended.error))
        if ended.state == CANCELLED:
            raise OperationCancelledError(f"{route.method} was cancelled; what it had begun is undone")
        return record(returned(route.method), ended.result)

    def _follow(self, operation: Operation, listener: Progress) -> Operation:
        try:
            return self._until_ended(operation, listener)
        except (KeyboardInterrupt, SystemExit):
            listener.step(f"cancelling {operation.method}: undoing what it had begun")
            ended = self._undone(operation)
            if ended is None:
                listener.step(f"operation {operation.id} goes on; xtool list shows what is there")
            elif ended.state == CANCELLED:
                listener.step("undone: nothing is left of it")
            else:
                listener.step(f"too late: {operation.method} is {ended.state}")
            raise

    def _until_ended(self, operation: Operation, listener: Progress) -> Operation:
        known: tuple[str, ...] = ()
        for kind, data in self._events(f"/v1/operations/{operation.id}/events"):
            if kind != "operation":
                continue
            now = record(Operation, data)
            for line in _new_lines(known, now.lines):
                listener.step(line)
            known = now.lines
            if now.done:
                listener.advance(now.done, now.total)
            if now.ended is not None:
                return cast("Operation", now)
        raise HostError(
            f"xtoold went away while it was at {operation.method}; that goes on by itself",
            hint="xtool list shows what came of it",
        )

    def _undone(self, operation: Operation) -> Operation | None:
        """Cancel it, and wait; None if nobody can be asked, or a second Ctrl-C."""
        self._connection.close()
        try:
            place = f"/v1/operations/{operation.id}"
            self._ask("DELETE", place)
            return cast("Operation", record(Operation, self._ask("GET", f"{place}?wait={UNDO_TIME:g}")))
        except (XtoolError, OSError, KeyboardInterrupt, SystemExit):
            return None

    # --- the daemon's own
    def status(self) -> DaemonStatus:
        return cast("DaemonStatus", record(DaemonStatus, self._ask("GET", "/v1/status")))

    def operations(self) -> list[Operation]:
        return [record(Operation, one) for one in self._ask("GET", "/v1/operations")]

    def cancel(self, number: str) -> Operation:
        return cast(
            "Operation", record(Operation, self._ask("DELETE", f"/v1/operations/{quote(number, '')}"))
        )

    def events(
        self, domain: str | None = None, *, after: str = "", since: float | None = None, follow: bool = True
    ) -> Iterator[Event]:
        """What happens, as it happens; see ``records.Event``. Ends when the daemon does."""
        wanted = {"domain": domain, "after": after or None, "since": since, "follow": follow}
        for _, data in self._events("/v1/events" + _query(wanted)):
            yield record(Event, data)

    def open_console(
        self, domain: str, kind: str | None = None, number: int = 0
    ) -> tuple[socket.socket, str]:
        """A connection that is the console, and what goes over it: ``feed`` or ``bytes``."""
        connection = _Connection(self.path, self._begin)
        path = f"/v1/domains/{quote(domain, '')}/console-stream" + _query({"kind": kind, "number": number})
        try:
            connection.request("POST", path, headers={"Connection": "Upgrade", "Upgrade": "xtool-console"})
            # Unbuffered: what follows the answer is the console's.
            answer = connection.response_class(connection.sock, method="POST")
            answer.fp.close()
            answer.fp = connection.sock.makefile("rb", 0)  # type: ignore[assignment]
            _, status, _ = answer._read_status()  # type: ignore[attr-defined]
            headers = http.client.parse_headers(answer.fp)
            if status != 101:
                size = int(headers.get("content-length") or 0)
                raise error_of(_parsed(answer.fp.read(size)))
            link = connection.sock
            connection.sock = None
            return link, headers.get("xtool-console", "bytes")
        except (OSError, http.client.HTTPException) as error:
            raise _gone(error) from None
        finally:
            connection.close()

    # --- requests
    def _ask(self, method: str, target: str, body: bytes | None = None) -> Any:
        with suppress_http():
            answer = self._send(method, target, body)
            raw = answer.read()
        if answer.status >= 400:
            raise error_of(_parsed(raw))
        return _parsed(raw)

    def _send(self, method: str, target: str, body: bytes | None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        idle = self._connection.sock is not None
        try:
            self._connection.request(method, target, body, headers)
            return self._connection.getresponse()
        except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
            self._connection.close()
            # A connection that was kept may have been closed before it had this request; a new one has not.
            if not idle or method not in ("GET", "DELETE"):
                raise
            self._connection.request(method, target, body, headers)
            return self._connection.getresponse()

    def _stream(self, route: Route, target: str) -> Iterator[Any]:
        with suppress_http():
            answer = self._send(route.http, target, None)
            if answer.status >= 400:
                raise error_of(_parsed(answer.read()))
        kind = returned_items(route.method)

        def items() -> Iterator[Any]:
            with suppress_http():
                while line := answer.readline(_LINE_MAX):
                    yield record(kind, _parsed(line))

        return items()

    def _events(self, target: str) -> Iterator[tuple[str, Any]]:
        """``(event, data)`` of a stream of server-sent events, on a connection of its own."""
        connection = _Connection(self.path, self._begin)
        try:
            with suppress_http():
                connection.request("GET", target)
                answer = connection.getresponse()
                if answer.status >= 400:
                    raise error_of(_parsed(answer.read()))
                kind = ""
                while line := answer.readline(_LINE_MAX):
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "data":
                        yield kind, _parsed(value)
        finally:
            connection.close()


class suppress_http:
    """What goes wrong with the connection, as an ``XtoolError``."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, http.client.HTTPException)) and not isinstance(error, XtoolError):
            raise _gone(error) from None


def _gone(error: Exception) -> XtoolError:
    return HostError(
        f"the connection to xtoold broke: {str(error) or type(error).__name__}", hint="xtool daemon status"
    )


def returned_items(method: str) -> Any:
    """The type of the records a method gives one after the other, None if it gives one value."""
    kind = returned(method)
    name = getattr(getattr(kind, "__origin__", None), "__name__", "")
    return kind.__args__[0] if name == "Iterator" else None


def _request(route: Route, given: dict[str, Any]) -> tuple[str, str, bytes | None]:
    """Path, query and body."""
    path = route.path
    for name in words_in(route.path):
        text = str(given.pop(name))
        if not text:
            raise UsageError(f"an empty {name}")
        path = path.replace("{" + name + "}", quote(text, ""))
    if in_query(route):
        return path, _query(given), None
    values = {
        name: value.to_dict() if hasattr(value, "to_dict") else plain(value) for name, value in given.items()
    }
    return path, "", json.dumps(values).encode()


def _query(values: dict[str, Any]) -> str:
    words = {True: "true", False: "false"}
    given = {
        name: words[value] if isinstance(value, bool) else repr(value) if isinstance(value, float) else value
        for name, value in values.items()
        if value is not None
    }
    return "?" + urlencode(given) if given else ""


def _parsed(raw: bytes | str) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        raise RemoteProtocolError(f"xtoold answered what is not JSON: {raw[:80]!r}") from None


def _new_lines(known: tuple[str, ...], now: tuple[str, ...]) -> tuple[str, ...]:
    """Those behind the ones that were known; both are the end of one list."""
    for start_at in range(len(known) + 1):
        tail = known[start_at:]
        if now[: len(tail)] == tail:
            return now[len(tail) :]
    return now


def open_socket(path: str = "") -> Client:
    """``Client`` over the socket at ``path``, or of this host's daemon, started if need be."""
    return cast("Client", SocketClient(path))
