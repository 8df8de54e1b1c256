"""A whole plan carried out: what others depend on first, independent domains at the same time."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from xtool.apply.carry import Manner, Step, attempt
from xtool.apply.described import Described
from xtool.apply.planning import whole
from xtool.apply.records import DESTROY, DONE, FAILED, SKIPPED, UNCHANGED, DomainChange, Plan
from xtool.progress import Progress
from xtool.toolstack.api import Client


class Runner(Protocol):
    """Carries steps out; at most ``room`` of them at a time are given to it."""

    room: int

    def begin(self, step: Step) -> None: ...

    def wait(self) -> DomainChange:
        """The result of a step that ended; one must have begun."""

    def stop(self) -> list[DomainChange]:
        """Interrupt what runs, and wait for its end; the results of those that had come to one."""


class InTurn:
    """One step after the other in this process: for a host that no other process could share."""

    room = 1

    def __init__(self, client: Client, manner: Manner, progress: Progress) -> None:
        self._client, self._manner, self._progress = client, manner, progress
        self._done: list[DomainChange] = []

    def begin(self, step: Step) -> None:
        self._done.append(attempt(self._client, step, self._manner, self._progress))

    def wait(self) -> DomainChange:
        return self._done.pop()

    def stop(self) -> list[DomainChange]:
        done, self._done = self._done, []
        return done


def carry_out(plan: Plan, described: Mapping[str, Described], runner: Runner, progress: Progress) -> Plan:
    """What fails stops nothing but what depends on it. Interrupted, it says what is unfinished."""
    waiting = {one.name: one for one in plan.domains}
    busy: dict[str, DomainChange] = {}
    done: dict[str, DomainChange] = {}
    needed = {name for one in plan.domains if one.action != UNCHANGED for name in one.depends_on}

    def end(one: DomainChange) -> None:
        busy.pop(one.name, None)
        done[one.name] = one

    try:
        while waiting or busy:
            one = _next(waiting, busy) if len(busy) < runner.room else None
            if one is None:
                end(runner.wait())
                continue
            del waiting[one.name]
            lost = [n for n in one.depends_on if n in done and done[n].result in (FAILED, SKIPPED)]
            if lost and one.action != UNCHANGED:
                end(replace(one, result=SKIPPED, why=f"it depends on {', '.join(lost)}"))
            elif one.action == UNCHANGED and one.name not in needed:
                end(replace(one, result=UNCHANGED))
            else:
                busy[one.name] = one
                runner.begin(Step(one, described.get(one.name), one.name in needed))
    except BaseException:
        for ended in runner.stop():
            end(ended)
        with suppress(Exception):
            _say_what_is_left(plan, waiting, done, progress)
        raise
    results = [done[one.name] for one in plan.domains]
    return replace(whole(results), changed=any(one.result == DONE for one in results))


def _next(waiting: Mapping[str, DomainChange], busy: Mapping[str, DomainChange]) -> DomainChange | None:
    """The first that waits for no other. What is to be destroyed waits until all else has ended, so that
    nothing is ended before what takes its place was tried."""
    for one in waiting.values():
        if one.action == DESTROY:
            continue
        if not any(name in waiting or name in busy for name in one.depends_on):
            return one
    if any(one.action != DESTROY for one in (*waiting.values(), *busy.values())):
        return None
    return next(iter(waiting.values()), None)


def _say_what_is_left(
    plan: Plan, waiting: Container[str], done: Mapping[str, DomainChange], progress: Progress
) -> None:
    left = [one.name for one in plan.domains if one.name not in done and one.action != UNCHANGED]
    for what, names in (
        ("unfinished", [name for name in left if name not in waiting]),
        ("not begun", [name for name in left if name in waiting]),
        ("done", [name for name, one in done.items() if one.result == DONE]),
    ):
        if names:
            progress.step(f"{what}: {', '.join(names)}")
    progress.step("the same apply goes on from there")
