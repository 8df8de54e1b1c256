"""The table of changes is whole, and circles are found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xtool.apply.described import find_circle
from xtool.config.changes import CHANGES, DISK_CHANGES, ORDER, VIF_CHANGES
from xtool.config.devices import DiskConfig, VifConfig
from xtool.config.model import FIELDS
from xtool.config.ready import matches


def test_every_key_says_how_it_can_change() -> None:
    assert set(CHANGES) == set(FIELDS)
    for table, model in ((DISK_CHANGES, DiskConfig), (VIF_CHANGES, VifConfig)):
        assert set(table) == {field.alias or name for name, field in model.model_fields.items()}
    for table in (CHANGES, DISK_CHANGES, VIF_CHANGES):
        assert all(way.when in ORDER and way.why for way in table.values())


@given(st.dictionaries(st.integers(0, 8).map(str), st.lists(st.integers(0, 8).map(str), max_size=4)))
def test_a_circle_is_found_where_there_is_one(depends: dict[str, list[str]]) -> None:
    circle = find_circle(depends)
    left = {name: {n for n in needs if n in depends} for name, needs in depends.items()}
    while ready := [name for name, needs in left.items() if not needs]:
        for name in ready:
            del left[name]
        for needs in left.values():
            needs -= set(ready)
    assert bool(circle) == bool(left)
    for one, other in zip(circle, [*circle[1:], *circle[:1]], strict=True):
        assert other in depends[one]


def test_patterns() -> None:
    assert matches("login:", "web login: ") and matches("port * ready", "port 80 ready")
    assert not matches("ready * port", "port 80 ready")
