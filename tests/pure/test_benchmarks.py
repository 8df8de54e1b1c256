"""The benchmarks' own arithmetic: ratios, goals, what ``load`` prints, tables. Nothing is measured here."""

from __future__ import annotations

import json
import os
import pstats
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import consolebench, cpu, profiles, report, split
from benchmarks.blockbench import CASES as BLOCK
from benchmarks.contest import (
    GIB,
    OURS,
    BenchError,
    Contest,
    Outcome,
    Race,
    Sample,
    cost,
    hold,
    parse_load,
    sample,
)
from benchmarks.netbench import CASES as NET
from benchmarks.stats import Figure, added, compare, gradient, slope
from xtool.backends.profiling import VARIABLE, profiled

LINE = 'LOAD {"ops": 50, "bytes": 204800, "ns": 500000000, "p50": 9000, "p99": 12000, "max": 13000}'


def contest(**keys: object) -> Contest:
    return Contest(**{"name": "block-guest read", "unit": "1/s", "goals": {"qdisk": 1.0}} | keys)  # type: ignore[arg-type]


# --- ratios
def test_a_rate_meets_its_goal_with_the_lower_end_only() -> None:
    ours, theirs = [100.0, 110.0, 120.0], [100.0, 100.0, 100.0]
    met = compare("x", ours, theirs, 1.0, unit="1/s", scale=1.0, at_least=True)
    assert (met.ratio, met.ours, met.theirs, met.low, met.high) == (1.1, 110.0, 100.0, 1.0, 1.2)
    assert met.verdict == "met"
    assert compare("x", ours, theirs, 1.05, at_least=True).verdict == "missed"
    assert compare("x", ours, theirs, at_least=True).verdict == ""


def test_a_time_meets_its_goal_with_the_upper_end_only() -> None:
    found = compare("x", [0.1, 0.11, 0.12], [0.1, 0.1, 0.1], 1.2)
    assert found.verdict == "met" and found.ours == pytest.approx(110) and found.unit == "ms"
    assert compare("x", [0.1, 0.11, 0.12], [0.1, 0.1, 0.1], 1.15).verdict == "missed"


def test_what_something_adds_is_a_ratio_of_differences() -> None:
    found = added("vif", ([0.012] * 5, [0.010] * 5), ([0.30] * 5, [0.10] * 5), 0.15)
    assert (found.ours, found.theirs) == (pytest.approx(2), pytest.approx(200))
    assert found.ratio == pytest.approx(0.01) and found.verdict == "met" and found.samples == 5
    # What adds nothing to theirs is no measure.
    assert added("x", ([2.0], [1.0]), ([1.0], [1.0]), 0.15).verdict == "missed"


def test_growth_is_the_slope_of_the_nearest_line() -> None:
    assert gradient({0: 1.0, 10: 2.0, 20: 3.0}) == pytest.approx(0.1)
    assert gradient({1: 5.0, 2: 5.0}) == 0
    ours = {n: [0.020 + 0.0001 * n] * 4 for n in (1, 50, 150)}
    theirs = {n: [0.060 + 0.002 * n] * 4 for n in (1, 50, 150)}
    found = slope("growth", ours, theirs, 0.15)
    assert (found.ours, found.theirs) == (pytest.approx(0.1), pytest.approx(2.0))
    assert found.ratio == pytest.approx(0.05) and found.verdict == "met"
    noisy = {n: [0.020 + 0.0001 * n, 0.020 + 0.0009 * n, 0.02] for n in (1, 50, 150)}
    wide = slope("growth", noisy, theirs, 0.1)
    assert wide.low < wide.ratio < wide.high and wide.verdict == "missed"


def test_a_figure_has_a_goal_of_its_own() -> None:
    assert "met" in Figure("m", 0.2, "MiB", 0.2).verdict and "missed" in Figure("m", 0.3, "MiB", 0.2).verdict
    assert Figure("m", 0.3, "MiB", None).verdict == ""


# --- what load prints
def test_the_last_line_of_load_counts_whatever_stands_around_it() -> None:
    text = f"# load block\r\nLOAD LISTENING\r\n{LINE.replace('50', '7')}\r\n# {LINE}\r\nEND=0=\r\n"
    found = parse_load(text)
    assert found["ops"] == 50 and found["p99"] == 12000
    assert sample(found, "1/s").value == 100
    assert sample(found, "MB/s").value == pytest.approx(0.4096)
    assert sample(found, "Mb/s").value == pytest.approx(3.2768)
    assert sample(found, "kB/s").value == pytest.approx(409.6)
    assert sample(found, "µs").value == 9


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Kernel panic - not syncing",
        'LOAD {"error": "read: Input/output error"}',
        'LOAD {"ops": 1, "bytes": 1}',
        'LOAD {"ops": -1, "bytes": 1, "ns": 1}',
        'LOAD {"ops": "1", "bytes": 1, "ns": 1}',
        'LOAD {"ops": 1, "byt',
        'LOAD {"ops": 1} and more',
    ],
)
def test_no_result_says_what_was_seen(text: str) -> None:
    with pytest.raises(BenchError, match=r"seen|Input/output error|has no"):
        parse_load(text)


def test_a_run_in_which_nothing_happened_is_no_sample() -> None:
    for found in ({"ops": 0, "bytes": 0, "ns": 5}, {"ops": 5, "bytes": 5, "ns": 0}):
        with pytest.raises(BenchError, match="nothing"):
            sample(found, "MB/s")
    with pytest.raises(BenchError, match="no µs"):
        sample({"ops": 5, "bytes": 5, "ns": 5}, "µs")


@settings(deadline=None)
@given(st.text())
def test_any_text_is_a_result_or_a_bench_error(text: str) -> None:
    for whole in (text, "LOAD {" + text, LINE[: len(text)] + text):
        try:
            assert parse_load(whole)["ns"] >= 0
        except BenchError:
            pass


# --- contests
def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def side(name: str) -> Sample:
        order.append(name)
        return Sample(float(len(order)))

    race = Race(contest(), {name: lambda name=name: side(name) for name in ("xtool", "phy", "qdisk")})
    outcome = hold(race, 2)
    assert order == ["xtool", "phy", "qdisk"] * 3
    assert [s.value for s in outcome.samples["xtool"]] == [4, 7]
    assert [row.name for row in outcome.comparisons()] == [
        "block-guest read / phy",
        "block-guest read / qdisk",
    ]
    assert [row.goal for row in outcome.comparisons()] == [None, 1.0]
    assert outcome.unjudged() == []


def test_a_side_that_fails_is_told_and_the_others_go_on() -> None:
    calls = {"qdisk": 0}

    def failing() -> Sample:
        calls["qdisk"] += 1
        if calls["qdisk"] == 3:
            raise BenchError("no 'END=' within 120 s; seen: 'Oops'")
        return Sample(1.0)

    race = Race(contest(), {OURS: lambda: Sample(2.0), "phy": lambda: Sample(1.0), "qdisk": failing})
    outcome = hold(race, 5)
    assert calls["qdisk"] == 3 and len(outcome.samples[OURS]) == len(outcome.samples["phy"]) == 5
    assert outcome.samples["qdisk"] == [] and "Oops" in outcome.failures["qdisk"]
    assert outcome.unjudged() == ["block-guest read / qdisk"]
    text = report.verdicts([outcome], {"net-dom0": "no bridge"})
    assert "0 met, 0 missed, 1 not measured" in text
    assert "FAILED block-guest read on qdisk: BenchError: no 'END='" in text
    assert "FAILED net-dom0: no bridge" in text


def test_a_preparation_that_fails_is_a_failure_of_all_sides() -> None:
    def prepare() -> None:
        raise BenchError("ETHTOOL_STSO: Operation not supported")

    outcome = hold(Race(contest(), {OURS: lambda: Sample(1.0)}, prepare=prepare), 1)
    assert "ETHTOOL_STSO" in outcome.failures[OURS] and outcome.comparisons() == []


def test_what_it_cost() -> None:
    taken = [
        Sample(v, ops=100, bytes=GIB // 2, ns=5_000_000, p50=9000, p99=20000, cpu={"dom0": c})
        for v, c in ((1.0, 10**9), (2.0, 2 * 10**9), (3.0, 3 * 10**9))
    ]
    found = cost(contest(), "phy", taken)
    assert found.value == 2.0 and found.ns_per_op == 50_000 and found.p50_us == 9
    assert found.dom0_s_per_gib == 4.0
    assert found.backend_s_per_gib is None  # nobody knows which process it was: no figure, not 0


# --- tables
def outcome(ours: float, latency: bool = False) -> Outcome:
    samples = {
        OURS: [Sample(ours, 10, 1 << 20, 10**6, 7000, 9000, {"backend": 10**6, "dom0": 10**7})] * 3,
        "qdisk": [Sample(100.0, 10, 1 << 20, 10**6, 5000, 9000)] * 3,
    }
    return Outcome(contest(latency=latency), samples, {})


def test_the_table_says_met_and_missed() -> None:
    met, missed = outcome(120.0), outcome(80.0, latency=True)
    rows = [*met.comparisons(), *missed.comparisons()]
    lines = report.comparisons(rows).splitlines()
    assert " ".join(lines[1].split()) == "block-guest read / qdisk 120 100 1/s 1.200 1.20-1.20 >= 1 met"
    assert lines[2].endswith(">= 1 missed")
    assert " ".join(lines[3].split()) == "block-guest read latency / qdisk 7 5 µs 1.400 1.40-1.40"
    assert "1 met, 1 missed, 0 not measured" in report.verdicts([met, missed], {})
    table = report.costs(report.all_costs([met]), True)
    assert "instr/op" in table and table.splitlines()[2].split()[-1] == "-"
    assert "ns/op" in report.costs([], False)


def test_json_has_rows_costs_and_failures(capsys: pytest.CaptureFixture[str]) -> None:
    found = outcome(120.0)
    found.failures["phy"] = "gone"
    split.show(split.Results([found], {"console": "no"}), "json", True)
    data = json.loads(capsys.readouterr().out)
    assert data["rows"][0]["verdict"] == "met" and data["rows"][0]["at_least"] is True
    assert data["costs"][0]["backend"] == OURS and data["deterministic"] is True
    assert data["failures"] == {"block-guest read on phy": "gone", "console": "no"}


# --- what is run
def test_places_by_word() -> None:
    assert split.chosen([]) == split.chosen(["split"]) == list(split.PLACES)
    assert split.chosen(["console", "block-dom0"]) == ["block-dom0", "console"]
    assert split.chosen(["net", "net-guest"]) == ["net-guest", "net-dom0"]
    with pytest.raises(ValueError, match="blok"):
        split.chosen(["blok"])


def test_every_goal_that_is_promised_is_judged() -> None:
    """The goals stand in one place for disks and interfaces, whatever the frontend."""
    goals = {case.name: dict(case.goals) for case in (*BLOCK, *NET)}
    for size in ("64k", "1m"):
        assert goals[f"read-{size}"] == goals[f"write-{size}"] == {"qdisk": 1.0}
    assert goals["read-4k-depth1"] == {"qdisk": 0.8}
    assert goals["read-4k-depth32"] == goals["write-4k-depth32"] == {"qdisk": 1.0, "phy": 0.5}
    assert goals["tcp-in-plain"] == goals["tcp-out-plain"] == {"netback": 0.3}
    assert goals["tcp-in-gso"] == goals["tcp-out-gso"] == {"netback": 0.6}
    assert consolebench.DRAIN.goals == {"xenconsoled": 0.5}
    for word, case in split.PROFILED.items():
        names = {"block": BLOCK, "net": NET}.get(word)
        assert names is None or case in {each.name for each in names}


# --- CPU time and profiles
def test_threads_of_the_kernels_backends() -> None:
    processes = {
        10: "1.xvdb-0",
        11: "1.xvdb-1",
        12: "1.xvdba-0",
        13: "11.xvdb-0",
        14: "blkback.1.xvdb",
        20: "vif1.1-q0-guest-rx",
        21: "vif1.1-q0-dealloc",
        22: "vif1.10-q0-dealloc",
        30: "xenconsoled",
    }
    assert cpu.blkback_threads(processes, 1, "xvdb") == [10, 11, 14]
    assert cpu.netback_threads(processes, 1, 1) == [20, 21]
    assert cpu.named(processes, "xenconsoled") == [30]


def test_cpu_time_of_a_process_grows_as_it_works() -> None:
    before = cpu.process_ns(os.getpid())
    sum(range(200_000))
    assert cpu.process_ns(os.getpid()) > before
    assert os.getpid() in cpu.names()
    with pytest.raises(OSError):
        cpu.process_ns(2**22 - 1)


def test_a_profile_only_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with profiled(3):
        pass
    folder = tmp_path / "profiles"
    with pytest.raises(BenchError, match="no profile"):
        profiles.text(folder)
    with profiles.profiling(folder), profiled(3):
        sorted(str(number) for number in range(1000))
    assert VARIABLE not in os.environ
    [file] = folder.iterdir()
    assert file.name == f"backend-3-{os.getpid()}.prof"
    assert pstats.Stats(str(file)).total_calls > 0  # type: ignore[attr-defined]
    assert "sorted" in profiles.text(folder)
