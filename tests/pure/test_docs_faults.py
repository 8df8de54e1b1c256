"""``docs/faults.md`` is held to the tests: every number is in it, each test it names is there."""

from __future__ import annotations

import ast
import re

import pytest
from test_docs_hostile import ROOT, in_file

PAGE = ROOT / "docs" / "faults.md"
WANTED = {f"FI {n}" for n in range(1, 25) if n != 22} | {f"R{n}" for n in (*range(11, 19), 21, 24, 25)}
_TEST = re.compile(r"`((?:pure|fake|xen|contract)/\w+\.py)::(\w+)`")
_IN_NAME = re.compile(r"_(fi|r)_?(\d+)(?=_)")
#: Those that this page alone is about: each of their tests must name its number, and be in the table.
OWN = ("fake/test_faults.py",)


def rows() -> list[tuple[str, list[tuple[str, str]], str]]:
    """(number, tests, seen on) of each row."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if re.match(r"\| (FI |R)\d", line):
            assert len(cells) == 7, line
            found.append((cells[1], _TEST.findall(cells[4]), cells[5]))
    return found


def test_every_number_has_a_row_and_each_row_a_test() -> None:
    table = rows()
    assert sorted(number for number, _, _ in table) == sorted(WANTED)
    assert all(tests for _, tests, _ in table)
    assert "FI 22" in PAGE.read_text()


@pytest.mark.parametrize(("file", "name"), sorted(set(_TEST.findall(PAGE.read_text()))))
def test_what_it_names_is_there(file: str, name: str) -> None:
    assert name in in_file(file)


def proven(file: str) -> set[str]:
    """The tests of a file that are not marked ``unproven``, by themselves or all."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    if any(isinstance(n, ast.Assign) and "unproven" in ast.unparse(n) for n in tree.body):
        return set()
    tests = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return {n.name for n in tests if not any("unproven" in ast.unparse(d) for d in n.decorator_list)}


def test_what_was_seen_on_xen_has_a_proven_test_there() -> None:
    for number, tests, seen in rows():
        assert re.match(r"(Xen|fake)(\.|$)", seen), number
        if seen.startswith("Xen"):
            there = [(f, n) for f, n in tests if f.startswith(("xen/", "contract/"))]
            assert any(name in proven(file) for file, name in there), number


@pytest.mark.parametrize("file", OWN)
def test_its_own_tests_say_their_numbers_and_are_named(file: str) -> None:
    named = {(number, name) for number, tests, _ in rows() for where, name in tests if where == file}
    for name, text in in_file(file).items():
        numbers = {("FI " if kind == "fi" else "R") + digits for kind, digits in _IN_NAME.findall(name)}
        assert numbers, name
        for number in numbers:
            assert number in text or number.replace(" ", "") in text, (name, number)
            assert (number, name) in named, (name, number)
