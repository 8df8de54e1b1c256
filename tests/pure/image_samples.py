"""Small kernels made by hand: ELF files with Xen notes, bzImages, each compression."""

from __future__ import annotations

import bz2
import ctypes
import gzip
import lzma
import struct
import zlib
from collections.abc import Callable

PAYLOAD = bytes(range(256)) * 64
VIRT_BASE = 0xFFFFFFFF80000000
PADDR = 0x100000


def number(kind: int, value: int, size: int = 8) -> tuple[int, bytes]:
    return kind, value.to_bytes(size, "little")


def text(kind: int, value: str) -> tuple[int, bytes]:
    return kind, value.encode() + b"\0"


PV_NOTES = [
    text(6, "linux"),
    text(5, "xen-3.0"),
    text(8, "generic"),
    number(3, VIRT_BASE),
    number(1, VIRT_BASE + PADDR + 0x40),
    number(2, VIRT_BASE + PADDR + 0x1000),
    text(10, "!writable_page_tables|pae_pgdir_above_4gb"),
]
PVH_NOTES = [number(18, PADDR + 0x80, 4)]


def pack_notes(notes: list[tuple[int, bytes]], name: bytes = b"Xen\0") -> bytes:
    out = b""
    for kind, desc in notes:
        out += struct.pack("<III", len(name), len(desc), kind)
        out += name.ljust(len(name) + 3 & ~3, b"\0") + desc.ljust(len(desc) + 3 & ~3, b"\0")
    return out


def make_elf(
    notes: list[tuple[int, bytes]] | None = None,
    *,
    bits: int = 64,
    section_notes: list[tuple[int, bytes]] | None = None,
    legacy: str | None = None,
    payload: bytes = PAYLOAD,
    paddr: int = PADDR,
    memsz: int | None = None,
    entry: int = VIRT_BASE + PADDR,
    kind: int = 2,
) -> bytes:
    """An ELF executable with one loadable segment of ``payload``, and what notes are asked for."""
    notes_raw = pack_notes(notes) if notes is not None else b""
    section_raw = pack_notes(section_notes) if section_notes is not None else b""
    legacy_raw = legacy.encode() + b"\0" if legacy is not None else b""
    names = b"\0.notes\0__xen_guest\0.shstrtab\0"
    phnum = 1 + (notes is not None)
    header_size, ph_size, sh_size = (64, 56, 64) if bits == 64 else (52, 32, 40)
    position = header_size + phnum * ph_size

    def put(raw: bytes) -> tuple[int, bytes]:
        nonlocal position
        start = position
        position += len(raw) + 15 & ~15
        return start, raw

    body_at, notes_at = put(payload), put(notes_raw)
    section_at, legacy_at, names_at = put(section_raw), put(legacy_raw), put(names)
    sections = [(0, 0, 0, 0)]
    if section_notes is not None:
        sections.append((1, 7, section_at[0], len(section_raw)))
    if legacy is not None:
        sections.append((8, 1, legacy_at[0], len(legacy_raw)))
    sections.append((20, 3, names_at[0], len(names)))
    shoff = position

    out = bytearray(position)
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    form = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    machine = 62 if bits == 64 else 3
    mask = (1 << bits) - 1
    out[: 16 + struct.calcsize(form)] = ident + struct.pack(
        form, kind, machine, 1, entry & mask, header_size, shoff, 0, header_size, ph_size, phnum, sh_size,
        len(sections), len(sections) - 1,
    )  # fmt: skip
    programs = [(1, 7, body_at[0], 0, paddr, len(payload), len(payload) if memsz is None else memsz)]
    if notes is not None:
        programs.append((4, 4, notes_at[0], 0, 0, len(notes_raw), len(notes_raw)))
    for i, (p_type, flags, offset, vaddr, p_paddr, filesz, p_memsz) in enumerate(programs):
        if bits == 64:
            raw = struct.pack("<IIQQQQQQ", p_type, flags, offset, vaddr, p_paddr, filesz, p_memsz, 0)
        else:
            raw = struct.pack("<8I", p_type, offset, vaddr, p_paddr, filesz, p_memsz, flags, 0)
        out[header_size + i * ph_size : header_size + (i + 1) * ph_size] = raw
    for start, raw in (body_at, notes_at, section_at, legacy_at, names_at):
        out[start : start + len(raw)] = raw
    for name, s_type, offset, size in sections:
        if bits == 64:
            out += struct.pack("<IIQQQQIIQQ", name, s_type, 0, 0, offset, size, 0, 0, 0, 0)
        else:
            out += struct.pack("<10I", name, s_type, 0, 0, offset, size, 0, 0, 0, 0)
    return bytes(out)


def make_bzimage(payload: bytes, *, version: int = 0x20F, setup_sects: int = 3, gap: int = 0x40) -> bytes:
    """A bzImage around ``payload``, which ends with the size Linux appends (``linux_payload``)."""
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    setup[0x1F1] = setup_sects
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x208] = b"HdrS" + struct.pack("<H", version)
    setup[0x248:0x250] = struct.pack("<II", gap, len(payload))
    return bytes(setup) + b"\x90" * gap + payload + bytes(64)


def linux_payload(name: str, kernel: bytes) -> bytes:
    packed = COMPRESSORS[name](kernel)
    return packed if name == "gzip" else packed + struct.pack("<I", len(kernel))


def _lzma_alone(raw: bytes) -> bytes:
    return lzma.compress(raw, format=lzma.FORMAT_ALONE)


def _xz(raw: bytes) -> bytes:
    """As Linux does it: with the x86 branch filter."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 1}]
    return lzma.compress(raw, check=lzma.CHECK_CRC32, filters=filters)


def _lz4(raw: bytes) -> bytes:
    import lz4.block

    out = b"\x02\x21\x4c\x18"
    for start in range(0, len(raw), 8 << 20):
        block = lz4.block.compress(raw[start : start + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


def _zstd(raw: bytes) -> bytes:
    import zstandard

    # From a pipe, as Linux's build does it: the frame then does not tell its content's size.
    packer = zstandard.ZstdCompressor(level=19, write_checksum=True).compressobj()
    return packer.compress(raw) + packer.flush()


def _lzo(raw: bytes, *, block_size: int = 256 << 10) -> bytes:
    """An lzop file with the checksums lzop writes by default (Adler-32 of the decompressed blocks)."""
    library = ctypes.CDLL("liblzo2.so.2")
    header = struct.pack(">HHHBBIIIIB", 0x1030, 0x20A0, 0x940, 3, 9, 0x01, 0o644, 0, 0, 0)
    out = b"\x89LZO\0\r\n\x1a\n" + header + struct.pack(">I", zlib.adler32(header))
    for start in range(0, len(raw), block_size):
        block = raw[start : start + block_size]
        packed = ctypes.create_string_buffer(len(block) + len(block) // 16 + 67)
        size = ctypes.c_size_t(0)
        work = ctypes.create_string_buffer(1 << 18)
        assert not library.lzo1x_1_compress(
            block, ctypes.c_size_t(len(block)), packed, ctypes.byref(size), work
        )
        stored = packed.raw[: size.value] if size.value < len(block) else block
        out += struct.pack(">III", len(block), len(stored), zlib.adler32(block)) + stored
    return out + bytes(4)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda raw: gzip.compress(raw, mtime=0),
    "bzip2": bz2.compress,
    "lzma": _lzma_alone,
    "xz": _xz,
    "lzo": _lzo,
    "lz4": _lz4,
    "zstd": _zstd,
}
