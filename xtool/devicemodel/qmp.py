"""QMP, the JSON protocol QEMU is asked and told things with. Source: QEMU's ``docs/interop/qmp-spec``.

A client of our own, synchronous and small: creating a domain asks QEMU two or three questions, and
importing asyncio for that would cost more time than the answers take.

Facts about QMP:

- One JSON object per line (QEMU ends each with CR LF). The server speaks first: ``{"QMP": {...}}``.
- Nothing but ``qmp_capabilities`` is accepted before that was sent once. Commands may be sent without
  waiting for earlier answers; they are answered in order, each with the command's ``id``. Events come
  between.
- QEMU answers from its main loop, which starts after the whole machine is set up and running: the answer
  to the first command is the proof that the device model is ready.
- A listening socket serves one client at a time; the next one waits until it has gone.

A QEMU that a guest has taken over is hostile: lines are bounded, nothing it says is trusted to be of the
right shape, and every wait has a deadline.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtool.errors import DeadlineError, DeviceModelError, RemoteProtocolError

#: The longest line accepted, in bytes. QEMU's longest honest answers (``query-qmp-schema``) are shorter.
MAX_LINE = 1 << 20
_CHUNK = 1 << 16

Message = dict[str, Any]


class QmpGoneError(DeviceModelError):
    """QEMU is not there (any more): the socket is missing, refuses, or was closed."""


class QmpStream:
    """Bytes in, messages out; opens nothing. Raises ``RemoteProtocolError`` for what is not QMP."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        self._buffer += data
        messages = []
        if b"\n" in data:
            *lines, rest = self._buffer.split(b"\n")
            self._buffer = rest
            messages = [_parse(line) for line in lines if line.strip()]
        if len(self._buffer) > MAX_LINE:
            raise RemoteProtocolError(f"QEMU sent a QMP line of more than {MAX_LINE} bytes")
        return messages


def _parse(line: bytearray) -> Message:
    if len(line) > MAX_LINE:
        raise RemoteProtocolError(f"QEMU sent a QMP line of more than {MAX_LINE} bytes")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: bad JSON, bad UTF-8, a number of too many digits
        raise RemoteProtocolError(f"QEMU sent something that is not QMP: {bytes(line[:80])!r}") from None
    if not isinstance(message, dict):
        raise RemoteProtocolError(f"QEMU sent a QMP message that is no object: {bytes(line[:80])!r}")
    return message


class QmpClient:
    """One connection. ``deadline`` is seconds from now everywhere."""

    def __init__(self, path: Path, *, deadline: float = 5.0) -> None:
        """Connect, and ask for the capabilities handshake without waiting for its answer."""
        self._path = path
        self._stream = QmpStream()
        self._answers: dict[int, Message] = {}
        self._greeted = False
        self._last_id = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(deadline)
            self._socket.connect(str(path))
        except TimeoutError:
            self.close()
            raise DeadlineError(f"QEMU at {path} did not accept a connection within {deadline:g} s") from None
        except OSError as error:
            self.close()
            raise QmpGoneError(f"no QEMU answers at {path}: {error.strerror or error}") from None
        self._hello = self.send("qmp_capabilities")

    def send(self, command: str, arguments: Mapping[str, object] | None = None) -> int:
        """Send a command; the number returned is what ``receive`` takes."""
        self._last_id += 1
        request: dict[str, object] = {"execute": command, "id": self._last_id}
        if arguments:
            request["arguments"] = dict(arguments)
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError:
            raise DeadlineError(f"QEMU at {self._path} reads no commands") from None
        except OSError as error:
            raise self._gone(error) from None
        return self._last_id

    def receive(self, command_id: int, *, deadline: float) -> Any:
        """What the command returned. Raises ``DeviceModelError`` if QEMU refused it."""
        until = time.monotonic() + deadline
        while command_id not in self._answers:
            self._read(until, deadline)
        answer = self._answers.pop(command_id)
        if "return" in answer:
            return answer["return"]
        error = answer["error"]
        reason = error.get("desc") if isinstance(error, dict) else error
        raise DeviceModelError(f"QEMU refused a command: {str(reason)[:400]}")

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, deadline: float = 5.0
    ) -> Any:
        return self.receive(self.send(command, arguments), deadline=deadline)

    def _read(self, until: float, deadline: float) -> None:
        left = until - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            data = self._socket.recv(_CHUNK)
        except TimeoutError:
            raise DeadlineError(f"QEMU did not answer within {deadline:g} s") from None
        except OSError as error:
            raise self._gone(error) from None
        if not data:
            raise self._gone(None)
        for message in self._stream.feed(data):
            self._take(message)

    def _take(self, message: Message) -> None:
        if not self._greeted:
            if "QMP" not in message:
                raise RemoteProtocolError("QEMU did not greet as QMP does")
            self._greeted = True
        elif "return" in message or "error" in message:
            number = message.get("id")
            if type(number) is not int or not 0 < number <= self._last_id or number in self._answers:
                raise RemoteProtocolError("QEMU answered a command that was not sent")
            self._answers[number] = message
            if number == self._hello and "error" in message:
                raise RemoteProtocolError("QEMU refused the QMP handshake")
        # The rest are events: nobody here waits for one.

    def _gone(self, error: OSError | None) -> QmpGoneError:
        reason = f": {error.strerror}" if error and error.strerror else ""
        return QmpGoneError(f"QEMU closed its QMP connection{reason}")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def query(
    path: Path, command: str, arguments: Mapping[str, object] | None = None, *, deadline: float = 5.0
) -> Any:
    """One command on a connection of its own: ``query(path, "query-status")``.

    Raises ``QmpGoneError`` when there is no QEMU, ``DeviceModelError`` when it refuses, ``DeadlineError``
    when it does not answer, ``RemoteProtocolError`` when it talks nonsense.
    """
    until = time.monotonic() + deadline
    with QmpClient(path, deadline=deadline) as client:
        return client.execute(command, arguments, deadline=max(0.0, until - time.monotonic()))


def serial_ttys(chardevs: object) -> dict[int, str]:
    """From ``query-chardev``: serial port number -> its pty. Ports that are no pty are left out."""
    found: dict[int, str] = {}
    for entry in chardevs if isinstance(chardevs, Sequence) else ():
        label = entry.get("label") if isinstance(entry, dict) else None
        where = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(label, str) or not isinstance(where, str):
            raise RemoteProtocolError("QEMU's answer to query-chardev has not the expected shape")
        number = label.removeprefix("serial")
        if number != label and number.isascii() and number.isdigit() and where.startswith("pty:"):
            found[int(number)] = where.removeprefix("pty:")
    return found
