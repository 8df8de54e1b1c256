"""Requests made and answers read: what the client and its transactions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xtool.errors import RemoteProtocolError, StoreError, StoreGoneError
from xtool.proto.xenstore import DIRECTORY_MAX, Failure, Op, Reply, check_path, split_strings, strings
from xtool.xenstore.channel import Request, op_name

Ask = Callable[[list[Request]], list[Reply | Failure]]

#: How often a long directory that changes under our hands is read again.
DIRECTORY_TRIES = 5

HINTS = {
    "EACCES": "only the control domain may do this; run it in dom0 as root",
    "EPERM": "only the control domain may do this; run it in dom0 as root",
    "EQUOTA": "the domain that owns the node is at its xenstore quota",
    "ENOSPC": "the domain is at its xenstore quota, or too many transactions are open",
    "EAGAIN": "others keep changing the same xenstore nodes; try again",
    "E2BIG": "a value or a list is too long for this xenstored (oxenstored takes values up to 2048 bytes)",
}


def one_path(op: Op, path: str, tx_id: int = 0) -> Request:
    return Request(op, path, strings(check_path(path)), tx_id)


def write(path: str, value: str | bytes, tx_id: int = 0) -> Request:
    data = value.encode() if isinstance(value, str) else value
    return Request(Op.WRITE, path, strings(check_path(path)) + data, tx_id)


def text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


def refused(request: Request, failure: Failure) -> StoreError:
    return StoreError(op_name(request.op), request.path, failure.errno, hint=HINTS.get(failure.errno))


def payload(request: Request, answer: Reply | Failure) -> bytes:
    if isinstance(answer, Failure):
        raise refused(request, answer)
    return answer.payload


def string_list(request: Request, answer: Reply | Failure) -> tuple[str, ...]:
    return _split(request, payload(request, answer))


def _split(request: Request, data: bytes) -> tuple[str, ...]:
    try:
        return split_strings(data)
    except RemoteProtocolError as error:
        raise StoreGoneError(op_name(request.op), request.path, f"EPROTO ({error.message})") from error


def values(requests: Sequence[Request], ask: Ask) -> dict[str, str | None]:
    """Path -> value of READ requests; None where there is no such node."""
    found: dict[str, str | None] = {}
    for request, answer in zip(requests, ask(list(requests)) if requests else (), strict=True):
        missing = isinstance(answer, Failure) and answer.errno == "ENOENT"
        found[request.path] = None if missing else text(payload(request, answer))
    return found


def directory(path: str, tx_id: int, ask: Ask) -> tuple[str, ...]:
    """The children of ``path``, in parts when there are too many for one message."""
    request = one_path(Op.DIRECTORY, path, tx_id)
    answer = ask([request])[0]
    if isinstance(answer, Failure) and answer.errno == "E2BIG":
        for _ in range(DIRECTORY_TRIES):
            found = _directory_in_parts(path, tx_id, ask)
            if found is not None:
                return found
        raise StoreError("directory", path, "EAGAIN", hint=HINTS["EAGAIN"])
    return string_list(request, answer)


def _directory_in_parts(path: str, tx_id: int, ask: Ask) -> tuple[str, ...] | None:
    """None when the directory changed between two parts.

    Each part is the node's generation, a NUL, and children from a byte offset on; the last part has one
    more NUL at its end, and an empty directory is that NUL alone.
    """
    first_generation: bytes | None = None
    data = b""
    while len(data) < DIRECTORY_MAX:
        request = Request(Op.DIRECTORY_PART, path, strings(check_path(path), str(len(data))), tx_id)
        answer = ask([request])[0]
        if isinstance(answer, Failure) and answer.errno in ("ENOSYS", "EINVAL"):
            raise StoreError("directory", path, "E2BIG", hint=HINTS["E2BIG"])
        generation, _, part = payload(request, answer).partition(b"\0")
        if first_generation not in (None, generation):
            return None
        first_generation = generation
        if not part:
            break
        data += part
        if data == b"\0" or data.endswith(b"\0\0"):
            return _split(request, data[:-1])
    raise StoreGoneError("directory-part", path, "EPROTO (a list without an end)")
