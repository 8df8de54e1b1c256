"""What is to be done: files compared with what runs, asked of the toolstack's client. Changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from xtool.apply.compare import Known, compare
from xtool.apply.described import Described, covers, in_order
from xtool.apply.records import (
    CONFLICT,
    CREATE,
    DESTROY,
    ENDED,
    RECREATE,
    UNCHANGED,
    UPDATE,
    DomainChange,
    Plan,
)
from xtool.config import parse_config
from xtool.config.changes import strongest
from xtool.errors import PrivilegeError
from xtool.toolstack.api import Client, DomainInfo, DomainTargets
from xtool.toolstack.everydayrecords import DomainConfigInfo

FORMAT = 1


def make_plan(
    client: Client, described: Sequence[Described], paths: Sequence[str] = (), *, prune: bool = False
) -> Plan:
    """With ``prune``, what an earlier apply made from ``paths`` and they no
    longer have is to go. Raises ``ConfigError`` for dependencies that cannot be."""
    running = {one.name: one for one in client.list() if one.domid}
    try:
        configs = {one.name: one for one in client.config(secrets=True)}
    except PrivilegeError:
        configs = {one.name: one for one in client.config()}
    targets = {one.name: one for one in client.targets()}
    changes = [
        _change(one, running.get(one.name), configs.get(one.name), targets.get(one.name))
        for one in in_order(described, running)
    ]
    if prune:
        names = {one.name for one in described}
        for name, info in configs.items():
            if name not in names and info.source and covers(paths, info.source):
                file = info.source.partition(":")[2]
                why = "an earlier apply made it, and its file no longer has it"
                changes.append(DomainChange(name, DESTROY, file, 0, "", info.domid, info.uuid, why=why))
    return whole(changes)


def whole(changes: Sequence[DomainChange]) -> Plan:
    changed = any(one.action != UNCHANGED for one in changes)
    return Plan(FORMAT, changed, dict(Counter(one.action for one in changes)), tuple(changes))


def _change(
    one: Described, info: DomainInfo | None, config: DomainConfigInfo | None, targets: DomainTargets | None
) -> DomainChange:
    depends = one.config.depends_on
    if info is None:
        return DomainChange(one.name, CREATE, one.file, one.line, one.config.type, depends_on=depends)

    def made(action: str, **more: object) -> DomainChange:
        kind = one.config.type
        waiting = config.waiting if config else ()
        fields: dict[str, object] = {"depends_on": depends, "waiting": waiting, **more}
        return DomainChange(one.name, action, one.file, one.line, kind, info.domid, info.uuid, **fields)  # type: ignore[arg-type]

    if config is None or config.config is None:
        return made(CONFLICT, why="it runs, but was not created by xtool: xtool does not know what it is")
    definition = parse_config(json.dumps(config.config), f"the configuration of {one.name}", "/")
    changes = tuple(compare(one.config, one.given, Known(definition, info.uuid, targets, config.hidden)))
    if info.state in ENDED:
        return made(RECREATE, changes=changes, why=f"it has ended ({info.reason or info.state}) and is kept")
    if not changes:
        return made(UNCHANGED)
    action = RECREATE if strongest([c.when for c in changes]) == "recreate" else UPDATE
    return made(action, changes=changes)
