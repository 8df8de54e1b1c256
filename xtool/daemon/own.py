"""The daemon's own routes, beside the verbs: operations, events, consoles, its state, its documents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, ValidationError, create_model

from xtool.client.records import DaemonStatus, Event, Operation
from xtool.daemon.access import Level
from xtool.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel

#: Longest a request may wait for an operation's end, seconds.
WAIT_MAX = 600.0
_Text = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]
_Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]


class _Own(NamedTuple):
    name: str
    http: str
    path: str
    summary: str
    level: Level
    status: int
    content_type: str
    answer: Any
    query: Mapping[str, Any]


class Own(_Own):
    """``name`` is the method of ``App`` behind ``_own_``; ``answer`` the type of what it answers."""

    @cached_property
    def model(self) -> type[BaseModel]:
        fields: dict[str, Any] = {name: (kind | None, None) for name, kind in self.query.items()}
        return create_model(f"{self.name}_query", __config__=ConfigDict(extra="forbid"), **fields)

    def check(self, query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        """The query's values. Raises ``UsageError``."""
        if body:
            raise UsageError(f"a {self.http} of {self.path} takes no body")
        given: dict[str, Any] = dict(query)
        for name, kind in self.query.items():
            if kind is bool and name in given:
                given[name] = {"true": True, "false": False}.get(given[name], [])
        try:
            made = self.model.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(str(part)[:64] for part in first["loc"])
            raise UsageError(f"{name}: {first['msg']}", hint="/docs tells what this takes") from None
        return {name: getattr(made, name) for name in given}


_JSON, _SSE, _HTML = "application/json", "text/event-stream", "text/html"
_READ, _FULL = Level.READ, Level.FULL
_KIND = Annotated[str, Field(pattern="^(pv|serial)$")]
_NUMBER = Annotated[int, Field(ge=0, lt=1 << 16)]
_ONE = "/v1/operations/{id}"
OWN = (
    Own("docs", "GET", "/docs", "This API, for people.", _READ, 200, _HTML, str, {}),
    Own("openapi", "GET", "/openapi.json", "This API, for programs.", _READ, 200, _JSON, dict[str, Any], {}),
    Own("status", "GET", "/v1/status", "How the daemon is.", _READ, 200, _JSON, DaemonStatus, {}),
    Own("operations", "GET", "/v1/operations", "Those that run, and the last that ended.", _READ, 200,
        _JSON, list[Operation], {}),
    Own("operation", "GET", _ONE, "One operation; wait: until it has ended, at most so many seconds.", _READ,
        200, _JSON, Operation, {"wait": Annotated[float, Field(ge=0, le=WAIT_MAX, allow_inf_nan=False)]}),
    Own("cancel", "DELETE", _ONE, "Interrupt an operation, as Ctrl-C would.", _FULL, 202,
        _JSON, Operation, {}),
    Own("follow", "GET", f"{_ONE}/events", "The operation each time it is further, until it has ended.",
        _READ, 200, _SSE, Operation, {}),
    Own("events", "GET", "/v1/events",
        "What happens, as it happens. Last-Event-ID (or after) goes on behind that event, since begins at "
        "that time; follow=false ends with what is known.",
        _READ, 200, _SSE, Event, {"domain": _Text, "after": _Text, "since": _Seconds, "follow": bool}),
    Own("console_stream", "POST", "/v1/domains/{domain}/console-stream",
        "A console, both ways, over this connection: upgrade to xtool-console.",
        _FULL, 101, "", None, {"kind": _KIND, "number": _NUMBER}),
)  # fmt: skip
