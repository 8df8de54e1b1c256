"""The verbs as endpoints: what a request may hold, and what an answer looks like, from the signatures of
``toolstack.api.Client`` and the table of routes. Nothing is written down twice.

Facts about pydantic: ``validate_json`` takes no lone surrogates and bounds the nesting; in lax mode the texts
of a query become numbers and booleans. Types of the domain file are objects here: ``config/`` has its own
checks, which tell more.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model

from xtool.client.routes import READ, ROUTES, Route, in_query, words_in
from xtool.client.wire import returned
from xtool.errors import ConfigError, UsageError
from xtool.progress import Progress
from xtool.toolstack import api

if TYPE_CHECKING:
    from pydantic import BaseModel

    from xtool.config import DiskConfig, DomainConfig, VifConfig
    from xtool.toolstack.api import Client

M = TypeVar("M")

#: Longest text of an argument, characters, and longest list.
TEXT_MAX, ITEMS_MAX = 4096, 1024
#: Longest time a verb may be told to wait, seconds; the second for those that look, in a thread of ours.
WAIT_MAX, LOOK_MAX = 86_400.0, 60.0
_UUID = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"

# Neither a path nor a name may hold NUL; what else they may not is said by those who use them.
_Text = Annotated[str, Field(max_length=TEXT_MAX, pattern=r"^[^\x00]*$")]
_Uuid = Annotated[str, Field(pattern=_UUID)]
_Float = Annotated[float, Field(allow_inf_nan=False)]
_Wait = Annotated[float, Field(ge=0, le=WAIT_MAX, allow_inf_nan=False)]
_ShortWait = Annotated[float, Field(ge=0, le=LOOK_MAX, allow_inf_nan=False)]
_Int = Annotated[int, Field(ge=-(1 << 31), lt=1 << 53)]
_Domid = Annotated[int, Field(ge=0, lt=0x7FF0)]
_Number = Annotated[int, Field(ge=0, lt=1 << 16)]
_BY_NAME = {
    "deadline": _Wait,
    "devices": _Wait,
    "wait": _Wait,
    "uuid": _Uuid,
    "domid": _Domid,
    "number": _Number,
}
_BY_TYPE = {str: _Text, float: _Float, int: _Int}


@dataclass(frozen=True)
class _Plain:
    """Stands for a model of ``config/`` in a schema; ``make`` makes it of the object that was sent."""

    what: str
    make: Callable[[Any], Any]


def _domain(sent: dict[str, Any]) -> DomainConfig:
    from xtool.config import parse_config

    # JSON is YAML, but for pairs of surrogate escapes.
    return parse_config(json.dumps(sent, ensure_ascii=False), "the configuration that was sent", "/")


def _disk(sent: dict[str, Any]) -> DiskConfig:
    from xtool.config import DiskConfig

    return _model(lambda: DiskConfig.model_validate(sent, context={"base_dir": "/"}), "disk")


def _vif(sent: dict[str, Any]) -> VifConfig:
    from xtool.config import VifConfig

    return _model(lambda: VifConfig.model_validate(sent), "vif")


def _model(make: Callable[[], M], what: str) -> M:
    try:
        return make()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        context = first.get("ctx") or {}
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{what}: {name} {context.get('message') or first['msg']}", hint=context.get("hint")
        ) from None


def _object(what: str, make: Callable[[dict[str, Any]], Any]) -> Any:
    return Annotated[dict[str, Any], Field(description=what), _Plain(what, make)]


_MODELS = {
    "DomainConfig": _object("A domain file's keys (docs/configuration.md), paths absolute", _domain),
    "DiskConfig": _object("A disk, as in a domain file", _disk),
    "VifConfig": _object("An interface, as in a domain file", _vif),
    # Of the daemon's host.
    "Path": Annotated[str, Field(max_length=TEXT_MAX, pattern=r"^/[^\x00]*$"), _Plain("a path", Path)],
}


@dataclass(frozen=True)
class Endpoint:
    """One verb. ``model`` checks all its arguments at once, ``answer`` describes what it returns;
    ``streams`` when that is a stream of records."""

    route: Route
    model: type[BaseModel]
    types: Mapping[str, Any]
    answer: TypeAdapter[Any]
    streams: bool
    makers: Mapping[str, Callable[[dict[str, Any]], Any]] = field(default_factory=dict)

    def check(self, path: Mapping[str, str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        """The arguments of a request as plain values, checked. Raises ``UsageError``."""
        given: dict[str, Any] = {}
        if body and not in_query(self.route):
            given = _json_object(body)
        elif body:
            raise UsageError(f"a {self.route.http} of {self.route.path} takes no body")
        elif query and not in_query(self.route):
            raise UsageError(f"a {self.route.http} of {self.route.path} takes no query")
        for name in path:
            if name in query or name in given:
                raise UsageError(f"{name} stands in the path")
        if in_query(self.route):
            texts = {**{name: self._switch(name, text) for name, text in query.items()}, **path}
            return self._checked(lambda: self.model.model_validate(texts), texts)
        return self.again({**given, **path})

    def again(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments from plain values, as JSON has them. Raises ``UsageError``."""
        text = json.dumps(given)
        return self._checked(lambda: self.model.model_validate_json(text, strict=True), given)

    def _checked(self, make: Callable[[], BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
        try:
            made = make()
        except ValidationError as error:
            raise UsageError(_said(error), hint="/docs tells what this takes") from None
        return {name: given[name] if name in self.makers else getattr(made, name) for name in given}

    def _switch(self, name: str, text: str) -> Any:
        return {"true": True, "false": False}.get(text, []) if self.types.get(name) is bool else text

    def changes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether this call is more than a look."""
        return self.route.how != "read" or bool(
            self.route.changes_if and arguments.get(self.route.changes_if)
        )

    def call(self, client: Client, arguments: Mapping[str, Any], progress: Progress | None = None) -> Any:
        """Carry it out. Raises what the verb raises, and ``ConfigError`` for a configuration that is none."""
        values = dict(arguments)
        for name, make in self.makers.items():
            if values.get(name) is not None:
                values[name] = make(values[name])
        if (
            progress is not None
            and "progress" in signature(getattr(api.Client, self.route.method)).parameters
        ):
            values["progress"] = progress
        return getattr(client, self.route.method)(**values)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        found = _ANY.validate_json(body)
    except ValidationError as error:
        raise UsageError(f"the body is not JSON: {error.errors(include_url=False)[0]['msg']}") from None
    if not isinstance(found, dict):
        raise UsageError("the body is to be a JSON object")
    return found


_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def _said(error: ValidationError) -> str:
    parts = []
    for one in error.errors(include_url=False, include_input=False)[:5]:
        name = ".".join(str(part)[:64] for part in one["loc"])
        parts.append(f"{name}: {one['msg']}" if name else one["msg"])
    return "; ".join(parts)


@cache
def endpoints() -> dict[str, Endpoint]:
    """By method."""
    return {method: _endpoint(route) for method, route in ROUTES.items()}


def _endpoint(route: Route) -> Endpoint:
    function = getattr(api.Client, route.method)
    space = {**vars(api), **function.__globals__, **_MODELS}
    hints = typing.get_type_hints(function, space, include_extras=True)
    kind = returned(route.method)
    streams = typing.get_origin(kind) is not None and typing.get_origin(kind).__name__ == "Iterator"
    answer = typing.get_args(kind)[0] if streams else kind
    types: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    makers = {}
    for name, parameter in list(signature(function).parameters.items())[1:]:
        if name == "progress":
            continue
        types[name] = _narrowed(name, hints[name])
        if route.how == READ and name == "deadline":
            types[name] = _ShortWait
        default = ... if parameter.default is Parameter.empty else parameter.default
        fields[name] = (types[name], default)
        for extra in getattr(hints[name], "__metadata__", ()):
            if isinstance(extra, _Plain):
                makers[name] = extra.make
    model = create_model(f"{route.method}_request", __config__=ConfigDict(extra="forbid"), **fields)
    assert set(words_in(route.path)) <= set(fields), route
    return Endpoint(route, model, types, TypeAdapter(answer), streams, makers)


def _narrowed(name: str, kind: Any) -> Any:
    """The same type, with bounds."""
    arms = typing.get_args(kind)
    if type(None) in arms and len(arms) == 2:
        return _narrowed(name, next(arm for arm in arms if arm is not type(None))) | None
    if typing.get_origin(kind) is Sequence:
        (item,) = typing.get_args(kind)
        return Annotated[list[_narrowed("", item)], Field(max_length=ITEMS_MAX)]  # type: ignore[misc]
    if name in _BY_NAME and kind in (str, int, float):
        return _BY_NAME[name]
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _bounded(kind)
    return _BY_TYPE.get(kind, kind) if isinstance(kind, type) else kind


@cache
def _bounded(kind: type) -> Any:
    """An options record whose members have bounds too; validates to the record itself."""
    from pydantic import AfterValidator

    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for name, member in kind.__dataclass_fields__.items():  # type: ignore[attr-defined]
        default = ... if member.default.__class__.__name__ == "_MISSING_TYPE" else member.default
        fields[name] = (_narrowed(name, hints[name]), default)
    model = create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **fields)
    return Annotated[model, AfterValidator(lambda made: kind(**{n: getattr(made, n) for n in fields}))]
