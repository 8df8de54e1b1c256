"""The interop matrix: which test is about which cell, and why a cell has none.

A test says it by a mark, in which ``$name`` stands for a parameter of the test::

    @pytest.mark.cell("block", backend="$backend", frontend="linux", guest="$kind")

``frontend`` is ``xtool`` (ours, in domain 0: ``guest`` is ``dom0``) or ``linux``. ``scripts/interop-table``
collects the marks and writes the table into ``docs/interop.md``; ``tests/pure/test_interop_table.py`` fails
when that was forgotten, or a cell has neither a test nor a reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "interop.md"
BEGIN, END = "<!-- table: scripts/interop-table -->\n", "<!-- end of table -->\n"

#: Who may serve each kind of device: ours, the kernel (or Xen's daemon), QEMU.
BACKENDS = {
    "block": ("xtool", "phy", "qdisk"),
    "net": ("xtool", "vif", "qemu"),
    "console": ("xtool", "xenconsoled", "qemu"),
}
#: What stands above their columns.
TITLES = {
    "xtool": "xtool",
    "phy": "phy (blkback)",
    "qdisk": "qdisk (QEMU)",
    "vif": "vif (netback)",
    "xenconsoled": "xenconsoled",
    "qemu": "QEMU",
}
ENDS = (("xtool", "dom0"), ("linux", "pv"), ("linux", "pvh"), ("linux", "hvm"))

_QEMU_NET = "not offered: interfaces are netback's or xtool's; QEMU's cards are emulated ones"
_QEMU_CONSOLE = "not offered: additional consoles are xtool's"
_PATH = "cannot be: QEMU looks for the frontend below `/local/domain/0/device`, where the kernel's takes it"
_DAEMON = "cannot be: xenconsoled serves domains from 1 up"


class Cell(NamedTuple):
    device: str
    backend: str
    frontend: str
    guest: str


REASONS: dict[Cell, str] = {
    Cell("block", "qdisk", "xtool", "dom0"): _PATH,
    Cell("console", "xenconsoled", "xtool", "dom0"): _DAEMON,
    **{Cell("net", "qemu", *end): _QEMU_NET for end in ENDS},
    **{Cell("console", "qemu", *end): _QEMU_CONSOLE for end in ENDS},
}


class Tested(NamedTuple):
    """A test and one of its cells; ``proven``: it has been seen passing on real Xen."""

    cell: Cell
    test: str
    proven: bool


def all_cells() -> Iterator[Cell]:
    for device, backends in BACKENDS.items():
        for backend in backends:
            for end in ENDS:
                yield Cell(device, backend, *end)


def cells_of(item: pytest.Item) -> Iterator[Tested]:
    """What a collected test is about. Raises ``ValueError`` for a mark that names no cell."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    known = set(all_cells())
    for mark in item.iter_markers("cell"):
        words = {"device": mark.args[0], **mark.kwargs}
        words = {name: params[word[1:]] if word.startswith("$") else word for name, word in words.items()}
        cell = Cell(**words)
        if cell not in known:
            raise ValueError(f"{item.nodeid}: {cell} is no cell")
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        yield Tested(cell, name, item.get_closest_marker("unproven") is None)


def write_collected(items: Iterable[pytest.Item], path: str) -> None:
    """For another process: what ``collect`` reads."""
    found = [[*tested.cell, tested.test, tested.proven] for item in items for tested in cells_of(item)]
    Path(path).write_text(json.dumps(found))


def collect() -> list[Tested]:
    """The cells of all tests on real Xen; they are collected by a pytest of their own, and not run."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, str(ROOT / "tests" / "xen")],
            cwd=ROOT,
            env={**os.environ, "XTOOL_CELLS": file.name},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return [Tested(Cell(*words[:4]), words[4], words[5]) for words in json.load(file)]


def table(tested: Iterable[Tested]) -> str:
    """In Markdown, a table for each kind of device."""
    tests: dict[Cell, dict[str, bool]] = {}
    for one in tested:
        known = tests.setdefault(one.cell, {})
        known[one.test] = known.get(one.test, False) or one.proven
    lines = []
    for device, backends in BACKENDS.items():
        lines += [f"## {device}", "", "| frontend | " + " | ".join(TITLES[b] for b in backends) + " |"]
        lines.append("|---" * (1 + len(backends)) + "|")
        for frontend, guest in ENDS:
            row = ["xtool, in domain 0" if guest == "dom0" else f"Linux, {guest}"]
            for backend in backends:
                cell = Cell(device, backend, frontend, guest)
                names = [
                    f"`{name}`" + ("" if proven else " *")
                    for name, proven in sorted(tests.get(cell, {}).items())
                ]
                row.append(", ".join(names) or REASONS.get(cell, "?"))
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def split(text: str) -> tuple[str, str, str]:
    """A document before its table, the table, and the rest."""
    before, _, rest = text.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before + BEGIN, inside, END + after


def main() -> None:
    before, _, after = split(DOC.read_text())
    DOC.write_text(f"{before}\n{table(collect())}\n{after}")


if __name__ == "__main__":
    main()
