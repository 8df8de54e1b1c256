"""Values as JSON and back: records, and the errors of ``xtool.errors``.

No library: what is sent is made of dataclasses, and both ends know their types. Values that come from the
other side are checked where they are used for something (the server does so by pydantic).
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from xtool import errors
from xtool.client.records import Problem
from xtool.errors import ConfigError, RemoteProtocolError, XtoolError

PROBLEM_TYPE = "application/problem+json"


def plain(value: Any) -> Any:
    """What ``json.dumps`` takes: dataclasses as objects, sequences as lists."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def record(kind: Any, value: Any) -> Any:
    """The value of type ``kind`` that ``plain`` made ``value`` of. Members it does not know are dropped: the
    other side may be newer. Raises ``RemoteProtocolError``."""
    try:
        return _record(kind, value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RemoteProtocolError(f"an answer that makes no sense: {error}") from None


def _record(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _record(next(arm for arm in typing.get_args(kind) if arm is not type(None)), value)
    if origin in (list, tuple):
        (item, *_) = typing.get_args(kind)
        made = [_record(item, part) for part in value]
        return made if origin is list else tuple(made)
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        hints = members(kind)
        return kind(**{name: _record(hints[name], part) for name, part in value.items() if name in hints})
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return kind(*(_record(t, part) for t, part in zip(members(kind).values(), value, strict=True)))
    return value


@cache
def members(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@cache
def returned(method: str) -> Any:
    """The type of what a method of ``Client`` returns."""
    from xtool.toolstack import api

    function = getattr(api.Client, method)
    text = function.__annotations__["return"]
    if not isinstance(text, str):
        return text
    return eval(text, {**vars(api), **function.__globals__, "Iterator": Iterator})


@cache
def arguments(method: str) -> tuple[str, ...]:
    """The names of the arguments of a method of ``Client``, in order, without those that stay here."""
    from xtool.toolstack import api

    code = getattr(api.Client, method).__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return tuple(name for name in names if name != "progress")


# --- errors ---------------------------------------------------------------------------------------------
_PLAIN = (str, int, float, bool, type(None))
_KNOWN = frozenset(("message", "hint", "problems"))


def problem(error: BaseException) -> Problem:
    """An error as it crosses the wire; anything but an ``XtoolError`` is a bug, told without its details."""
    if not isinstance(error, XtoolError):
        return Problem(
            "about:blank",
            "a bug in xtool",
            500,
            f"this is a bug in xtool: {type(error).__name__}",
            "Bug",
            70,
            "the daemon's log has the traceback: journalctl -u xtoold, or xtoold.log",
        )
    several = getattr(error, "problems", ())
    return Problem(
        "about:blank",
        type(error).__name__.removesuffix("Error"),
        status_of(error),
        error.message,
        error.kind,
        error.exit_code,
        error.hint,
        _fields(error),
        tuple({"message": p.message, "hint": p.hint, **_fields(p)} for p in several),
    )


def _fields(error: XtoolError) -> dict[str, Any]:
    found = vars(error).items()
    return {name: value for name, value in found if name not in _KNOWN and isinstance(value, _PLAIN)}


#: The first that fits counts.
_STATUS: tuple[tuple[type[XtoolError], int], ...] = (
    (errors.UsageError, 400),
    (errors.ConfigError, 422),
    (errors.ImageError, 422),
    (errors.PrivilegeError, 403),
    (errors.DomainNotFoundError, 404),
    (errors.DomainError, 409),
    (errors.DeviceError, 409),
    (errors.DeadlineError, 409),
    (errors.LocalProtocolError, 500),
)
#: The host, not the request, is why it cannot be done. Not 5xx: those are bugs of ours.
_HOST_CANNOT = 424


def status_of(error: XtoolError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), _HOST_CANNOT)


class RemoteBugError(XtoolError):
    """The daemon ran into a bug of its own."""

    exit_code = 70


def error_of(found: Mapping[str, Any]) -> XtoolError:
    """The error that ``problem`` described."""
    message, hint = str(found.get("detail") or "xtoold refused"), found.get("hint")
    kind = _kinds().get(str(found.get("kind")), XtoolError)
    if found.get("kind") == "Bug":
        kind = RemoteBugError
    several = found.get("problems") or ()
    if kind is ConfigError or several:
        return _config_error(message, hint, found.get("fields") or {}, several)
    error = kind.__new__(kind)
    XtoolError.__init__(error, message, hint=hint)
    for name, value in (found.get("fields") or {}).items():
        if isinstance(name, str) and name.isidentifier() and not name.startswith("__"):
            error.__dict__[name] = value
    return error


def _config_error(
    message: str, hint: str | None, fields: Mapping[str, Any], several: Iterable[Mapping[str, Any]]
) -> XtoolError:
    def one(text: str, tip: str | None, at: Mapping[str, Any]) -> ConfigError:
        return ConfigError(
            text,
            file=str(at.get("file") or ""),
            line=int(at.get("line") or 0),
            column=int(at.get("column") or 0),
            source=at.get("source"),
            hint=tip,
        )

    made = [one(str(p.get("message")), p.get("hint"), p) for p in several]
    if not made:
        return one(message, hint, fields)
    from xtool.config.problems import ConfigErrors

    return ConfigErrors(made)


@cache
def _kinds() -> dict[str, type[XtoolError]]:
    found: dict[str, type[XtoolError]] = {}

    def walk(kind: type[XtoolError]) -> None:
        found.setdefault(kind.__name__.removesuffix("Error"), kind)
        for below in kind.__subclasses__():
            walk(below)

    walk(XtoolError)
    return found
