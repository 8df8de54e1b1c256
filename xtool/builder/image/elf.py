"""The parts of an ELF file a domain builder needs: program headers and Xen notes.

Facts about ELF kernels
-----------------------
* Xen loads by ``p_paddr``; ``p_vaddr`` is ignored (a PV kernel's virtual addresses follow from its notes).
* Notes are looked for in note segments first, then in note sections, then (PV only) in the section
  ``__xen_guest``. Some linkers left ``p_offset`` of a note segment 0: such a segment is skipped.

Every offset is checked before it is used; Python's integers do not wrap, so the sums are exact.
Source: the ELF-64 object file format, ``xen/common/libelf``.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from xtool.builder.image.notes import XenNotes, parse_legacy, parse_notes
from xtool.errors import ImageError

MAGIC = b"\x7fELF"
_PT_LOAD, _PT_NOTE, _SHT_NOTE = 1, 4, 7
_MACHINES = {3: 32, 62: 64}  # EM_386, EM_X86_64
#: More program headers or sections than any kernel has; a bound on hostile files.
MAX_HEADERS = 4096
_ADDRESS_END = 1 << 64


class _Class(NamedTuple):
    """The layouts that differ between 32-bit and 64-bit files. Each tuple of fields is reordered by the
    index tuples to ``(type, flags, offset, vaddr, paddr, filesz, memsz)``."""

    header: Struct
    program: Struct
    program_order: tuple[int, ...]
    section: Struct


# header: type machine version entry phoff shoff flags ehsize phentsize phnum shentsize shnum shstrndx
_CLASSES = {
    1: _Class(Struct("<HHIIIIIHHHHHH"), Struct("<8I"), (0, 6, 1, 2, 3, 4, 5), Struct("<10I")),
    2: _Class(Struct("<HHIQQQIHHHHHH"), Struct("<IIQQQQQQ"), (0, 1, 2, 3, 4, 5, 6), Struct("<IIQQQQIIQQ")),
}


class Segment(NamedTuple):
    """One loadable piece: ``data[offset:offset + filesz]`` goes to guest-physical ``paddr``, zeros follow
    up to ``memsz``. ``vaddr`` is the linker's; ``flags`` are 1 execute, 2 write, 4 read."""

    paddr: int
    vaddr: int
    offset: int
    filesz: int
    memsz: int
    flags: int


class Elf(NamedTuple):
    machine: int
    entry: int
    segments: tuple[Segment, ...]
    notes: XenNotes


def parse_elf(data: memoryview, path: str) -> Elf:
    """Parse an x86 ELF executable. Raises ``ImageError`` naming ``path`` for anything else."""
    if bytes(data[:4]) != MAGIC:
        raise ImageError(f"{path} is not an ELF file")
    if len(data) < 16:
        raise _cut(path, "ELF header", 16, len(data))
    if data[5] != 1 or data[4] not in _CLASSES:
        raise ImageError(f"{path} is an ELF file for another machine; an x86 kernel is needed")
    layout = _CLASSES[data[4]]
    if len(data) < 16 + layout.header.size:
        raise _cut(path, "ELF header", 16 + layout.header.size, len(data))
    header = layout.header.unpack_from(data, 16)
    kind, machine, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = header
    if machine not in _MACHINES:
        raise ImageError(f"{path} is an ELF file for machine {machine}; an x86 kernel (3 or 62) is needed")
    if kind not in (2, 3):  # ET_EXEC, ET_DYN
        what = {1: "a relocatable object file", 4: "a core dump"}.get(kind, f"an ELF file of type {kind}")
        raise ImageError(f"{path} is {what}, not an executable kernel")

    segments = []
    notes = []
    for raw in _entries(data, path, "program headers", layout.program, phoff, phentsize, phnum):
        program = [raw[i] for i in layout.program_order]
        p_type, flags, offset, vaddr, paddr, filesz, memsz = program
        if p_type == _PT_LOAD and flags & 7 and memsz:
            _check_range(data, path, "a segment", offset, filesz)
            if filesz > memsz:
                raise ImageError(
                    f"{path}: a segment has {filesz} bytes in the file but only {memsz} in memory"
                )
            if paddr + memsz > _ADDRESS_END:
                raise ImageError(f"{path}: a segment at {paddr:#x} of {memsz:#x} bytes wraps around")
            segments.append(Segment(paddr, vaddr, offset, filesz, memsz, flags))
        elif p_type == _PT_NOTE and offset:
            _check_range(data, path, "a note segment", offset, filesz)
            notes.append((offset, filesz))
    if not segments:
        raise ImageError(f"{path} has nothing to load: no program header says so")
    found = parse_notes(data, notes, "note", path)
    if found is None:
        sections = _entries(data, path, "section headers", layout.section, shoff, shentsize, shnum)
        found = _notes_from_sections(data, sections, shstrndx, path)
    return Elf(_MACHINES[machine], entry, tuple(segments), found or XenNotes())


def _entries(
    data: memoryview, path: str, what: str, form: Struct, offset: int, entsize: int, count: int
) -> list[tuple[int, ...]]:
    if not count:
        return []
    if entsize < form.size or count > MAX_HEADERS:
        raise ImageError(f"{path}: {count} {what} of {entsize} bytes each make no sense")
    _check_range(data, path, what, offset, entsize * count)
    return [form.unpack_from(data, offset + i * entsize) for i in range(count)]


def _notes_from_sections(
    data: memoryview, sections: list[tuple[int, ...]], shstrndx: int, path: str
) -> XenNotes | None:
    # A section: name type flags addr offset size link info addralign entsize
    areas = []
    for section in sections[1:]:
        if section[1] == _SHT_NOTE:
            _check_range(data, path, "a note section", section[4], section[5])
            areas.append((section[4], section[5]))
    found = parse_notes(data, areas, "section", path)
    if found is not None or not 0 < shstrndx < len(sections):
        return found
    names, names_size = sections[shstrndx][4:6]
    _check_range(data, path, "the section names", names, names_size)
    for section in sections[1:]:
        start = names + section[0]
        if section[0] < names_size and bytes(data[start : start + 12]) == b"__xen_guest\0":
            _check_range(data, path, "__xen_guest", section[4], section[5])
            raw = bytes(data[section[4] : section[4] + section[5]])
            return parse_legacy(raw.split(b"\0", 1)[0].decode("ascii", "replace"), path)
    return None


def _check_range(data: memoryview, path: str, what: str, offset: int, size: int) -> None:
    if offset + size > len(data):
        raise _cut(path, what, offset + size, len(data))


def _cut(path: str, what: str, needed: int, there: int) -> ImageError:
    return ImageError(
        f"{path} is cut off: {what} reach to byte {needed}, the file ends at {there}",
        hint="copy the file again; it is shorter than its own headers say",
    )
