"""Guests come, go, reboot and crash in many lanes at once, while a killer ends the processes that look after
them; then every guest is to be what its lane made of it.

A lane is a thread with guests of its own. What it does is drawn from its seed; what is possible depends on
what its last guest is. After each step it notes what the guest may be now: one state if the step said that
it was done, the old one or the new one if it failed, for whoever did it may have been killed. Before the next
step it waits until the guest is one of these: a guest that is lost, or that nobody restarts, is seen there.

``Site`` is where it happens: real Xen, or a machine in memory that real processes share.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from xtool import paths
from xtool.hypercall.port import DomainState
from xtool.toolstack import journal, watchlink
from xtool.toolstack.names import uuid_text

POWEROFF, REBOOT, CRASH = 0, 1, 3
ABSENT, UP, PAUSED, KEPT = "absent", "up", "paused", "kept"
#: How long a guest may take to be what it is to be, seconds: a restart that failed is tried again later.
SETTLE = float(os.environ.get("XTOOL_CHURN_SETTLE") or 120)


class Seen(NamedTuple):
    """A guest as Xen has it, and whether its entry in the journal is complete."""

    domid: int
    state: str
    disks: frozenset[str]
    settled: bool


class Site(Protocol):
    """``by_daemon`` and ``by_command`` carry out one verb and raise any exception if it failed."""

    def by_daemon(self, verb: str, name: str, **keys: Any) -> None: ...
    def by_command(self, verb: str, name: str, **keys: Any) -> None: ...
    def end(self, domid: int, reason: int) -> None:
        """The guest shuts down by itself."""

    def look(self) -> Mapping[str, Seen]:
        """All guests of this test, without any process of ours."""

    def repair(self) -> None:
        """What each create does first: finish what killed processes left, have all guests looked after."""

    def victims(self) -> list[tuple[str, int]]:
        """(role, pid) of the processes that may be killed now."""

    def workers(self) -> set[int]:
        """Those at work on a domain for somebody else, who may be dead: ``workers``."""


@dataclass
class Fate:
    """What one guest may be: ``states``; another domid than ``before`` if that is set; ``disks`` it may have
    beside those it must have."""

    states: frozenset[str] = frozenset((ABSENT,))
    before: int = -1
    disks: tuple[frozenset[str], ...] = (frozenset(),)

    def allows(self, seen: Seen | None) -> bool:
        if seen is None:
            return ABSENT in self.states
        return (
            seen.settled
            and seen.state in self.states
            and seen.domid != self.before
            and seen.disks in self.disks
        )


@dataclass(frozen=True)
class Plan:
    """``steps`` in all; ``kinds`` of guests; ``disks``: whether disks come and go; a kill each ``pause``
    seconds on average, 0 for none."""

    seed: int
    steps: int
    lanes: int = 4
    kinds: tuple[str, ...] = ("pv", "pvh")
    disks: bool = True
    pause: float = 0.3


def planned(steps: int, **keys: Any) -> Plan:
    """As the environment says: XTOOL_CHURN is the number of steps, XTOOL_SEED the seed, XTOOL_CHURN_PAUSE the
    seconds between kills, XTOOL_CHURN_SETTLE what a guest may take."""
    if pause := os.environ.get("XTOOL_CHURN_PAUSE"):
        keys["pause"] = float(pause)
    seed = int(os.environ.get("XTOOL_SEED") or random.randrange(1 << 32))
    return Plan(seed, int(os.environ.get("XTOOL_CHURN") or steps), **keys)


@dataclass
class Churn:
    site: Site
    plan: Plan
    fates: dict[str, Fate] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    #: What each guest does when it crashes; those that were restarted.
    _crash: dict[str, str] = field(default_factory=dict)
    _restarted: set[str] = field(default_factory=set)

    def run(self) -> None:
        """The steps; then no more kills, and each guest is looked at and destroyed. Raises
        ``AssertionError`` with the seed and what was done."""
        self._began = time.monotonic()
        over = threading.Event()
        killer = threading.Thread(target=self._kill, args=(over,))
        if self.plan.pause:
            killer.start()
        lanes = [threading.Thread(target=self._lane, args=(n,)) for n in range(self.plan.lanes)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        over.set()
        if self.plan.pause:
            killer.join()
        for name in list(self.fates):
            self._settled(name, "at the end")
        for name in sorted(self.site.look()):
            self._try(f"end   destroy {name}", lambda name=name: self.site.by_daemon("destroy", name))  # type: ignore[misc]
        end = time.monotonic() + SETTLE
        while self.site.look() and time.monotonic() < end:
            self.site.repair()
            time.sleep(0.1)
        if left := sorted(self.site.look()):
            self.wrong.append(f"cannot be destroyed: {left}")
        print(f"seed {self.plan.seed}:", dict(sorted(self.counts.items())))
        if self.wrong:
            raise AssertionError("\n".join([*self.wrong, *self.told()]))

    def told(self) -> list[str]:
        return [f"XTOOL_SEED={self.plan.seed} XTOOL_CHURN={self.plan.steps}; what was done:", *self.log]

    # --- one lane
    def _lane(self, number: int) -> None:
        dice = random.Random(f"{self.plan.seed}-{number}")
        name, guests = "", 0
        for _ in range(-(-self.plan.steps // self.plan.lanes)):
            if self.wrong:
                return
            seen = self._settled(name, "before the next step") if name else None
            if name and self.wrong:
                return
            if seen is None:
                guests += 1
                name = f"xtool-test-churn-{number}-{guests}"
                self.fates[name] = Fate()
                self._create(name, dice)
            else:
                self._step(name, seen, dice)
            time.sleep(dice.uniform(0, 0.05))

    def _create(self, name: str, dice: random.Random) -> None:
        paused = dice.random() < 0.2
        keys: dict[str, object] = {
            "kind": dice.choice(self.plan.kinds),
            "paused": paused,
            "on_crash": dice.choice(["destroy", "restart", "preserve"]),
        }
        self._crash[name] = str(keys["on_crash"])
        fate = self.fates[name]
        self._ask("create", name, dice, fate, replace_states(fate, PAUSED if paused else UP), **keys)

    def _step(self, name: str, seen: Seen, dice: random.Random) -> None:
        fate = Fate(frozenset((seen.state,)), -1, (seen.disks,))
        self.fates[name] = fate
        gone = Fate()
        if seen.state == KEPT:
            return self._ask("destroy", name, dice, fate, gone)
        if seen.state == PAUSED:
            verb = dice.choice(["unpause", "unpause", "destroy"])
            return self._ask(verb, name, dice, fate, gone if verb == "destroy" else replace_states(fate, UP))
        verbs = ["pause", "destroy", "poweroff", "destroy"]
        if name not in self._restarted:  # a second restart soon after would be made to wait
            verbs += ["reboot", "reboot", "crash", "crash"]
        if self.plan.disks:
            verbs += ["detach", "detach"] if seen.disks else ["attach", "attach", "attach"]
        verb = dice.choice(verbs)
        if verb == "pause":
            self._ask(verb, name, dice, fate, replace_states(fate, PAUSED))
        elif verb == "destroy":
            self._ask(verb, name, dice, fate, gone)
        elif verb in ("attach", "detach"):
            disks = frozenset(("xvdb",)) if verb == "attach" else frozenset[str]()
            self._ask(verb, name, dice, fate, Fate(fate.states, -1, (disks,)))
        else:
            self._end(name, seen, verb)
        return None

    def _end(self, name: str, seen: Seen, verb: str) -> None:
        """The guest's own doing: what follows is its keeper's."""
        action = {"poweroff": "destroy", "reboot": "restart", "crash": self._crash[name]}[verb]
        self._say(f"{name} {verb} (domain {seen.domid}): {action} is to follow")
        self.counts[f"{verb}: {action}"] += 1
        if action == "restart":
            self._restarted.add(name)
            self.fates[name] = Fate(frozenset((UP,)), seen.domid, (seen.disks,))
        else:
            state = KEPT if action == "preserve" else ABSENT
            self.fates[name] = Fate(frozenset((state,)), -1, (seen.disks,))
        self.site.end(seen.domid, {"poweroff": POWEROFF, "reboot": REBOOT, "crash": CRASH}[verb])

    def _ask(self, verb: str, name: str, dice: random.Random, old: Fate, new: Fate, **keys: Any) -> None:
        way = dice.choice(["daemon", "command"])
        ask = self.site.by_daemon if way == "daemon" else self.site.by_command
        self.counts[f"{verb} by {way}"] += 1
        workers = self.site.workers()
        if self._try(f"{way} {verb} {name}", lambda: ask(verb, name, **keys)):
            self.fates[name] = new
            return
        # Whoever was at it may still be: a job goes on when its daemon is killed.
        disks = tuple(dict.fromkeys((*old.disks, *new.disks)))
        self.fates[name] = Fate(old.states | new.states, -1, disks)
        self._wait_for(workers | self.site.workers())

    def _try(self, what: str, ask: Callable[[], None]) -> bool:
        self._say(f"{what} ...")
        try:
            ask()
        except Exception as error:  # which one is looked at where the state is wrong
            self._say(f"{what}: {type(error).__name__}: {str(error)[:300]}")
            self.counts["failed"] += 1
            return False
        self._say(f"{what}: done")
        return True

    def _settled(self, name: str, when: str) -> Seen | None:
        """The guest, as soon as it is what it may be."""
        fate, end, looked = self.fates[name], time.monotonic() + SETTLE, 0.0
        while not fate.allows(seen := self.site.look().get(name)):
            if time.monotonic() > end:
                self.wrong.append(f"{name} {when} is {seen}, but is to be {fate}")
                return None
            if time.monotonic() - looked > 1:
                with suppress(Exception):  # it may be killed, too
                    self.site.repair()
                looked = time.monotonic()
            time.sleep(0.02)
        return seen

    # --- the killer
    def _kill(self, over: threading.Event) -> None:
        dice = random.Random(f"{self.plan.seed}-killer")
        while not over.wait(dice.expovariate(1 / self.plan.pause)):
            by_role: dict[str, list[int]] = {}
            for role, pid in self.site.victims():
                by_role.setdefault(role, []).append(pid)
            if not by_role:
                continue
            role = dice.choice(sorted(by_role))  # else there would be those of which there are many only
            pid = dice.choice(sorted(by_role[role]))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.counts[f"killed {role}"] += 1
                self._say(f"killed {role} {pid}")

    def _wait_for(self, pids: set[int]) -> None:
        end = time.monotonic() + SETTLE
        while pids & self.site.workers() and time.monotonic() < end:
            time.sleep(0.02)

    def _say(self, text: str) -> None:
        self.log.append(f"{time.monotonic() - self._began:8.3f} {text}")


def replace_states(fate: Fate, *states: str) -> Fate:
    return Fate(frozenset(states), -1, fate.disks)


def command_words(
    verb: str,
    name: str,
    keys: dict[str, Any],
    folder: Path,
    described: Callable[[], Any],
    disk: Callable[[], str],
) -> list[str]:
    """A step as a command line; ``described`` gives a new domain's file, ``paused`` taken out of ``keys``."""
    if verb == "create":
        file = folder / f"{name}.yaml"
        paused = ["--paused"] if keys.pop("paused") else []
        file.write_text(json.dumps(described()))
        return ["create", str(file), *paused]
    if verb == "attach":
        return ["block-attach", name, disk()]
    if verb == "detach":
        return ["block-detach", name, "xvdb", "--force"]
    return [verb, name]


def look(
    states: Iterable[DomainState], disks: Callable[[int], Iterable[str]], known: Container[int] = ()
) -> dict[str, Seen]:
    """What ``Site.look`` gives, of what the hypervisor and the journal say. ``known``: others' domains."""
    found = {}
    by_uuid = {entry.uuid: entry for entry in journal.entries()}
    for state in states:
        if state.domid in known or state.dying:
            continue
        entry = by_uuid.pop(uuid_text(state.handle), None)
        name = entry.name if entry else f"domain {state.domid} that nobody knows"
        word = KEPT if state.shutdown else PAUSED if state.paused else UP
        settled = (
            entry is not None
            and (entry.state, entry.domid, entry.pending) == ("running", state.domid, None)
            and (bool(entry.settled) or word != KEPT)
        )
        found[name] = Seen(state.domid, word, frozenset(disks(state.domid)), settled)
    for entry in by_uuid.values():  # on its way in or out
        found.setdefault(entry.name, Seen(entry.domid, entry.state, frozenset(), False))
    return found


def workers(ours: Callable[[int], bool] = lambda pid: True) -> set[int]:
    """Jobs, children of keepers and of the watcher, and children of the zygote that carry out a command
    line."""
    zygote, watcher = zygote_pid(), watchlink.pid()
    return {
        pid
        for pid, name in processes()
        if (
            name == "xtoold-job"
            or name.startswith("xtool-act-")
            or (name == "xtool-zygote" and pid != zygote)
            or (name == watchlink.NAME and pid != watcher)
        )
        and ours(pid)
    }


def zygote_pid() -> int:
    """0 if there is none."""
    try:
        pid = int((paths.run_dir() / "zygote.lock").read_text())
        return pid if (pid, "xtool-zygote") in processes() else 0
    except (OSError, ValueError):
        return 0


def processes() -> list[tuple[int, str]]:
    """(pid, name) of all that run on this machine."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError):
                text = Path(f"/proc/{entry}/stat").read_text()
                name, _, rest = text.partition("(")[2].rpartition(")")
                if rest.split()[0] != "Z":
                    found.append((int(entry), name))
    return found
