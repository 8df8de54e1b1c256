"""ELF headers and Xen notes: what is read, what is refused, and that no file makes the parser stumble."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_samples import PADDR, PAYLOAD, PV_NOTES, PVH_NOTES, VIRT_BASE, make_elf, number, pack_notes, text

from xtool.builder.image import KernelImage, load_kernel
from xtool.builder.image.elf import parse_elf
from xtool.builder.image.notes import parse_features, parse_legacy, parse_notes
from xtool.errors import ImageError


def load(tmp_path: Path, raw: bytes) -> KernelImage:
    file = tmp_path / "vmlinux"
    file.write_bytes(raw)
    return load_kernel(str(file))


def test_a_pv_kernel(tmp_path: Path) -> None:
    kernel = load(tmp_path, make_elf(PV_NOTES, memsz=0x8000))
    kernel.require("pv")
    assert (kernel.format, kernel.compression, kernel.machine, kernel.cached) == ("elf", "none", 64, False)
    (segment,) = kernel.segments
    assert bytes(kernel.data[segment.offset : segment.offset + segment.filesz]) == PAYLOAD
    assert (segment.paddr, segment.memsz) == (PADDR, 0x8000)
    assert (kernel.phys_start, kernel.phys_end) == (PADDR, PADDR + 0x8000)
    assert (kernel.virt_start, kernel.virt_end) == (VIRT_BASE + PADDR, VIRT_BASE + PADDR + 0x8000)
    assert kernel.pv_entry == VIRT_BASE + PADDR + 0x40
    assert kernel.notes.requires("writable_page_tables") and kernel.notes.supports("pae_pgdir_above_4gb")
    assert not kernel.notes.requires("pae_pgdir_above_4gb")
    assert kernel.notes.origin == "note"


def test_paddr_offset_shifts_the_virtual_addresses(tmp_path: Path) -> None:
    kernel = load(tmp_path, make_elf([*PV_NOTES, number(4, 0x80000)]))
    assert kernel.virt_start == VIRT_BASE + PADDR - 0x80000
    assert kernel.to_pfn_address(kernel.phys_start) == PADDR - 0x80000


def test_a_pvh_kernel_of_either_width(tmp_path: Path) -> None:
    for bits in (32, 64):
        kernel = load(tmp_path, make_elf(PVH_NOTES, bits=bits))
        kernel.require("pvh")
        assert kernel.pvh_entry == PADDR + 0x80
        assert kernel.machine == bits


def test_notes_in_sections_count_when_no_segment_has_any(tmp_path: Path) -> None:
    kernel = load(tmp_path, make_elf(section_notes=PV_NOTES))
    assert kernel.notes.origin == "section"
    kernel.require("pv")
    both = load(tmp_path, make_elf(PVH_NOTES, section_notes=PV_NOTES))
    assert both.notes.origin == "note" and not both.notes.loader


def test_the_old_guest_section(tmp_path: Path) -> None:
    kernel = load(
        tmp_path,
        make_elf(
            legacy=f"GUEST_OS=linux,XEN_VER=xen-3.0,VIRT_BASE={VIRT_BASE:#x},ELF_PADDR_OFFSET=0,"
            "HYPERCALL_PAGE=0x101,FEATURES=!writable_page_tables,LOADER=generic,BSD_SYMTAB"
        ),
    )
    assert kernel.notes.origin == "legacy"
    assert kernel.notes.hypercall_page == VIRT_BASE + 0x101000
    assert kernel.notes.bsd_symtab
    kernel.require("pv")


def test_the_old_sections_paddr_offset_defaults_to_virt_base(tmp_path: Path) -> None:
    kernel = load(tmp_path, make_elf(legacy=f"VIRT_BASE={VIRT_BASE:#x}", paddr=VIRT_BASE + PADDR))
    assert kernel.paddr_offset == VIRT_BASE
    assert kernel.virt_start == VIRT_BASE + PADDR


def test_all_other_notes() -> None:
    raw = pack_notes(
        [
            number(14, 1, 4), number(16, 1, 4), number(15, 0x8000000000), number(12, VIRT_BASE),
            text(7, "6.1"), text(9, "yes"), text(11, "yes"), number(17, 0x8811, 4),
            (13, (1).to_bytes(8, "little") * 2), (19, (0x200000).to_bytes(4, "little")), (99, b"whatever"),
        ]
    )  # fmt: skip
    notes = parse_notes(memoryview(raw), [(0, len(raw))], "note", "k")
    assert notes is not None
    assert notes.suspend_cancel and notes.mod_start_pfn and notes.bsd_symtab
    assert (notes.init_p2m, notes.hv_start_low) == (0x8000000000, VIRT_BASE)
    assert (notes.guest_version, notes.pae_mode, notes.supported_features) == ("6.1", "yes", 0x8811)
    assert notes.l1_mfn_valid == ((1, 1),)
    assert notes.phys32_reloc == (0x200000, 0, 0xFFFFFFFF)


def test_other_vendors_notes_are_not_xens() -> None:
    raw = pack_notes(PVH_NOTES, name=b"GNU\0")
    assert parse_notes(memoryview(raw), [(0, len(raw))], "note", "k") is None


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_cut_note_is_an_error_or_the_end(cut: int) -> None:
    raw = pack_notes(PVH_NOTES)[:-cut]
    if len(raw) < 12:
        assert parse_notes(memoryview(raw), [(0, len(raw))], "note", "k") is None
    else:
        with pytest.raises(ImageError, match="note at offset 0x0 is cut off"):
            parse_notes(memoryview(raw), [(0, len(raw))], "note", "k")


def test_a_number_of_odd_size_is_refused() -> None:
    raw = pack_notes([(18, b"abc")])
    with pytest.raises(ImageError, match="number of 3 bytes"):
        parse_notes(memoryview(raw), [(0, len(raw))], "note", "k")


def test_unknown_features() -> None:
    assert parse_features("teleport|dom0", "k") == (1 << 11, 0)
    with pytest.raises(ImageError, match="unknown Xen feature 'teleport'"):
        parse_features("!teleport", "k")


def test_legacy_numbers_are_checked() -> None:
    for value in ("apple", "-1", hex(1 << 64)):
        with pytest.raises(ImageError, match="expected an address"):
            parse_legacy(f"VIRT_BASE={value}", "k")


# -- require()


def replaced(kind: int, desc: tuple[int, bytes] | None) -> list[tuple[int, bytes]]:
    return [n for n in PV_NOTES if n[0] != kind] + ([desc] if desc else [])


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (make_elf(), "pv", "has no Xen notes"),
        (make_elf(PV_NOTES), "pvh", r"no Xen PVH entry note \(XEN_ELFNOTE_PHYS32_ENTRY\).*CONFIG_PVH"),
        (make_elf(PVH_NOTES), "pv", "expected loader 'generic'"),
        (make_elf(replaced(5, None)), "pv", "unnamed version"),
        (make_elf(replaced(5, text(5, "xen-2.0"))), "pv", "'xen-2.0'"),
        (make_elf(replaced(10, text(10, "!auto_translated_physmap"))), "pv", "auto_translated_physmap"),
        (make_elf([*replaced(3, None), number(4, 0)]), "pv", "but not VIRT_BASE"),
        (make_elf(replaced(1, number(1, 0x1000))), "pv", "contradict"),
        (make_elf(replaced(3, number(3, (1 << 64) - 4096))), "pv", "contradict"),
        (make_elf(replaced(2, number(2, VIRT_BASE + PADDR + 1))), "pv", "not a page of the kernel"),
        (make_elf([*PV_NOTES, number(15, VIRT_BASE + PADDR)]), "pv", "INIT_P2M"),
        (make_elf([text(8, "generic"), text(5, "xen-3.0")], bits=32), "pv", "32-bit"),
        (make_elf([number(18, 0x10)]), "pvh", "outside of the kernel"),
        (make_elf(PVH_NOTES, paddr=(1 << 32) - 4096), "pvh", "above 4 GiB"),
    ],
)
def test_require_says_what_is_missing(tmp_path: Path, raw: bytes, kind: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load(tmp_path, raw).require(kind)  # type: ignore[arg-type]


def test_the_hint_names_the_type_that_works(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        load(tmp_path, make_elf(PV_NOTES)).require("pvh")
    assert caught.value.hint == "this kernel can boot with type: pv"


# -- bad files


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"#!/bin/sh\necho no kernel\n", "is not a kernel"),
        (make_elf(kind=1), "relocatable object"),
        (make_elf(kind=4), "core dump"),
        (make_elf(memsz=1), "only 1 in memory"),
        (make_elf(paddr=(1 << 64) - 16), "wraps around"),
        (make_elf()[:18] + b"\x28\0" + make_elf()[20:], "for machine 40"),
        (b"\x7fELF\2\2" + make_elf()[6:], "another machine"),
        (make_elf()[:56] + b"\0\0" + make_elf()[58:], "nothing to load"),
        (make_elf()[:54] + b"\1\0" + make_elf()[56:], "make no sense"),
    ],
)
def test_what_is_not_a_kernel_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(tmp_path, raw)
    assert str(tmp_path) in caught.value.message


def test_every_truncation_is_an_image_error() -> None:
    """The section headers are last in the file, and needed as no segment has notes."""
    raw = make_elf(section_notes=PV_NOTES, payload=b"kernel")
    for end in range(len(raw)):
        with pytest.raises(ImageError):
            parse_elf(memoryview(raw[:end]), "k")
    parse_elf(memoryview(raw), "k")
    parse_elf(memoryview(raw + b"garbage"), "k")


@given(st.data())
def test_no_damage_raises_anything_but_image_error(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([32, 64]))
    raw = bytearray(make_elf(PV_NOTES, bits=bits, section_notes=PVH_NOTES, legacy="A=b", payload=b"kernel"))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        elf = parse_elf(memoryview(bytes(raw)), "k")
    except ImageError:
        return
    for segment in elf.segments:
        assert segment.offset + segment.filesz <= len(raw) and segment.filesz <= segment.memsz


@given(st.binary(max_size=300))
def test_random_notes(raw: bytes) -> None:
    try:
        parse_notes(memoryview(raw), [(0, len(raw))], "note", "k")
    except ImageError:
        pass
