"""What ``xtool plan`` and ``xtool apply`` say, as ``-o json`` prints it (docs/plan.md). Plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

CREATE, UPDATE, RECREATE, DESTROY = "create", "update", "recreate", "destroy"
UNCHANGED, CONFLICT = "unchanged", "conflict"
#: In the order people are told of them.
ACTIONS = (CREATE, UPDATE, RECREATE, DESTROY, CONFLICT, UNCHANGED)

DONE, FAILED, SKIPPED = "done", "failed", "skipped"
#: States of a domain that has ended and is kept.
ENDED = ("shutdown", "crashed", "dying")


@dataclass(frozen=True)
class KeyChange:
    """One key that differs. ``key`` is as in a domain file; ``disk[xvdb]`` and ``vif[0]`` are a whole device,
    ``disk[xvdb].target`` a sub-key of one. Values are as a domain file has them (sizes in MiB); null is "not
    given". ``when`` is ``live``, ``reboot`` or ``recreate``, ``why`` says why then."""

    key: str
    before: Any
    after: Any
    when: str
    why: str


@dataclass(frozen=True)
class Failure:
    """Why a domain could not be brought there; ``exit_code`` as in docs/exit-codes.md."""

    kind: str
    message: str
    hint: str | None
    exit_code: int


@dataclass(frozen=True)
class DomainChange:
    """One domain. ``action``:

    - ``create``: it does not run,
    - ``update``: it is changed, now or in its definition for the next reboot (each change's ``when``),
    - ``recreate``: it is shut down and created anew; what it runs is lost,
    - ``destroy``: an earlier apply made it from these files, which no longer have it (``--prune``),
    - ``conflict``: nothing can be done about it, ``why`` says why; apply fails for it,
    - ``unchanged``.

    ``file`` and ``line`` say where it is described (of a domain to be destroyed: where it was, line 0).
    ``waiting`` are the keys whose new value is kept for the next reboot already. ``result`` is empty in a
    plan; after an apply ``done``, ``failed`` (see ``error``), ``skipped`` (see ``why``) or ``unchanged``.
    """

    name: str
    action: str
    file: str
    line: int
    type: str = ""
    domid: int | None = None
    uuid: str = ""
    depends_on: Sequence[str] = ()
    changes: Sequence[KeyChange] = ()
    waiting: Sequence[str] = ()
    why: str = ""
    result: str = ""
    error: Failure | None = None


@dataclass(frozen=True)
class Plan:
    """``changed``: whether anything is to be done (in a plan), or was done (after an apply). ``summary``
    counts the domains by action; ``domains`` are in the order they are carried out in."""

    format: int
    changed: bool
    summary: dict[str, int] = field(default_factory=dict)
    domains: Sequence[DomainChange] = ()
