"""The command lines of the tuning verbs: what they ask of the toolstack, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xtool.cli import app
from xtool.cli.sched import vcpu_numbers
from xtool.cli.tuning import size_argument
from xtool.config.cpupool import parse_pool
from xtool.errors import ConfigError, UsageError
from xtool.toolstack import api

VERBS = [
    verb for verb, known in app.VERBS.items() if known.module in ("tuning", "sched", "cpupool", "control")
]
POOL = api.PoolInfo(1, "batch", "credit", (2, 3), 1)


class Recorder:
    """A client that answers with canned records and remembers what it was asked."""

    ANSWERS: dict[str, Any] = {
        "vcpu_pin": [api.VcpuInfo("web", 3, 0, 1, "running", 1.5, "2-3", "all")],
        "vcpu_set": api.VcpuCount(3, "web", 1, 2, 4),
        "mem_set": api.MemoryInfo(3, "web", 512 << 20, 256 << 20, 1 << 30, 513 << 20),
        "mem_max": api.MemoryInfo(3, "web", 512 << 20, 256 << 20, 1 << 30, 1025 << 20),
        "sched_credit": [api.CreditInfo(3, "w\x1b[1meb", "Pool-0", 256, 0)],
        "sched_credit_set": [api.CreditInfo(3, "web", "Pool-0", 512, 50)],
        "sched_pool": [api.PoolScheduler("Pool-0", "credit2", 1000)],
        "sched_pool_set": [api.PoolScheduler("batch", "credit", 1000, 30, 0)],
        "sched_rtds": [api.RtdsInfo(3, "web", "rt", 0, 10000, 4000, False)],
        "sched_rtds_set": [api.RtdsInfo(3, "web", "rt", 0, 10000, 2500, True)],
        "cpupool_list": [POOL],
        "cpupool_numa_split": [POOL],
        "set_parameters": [api.ParameterChange("loglvl", "warning", "all")],
        "debug_keys": "h",
        "dump_core": api.CoreDump(3, "web", "/tmp/x", 4096, 512, 2, 1, "crashed"),
    }

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            self.asked.append((name, args, {k: v for k, v in keys.items() if k != "progress"}))
            if name in self.ANSWERS:
                return self.ANSWERS[name]
            return POOL if name.startswith("cpupool_") and name != "cpupool_migrate" else DONE

        return call

    def close(self) -> None:
        pass


DONE = api.LifecycleResult(3, "web", "done")


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[Recorder, int, str, str]:
    client = Recorder()
    code = app.main(line, opener=lambda: client)  # type: ignore[arg-type, return-value]
    out, err = capsys.readouterr()
    return client, code, out, err


ASKED: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("vcpu-pin web 0 2-3", "vcpu_pin", ("web", 0, "2-3", "-"), {"force": False}),
    ("vcpu-pin web all - node:0", "vcpu_pin", ("web", None, "-", "node:0"), {"force": False}),
    ("vcpu-pin -f web 1 0", "vcpu_pin", ("web", 1, "0", "-"), {"force": True}),
    ("vcpu-set web 2", "vcpu_set", ("web", 2), {"ignore_host": False, "wait": None}),
    ("vcpu-set -i web 2 -w --timeout 5", "vcpu_set", ("web", 2), {"ignore_host": True, "wait": 5.0}),
    ("mem-set web 512", "mem_set", ("web", 512 << 20), {"wait": None}),
    ("mem-set web 2GiB -w", "mem_set", ("web", 2 << 30), {"wait": 60.0}),
    ("mem-max web 1g", "mem_max", ("web", 1 << 30), {}),
    ("sched-credit2", "sched_credit", ("credit2", None, None), {}),
    ("sched-credit -d web", "sched_credit", ("credit", "web", None), {}),
    ("sched-credit -d web -w 512 -c 50", "sched_credit_set", ("credit", "web"), {"weight": 512, "cap": 50}),
    ("sched-credit -p batch", "sched_credit", ("credit", None, "batch"), {}),
    ("sched-credit2 -s", "sched_pool", ("credit2", None), {}),
    (
        "sched-credit -s -t 10 -r 500 -m 9 -p batch", "sched_pool_set", ("credit", "batch"),
        {"ratelimit_us": 500, "tslice_ms": 10, "migration_delay_us": 9},
    ),
    ("sched-rtds", "sched_rtds", (None, None, None), {}),
    ("sched-rtds -d web -v 1 -v 0", "sched_rtds", ("web", None, [1, 0]), {}),
    ("sched-rtds -c rt", "sched_rtds", (None, "rt", None), {}),
    (
        "sched-rtds -d web -p 10000 -b 2500 -e 1", "sched_rtds_set", ("web", None),
        {"period": 10000, "budget": 2500, "extratime": True},
    ),
    ("cpupool-list batch", "cpupool_list", ("batch",), {}),
    ("cpupool-create name=batch cpus=2-3 sched=credit", "cpupool_create",
     (api.PoolRequest("batch", "credit", "2-3"),), {}),
    ('cpupool-create name=b cpus=["2",3] nodes=1', "cpupool_create",
     (api.PoolRequest("b", "", "2,3", "1"),), {}),
    ("cpupool-destroy batch", "cpupool_destroy", ("batch",), {}),
    ("cpupool-rename batch night", "cpupool_rename", ("batch", "night"), {}),
    ("cpupool-cpu-add batch node:1", "cpupool_cpu_add", ("batch", "node:1"), {}),
    ("cpupool-cpu-remove batch 3", "cpupool_cpu_remove", ("batch", "3"), {}),
    ("cpupool-migrate web batch", "cpupool_migrate", ("web", "batch"), {}),
    ("cpupool-numa-split", "cpupool_numa_split", (), {}),
    ("trigger web power", "trigger", ("web", "power", 0), {}),
    ("trigger web nmi 1", "trigger", ("web", "nmi", 1), {}),
    ("sysrq web s", "sysrq", ("web", "s"), {}),
    ("debug-keys h", "debug_keys", ("h",), {}),
    ("set-parameters loglvl=all x=1", "set_parameters", (["loglvl=all", "x=1"],), {}),
    ("dump-core web /tmp/x -L -C", "dump_core", ("web", Path("/tmp/x")),
     {"live": True, "crash": True, "reset": False}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "method", "args", "keys"), ASKED, ids=[line for line, *_ in ASKED])
def test_what_is_asked(
    line: str, method: str, args: object, keys: object, capsys: pytest.CaptureFixture[str]
) -> None:
    client, code, out, err = run(capsys, *line.split())
    assert (code, client.asked) == (0, [(method, args, keys)]), err
    assert method == "debug_keys" or out.strip()
    assert "\x1b" not in out
    client, code, out, err = run(capsys, *line.split(), "-o", "json")
    assert code == 0 and json.loads(out) is not None


def test_every_verb_is_asked_for_above() -> None:
    assert {line.split()[0] for line, *_ in ASKED} == set(VERBS) and len(VERBS) == 20


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_two_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([verb, "--help"]) == 0
    assert capsys.readouterr().out.count(f"xtool {verb}") >= 3  # the usage line too


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("vcpu-pin web one 2", "no vCPU"),
        ("vcpu-set web many", "VCPUS"),
        ("mem-set web lots", "not a size"),
        ("mem-set web 1kib", "whole number of MiB"),
        ("sched-credit2 -w 3", "a domain's"),
        ("sched-credit -t 3", "say -s"),
        ("sched-credit -d web -p x", "for all"),
        ("sched-rtds -p 100", "whose"),
        ("sched-rtds -d web -v all -v 1 -b 3", "or all alone"),
        ("sched-rtds -d web -v 0 -v 1 -p 1 -p 2 -p 3", "once for each"),
        ("cpupool-create cpus=1", "wants a name"),
        ("cpupool-create name=x weight=3", "sets nothing"),
        ("cpupool-create name=x cpus=zwei", "no list of cpus"),
        ("cpupool-create /no/such/file", "cannot read"),
        ("trigger web nmi -1", ""),
        ("set-parameters", ""),
    ],
)
def test_refused(line: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    client, code, _, err = run(capsys, *line.split())
    assert code in (2, 3) and what in err and not client.asked


def test_rtds_takes_values_for_each_vcpu(capsys: pytest.CaptureFixture[str]) -> None:
    line = "sched-rtds -d web -v 0 -p 100 -b 50 -v 3 -p 200 -b 60 -e 0"
    client, code, _, err = run(capsys, *line.split())
    assert code == 0, err
    assert [
        (args[1], keys["period"], keys["budget"], keys["extratime"]) for _, args, keys in client.asked
    ] == [
        ([0], 100, 50, False),
        ([3], 200, 60, False),
    ]
    assert vcpu_numbers(["all"]) is None


def test_a_dry_run_makes_no_pool(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "batch.yaml"
    file.write_text("sched: credit\ncpus: [2, '3']\n")
    client, code, out, _ = run(capsys, "cpupool-create", str(file), "-n", "cpus=1")
    assert (code, client.asked) == (0, [])
    assert out.splitlines() == ["name: batch", "sched: credit", "cpus: 1"]


# --- parsing ----------------------------------------------------------------------------------------
def test_pool_files() -> None:
    assert parse_pool("name: x\ncpus: 0-3,^1\nnodes: [0, '2-3']\n") == {
        "name": "x", "sched": "", "cpus": "0-3,^1", "nodes": "0,2-3"
    }  # fmt: skip
    assert parse_pool("", overrides=["name=7"])["name"] == "7"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name: [", "not YAML"),
        ("- a", "KEY: VALUE"),
        ("nmae: x", "unknown key 'nmae'"),
        ("cpus: true", "a word is wanted"),
        ("cpus: {a: 1}", "a word is wanted"),
        ("cpus: 9-3", "no list"),
        ("name: [x]", "a word is wanted"),
        ("name: &a [*a]", "a word is wanted"),
    ],
)
def test_pool_files_refused(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse_pool(text, "pool.yaml")


def test_sizes() -> None:
    assert [size_argument(t) for t in ("512", "512M", "2GiB", "1t")] == [
        512 << 20,
        512 << 20,
        2 << 30,
        1 << 40,
    ]
    for bad in ("", "-1", "1.5G", "12XB", "³"):
        with pytest.raises(UsageError):
            size_argument(bad)
