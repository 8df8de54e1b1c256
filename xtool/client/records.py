"""Records of the daemon itself: operations, events, its state. Plain values, as those of
``toolstack.api``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

QUEUED, RUNNING = "queued", "running"
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"


@dataclass(frozen=True)
class Problem:
    """An error as it crosses the wire (RFC 9457, and more members). ``status`` is HTTP's, ``kind`` the
    error's class without ``Error``, ``exit_code`` what the command line ends with (docs/exit-codes.md);
    ``fields`` are the attributes that class has beside these, such as ``file``, ``line``, ``column``."""

    type: str
    title: str
    status: int
    detail: str
    kind: str
    exit_code: int
    hint: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    problems: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Operation:
    """A piece of work: ``state`` is ``queued``, ``running``, ``done``, ``failed`` or ``cancelled``.

    ``subject`` is the domain it is about, as it was named. ``lines`` are its steps, the latest last; ``done``
    and ``total`` say how far the latest is, in whatever it counts; ``fraction`` is their quotient. Times are
    seconds since the epoch. ``result`` is what the verb returned, ``error`` why it failed.
    """

    id: str
    method: str
    subject: str
    state: str
    created: float
    started: float | None = None
    ended: float | None = None
    stage: str = ""
    lines: tuple[str, ...] = ()
    done: int = 0
    total: int | None = None
    fraction: float | None = None
    result: Any = None
    error: Problem | None = None
    uid: int = -1


@dataclass(frozen=True)
class Event:
    """Something that happened. ``id`` orders events of one run of the daemon and can be resumed from.

    ``kind`` is ``domain.created``, ``.started``, ``.paused``, ``.unpaused``, ``.shutdown``
    (``details.reason`` is why), ``.rebooted``, ``.renamed``, ``.destroyed``, ``device.attached``, ``.state``,
    ``.detached``, ``operation``, ``keeper``, ``lost`` (``details.count`` events could not be kept for this
    listener; null: nobody knows how many), ``suppressed`` (so many of one domain came too fast). ``time`` is
    in seconds since the epoch, ``domid`` -1 where it is about no domain.
    """

    id: str
    time: float
    kind: str
    domid: int = -1
    name: str = ""
    uuid: str = ""
    managed: bool = False
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DaemonStatus:
    """``uptime`` in seconds; ``access`` is what the asker may do: ``full`` or ``read-only``."""

    version: str
    pid: int
    host: str
    uptime: float
    connections: int
    operations_running: int
    operations_queued: int
    domains: int
    last_event: str
    access: str
