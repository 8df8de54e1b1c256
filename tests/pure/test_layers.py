"""The shape of the package: imports go down only, none is relative, files fit one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "xtool"
MAX_LINES = 400

#: Each layer may import those below it, and itself within one package.
LAYERS = [
    {
        "abi",
        "errors",
        "paths",
        "progress",
        "devnode",
        "diskurl",
        "libc",
        "systempython",
        "warmlink",
        "__init__",
    },
    {"proto", "config"},
    {"hypercall", "xenstore", "evtchn", "grant", "fake"},
    {"builder", "devices", "backends", "frontends", "devicemodel"},
    {"toolstack"},
    {"drivers", "client", "apply"},
    {"daemon", "cli", "lab"},
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
#: Siblings that may meet, and which way.
ALLOWED = {
    ("cli", "lab"),
    # The zygote's children carry command lines out.
    ("daemon", "cli"),
    ("cli", "daemon"),
    # What a device is called, and where its nodes are.
    ("backends", "devices"),
    ("frontends", "devices"),
    *((a, b) for a in LAYERS[0] for b in LAYERS[0] if b != "__init__"),
}

#: A port says what its package offers and imports nothing real: the fake is written against it.
PORTS = (
    "xtool.hypercall.port",
    "xtool.hypercall.tuningport",
    "xtool.xenstore.port",
    "xtool.evtchn.port",
    "xtool.grant.port",
    # Neither touches a device: pieces of address space, and filling in a batch.
    "xtool.grant.window",
    "xtool.grant.copy",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """``xtool.cli.app`` -> ``cli``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """``(line, module)`` of each import of our own modules; late ones and those for types count too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "xtool":
            yield from ((node.lineno, f"xtool.{a.name}" if a.name in LAYER else "xtool") for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def complaints(part: str, source: str) -> list[str]:
    """What is wrong with the imports of ``source``, a module of ``part``."""
    found = []
    for line, module in imports(ast.parse(source)):
        if module.startswith("."):
            found.append(f"line {line}: relative import of {module}")
            continue
        if module != "xtool" and not module.startswith("xtool."):
            continue
        other = part_of(module)
        if other not in LAYER:
            found.append(f"line {line}: {module} is in no layer")
        elif part == "fake" and module in PORTS:
            continue
        elif other != part and (part, other) not in ALLOWED and LAYER[other] >= LAYER[part]:
            found.append(f"line {line}: {part} (L{LAYER[part]}) imports {module} (L{LAYER[other]})")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_and_files_are_short(path: Path) -> None:
    source = path.read_text()
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in LAYER, f"{part} is in no layer"
    assert complaints(part, source) == []
    assert len(source.splitlines()) < MAX_LINES, f"{path.name}: {MAX_LINES} lines or more"


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("config", "from xtool.hypercall.port import Hypervisor"),
        ("builder", "def f():\n    import xtool.devices.keys"),
        ("abi", "from xtool import cli"),
        ("lab", "from xtool.cli import app"),
        ("proto", "from . import shm"),
        ("proto", "import xtool.nowhere"),
    ],
)
def test_the_test_finds_what_is_wrong(part: str, source: str) -> None:
    assert len(complaints(part, source)) == 1


def test_what_is_right_passes() -> None:
    assert complaints("cli", "from xtool.lab import spec\nfrom xtool.toolstack import api\nimport os") == []
