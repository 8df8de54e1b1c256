"""Kernels put straight into an HVM guest's memory: where the pieces go, and the stub that starts them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from struct import pack_into, unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtool.builder.directboot import STAGED, plan_direct_boot, stub_kernel
from xtool.errors import UsageError

MIB = 1 << 20


def bzimage(
    *, version: int = 0x20F, relocatable: int = 1, preferred: int = 16 * MIB, init: int = 40 * MIB
) -> bytes:
    image = bytearray(20 * 512 + 5 * MIB)
    image[0x1F1] = 19
    image[0x202:0x206] = b"HdrS"
    pack_into("<H", image, 0x206, version)
    image[0x211] = 1
    image[0x234] = relocatable
    pack_into("<Q", image, 0x258, preferred)
    pack_into("<I", image, 0x260, init)
    image[20 * 512 :] = b"K" * (5 * MIB)
    return bytes(image)


def test_where_everything_goes() -> None:
    boot = plan_direct_boot(memoryview(bzimage()), "console=ttyS0", 3 * MIB + 5, 256 * MIB)
    assert boot is not None
    setup = boot.setup[1]
    assert boot.setup[0] == STAGED and len(setup) == 20 * 512
    assert boot.code == (16 * MIB, b"K" * (5 * MIB))
    assert boot.cmdline == (STAGED + 0xE000, b"console=ttyS0\0")
    # The header as Linux will read it: addresses after the copy to 0x40000.
    assert unpack_from("<I", setup, 0x228)[0] == 0x4E000
    assert unpack_from("<I", setup, 0x214)[0] == 16 * MIB
    assert setup[0x210] == 0xFF and setup[0x211] == 0x81
    assert boot.ramdisk is not None
    assert unpack_from("<II", setup, 0x218) == boot.ramdisk
    at, size = boot.ramdisk
    assert size == 3 * MIB + 5 and at % 4096 == 0
    assert at >= 16 * MIB + 40 * MIB and at + size <= 256 * MIB - 18 * MIB


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\x7fELF" + bytes(1000),
        bzimage(version=0x209),
        bzimage(relocatable=0),
        bzimage(preferred=MIB),
        bzimage(init=230 * MIB),
    ],
)
def test_what_it_leaves_to_qemu(image: bytes) -> None:
    assert plan_direct_boot(memoryview(image), "", MIB, 256 * MIB) is None


def test_a_long_command_line_is_refused() -> None:
    with pytest.raises(UsageError, match="5000 bytes long"):
        plan_direct_boot(memoryview(bzimage()), "x" * 5000, 0, 256 * MIB)


@given(st.binary(max_size=2000), st.integers(0, 1 << 32))
def test_no_image_breaks_it(garbage: bytes, low_end: int) -> None:
    image = bytearray(bzimage()[:0x268]) + garbage
    plan_direct_boot(memoryview(bytes(image)), "", 4096, low_end)


@pytest.mark.skipif(not shutil.which("objdump"), reason="binutils are not installed")
def test_the_stub_is_the_code_it_says(tmp_path: Path) -> None:
    stub = stub_kernel()
    assert stub[0x1FE:0x200] == b"\x55\xaa" and stub[0x202:0x206] == b"HdrS" and len(stub) == 1536
    file = tmp_path / "code"
    file.write_bytes(stub[0x268:0x290])
    listing = subprocess.run(
        ["objdump", "-D", "-b", "binary", "-m", "i8086", "-M", "intel", str(file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    code = [" ".join(line.split("\t")[2].split()) for line in listing.splitlines() if line.count("\t") >= 2]
    assert code[:6] == ["push cs", "pop es", "mov si,0xa0", "mov cx,0x8000", "mov ah,0x87", "int 0x15"]
    assert code[6:8] == ["cli", "mov ax,0x4000"]
    assert code[12:15] == ["mov ss,ax", "mov sp,0xde00", "jmp 0x4020:0x0"]
    # From 15 MiB to 0x40000, as descriptors 2 and 3 of the table.
    assert stub[0x2B0:0x2C0].hex() == "ffff0000f0930000" + "ffff000004930000"
