"""Building an image: archives, module order, boot records, folders that are whole or absent."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from xtool.errors import LabError
from xtool.lab import guests, image, steps, sync
from xtool.lab.cpio import CpioArchive
from xtool.lab.modules import load_order
from xtool.progress import SILENT


def read_newc(data: bytes) -> dict[str, tuple[int, bytes]]:
    """name -> (mode, content), by the format's own rules."""
    found, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        at = (at + 110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            return found
        assert name not in found, "an entry twice"
        found[name] = (fields[1], data[at : at + fields[6]])
        at = (at + fields[6] + 3) & ~3


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 4096])
def test_cpio_holds_what_was_put_in(size: int) -> None:
    archive = CpioArchive()
    archive.file("a/b/data", b"x" * size, 0o755)
    archive.file("a/other", b"y")
    archive.link("bin/sh", "busybox")
    archive.device("dev/console", 5, 1)
    found = read_newc(archive.to_bytes())
    assert found["a/b/data"] == (0o100755, b"x" * size)
    assert found["bin/sh"] == (0o120777, b"busybox")
    assert found["dev/console"][0] == 0o020600
    names = list(found)
    assert names.index("a") < names.index("a/b") < names.index("a/b/data")
    assert archive.to_bytes() == archive.to_bytes(), "asking twice changes nothing"


DEP = """k/ext4.ko: k/jbd2.ko k/mbcache.ko
k/jbd2.ko:
k/mbcache.ko:
k/virtio_blk.ko: k/virtio_ring.ko k/virtio.ko
"""


def test_modules_load_after_what_they_need() -> None:
    assert load_order(DEP, ["virtio-blk", "ext4"]) == [
        *("k/virtio.ko", "k/virtio_ring.ko", "k/virtio_blk.ko", "k/mbcache.ko", "k/jbd2.ko", "k/ext4.ko")
    ]
    assert load_order(DEP, ["crc32c_generic", "jbd2"], "k/crc32c_generic.ko\n") == ["k/jbd2.ko"]
    with pytest.raises(LabError, match="no module nvme"):
        load_order(DEP, ["nvme"])


def test_boot_record_has_one_active_partition() -> None:
    sector = guests.boot_record(b"\x90" * 440, 1 << 20, 31 << 20)
    assert len(sector) == 512 and sector[:440] == b"\x90" * 440 and sector[510:] == b"\x55\xaa"
    assert sector[446] == 0x80 and sector[450] == 0x0E
    assert int.from_bytes(sector[454:458], "little") == 2048
    assert int.from_bytes(sector[458:462], "little") == (31 << 20) // 512
    assert sector[462:510] == bytes(48)


def test_recipe_names_the_image_by_what_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    before = image.recipe_hash()
    assert before == image.recipe_hash() and len(before) == 16
    monkeypatch.setattr(image, "_PACKAGES", (*image._PACKAGES, "another"))
    assert image.recipe_hash() != before


class Steps:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def step(self, text: str) -> None:
        self.texts.append(text)

    def advance(self, done: int, total: int | None = None) -> None:
        pass


def test_a_failed_build_leaves_nothing_and_a_killed_ones_leftover_goes(tmp_path: Path) -> None:
    final = tmp_path / "image"

    def fail(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise LabError("no network")

    with pytest.raises(LabError, match="no network"):
        steps.build_folder(final, "building", SILENT, fail)
    assert [p.name for p in tmp_path.iterdir()] == [".image.lock"]

    (tmp_path / ".building-image-12345").mkdir()  # what kill -9 leaves
    told = Steps()
    assert steps.build_folder(final, "building", told, lambda folder: (folder / "part").write_text("whole"))  # type: ignore[arg-type]
    assert (final / "part").read_text() == "whole"
    assert not list(tmp_path.glob(".building-*")) and any("half-built" in text for text in told.texts)
    assert not steps.build_folder(final, "building", SILENT, fail), "it is there: nothing is built"


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="not enough disk space") as caught:
        steps.require_space(tmp_path, 1 << 60, "the image")
    assert "XDG_CACHE_HOME" in str(caught.value.hint)

    def fill(folder: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(LabError, match="disk is full"):
        steps.build_folder(tmp_path / "image", "building", SILENT, fill)
    with pytest.raises(LabError) as caught:
        steps.run(["cp", "/proc/self/cmdline", "/dev/full"], "writing")
    assert "disk is full" in str(caught.value.hint)


def test_a_missing_tool_names_its_package() -> None:
    with pytest.raises(LabError, match="packages are missing: nothing-like-it") as caught:
        steps.require_tools({"sh": "dash", "no-such-tool-here": "nothing-like-it"})
    assert "scripts/setup" in str(caught.value.hint)


def test_sync_sends_what_differs() -> None:
    held = {"a": "1", "b": "2", "gone": "3"}
    assert sync.difference(held, {"a": "1", "b": "9", "new": "4"}) == (["b", "new"], ["gone"])
    assert sync.difference(held, held) == ([], [])


def test_hashes_follow_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "tree"
    (root / "xtool/__pycache__").mkdir(parents=True)
    (root / "xtool/__pycache__/a.pyc").write_bytes(b"")
    (root / "xtool/a.py").write_text("A = 1\n")
    first = sync.Hashes(root).record()
    assert list(first) == ["xtool/a.py"]
    assert sync.Hashes(root).record() == first
    (root / "xtool/a.py").write_text("A = 2\n")
    os.utime(root / "xtool/a.py", ns=(1, 1))
    assert sync.Hashes(root).record() != first


def test_packed_bytecode_is_what_python_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.MAGIC_NUMBER != image.LAB_PYC_MAGIC:
        pytest.skip("bytecode is sent only by Python 3.11")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "tree"
    (root / "xtool").mkdir(parents=True)
    (root / "xtool/module.py").write_text("print(__file__, __cached__)\n")
    archive = sync.pack(root, ["xtool/module.py"], ["old one"])
    target = tmp_path / "lab"
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.extractfile(".remove").read() == b"old one\0"  # type: ignore[union-attr]
        tar.extractall(target, filter="data")
    pyc = target / "xtool/__pycache__/module.cpython-311.pyc"
    before = pyc.read_bytes()
    argv = [sys.executable, "-v", "-c", "import xtool.module"]
    done = subprocess.run(argv, cwd=target, env={"PYTHONPATH": str(target)}, capture_output=True, text=True)
    assert f"{pyc} matches" in done.stderr, "Python took it for stale"
    assert pyc.read_bytes() == before
