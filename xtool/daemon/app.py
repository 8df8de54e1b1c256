"""From a request to its answer: the routes, who may take them, and where their work is done.

Verbs that look run in the connection's thread, on a host of their own; all others are operations. What the
caller did wrong is a 4xx with a problem object; a 5xx is a bug, and in the log.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from xtool import __version__
from xtool.client.records import CANCELLED, DaemonStatus, Event, Operation, Problem
from xtool.client.routes import LONG
from xtool.client.wire import PROBLEM_TYPE, plain, problem
from xtool.daemon import consoles
from xtool.daemon.access import GROUP, READ_GROUP, Level
from xtool.daemon.endpoints import Endpoint, endpoints
from xtool.daemon.events import Events
from xtool.daemon.hosts import Hosts
from xtool.daemon.http import Request, Response, Server
from xtool.daemon.openapi import docs_page, document
from xtool.daemon.operations import Operations, TooBusyError, Work
from xtool.daemon.own import OWN, Own
from xtool.errors import UsageError, XtoolError

if TYPE_CHECKING:
    from xtool.daemon.watcher import Watcher

#: Verbs that look and are under way at once, and how long the next may wait for its turn, seconds.
LOOKS, LOOK_WAIT = 128, 10.0
#: An open stream without news says so this often, seconds: a peer that is gone is noticed.
HEARTBEAT = 15.0
#: Progress of an operation is told at most this often, seconds.
PROGRESS_PAUSE = 0.1
_FIELDS_MAX = 64
log = logging.getLogger("xtoold")


class _Wrong(Exception):
    """Answered with this status."""

    def __init__(
        self, status: int, why: str, hint: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(why)
        self.status, self.hint, self.headers = status, hint, dict(headers or {})


class App:
    """``server`` is set by whoever makes both."""

    server: Server | None = None

    def __init__(self, hosts: Hosts, operations: Operations, events: Events, watcher: Watcher) -> None:
        self._hosts, self._operations, self._events, self._watcher = hosts, operations, events, watcher
        self._looks = BoundedSemaphore(LOOKS)
        self._started = time.time()
        self._document: bytes = b""
        routes: list[Endpoint | Own] = [*endpoints().values(), *OWN]
        self._routes = [(_http(r), tuple(_path(r).split("/")), r) for r in routes]

    # --- the way in
    def handle(self, request: Request) -> Response:
        try:
            return self._handle(request)
        except _Wrong as wrong:
            response = self.refuse(wrong.status, str(wrong), wrong.hint)
            response.headers.update(wrong.headers)
            return response
        except TooBusyError as error:
            response = self.refuse(429, error.message, error.hint)
            response.headers["retry-after"] = "5"
            return response
        except XtoolError as error:
            if (found := problem(error)).status >= 500:
                log.error("%s %s failed", request.method, request.path, exc_info=error)
            return _problem(found)
        except Exception as error:
            log.error("%s %s failed", request.method, request.path, exc_info=error)
            return _problem(problem(error))

    def refuse(self, status: int, why: str, hint: str | None = None) -> Response:
        kind = {403: "Privilege", 404: "Usage", 405: "Usage"}.get(status, "Usage" if status < 500 else "Bug")
        code = 5 if kind == "Privilege" else 2
        return _problem(Problem("about:blank", kind, status, why, kind, code, hint))

    def _handle(self, request: Request) -> Response:
        if request.peer.level is Level.NOTHING:
            raise _Wrong(
                403,
                f"user {request.peer.uid} may not use xtoold",
                f"be root, or in the group {GROUP} (or {READ_GROUP}, to look)",
            )
        route, words = self._find(request.method, request.path)
        query = _query(request.query)
        if isinstance(route, Own):
            _may(request, route.level)
            values = route.check(query, request.body)
            return getattr(self, f"_own_{route.name}")(request, words, values)  # type: ignore[no-any-return]
        if route.route.how != "read":
            _may(request, Level.FULL)  # before anything is said about the rest
        arguments = route.check(words, query, request.body)
        if route.changes(arguments):
            _may(request, Level.FULL)
        return self._verb(request, route, arguments)

    def _find(self, method: str, path: str) -> tuple[Endpoint | Own, dict[str, str]]:
        parts = path.split("/")
        try:
            texts = [unquote(part, errors="strict") for part in parts]
        except UnicodeDecodeError:
            raise _Wrong(400, "the path is not UTF-8") from None
        others = set()
        for http, pattern, route in self._routes:
            if len(pattern) == len(parts) and all(
                (p.startswith("{") and part) or p == part for p, part in zip(pattern, parts, strict=True)
            ):
                if http == method:
                    return route, {
                        p[1:-1]: text for p, text in zip(pattern, texts, strict=True) if p.startswith("{")
                    }
                others.add(http)
        if others:
            allowed = ", ".join(sorted(others))
            raise _Wrong(405, f"{path[:200]} takes {allowed}", headers={"allow": allowed})
        raise _Wrong(404, f"there is no {path[:200]}", "GET /docs lists what there is")

    # --- verbs
    def _verb(self, request: Request, endpoint: Endpoint, arguments: dict[str, Any]) -> Response:
        route = endpoint.route
        if route.how == "read":
            return self._stream(endpoint, arguments) if endpoint.streams else self._look(endpoint, arguments)
        subject = _subject(arguments)
        work = self._operations.submit(route.method, arguments, subject=subject, uid=request.peer.uid)
        if route.how == LONG:
            place = f"/v1/operations/{work.snapshot.id}"
            return _json(work.snapshot, 202, location=place)
        ended = work.wait()
        if ended.error is not None:
            return _problem(ended.error)
        if ended.state == CANCELLED:
            raise _Wrong(409, f"{route.method} was cancelled; what it had begun is undone")
        return _json(ended.result)

    def _look(self, endpoint: Endpoint, arguments: dict[str, Any]) -> Response:
        with self._turn(), self._hosts.client() as client:
            return _json(endpoint.call(client, arguments))

    def _turn(self) -> ExitStack:
        if not self._looks.acquire(timeout=LOOK_WAIT):
            raise TooBusyError(f"{LOOKS} requests are under way", hint="try again in a moment")
        stack = ExitStack()
        stack.callback(self._looks.release)
        return stack

    def _stream(self, endpoint: Endpoint, arguments: dict[str, Any]) -> Response:
        stack = self._turn()
        try:
            client = stack.enter_context(self._hosts.client())
            records = iter(endpoint.call(client, arguments))
            first = next(records, None)  # errors come with it, while there can be a status yet
        except BaseException:
            with stack:
                raise

        def pieces() -> Iterator[bytes]:
            with stack:
                if first is not None:
                    yield _line(first)
                    for record in records:
                        yield _line(record)

        return Response(200, "application/x-ndjson", pieces())

    # --- the daemon's own; each is named in own.OWN
    def _own_docs(self, request: Request, words: dict[str, str], query: dict[str, Any]) -> Response:
        return Response(200, "text/html; charset=utf-8", docs_page().encode())

    def _own_openapi(self, request: Request, words: dict[str, str], query: dict[str, Any]) -> Response:
        self._document = self._document or json.dumps(document()).encode()
        return Response(200, "application/json", self._document)

    def _own_status(self, request: Request, words: dict[str, str], query: dict[str, Any]) -> Response:
        running, queued = self._operations.counts()
        return _json(
            DaemonStatus(
                __version__,
                os.getpid(),
                self._hosts.uri,
                time.time() - self._started,
                self.server.connections if self.server else 0,
                running,
                queued,
                self._watcher.count,
                self._events.last_id,
                "full" if request.peer.level is Level.FULL else "read-only",
            )
        )

    def _own_operations(self, request: Request, words: dict[str, str], query: dict[str, Any]) -> Response:
        return _json(self._operations.list())

    def _own_operation(self, request: Request, words: dict[str, str], query: dict[str, Any]) -> Response:
        work = self._work(words["id"])
        return _json(work.wait(query["wait"]) if query.get("wait") else work.snapshot)

    def _own_cancel(self, request: Request, words: dict[str, str], query: dict[str, Any]) -> Response:
        return _json(self._operations.cancel(self._work(words["id"])), 202)

    def _own_follow(self, request: Request, words: dict[str, str], query: dict[str, Any]) -> Response:
        return Response(200, "text/event-stream", _progress(self._work(words["id"])))

    def _own_events(self, request: Request, words: dict[str, str], query: dict[str, Any]) -> Response:
        after = query.get("after") or request.headers.get("last-event-id", "")
        follow = query.get("follow", True)
        found = self._events.follow(after, since=query.get("since"), live=follow, patience=HEARTBEAT)
        return Response(200, "text/event-stream", _told(found, query.get("domain")))

    def _own_console_stream(self, request: Request, words: dict[str, str], query: dict[str, Any]) -> Response:
        if request.headers.get("upgrade", "").lower() != consoles.PROTOCOL:
            raise _Wrong(
                426, f"a console is a connection of its own: upgrade to {consoles.PROTOCOL}",
                headers={"upgrade": consoles.PROTOCOL, "connection": "upgrade"},
            )  # fmt: skip
        with self._turn(), self._hosts.client() as client:
            target = client.console(words["domain"], query.get("kind"), number=query.get("number", 0))
        relay = consoles.open_relay(target)
        headers = {"upgrade": consoles.PROTOCOL, "connection": "upgrade", "xtool-console": relay.form}
        return Response(101, headers=headers, takeover=relay.run)

    def _work(self, number: str) -> Work:
        work = self._operations.get(number)
        if work is None:
            raise _Wrong(404, f"there is no operation {number[:100]}", "old ones are forgotten")
        return work


# --- small things ---------------------------------------------------------------------------------------
def _http(route: Endpoint | Own) -> str:
    return route.http if isinstance(route, Own) else route.route.http


def _path(route: Endpoint | Own) -> str:
    return route.path if isinstance(route, Own) else route.route.path


def _may(request: Request, level: Level) -> None:
    if request.peer.level < level:
        raise _Wrong(
            403,
            f"user {request.peer.uid} may only look: {request.method} {request.path[:200]} changes something",
            f"be root, or in the group {GROUP}",
        )


def _query(text: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(text, True, True, errors="strict", max_num_fields=_FIELDS_MAX) if text else []
    except (ValueError, UnicodeDecodeError):
        raise _Wrong(400, "the query makes no sense") from None
    if len(dict(pairs)) != len(pairs):
        raise UsageError("a name stands twice in the query")
    return dict(pairs)


def _subject(arguments: Mapping[str, Any]) -> str:
    config = arguments.get("config")
    name = config.get("name") if isinstance(config, dict) else arguments.get("domain", arguments.get("domid"))
    return str(name)[:256] if isinstance(name, (str, int)) else ""


def _json(value: Any, status: int = 200, **headers: str) -> Response:
    return Response(status, body=json.dumps(plain(value)).encode(), headers=headers)


def _problem(found: Problem) -> Response:
    return Response(found.status, PROBLEM_TYPE, json.dumps(plain(found)).encode())


def _line(record: Any) -> bytes:
    return json.dumps(plain(record)).encode() + b"\n"


def _sse(kind: str, value: Any, number: str = "") -> bytes:
    mark = f"id: {number}\n" if number else ""
    return f"{mark}event: {kind}\ndata: {json.dumps(plain(value))}\n\n".encode()


def _told(found: Iterator[Event | None], domain: str | None) -> Iterator[bytes]:
    yield b": xtoold\n\n"
    for event in found:
        if event is None:
            yield b":\n\n"
        elif domain is None or event.kind == "lost" or domain in (event.name, event.uuid, str(event.domid)):
            yield _sse(event.kind, event, event.id)


def _progress(work: Work) -> Iterator[bytes]:
    seen = -1
    told: Operation | None = None
    while True:
        seen, now = work.changes(seen, HEARTBEAT)
        yield _sse("operation", now) if now is not told else b":\n\n"
        told = now
        if now.ended is not None:
            return
        work.wait(PROGRESS_PAUSE)
