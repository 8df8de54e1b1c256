"""The examples in ``docs/evtchn.md`` and ``docs/grant.md``, run on the in-memory machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import xtool.evtchn
import xtool.grant
from xtool.fake.machine import FakeMachine

DOCS = Path(__file__).parents[2] / "docs"
GUEST = 7


class Ring:
    left = 40

    def work(self, budget: int) -> int:
        done = min(budget, self.left)
        self.left -= done
        return done


def run(page: str, names: dict[str, Any]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_event_channels(capsys: pytest.CaptureFixture[str]) -> None:
    machine = FakeMachine()
    machine.add_domain(GUEST)
    ring = Ring()
    names = {**vars(xtool.evtchn), "guest": GUEST, "ring": ring}
    names |= {"frontend": machine.events(GUEST), "backend": machine.events(0)}
    run("evtchn.md", names)
    assert capsys.readouterr().out == f"[{names['ours']}]\n" * 2
    assert ring.left == 8
    names["dispatcher"].run_once(0)
    assert ring.left == 0


def test_grants(capsys: pytest.CaptureFixture[str]) -> None:
    machine = FakeMachine()
    machine.add_domain(GUEST)
    names = {**vars(xtool.grant), "guest": GUEST}
    names |= {"grants": machine.grants(0), "allocator": machine.allocator(GUEST)}
    run("grant.md", names)
    assert capsys.readouterr().out.splitlines() == [
        "b'hello'",
        "[0, 0, 0, -3]",
        "b'hello'",
        "104",
    ]
    names["shared"].close()
    assert machine.frames_used == 0
