"""The engine's benchmarks on the host in memory: every part runs to its end, compares what it says and leaves
nothing. In xl's place is a side of ours that takes longer; the figures mean nothing here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Running, running
from test_create import fake

from benchmarks import fleet, sides
from benchmarks.contest import BenchError
from benchmarks.sides import Api, Bench, Commands, Wanted
from xtool import paths
from xtool.config import parse_config
from xtool.config.fromxl import convert
from xtool.toolstack import journal
from xtool.toolstack.host import Host


class Slow(Api):
    """One millisecond more for each guest there is."""

    def create(self, wanted: Wanted) -> None:
        time.sleep(0.001 * (10 + len(self.names())))
        super().create(wanted)

    def list_all(self) -> None:
        time.sleep(0.05)
        super().list_all()


@pytest.fixture
def daemon(host: Host, tmp_path: Path) -> Iterator[Running]:
    paths.run_dir().mkdir()
    with running(host, tmp_path) as found:
        yield found


def bench(daemon: Running, folder: Path) -> tuple[Bench, list[str]]:
    said: list[str] = []
    made = iter(range(0, 1 << 40, 1 << 20))
    return (
        Bench(
            Api(daemon.client),
            Api(daemon.client),
            Slow(daemon.client),
            samples=2,
            guests=4,
            bridge="xenbr0",
            disks=folder,
            pss=lambda: next(made),
            tell=said.append,
        ),
        said,
    )


GOALS = {
    "api": {"create, api": 0.5, "destroy, api": 1.0},
    "cold": {"create, cold, 0 guests": 1.2, "create, cold, 4 guests": 0.6},
    "list": {"list, api, 1 guests": None, "list, cold, 1 guests": None, "list, api, 4 guests": 0.2,
             "list, cold, 4 guests": 0.5},
    "growth": {"create, api, 1 guests": None, "create, api, 6 guests": 0.25,
               "create, growth per guest": 0.15},
    "devices": {"create, vif adds": 0.15, "create, vbd adds": 0.15, "create, both adds": 0.15,
                "destroy, bare": 1.0, "destroy, vif": 0.3, "destroy, vbd": 0.4, "destroy, both": None},
    "storm": {"storm of 2, 1 at once": None, "storm of 2, 4 at once": 0.6, "storm of 2, 8 at once": 0.6,
              "storm of 2, 4 at once / 1": 1 / 1.3},
}  # fmt: skip


@pytest.mark.parametrize("part", GOALS)
def test_a_part_says_what_it_is_to_say(
    daemon: Running, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = bench(daemon, tmp_path)
    free = fake(daemon.host).host().free_pages
    assert fleet.run(found, [part]) == {}
    goals = {row.name: row.goal for row in found.rows}
    dear = [name for name in goals if name.startswith("create, both add") and "/" in name]  # one is measured
    assert {name: goal for name, goal in goals.items() if name not in dear} == GOALS[part]
    assert len(dear) == (part == "devices")
    assert all(row.low <= row.high and row.ours > -1e3 for row in found.rows)
    assert sum(row.name in line for row in found.rows for line in said) >= len(found.rows)
    assert fake(daemon.host).all == {} and journal.entries() == []
    assert fake(daemon.host).host().free_pages == free


def test_memory_is_that_of_each_further_guest(
    daemon: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here 5 MiB for each guest there is, and 7 of xtoold's."""
    monkeypatch.setattr(fleet, "sleep", lambda seconds: None)
    found, _ = bench(daemon, tmp_path)
    found.pss = lambda: (7 << 20) + len(fake(daemon.host).all) * (5 << 20)
    assert fleet.run(found, ["memory"]) == {}
    assert [(figure.value, figure.goal) for figure in found.figures] == [
        (5.0, 0.2), (5.0, None), (5.0, 3.0), (5.0, None), (5.0, 3.0)
    ]  # fmt: skip
    assert "missed" in found.figures[0].verdict and found.figures[1].verdict == ""
    assert fake(daemon.host).all == {}


def test_a_part_that_fails_leaves_the_others(daemon: Running, tmp_path: Path) -> None:
    found, said = bench(daemon, tmp_path)

    class Broken(Slow):
        def list_all(self) -> None:
            raise BenchError("xl list: no")

    found.xl = Broken(daemon.client)
    broken = fleet.run(found, ["list", "api"])
    assert broken == {"list": "BenchError: xl list: no"} and len(found.rows) == 2
    assert any("list FAILED" in line for line in said)
    assert fake(daemon.host).all == {}


def test_a_storm_in_which_one_fails_is_no_result(daemon: Running, tmp_path: Path) -> None:
    found, _ = bench(daemon, tmp_path)
    found.api.create(Wanted(f"{sides.PREFIX}-storm-1", memory=8))
    with pytest.raises(BenchError, match=r"1 of 2 failed: xtool-bench-storm-1: .*already named"):
        fleet._storm(found, found.api, 2, 2)
    assert len(fake(daemon.host).all) == 1


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted("a"),
        Wanted("b", "pvh", disk="/images/a.img", bridge="xenbr0"),
        Wanted("d", disk="/images/a.img", bridge="xenbr0", ours=True),
    ],
)
def test_both_are_asked_for_the_same_guest(tmp_path: Path, wanted: Wanted) -> None:
    """xl's file, read as xl's, is the domain file of ours (xl gives an hvm guest a display by itself)."""
    (tmp_path / "bin").mkdir()
    ours = Commands("xtool", tmp_path).prepare(wanted)
    theirs = Commands("xl", tmp_path).prepare(wanted)
    assert ours != theirs and theirs.suffix == ".cfg"
    mine = parse_config(ours.read_text(), "a.yaml", "/")
    other = parse_config(convert(theirs.read_text()).text, "b.yaml", "/")
    assert mine.to_dict() == other.to_dict()


def test_commands_are_run_and_their_failures_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "xl"
    program.write_text(
        '#!/bin/sh\necho "$@" >>' + f"{tmp_path}/log\n" + '[ "$1" != destroy ] || { echo no >&2; exit 3; }\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    side = Commands("xl", tmp_path)
    side.create(Wanted("web"))
    side.list_all()
    with pytest.raises(BenchError, match="xl destroy web: no"):
        side.destroy("web")
    assert (tmp_path / "log").read_text().splitlines() == [
        f"create -p -q {tmp_path}/web-xl.cfg", "list", "destroy web"
    ]  # fmt: skip
    assert 'name = "web"' in (tmp_path / "web-xl.cfg").read_text()


def test_memory_of_processes_is_read() -> None:
    assert fleet.processes_pss() > 1 << 20


def test_json_of_figures() -> None:
    figure = fleet.Figure("memory", 0.1, "MiB", 0.2)
    assert "met" in figure.verdict and json.dumps(fleet.asdict(figure))
