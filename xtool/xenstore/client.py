"""The xenstore client: no library, no threads, one connection.

::

    store = open_store()
    store.write("/tool/xtool/note", "hello", perms=PRIVATE)

    def declare(tx):                                    # may run more than once
        if tx.exists(paths.domain(domid)):
            raise DomainExistsError(...)                # aborts the transaction
        tx.mkdir(paths.domain(domid), perms=owned_by(0, read=[domid]))
        tx.write(paths.domain(domid) + "/name", "web")  # queued, sent in one pipeline
    store.atomically(declare, deadline=10)

    with store.batch() as batch:                        # a pipeline without a transaction
        batch.write(state, "1")
        batch.rm(old)

    with store.watch(tty) as watch:
        while watch.wait(5.0): ...

A client belongs to one thread and one process: open another one after ``fork`` or in another thread.

When the daemon goes away, the operation under way raises ``StoreGoneError``; nothing is sent twice. The
next operation connects again and registers the watches again, which fires each of them, so whoever
follows a watch looks again at what it reads. A transaction does not survive this.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar, overload

from xtool.errors import DeadlineError, LocalProtocolError, StoreError, StoreGoneError
from xtool.proto.xenstore import (
    Failure,
    Op,
    Reply,
    WatchEvent,
    check_path,
    is_ok,
    one_string,
    perms_payload,
    strings,
)
from xtool.xenstore import requests as rq
from xtool.xenstore.batch import Batch, TransactionBatch
from xtool.xenstore.channel import Channel, Request, op_name
from xtool.xenstore.port import Transaction, Watch
from xtool.xenstore.transport import Transport, connect_default, connect_socket
from xtool.xenstore.watches import ClientWatch

if TYPE_CHECKING:
    from xtool.xenstore.port import Store

    def _implements(client: StoreClient) -> Store:
        return client


T = TypeVar("T")
D = TypeVar("D")

FIRST_RESERVED_DOMID = 0x7FF0  # xen.h
#: How long the daemon may leave us without an answer, seconds.
DEADLINE = 30.0
#: How often a transaction is tried before it counts as hopeless, and the longest pause between, seconds.
ATTEMPTS = 20
PAUSE_MAX = 0.1


class StoreClient:
    """Implements ``xtool.xenstore.port.Store``. ``connect`` opens a transport; it is called when needed."""

    def __init__(self, connect: Callable[[], Transport], *, deadline: float = DEADLINE) -> None:
        self._connect = connect
        self._deadline = deadline
        self._channel: Channel | None = None
        self._watches: dict[str, ClientWatch] = {}
        self._last_token = 0

    # --- the connection

    @property
    def connector(self) -> Callable[[], Transport]:
        """What opens a transport: for another client of the same daemon."""
        return self._connect

    def _live(self) -> Channel:
        """The channel, connected (again) if need be."""
        if self._channel is None or self._channel.closed:
            self._channel = Channel(self._connect(), self._notice)
            if self._watches:
                again = [_watch_request(Op.WATCH, watch) for watch in self._watches.values()]
                self._channel.exchange(again, self._deadline)
        return self._channel

    def _notice(self, event: WatchEvent) -> None:
        watch = self._watches.get(event.token)
        if watch is not None:
            watch.notice(event.path)

    def _exchange(self, requests: Sequence[Request], deadline: float | None = None) -> list[Reply | Failure]:
        return self._live().exchange(requests, self._deadline if deadline is None else deadline)

    def _ask(self, request: Request) -> bytes:
        return rq.payload(request, self._exchange((request,))[0])

    def _do(self, request: Request) -> None:
        payload = self._ask(request)
        if not is_ok(payload):
            self.close()
            raise StoreGoneError(op_name(request.op), request.path, f"EPROTO (answered {payload[:40]!r})")

    def connect(self) -> None:
        """Connect now, to learn early whether there is a xenstore."""
        self._live()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._live().fileno()

    # --- looking

    def read(self, path: str) -> bytes:
        return self._ask(rq.one_path(Op.READ, path))

    def read_text(self, path: str) -> str:
        return rq.text(self.read(path))

    @overload
    def get(self, path: str) -> str | None: ...
    @overload
    def get(self, path: str, default: D) -> str | D: ...
    def get(self, path: str, default: D | None = None) -> str | D | None:
        value = self.get_many((path,))[path]
        return default if value is None else value

    def get_many(self, paths: Iterable[str]) -> dict[str, str | None]:
        return rq.values([rq.one_path(Op.READ, path) for path in paths], self._exchange)

    def list(self, path: str) -> tuple[str, ...]:
        return rq.directory(path, 0, self._exchange)

    def list_many(self, paths: Iterable[str]) -> dict[str, tuple[str, ...] | None]:
        """The children of many nodes in one pipeline; None for a node that does not exist."""
        requests = [rq.one_path(Op.DIRECTORY, path) for path in paths]
        found: dict[str, tuple[str, ...] | None] = {}
        for request, answer in zip(requests, self._exchange(requests) if requests else (), strict=True):
            if not isinstance(answer, Failure):
                found[request.path] = rq.string_list(request, answer)
            elif answer.errno == "ENOENT":
                found[request.path] = None
            else:
                found[request.path] = self.list(request.path)  # too long for one message, or it raises
        return found

    def exists(self, path: str) -> bool:
        return self.get(path) is not None

    def get_perms(self, path: str) -> tuple[str, ...]:
        request = rq.one_path(Op.GET_PERMS, path)
        return rq.string_list(request, self._exchange((request,))[0])

    def get_perms_many(self, paths: Iterable[str]) -> dict[str, tuple[str, ...] | None]:
        """The permissions of many nodes in one pipeline; None for a node that does not exist."""
        requests = [rq.one_path(Op.GET_PERMS, path) for path in paths]
        found: dict[str, tuple[str, ...] | None] = {}
        for request, answer in zip(requests, self._exchange(requests) if requests else (), strict=True):
            missing = isinstance(answer, Failure) and answer.errno == "ENOENT"
            found[request.path] = None if missing else rq.string_list(request, answer)
        return found

    # --- changing

    def write(self, path: str, value: str | bytes, *, perms: Iterable[str] | None = None) -> None:
        with self.batch() as batch:
            batch.write(path, value, perms=perms)

    def mkdir(self, path: str, *, perms: Iterable[str] | None = None) -> None:
        with self.batch() as batch:
            batch.mkdir(path, perms=perms)

    def rm(self, path: str) -> None:
        with self.batch() as batch:
            batch.rm(path)

    def set_perms(self, path: str, perms: Iterable[str]) -> None:
        self._do(Request(Op.SET_PERMS, path, perms_payload(path, perms)))

    def batch(self, *, deadline: float | None = None) -> Batch:
        return Batch(lambda requests: self._exchange(requests, deadline))

    def transaction(self, *, deadline: float | None = None) -> TransactionBatch:
        request = Request(Op.TRANSACTION_START, "/", strings(""))
        channel = self._live()
        limit = self._deadline if deadline is None else deadline
        answer = one_string(rq.payload(request, channel.exchange((request,), limit)[0]))
        tx_id = int(answer) if answer.isdecimal() and answer.isascii() else 0
        if not 0 < tx_id < 1 << 32:
            channel.close()
            raise StoreGoneError("transaction-start", "/", f"EPROTO (transaction {answer[:40]!r})")

        def exchange(requests: Sequence[Request]) -> list[Reply | Failure]:
            if channel.closed:
                raise StoreGoneError(
                    "transaction", "/", "ECONNRESET", hint="xenstored dropped the transaction; start over"
                )
            return channel.exchange(requests, limit)

        return TransactionBatch(exchange, tx_id)

    def atomically(
        self, change: Callable[[Transaction], T], *, deadline: float = 10.0, plain_fallback: bool = False
    ) -> T:
        end = time.monotonic() + deadline
        for attempt in range(ATTEMPTS):
            if time.monotonic() >= end:
                break
            try:
                with self.transaction() as transaction:
                    return change(transaction)
            except StoreError as error:
                if (error.operation, error.errno) != ("commit", "EAGAIN"):
                    raise
            # Jitter, so that two toolstacks in conflict do not stay in step.
            pause = min(PAUSE_MAX, 0.001 * 2**attempt) * (os.urandom(1)[0] + 1) / 256
            time.sleep(min(pause, max(end - time.monotonic(), 0)))
        if plain_fallback:
            with TransactionBatch(self._exchange, 0) as plain:
                return change(plain)
        raise StoreError("commit", "/", "EAGAIN", hint=rq.HINTS["EAGAIN"])

    # --- watches

    def watch(self, path: str) -> ClientWatch:
        check_path(path, special=True)
        self._last_token += 1
        watch = ClientWatch(self, path, f"xtool-{self._last_token}")
        channel = self._live()
        self._watches[watch.token] = watch  # before the request: the first event may overtake the reply
        try:
            request = _watch_request(Op.WATCH, watch)
            rq.payload(request, channel.exchange((request,), self._deadline)[0])
        except BaseException:
            self._watches.pop(watch.token, None)
            raise
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Forget a watch; never raises for a connection that is lost, which has no watches any more."""
        if not isinstance(watch, ClientWatch) or self._watches.pop(watch.token, None) is None:
            return
        if self._channel is None or self._channel.closed:
            return
        try:
            self._exchange((_watch_request(Op.UNWATCH, watch),))
        except (StoreGoneError, DeadlineError):
            pass

    def wait_any(self, watches: Sequence[Watch], deadline: float) -> bool:
        end = time.monotonic() + deadline
        while not any(watch.has_pending() for watch in watches):
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.pump(left)
        return True

    def pump(self, timeout: float) -> None:
        """Take in watch events that are here, or wait up to ``timeout`` seconds for some."""
        self._live().pump(timeout)

    # --- domains

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        _check_guest(domid)
        self._do(Request(Op.INTRODUCE, f"domain {domid}", strings(str(domid), str(gfn), str(port))))

    def release(self, domid: int) -> None:
        _check_guest(domid)
        request = Request(Op.RELEASE, f"domain {domid}", strings(str(domid)))
        answer = self._exchange((request,))[0]
        # Not introduced: xenstored says ENOENT, oxenstored EINVAL.
        if isinstance(answer, Failure) and (answer.errno not in ("ENOENT", "EINVAL")):
            raise rq.refused(request, answer)

    def is_introduced(self, domid: int) -> bool:
        request = Request(Op.IS_DOMAIN_INTRODUCED, f"domain {domid}", strings(str(domid)))
        answer = one_string(self._ask(request))
        if answer not in ("T", "F"):
            raise StoreGoneError(op_name(request.op), request.path, f"EPROTO (answered {answer[:40]!r})")
        return answer == "T"

    def domain_path(self, domid: int) -> str:
        return one_string(self._ask(Request(Op.GET_DOMAIN_PATH, f"domain {domid}", strings(str(domid)))))


def _check_guest(domid: int) -> None:
    """oxenstored carries out a RELEASE of domain 0: it removes every node, and the host needs a reboot."""
    if not 0 < domid < FIRST_RESERVED_DOMID:
        raise LocalProtocolError(f"domain {domid} cannot be introduced to xenstore, or released from it")


def _watch_request(op: Op, watch: ClientWatch) -> Request:
    return Request(op, watch.path, strings(watch.path, watch.token))


def open_store(socket_path: str | None = None, *, deadline: float = DEADLINE) -> StoreClient:
    """A client of this host's xenstored, connected.

    Raises ``NoXenError``, ``PrivilegeError`` or ``StoreGoneError``.
    """

    def connect() -> Transport:
        return connect_default() if socket_path is None else connect_socket(socket_path)

    store = StoreClient(connect, deadline=deadline)
    store.connect()
    return store
