"""bzImages and compressed ELF files: each compression whole, cut, damaged and with something after it."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_samples import COMPRESSORS, PV_NOTES, PVH_NOTES, linux_payload, make_bzimage, make_elf

from xtool.builder.image import load, load_kernel, load_ramdisk
from xtool.builder.image.decompress import decompress, sniff
from xtool.errors import ImageError

NAMES = sorted(COMPRESSORS)
KERNEL = make_elf(PV_NOTES + PVH_NOTES, payload=random.Random(1).randbytes(5000) + b"text" * 20000)


class Collect:
    def __init__(self) -> None:
        self.data = b""
        self.largest = 0

    def write(self, chunk: bytes) -> None:
        self.data += chunk
        self.largest = max(self.largest, len(chunk))


def write(tmp_path: Path, raw: bytes) -> str:
    file = tmp_path / "vmlinuz"
    file.write_bytes(raw)
    return str(file)


@pytest.mark.parametrize("name", NAMES)
def test_a_bzimage_of_each_compression(tmp_path: Path, name: str) -> None:
    with load_kernel(write(tmp_path, make_bzimage(linux_payload(name, KERNEL)))) as kernel:
        assert (kernel.format, kernel.compression, kernel.cached) == ("bzimage", name, False)
        assert bytes(kernel.data) == KERNEL
        kernel.require("pv")
        kernel.require("pvh")


@pytest.mark.parametrize("name", NAMES)
def test_a_compressed_elf_of_each_compression(tmp_path: Path, name: str) -> None:
    kernel = load_kernel(write(tmp_path, COMPRESSORS[name](KERNEL)))
    assert (kernel.format, kernel.compression) == ("elf", name)
    assert bytes(kernel.data) == KERNEL


def test_an_uncompressed_payload(tmp_path: Path) -> None:
    kernel = load_kernel(write(tmp_path, make_bzimage(KERNEL + struct.pack("<I", len(KERNEL)))))
    assert (kernel.format, kernel.compression) == ("bzimage", "none")
    kernel.require("pv")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.999])
def test_a_cut_payload(tmp_path: Path, name: str, part: float) -> None:
    packed = COMPRESSORS[name](KERNEL)
    cut = packed[: max(16, min(len(packed) - 1, int(len(packed) * part)))]
    raw = make_bzimage(cut + struct.pack("<I", len(KERNEL)))
    with pytest.raises(ImageError, match=r"vmlinuz .*(cut off|corrupt)|vmlinuz: .*nothing"):
        load_kernel(write(tmp_path, raw))


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_of_a_small_stream(name: str) -> None:
    packed = COMPRESSORS[name](b"kernel " * 40)
    for end in range(16, len(packed)):
        sink = Collect()
        try:
            decompress(memoryview(packed[:end]), name, sink, "k")
        except ImageError:
            continue
        # Only the legacy lz4 container has no end mark: cut between two blocks it is complete.
        assert name == "lz4" and sink.data == b""


@pytest.mark.parametrize("name", NAMES)
def test_bytes_after_the_end(tmp_path: Path, name: str) -> None:
    packed = COMPRESSORS[name](KERNEL)
    load_kernel(write(tmp_path, packed + bytes(512 if name != "lz4" else 0)))
    with pytest.raises(ImageError, match=r"after the end|cut off|corrupt"):
        load_kernel(write(tmp_path, packed + b"some more"))


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_payload_is_never_accepted_silently(tmp_path: Path, name: str) -> None:
    """With a checksum or without: at worst the result differs, but it never crashes or grows."""
    payload = bytearray(linux_payload(name, KERNEL))
    for at in range(20, len(payload) - 8, len(payload) // 23):
        damaged = payload.copy()
        damaged[at] ^= 0x55
        try:
            kernel = load_kernel(write(tmp_path, make_bzimage(bytes(damaged))))
        except ImageError:
            continue
        assert name in ("lz4", "lzma", "lzo"), f"{name} has a checksum"
        assert len(kernel.data) == len(KERNEL)


def test_a_wrong_trailer(tmp_path: Path) -> None:
    raw = make_bzimage(COMPRESSORS["xz"](KERNEL) + struct.pack("<I", len(KERNEL) + 1))
    with pytest.raises(ImageError, match=r"decompresses to \d+ bytes, its trailer says"):
        load_kernel(write(tmp_path, raw))


@pytest.mark.parametrize("name", NAMES)
def test_a_bomb_is_stopped(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_KERNEL", 1 << 20)
    raw = COMPRESSORS[name](bytes(24 << 20))
    with pytest.raises(ImageError, match="more than 1048576 bytes"):
        load_kernel(write(tmp_path, raw))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_stay_small(name: str) -> None:
    sink = Collect()
    decompress(memoryview(COMPRESSORS[name](bytes(24 << 20))), name, sink, "k")
    assert len(sink.data) == 24 << 20
    assert sink.largest <= 8 << 20


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (make_bzimage(b"\x1f\x8b\x08" + bytes(20), version=0x207), r"boot protocol 2\.07"),
        (make_bzimage(b"what is this?"), "unknown compression"),
        (make_bzimage(b""), "without a payload"),
        (make_bzimage(linux_payload("xz", b"not a kernel")), "not an ELF kernel"),
        (make_bzimage(linux_payload("xz", KERNEL))[:3000], "payload reaches to byte"),
        (make_bzimage(linux_payload("xz", KERNEL))[:0x220], "cut off in its set-up header"),
        (make_bzimage(b"").replace(b"\x55\xaa", b"\0\0"), "boot sector mark"),
    ],
)
def test_bad_bzimages(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_kernel(write(tmp_path, raw))


def test_a_payload_offset_that_would_wrap_is_refused(tmp_path: Path) -> None:
    raw = bytearray(make_bzimage(linux_payload("gzip", KERNEL)))
    raw[0x248:0x250] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    with pytest.raises(ImageError, match="cut off"):
        load_kernel(write(tmp_path, bytes(raw)))


def test_setup_sects_zero_means_four(tmp_path: Path) -> None:
    load_kernel(write(tmp_path, make_bzimage(linux_payload("gzip", KERNEL), setup_sects=0)))


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot open the kernel .*No such file"):
        load_kernel(str(tmp_path / "missing"))
    with pytest.raises(ImageError, match="not a regular file"):
        load_kernel(str(tmp_path))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ImageError, match="not a regular file"):
        load_kernel(str(fifo))
    with pytest.raises(ImageError, match="is empty"):
        load_ramdisk(write(tmp_path, b""))
    with pytest.raises(ImageError, match="cannot open the ramdisk"):
        load_ramdisk("no\0such")


def test_a_ramdisk_is_taken_as_it_is(tmp_path: Path) -> None:
    ramdisk = load_ramdisk(write(tmp_path, b"\x1f\x8b initrd"))
    assert ramdisk.size == 9 and bytes(ramdisk.data) == b"\x1f\x8b initrd"
    ramdisk.close()


@given(st.sampled_from(NAMES), st.binary(max_size=400))
def test_random_data_behind_each_magic(name: str, rest: bytes) -> None:
    head = COMPRESSORS[name](b"x")[:12]
    assert sniff(head) == name
    try:
        decompress(memoryview(head + rest), name, Collect(), "k")
    except ImageError as error:
        assert error.message.startswith("k ")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("gzip", "gzip -9"), ("bzip2", "bzip2 -9"), ("lzma", "lzma -9"),
        ("xz", "xz --check=crc32 --x86 --lzma2=dict=32MiB"),
        ("lzo", "lzop -9"), ("lz4", "lz4 -l -9"), ("lz4", "lz4 -9"), ("zstd", "zstd -19"),
    ],
)  # fmt: skip
def test_what_the_real_tools_write(tmp_path: Path, name: str, command: str) -> None:
    argv = command.split()
    if not shutil.which(argv[0]):
        pytest.skip(f"{argv[0]} is not installed")
    packed = subprocess.run([*argv, "-c"], input=KERNEL, stdout=subprocess.PIPE, check=True).stdout
    sink = Collect()
    decompress(memoryview(packed), name, sink, "k")
    assert sink.data == KERNEL


def test_lzo_without_its_library() -> None:
    """In a process of its own, where the dynamic linker cannot find liblzo2."""
    code = (
        "import ctypes, sys\n"
        "from xtool.builder.image import lzo\n"
        "from xtool.builder.image.decompress import decompress\n"
        "from xtool.errors import ImageError\n"
        "lzo._LIBRARY = 'liblzo2-missing.so.2'\n"
        "try: decompress(memoryview(sys.stdin.buffer.read()), 'lzo', None, 'k')\n"
        "except ImageError as error: print(error.message, '|', error.hint)\n"
    )
    packed = COMPRESSORS["lzo"](b"kernel " * 400)
    run = subprocess.run([sys.executable, "-c", code], input=packed, stdout=subprocess.PIPE, check=True)
    expected = (
        b"k is compressed with lzo, and liblzo2-missing.so.2 is not installed here | apt install liblzo2-2\n"
    )
    assert run.stdout == expected
