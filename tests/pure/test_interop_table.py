"""The interop matrix: each cell has a test or a reason, and the table in the docs says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "xen"))

import cells  # type: ignore[import-not-found]


@pytest.fixture(scope="module")
def tested() -> list[cells.Tested]:
    return list(cells.collect())


def test_each_cell_has_a_test_or_a_reason(tested: list[cells.Tested]) -> None:
    found = {one.cell for one in tested}
    every = set(cells.all_cells())
    assert found | set(cells.REASONS) == every, "neither a test nor a reason"
    assert not found & set(cells.REASONS), "a reason why there is no test, and a test"
    assert len(every) == 36


def test_the_table_is_up_to_date(tested: list[cells.Tested]) -> None:
    _, inside, _ = cells.split(cells.DOC.read_text())
    assert inside.strip() == cells.table(tested).strip(), "run scripts/interop-table"


def test_a_table_shows_what_is_not_proven() -> None:
    cell = cells.Cell("block", "phy", "linux", "pv")
    lines = cells.table([cells.Tested(cell, "a.py::b", False)]).splitlines()
    assert "`a.py::b` *" in [line.split("|")[3].strip() for line in lines if "Linux, pv " in line]
    lines = cells.table([cells.Tested(cell, "a.py::b", proven) for proven in (True, False)]).splitlines()
    assert any("`a.py::b` |" in line for line in lines)
