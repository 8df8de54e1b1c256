"""The check on VT-x: the machine's description, and what counts as proof on its serial line."""

from __future__ import annotations

import json

import pytest

from xtool.lab import bochs
from xtool.lab.vtx import INFO, SIGNS, Report

TESTS = ("tests/xen/test_a.py::test_one", "tests/xen/test_a.py::test_two[8-1]")
LOG = [
    "(XEN) Xen version 4.17.6 (Debian 4.17.6-1) (gcc)",
    "(XEN)  - Extended Page Tables (EPT)",
    "(XEN)  - Virtual-Processor Identifiers (VPID)",
    "(XEN) HVM: VMX enabled",
    "(XEN) HVM: Hardware Assisted Paging (HAP) detected",
    "XTOOL-LAB-READY",
    "XTOOL-VTX BEGIN info",
    *json.dumps(INFO, indent=2).splitlines(),
    "XTOOL-VTX END info 0",
    "XTOOL-VTX BEGIN snapshot",
    "XTOOL-VTX END snapshot 0",
    "XTOOL-VTX BEGIN tests",
    "tests/xen/test_a.py::test_one (d1) SeaBIOS (version 1.16)",
    "PASSED    [ 50%]",
    "PASSED tests/xen/test_a.py::test_one",
    "PASSED tests/xen/test_a.py::test_two[8-1]",
    "XTOOL-VTX END tests 0",
    "XTOOL-VTX BEGIN leaks",
    "Nothing was left behind.",
    "XTOOL-VTX END leaks 0",
    "XTOOL-VTX DONE",
]


def read(lines: list[str], tests: tuple[str, ...] = TESTS) -> Report:
    report = Report(tests)
    for line in lines:
        report.feed(line + "\r")
    return report


def test_a_whole_log_proves_it() -> None:
    report = read(LOG)
    assert report.done and report.problems() == []


@pytest.mark.parametrize("missing", [line for line in LOG if line.startswith(("(XEN)", "PASSED t", "XTOOL"))])
def test_every_sign_counts(missing: str) -> None:
    report = read([line for line in LOG if line != missing])
    assert report.problems() or not report.done


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"Intel"', '"AMD"', "says 'AMD' for vendor, not 'Intel'"),
        ("true", "false", "says False for nested_paging, not True"),
        ('"asid": true', '"asid": 1', "says 1 for asid, not True"),
        ("END leaks 0", "END leaks 1", "step leaks ended with status 1"),
        ("END info 0", "END info 127", "step info ended with status 127"),
        (
            "PASSED tests/xen/test_a.py::test_one",
            "SKIPPED tests/xen/test_a.py::test_one",
            "test_one: SKIPPED",
        ),
        (
            "PASSED tests/xen/test_a.py::test_one",
            "FAILED tests/xen/test_a.py::test_one - no",
            "test_one: FAILED",
        ),
    ],
)
def test_another_answer_proves_nothing(old: str, new: str, problem: str) -> None:
    assert any(old in line for line in LOG)
    assert any(problem in said for said in read([line.replace(old, new) for line in LOG]).problems())


def test_xens_lines_amid_an_answer_do_no_harm() -> None:
    at = LOG.index("XTOOL-VTX BEGIN info") + 2
    assert read([*LOG[:at], "(XEN) d0v0: something", *LOG[at:]]).problems() == []


def test_a_test_named_without_parameters_stands_for_all() -> None:
    named = ("tests/xen/test_a.py",)
    assert read(LOG, named).problems() == []
    failed = [
        line.replace("PASSED tests/xen/test_a.py::test_two", "ERROR tests/xen/test_a.py::test_two")
        for line in LOG
    ]
    assert read(failed, named).problems() == ["tests/xen/test_a.py: ERROR, PASSED"]


@pytest.mark.parametrize(
    "line",
    [
        "XTOOL-LAB-FAILED no disk labelled lab",
        "(XEN) Panic on CPU 0:",
        "[    1.0] Kernel panic - not syncing: VFS",
    ],
)
def test_what_ends_it_at_once(line: str) -> None:
    report = read([*LOG[:3], line])
    assert report.fatal == line and report.problems()


def test_every_sign_is_told_once() -> None:
    report = Report(TESTS)
    told = [report.feed(line) for line in LOG + LOG]
    for what, _ in SIGNS:
        assert sum(1 for text in told if text and text.startswith(f"{what}: ")) == 1


@pytest.mark.parametrize("size", [1, 516_095, 516_096, 516_097, 4 << 30])
def test_disks_have_the_size_of_their_geometry(size: int) -> None:
    whole = bochs.cylinders(size) * 16 * 63 * 512
    assert size <= whole < size + 16 * 63 * 512


def test_the_machine_is_intels() -> None:
    lines = bochs.bochsrc(8323, 521).splitlines()
    assert any(line.startswith("cpu: model=corei7_haswell_4770,") for line in lines)
    assert "ata0-master: type=disk, mode=flat, path=root.img, cylinders=8323, heads=16, spt=63" in lines
