"""``docs/hostile.md`` is held to the tests: every number is in it, each test it names is there, and says of
itself that it is about that number."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "hostile.md"
WANTED = {f"HF {n}" for n in range(1, 43)} | {f"R{n}" for n in (*range(1, 11), 19, 20)}
_TEST = re.compile(r"`((?:pure|fake|xen|contract)/\w+\.py)::(\w+)`")
_NUMBER = re.compile(r"HF \d+|R\d+")
#: ``test_hf_16_to_19_...``, ``test_hf1_2_4_...``, ``test_r6_...``.
_IN_NAME = re.compile(r"_(hf|r)_?(\d+(?:_(?:to_)?\d+)*)_")
_IN_TEXT = re.compile(r"\b(HF|R) ?(\d+)((?:, \d+)*(?: and \d+)?)")


@cache
def in_file(file: str) -> dict[str, str]:
    """Name -> docstring of a file's tests."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_docstring(node) or "" for node in found if node.name.startswith("test_")}


def numbers(name: str, text: str) -> set[str]:
    """What a test says it is about."""
    found = set()
    for kind, digits in _IN_NAME.findall(name):
        words = digits.split("_")
        for at, word in enumerate(words):
            if word == "to":
                found |= {(kind, n) for n in range(int(words[at - 1]), int(words[at + 1]) + 1)}
            else:
                found.add((kind, int(word)))
    for kind, first, rest in _IN_TEXT.findall(text):
        found |= {(kind.lower(), int(n)) for n in (first, *re.findall(r"\d+", rest))}
    return {f"HF {n}" if kind == "hf" else f"R{n}" for kind, n in found}


def rows() -> list[tuple[list[str], list[tuple[str, str]]]]:
    """(numbers, tests) of each row about an attack or a requirement."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and _NUMBER.match(cells[1]):
            found.append((_NUMBER.findall(cells[1]), _TEST.findall(cells[4])))
    return found


def test_every_number_has_a_row_and_each_row_a_test() -> None:
    table = rows()
    assert sorted(n for those, _ in table for n in those) == sorted(WANTED)
    assert all(tests for _, tests in table)


@pytest.mark.parametrize(("file", "name"), sorted(set(_TEST.findall(PAGE.read_text()))))
def test_what_it_names_is_there(file: str, name: str) -> None:
    assert name in in_file(file)


def test_each_attack_is_carried_out_by_a_test_that_names_it() -> None:
    for those, tests in rows():
        said = [numbers(name, in_file(file)[name]) for file, name in tests]
        for number in those:
            assert any(number in one for one in said), number
            on_real_backends = [file for file, _ in tests if file.startswith(("fake/", "xen/"))]
            assert on_real_backends or number == "HF 41"


def test_names_are_read_right() -> None:
    assert numbers("test_hf_16_to_19_requests", "") == {"HF 16", "HF 17", "HF 18", "HF 19"}
    assert numbers("test_hf1_2_4_indexes", "R6, R7 and HF 3") == {"HF 1", "HF 2", "HF 4", "HF 3", "R6", "R7"}
    assert numbers("test_r10_a_guest_is_given", "HF 34, 35: raw") == {"R10", "HF 34", "HF 35"}
