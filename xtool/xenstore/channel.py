"""One connection to xenstored: requests out in a pipeline, replies and watch events in, each with a deadline.

Facts about pipelining
----------------------
- Each daemon answers in order and costs two to three times more per request when every reply is awaited
  (``docs/xenstore.md``), so many requests are written before their replies are read.
- At most ``WINDOW`` requests and ``WINDOW_BYTES`` of them are unanswered at any time: the daemon keeps
  replies in its memory, and a kernel socket buffer holds about 200 KiB. Reading and writing are
  interleaved, so neither side waits for the other. A transport that cannot pipeline gets one at a time.
- A channel whose exchange was cut short (deadline, Ctrl-C, nonsense from the daemon) is closed: replies
  would still be on their way, and the daemon drops our transactions and watches with the connection.
"""

from __future__ import annotations

import errno
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from xtool.errors import DeadlineError, RemoteProtocolError, StoreGoneError
from xtool.proto.xenstore import Failure, Op, Reply, WatchEvent, XsConnection
from xtool.xenstore.transport import Transport

WINDOW = 64
WINDOW_BYTES = 64 * 1024
#: How many reads one ``pump`` makes at most: a storm of events must not hold its caller.
PUMP_READS = 64

_GONE_HINT = "is xenstored running? The operation may or may not have been carried out"


class Request(NamedTuple):
    """``path`` is what an error message shows."""

    op: Op
    path: str
    payload: bytes
    tx_id: int = 0


class Channel:
    """``on_event`` is called for each watch event; it must not use the channel."""

    def __init__(self, transport: Transport, on_event: Callable[[WatchEvent], None]) -> None:
        self._transport = transport
        self._on_event = on_event
        self._wire = XsConnection()
        self._closed = False
        self._poll = select.poll()
        self._poll.register(transport.fileno(), select.POLLIN)
        self._polled = select.POLLIN

    @property
    def closed(self) -> bool:
        return self._closed

    def fileno(self) -> int:
        return self._transport.fileno()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.close()

    def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply | Failure]:
        """Send all requests, return their answers in the same order.

        ``deadline`` is the longest time without any answer, seconds. A refused request does not stop those
        after it. Raises ``StoreGoneError`` or ``DeadlineError``, and then the channel is closed.
        """
        what = requests[0] if requests else Request(Op.CONTROL, "/", b"")
        try:
            return self._exchange(requests, deadline)
        except TimeoutError:
            self.close()
            raise DeadlineError(
                f"xenstored did not answer {op_name(what.op)} {what.path} within {deadline:g} s",
                hint="is xenstored hung? Look at its log and its processor time",
            ) from None
        except RemoteProtocolError as error:
            self.close()
            raise StoreGoneError(
                op_name(what.op), what.path, f"EPROTO ({error.message})", hint="the connection was closed"
            ) from error
        except OSError as error:
            self.close()
            name = errno.errorcode.get(error.errno or 0, "EIO")
            raise StoreGoneError(op_name(what.op), what.path, name, hint=_GONE_HINT) from None
        except BaseException:
            self.close()
            raise

    def _exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply | Failure]:
        order: dict[int, int] = {}
        answers: dict[int, Reply | Failure] = {}
        unsent: deque[bytes] = deque()  # what is encoded but not handed to the transport yet
        sizes: dict[int, int] = {}
        unanswered_bytes = 0
        position = 0
        end = time.monotonic() + deadline
        window = WINDOW if self._transport.pipelines else 1
        while len(answers) < len(requests):
            while (
                position < len(requests)
                and len(order) - len(answers) < window
                and (
                    unanswered_bytes == 0 or unanswered_bytes + len(requests[position].payload) < WINDOW_BYTES
                )
            ):
                request = requests[position]
                req_id, data = self._wire.send(request.op, request.payload, request.tx_id)
                order[req_id] = position
                sizes[req_id] = len(data)
                unanswered_bytes += len(data)
                unsent.append(data)
                position += 1
            self._flush(unsent)
            self._wait(end, writing=bool(unsent))
            if time.monotonic() > end:  # watch events alone must not keep us here
                raise TimeoutError
            for event in self._receive() or ():
                index = order[event.req_id]
                answers[index] = event
                unanswered_bytes -= sizes[event.req_id]
                end = time.monotonic() + deadline
        return [answers[index] for index in range(len(requests))]

    def _flush(self, unsent: deque[bytes]) -> None:
        while unsent:
            data = b"".join(unsent)
            unsent.clear()
            taken = self._transport.send(data)
            if taken < len(data):
                unsent.appendleft(data[taken:])
                return

    def _wait(self, end: float, *, writing: bool) -> None:
        """Until the transport is readable (or writable); raises ``TimeoutError``."""
        wanted = select.POLLIN | (select.POLLOUT if writing else 0)
        if wanted != self._polled:
            self._poll.modify(self._transport.fileno(), wanted)
            self._polled = wanted
        left = max(end - time.monotonic(), 0)
        if not self._poll.poll(left * 1000):  # rounds up to milliseconds; looks at least once
            raise TimeoutError

    def _receive(self) -> list[Reply | Failure] | None:
        """The answers that came, None when there are no bytes; watch events go to ``on_event``."""
        data = self._transport.recv()
        if data is None:
            return None
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "xenstored closed the connection")
        self._wire.receive_data(data)
        answers: list[Reply | Failure] = []
        while (event := self._wire.next_event()) is not None:
            if isinstance(event, WatchEvent):
                self._on_event(event)
            else:
                answers.append(event)
        return answers

    def pump(self, timeout: float) -> None:
        """Take in watch events: those already here, else what comes first within ``timeout`` seconds.

        Raises ``StoreGoneError`` when the connection is lost.
        """
        try:
            try:
                self._wait(time.monotonic() + timeout, writing=False)
            except TimeoutError:
                return
            for _ in range(PUMP_READS):
                if self._receive() is None:
                    break
        except RemoteProtocolError as error:
            self.close()
            raise StoreGoneError("watch", "/", f"EPROTO ({error.message})") from error
        except OSError as error:
            self.close()
            name = errno.errorcode.get(error.errno or 0, "EIO")
            raise StoreGoneError("watch", "/", name, hint="is xenstored running?") from None


def op_name(op: Op) -> str:
    """``Op.SET_PERMS`` -> ``"set-perms"``: how error messages call it."""
    return op.name.lower().replace("_", "-")
