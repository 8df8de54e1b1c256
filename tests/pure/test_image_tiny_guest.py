"""The tiny guests build with plain gcc, stay tiny, and are kernels for exactly their type."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from xtool.builder.image import load_kernel
from xtool.errors import ImageError

SCRIPT = Path(__file__).parents[2] / "scripts" / "build-guests"

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guest")
    subprocess.run([str(SCRIPT)], env={**os.environ, "OUT": str(out)}, check=True)
    return out


def test_pv(built: Path) -> None:
    kernel = load_kernel(str(built / "tiny-pv.elf"))
    kernel.require("pv")
    assert kernel.machine == 64
    assert kernel.virt_base == 0xFFFFFFFF80000000
    assert kernel.phys_start == 1 << 20
    assert kernel.pv_entry == kernel.entry
    with pytest.raises(ImageError, match="PHYS32_ENTRY"):
        kernel.require("pvh")


def test_pvh(built: Path) -> None:
    kernel = load_kernel(str(built / "tiny-pvh.elf"))
    kernel.require("pvh")
    assert kernel.machine == 32
    assert kernel.pvh_entry == kernel.entry == 1 << 20
    with pytest.raises(ImageError):
        kernel.require("pv")


def test_they_are_tiny(built: Path) -> None:
    for name in ("tiny-pv.elf", "tiny-pvh.elf"):
        assert (built / name).stat().st_size < 16 << 10


def test_a_second_build_does_nothing(built: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in built.iterdir()}
    run = subprocess.run(
        [str(SCRIPT)], env={**os.environ, "OUT": str(built)}, check=True, capture_output=True, text=True
    )
    assert run.stdout == ""
    assert {p: p.stat().st_mtime_ns for p in built.iterdir()} == before
