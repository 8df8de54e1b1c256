"""Kernel modules for an initramfs: which ones, in which order.

Facts: ``modules.dep`` (made by depmod; a .deb carries none) lists ``path: dependencies...`` relative to
``/lib/modules/RELEASE``; dependencies are listed nearest first, so loading goes from the last one back.
Names use ``-`` and ``_`` alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from xtool.errors import LabError
from xtool.lab.cpio import CpioArchive
from xtool.lab.steps import run


def kernel_release(root: Path) -> str:
    """The one release under ``root/lib/modules``."""
    (folder,) = (root / "lib/modules").iterdir()
    return folder.name


def run_depmod(root: Path) -> None:
    run(["depmod", "-b", root, kernel_release(root)], "listing kernel modules")


def load_order(modules_dep: str, wanted: Iterable[str], builtin: str = "") -> list[str]:
    """Paths to load, in order, so that ``wanted`` and all they need are loaded.

    ``modules_dep`` and ``builtin`` are the texts of ``modules.dep`` and ``modules.builtin``.
    Raises LabError for a module neither knows.
    """
    table: dict[str, tuple[str, list[str]]] = {}
    for line in modules_dep.splitlines():
        file, _, dependencies = line.partition(":")
        table[_name(file)] = (file, dependencies.split())
    present = {_name(line) for line in builtin.splitlines()}
    order: dict[str, None] = {}
    for name in wanted:
        if _name(name) in present:
            continue
        found = table.get(_name(name))
        if found is None:
            raise LabError(f"this kernel has no module {name}")
        path, needs = found
        for each in (*reversed(needs), path):
            order[each] = None
    return list(order)


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko")[0].replace("-", "_")


def add_modules(archive: CpioArchive, root: Path, wanted: Iterable[str], folder: str) -> None:
    """Put modules and a file ``order`` (names to load, in order) into ``folder`` of the archive."""
    base = root / "lib/modules" / kernel_release(root)
    order = load_order((base / "modules.dep").read_text(), wanted, (base / "modules.builtin").read_text())
    archive.folder(folder)
    names = []
    for path in order:
        name = path.rsplit("/", 1)[-1]
        archive.file(f"{folder}/{name}", (base / path).read_bytes())
        names.append(name)
    archive.file(f"{folder}/order", "".join(f"{name}\n" for name in names).encode())
