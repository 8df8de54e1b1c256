"""Many changes in one pipeline, with or without a transaction around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar, overload

from xtool.errors import StoreError, XtoolError
from xtool.proto.xenstore import Failure, Op, Reply, perms_payload, strings
from xtool.xenstore import requests as rq
from xtool.xenstore.channel import Request

if TYPE_CHECKING:
    from typing import Self

D = TypeVar("D")
#: Sends requests, returns their answers in order.
Exchange = Callable[[list[Request]], list[Reply | Failure]]


class Batch:
    """Queues changes; ``flush`` sends them. Used with ``with``: the end flushes, an exception drops all.

    The daemon carries each change out on its own: when one is refused, ``flush`` raises the first refusal
    after all the others were tried.
    """

    def __init__(self, exchange: Exchange, tx_id: int = 0) -> None:
        self._exchange = exchange
        self._tx_id = tx_id
        self._queue: list[Request] = []

    def write(self, path: str, value: str | bytes, *, perms: Iterable[str] | None = None) -> None:
        self._queue.append(rq.write(path, value, self._tx_id))
        if perms is not None:
            self.set_perms(path, perms)

    def mkdir(self, path: str, *, perms: Iterable[str] | None = None) -> None:
        self._queue.append(rq.one_path(Op.MKDIR, path, self._tx_id))
        if perms is not None:
            self.set_perms(path, perms)

    def rm(self, path: str) -> None:
        self._queue.append(rq.one_path(Op.RM, path, self._tx_id))

    def set_perms(self, path: str, perms: Iterable[str]) -> None:
        self._queue.append(Request(Op.SET_PERMS, path, perms_payload(path, perms), self._tx_id))

    def flush(self) -> None:
        """Send what is queued. Raises the first refusal (a missing node is none for ``rm``)."""
        queue, self._queue = self._queue, []
        if not queue:
            return
        for request, answer in zip(queue, self._exchange(queue), strict=True):
            if isinstance(answer, Failure) and not (request.op is Op.RM and answer.errno == "ENOENT"):
                raise rq.refused(request, answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.flush()
        self._queue.clear()


class TransactionBatch(Batch):
    """A transaction: changes are queued, a look sends the queue first, so it sees them.

    Begin and end are round trips; all changes between two looks are one more.
    """

    def __init__(self, exchange: Exchange, tx_id: int) -> None:
        super().__init__(exchange, tx_id)
        self._open = tx_id != 0

    def _ask(self, requests: list[Request]) -> list[Reply | Failure]:
        self.flush()
        return self._exchange(requests)

    def read(self, path: str) -> bytes:
        request = rq.one_path(Op.READ, path, self._tx_id)
        return rq.payload(request, self._ask([request])[0])

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
        return rq.values([rq.one_path(Op.READ, path, self._tx_id) for path in paths], self._ask)

    def list(self, path: str) -> tuple[str, ...]:
        return rq.directory(path, self._tx_id, self._ask)

    def exists(self, path: str) -> bool:
        return self.get(path) is not None

    def get_perms(self, path: str) -> tuple[str, ...]:
        request = rq.one_path(Op.GET_PERMS, path, self._tx_id)
        return rq.string_list(request, self._ask([request])[0])

    def commit(self) -> None:
        """Raises ``StoreError`` EAGAIN when somebody else changed what this transaction touched."""
        self.flush()
        if self._open:
            self._end("T")

    def abort(self) -> None:
        """Forget it all. Does not raise: the connection may be what was lost."""
        self._queue.clear()
        if self._open:
            try:
                self._end("F")
            except XtoolError:
                pass

    def _end(self, verdict: str) -> None:
        self._open = False
        request = Request(Op.TRANSACTION_END, "/", strings(verdict), self._tx_id)
        answer = self._exchange([request])[0]
        if isinstance(answer, Failure):
            raise StoreError("commit", "/", answer.errno, hint=rq.HINTS.get(answer.errno))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.commit()
        except BaseException:
            self.abort()
            raise
