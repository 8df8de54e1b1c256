"""The kernel cache: hits, damage, eviction, full disks, killed writers, many processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from image_samples import PV_NOTES, linux_payload, make_bzimage, make_elf

from xtool.builder.image import KernelCache, load_kernel
from xtool.builder.image import cache as cache_module
from xtool.builder.image import load as load_module


def kernel_file(
    folder: Path, name: str = "vmlinuz", *, fill: int = 1, size: int = 200_000
) -> tuple[str, bytes]:
    elf = make_elf(PV_NOTES, payload=bytes([fill]) * size)
    file = folder / name
    file.write_bytes(make_bzimage(linux_payload("xz", elf)))
    return str(file), elf


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "cache" / "kernels", settle=0)


def entries(cache: KernelCache, suffix: str = ".elf") -> list[Path]:
    return sorted(p for p in cache.directory.iterdir() if p.name.endswith(suffix))


def test_the_second_load_is_a_hit(tmp_path: Path, cache: KernelCache) -> None:
    path, elf = kernel_file(tmp_path)
    first, second = load_kernel(path, cache=cache), load_kernel(path, cache=cache)
    assert (first.cached, second.cached) == (False, True)
    assert first.data == second.data == elf
    assert first.digest == second.digest and len(first.digest) == 64
    assert first.notes == second.notes


def test_a_hit_reads_neither_the_source_nor_the_copy(
    tmp_path: Path, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = kernel_file(tmp_path)
    load_kernel(path, cache=cache)

    def forbidden(*_: object) -> None:
        raise AssertionError("read all of it")

    monkeypatch.setattr(load_module, "content_digest", forbidden)
    monkeypatch.setattr(cache_module.zlib, "crc32", forbidden)
    assert load_kernel(path, cache=cache).cached


def test_the_same_content_under_another_name_is_a_hit(tmp_path: Path, cache: KernelCache) -> None:
    path, _ = kernel_file(tmp_path)
    load_kernel(path, cache=cache)
    again, _ = kernel_file(tmp_path, "copy")
    assert load_kernel(again, cache=cache).cached
    assert len(entries(cache)) == 1


def test_a_changed_source_is_a_miss(tmp_path: Path, cache: KernelCache) -> None:
    path, _ = kernel_file(tmp_path)
    load_kernel(path, cache=cache)
    path, elf = kernel_file(tmp_path, fill=2)
    kernel = load_kernel(path, cache=cache)
    assert not kernel.cached and kernel.data == elf


def test_a_source_still_settling_gets_no_key(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "kernels", settle=3600)
    path, _ = kernel_file(tmp_path)
    load_kernel(path, cache=cache)
    assert not [p for p in cache.directory.iterdir() if p.name.startswith("key-")]
    assert load_kernel(path, cache=cache).cached, "its content is known all the same"


@pytest.mark.parametrize("position", [0, 5000, -1])
def test_a_damaged_copy_is_rebuilt(tmp_path: Path, cache: KernelCache, position: int) -> None:
    path, elf = kernel_file(tmp_path)
    load_kernel(path, cache=cache).close()
    (copy,) = entries(cache)
    raw = bytearray(copy.read_bytes())
    raw[position] ^= 1
    copy.write_bytes(raw)
    os.utime(copy, (1, 1))  # the write above may fall into the same tick of the clock as the copy's creation
    kernel = load_kernel(path, cache=cache)
    assert not kernel.cached and kernel.data == elf
    assert load_kernel(path, cache=cache).cached


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "gone", "meta-gone", "meta-cut", "meta-empty", "meta-odd"]
)
def test_torn_entries_are_rebuilt(tmp_path: Path, cache: KernelCache, damage: str) -> None:
    path, elf = kernel_file(tmp_path)
    load_kernel(path, cache=cache).close()
    (copy,), (meta,) = entries(cache), entries(cache, ".meta")
    text = meta.read_text()
    if damage == "cut":
        os.truncate(copy, 4096)
    elif damage == "empty":
        os.truncate(copy, 0)
    elif damage == "gone":
        copy.unlink()
    elif damage == "meta-gone":
        meta.unlink()
    else:
        meta.write_text({"meta-cut": text[:20], "meta-empty": "", "meta-odd": "x y z"}[damage])
    kernel = load_kernel(path, cache=cache)
    assert not kernel.cached and kernel.data == elf
    assert load_kernel(path, cache=cache).cached


@pytest.mark.parametrize("offset", range(0, 200, 9))
def test_a_flipped_byte_in_the_meta_file_never_gives_a_wrong_kernel(
    tmp_path: Path, cache: KernelCache, offset: int
) -> None:
    path, elf = kernel_file(tmp_path)
    load_kernel(path, cache=cache).close()
    (meta,) = entries(cache, ".meta")
    raw = bytearray(meta.read_bytes())
    raw[offset % len(raw)] ^= 0x41
    meta.write_bytes(raw)
    assert load_kernel(path, cache=cache).data == elf
    assert load_kernel(path, cache=cache).cached


def test_an_intact_copy_last_verified_under_another_boot_is_verified_once(
    tmp_path: Path, cache: KernelCache
) -> None:
    path, _ = kernel_file(tmp_path)
    load_kernel(path, cache=cache)
    (meta,) = entries(cache, ".meta")
    good = meta.read_text()
    fields = good.split(" ")
    meta.write_text(" ".join([*fields[:3], "0" * 36, *fields[4:]]))
    assert load_kernel(path, cache=cache).cached
    assert meta.read_text() == good


def test_a_damaged_key_leads_nowhere(tmp_path: Path, cache: KernelCache) -> None:
    path, elf = kernel_file(tmp_path)
    digest = load_kernel(path, cache=cache).digest
    (key,) = (p for p in cache.directory.iterdir() if p.name.startswith("key-"))
    for text in ("", "0" * 64, "../../etc/passwd", "\0\xff"):
        key.write_text(text)
        kernel = load_kernel(path, cache=cache)
        assert kernel.data == elf and kernel.digest == digest
        assert key.read_text() == digest
    assert len(entries(cache)) == 1


def test_the_oldest_goes_first(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "kernels", settle=0, capacity=650_000)
    paths = [kernel_file(tmp_path, f"k{i}", fill=i)[0] for i in range(5)]
    for i, path in enumerate(paths[:3]):
        digest = load_kernel(path, cache=cache).digest
        os.utime(cache.directory / f"{digest}.meta", (1000 + i, 1000 + i))
    load_kernel(paths[0], cache=cache)  # used again: now the youngest
    load_kernel(paths[3], cache=cache)
    assert len(entries(cache)) == len(entries(cache, ".meta")) == 3
    assert [load_kernel(p, cache=cache).cached for p in (paths[0], paths[2], paths[3])] == [True] * 3
    assert not load_kernel(paths[1], cache=cache).cached
    keys = [p for p in cache.directory.iterdir() if p.name.startswith("key-")]
    assert len(keys) == 3, "keys of what was removed are gone too"


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "kernels", settle=0, capacity=1000)
    path, elf = kernel_file(tmp_path)
    assert load_kernel(path, cache=cache).data == elf
    assert not entries(cache)


def test_a_bad_payload_leaves_nothing(tmp_path: Path, cache: KernelCache) -> None:
    path, _ = kernel_file(tmp_path)
    raw = Path(path).read_bytes()
    Path(path).write_bytes(raw[:-200] + bytes(200))
    with pytest.raises(load_module.ImageError):
        load_kernel(path, cache=cache)
    assert list(cache.directory.iterdir()) == []


def test_no_cache_folder_no_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path, elf = kernel_file(tmp_path)
    for _ in range(2):
        kernel = load_kernel(path, cache=KernelCache(tmp_path / "file" / "kernels"))
        assert not kernel.cached and kernel.data == elf


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_falls_back_to_memory(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        path, elf = kernel_file(tmp_path)
        cache = KernelCache(disk / "kernels", settle=0)
        for _ in range(2):
            kernel = load_kernel(path, cache=cache)
            assert not kernel.cached and kernel.data == elf
        assert entries(cache) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_killed_writer_leaves_nothing(tmp_path: Path, cache: KernelCache) -> None:
    path, elf = kernel_file(tmp_path)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from xtool.builder.image import cache, load_kernel\n"
        "write = cache.NewEntry.write\n"
        "def die(self, chunk):\n"
        "    write(self, chunk)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.NewEntry.write = die\n"
        "load_kernel(sys.argv[1], cache=cache.KernelCache(Path(sys.argv[2])))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, path, str(cache.directory)])
    assert run.returncode == -signal.SIGKILL
    assert list(cache.directory.iterdir()) == []
    assert load_kernel(path, cache=cache).data == elf


def test_many_processes_at_once(tmp_path: Path, cache: KernelCache) -> None:
    path, _ = kernel_file(tmp_path, size=4_000_000)
    code = (
        "import hashlib, sys\n"
        "from pathlib import Path\n"
        "from xtool.builder.image import KernelCache, load_kernel\n"
        "cache = KernelCache(Path(sys.argv[2]), settle=0)\n"
        "print({hashlib.sha256(load_kernel(sys.argv[1], cache=cache).data).hexdigest() for _ in range(5)})\n"
    )
    argv = [sys.executable, "-c", code, path, str(cache.directory)]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    answers = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    assert len(set(answers)) == 1 and answers[0].count("'") == 2
    assert load_kernel(path, cache=cache).cached
    assert not [p for p in cache.directory.iterdir() if p.name.startswith(".new-")]


def test_loading_again_and_again_leaks_no_descriptor(tmp_path: Path, cache: KernelCache) -> None:
    path, _ = kernel_file(tmp_path)
    load_kernel(path, cache=cache)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(20):
        load_kernel(path, cache=cache if i % 2 else None).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_kernel_is_decompressed_once_by_many_at_a_time(tmp_path: Path) -> None:
    path, _ = kernel_file(tmp_path)
    cached: list[bool] = []

    def load() -> None:
        cached.append(load_kernel(path, cache=KernelCache(tmp_path / "kernels", settle=0)).cached)

    with KernelCache(tmp_path / "kernels").turn():
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert cached == []
    for thread in threads:
        thread.join(20)
    assert sorted(cached) == [False, True, True, True]


def test_a_stuck_holder_of_the_turn_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    path, _ = kernel_file(tmp_path)
    cache = KernelCache(tmp_path / "kernels", settle=0, patience=0.05)
    with KernelCache(tmp_path / "kernels").turn():
        assert not load_kernel(path, cache=cache).cached
