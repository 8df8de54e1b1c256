"""What a kernel says about itself to Xen: ELF notes, or the string that came before them.

Source: ``xen/include/public/elfnote.h`` and ``features.h``; how Xen reads them: ``xen/common/libelf``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from struct import Struct, unpack_from
from typing import Any

from xtool.errors import ImageError

#: Feature names by bit number (``features.h``, without the ``XENFEAT_`` prefix).
FEATURES = (
    "writable_page_tables",
    "writable_descriptor_tables",
    "auto_translated_physmap",
    "supervisor_mode_kernel",
    "pae_pgdir_above_4gb",
    "mmu_pt_update_preserve_ad",
    "highmem_assist",
    "gnttab_map_avail_bits",
    "hvm_callback_vector",
    "hvm_safe_pvclock",
    "hvm_pirqs",
    "dom0",
    "grant_map_identity",
    "memory_op_vnode_supported",
    "ARM_SMCCC_supported",
    "linux_rsdp_unrestricted",
    "not_direct_mapped",
    "direct_mapped",
)

#: A file cannot make us walk more notes than Xen's own parser would.
MAX_NOTES = 65536

_NOTE = Struct("<III")  # name size, desc size, type
_NUMERIC = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}

_STRINGS = {
    5: "xen_version",
    6: "guest_os",
    7: "guest_version",
    8: "loader",
    9: "pae_mode",
}
_NUMBERS = {
    1: "entry",
    2: "hypercall_page",
    3: "virt_base",
    4: "paddr_offset",
    12: "hv_start_low",
    15: "init_p2m",
    18: "phys32_entry",
}
_FLAGS = {14: "suspend_cancel", 16: "mod_start_pfn"}
_FEATURES, _BSD_SYMTAB, _L1_MFN_VALID, _SUPPORTED_FEATURES, _PHYS32_RELOC = 10, 11, 13, 17, 19


@dataclass(frozen=True)
class XenNotes:
    """The notes, names as in ``elfnote.h``. Addresses are virtual unless said otherwise; ``None`` means
    the note is absent (``KernelImage`` knows the defaults). Feature sets are bit masks over ``FEATURES``.
    """

    #: Where they were found: ``note`` segments, ``section``, ``legacy`` (``__xen_guest``) or ``none``.
    origin: str = "none"
    guest_os: str = ""
    guest_version: str = ""
    xen_version: str = ""
    loader: str = ""
    pae_mode: str = ""
    entry: int | None = None
    virt_base: int | None = None
    paddr_offset: int | None = None
    hypercall_page: int | None = None
    hv_start_low: int | None = None
    init_p2m: int | None = None
    #: Guest-physical address of the 32-bit PVH entry point.
    phys32_entry: int | None = None
    #: ``(alignment, lowest, highest)`` guest-physical addresses a PVH kernel may be moved to.
    phys32_reloc: tuple[int, int, int] | None = None
    suspend_cancel: bool = False
    #: The ramdisk need not be in the initial mapping; start_info then gives its frame number.
    mod_start_pfn: bool = False
    bsd_symtab: bool = False
    #: ``(mask, value)`` pairs that mark an L1 entry as holding a valid machine frame.
    l1_mfn_valid: tuple[tuple[int, int], ...] = ()
    supported_features: int = 0
    required_features: int = 0

    def supports(self, feature: str) -> bool:
        return bool(self.supported_features >> FEATURES.index(feature) & 1)

    def requires(self, feature: str) -> bool:
        return bool(self.required_features >> FEATURES.index(feature) & 1)


def feature_names(mask: int) -> list[str]:
    return [name for bit, name in enumerate(FEATURES) if mask >> bit & 1]


def parse_notes(data: memoryview, areas: list[tuple[int, int]], origin: str, path: str) -> XenNotes | None:
    """Read the notes of ``areas`` (offset and size inside ``data``, already checked to be inside).

    Returns None if none of them is Xen's. Raises ``ImageError`` for a malformed area.
    """
    fields: dict[str, Any] = {}
    seen = found = 0
    for start, size in areas:
        area = data[start : start + size]
        offset = 0
        while offset + _NOTE.size <= size:
            seen += 1
            if seen > MAX_NOTES:
                raise ImageError(f"{path}: more than {MAX_NOTES} ELF notes")
            name_size, desc_size, kind = _NOTE.unpack_from(area, offset)
            desc = offset + _NOTE.size + (name_size + 3 & ~3)
            end = desc + desc_size
            if end > size:
                raise ImageError(
                    f"{path}: the ELF note at offset {start + offset:#x} is cut off: it needs {end - offset} "
                    f"bytes, {size - offset} are there"
                )
            if name_size == 4 and bytes(area[offset + 12 : offset + 16]) == b"Xen\0":
                found += 1
                _take(fields, kind, bytes(area[desc:end]), path)
            offset = end + 3 & ~3
    return XenNotes(origin=origin, **fields) if found else None


def _take(fields: dict[str, Any], kind: int, desc: bytes, path: str) -> None:
    if name := _STRINGS.get(kind):
        fields[name] = _text(desc)
    elif name := _NUMBERS.get(kind):
        fields[name] = _number(kind, desc, path)
    elif name := _FLAGS.get(kind):
        fields[name] = bool(_number(kind, desc, path))
    elif kind == _FEATURES:
        supported, required = parse_features(_text(desc), path)
        fields["supported_features"] = fields.get("supported_features", 0) | supported
        fields["required_features"] = fields.get("required_features", 0) | required
    elif kind == _SUPPORTED_FEATURES:
        number = _number(kind, desc, path)
        fields["supported_features"] = fields.get("supported_features", 0) | number
    elif kind == _BSD_SYMTAB:
        fields["bsd_symtab"] = _text(desc) == "yes"
    elif kind == _L1_MFN_VALID:
        count = len(desc) // 16
        pairs = unpack_from(f"<{count * 2}Q", desc)
        fields["l1_mfn_valid"] = tuple(zip(pairs[::2], pairs[1::2], strict=True))
    elif kind == _PHYS32_RELOC:
        # Any of the three may be left off at the end; the defaults are Xen's.
        count = min(len(desc) // 4, 3)
        given = unpack_from(f"<{count}I", desc)
        fields["phys32_reloc"] = given + (0x200000, 0, 0xFFFFFFFF)[count:]


def _text(desc: bytes) -> str:
    return desc.split(b"\0", 1)[0].decode("ascii", "replace")


def _number(kind: int, desc: bytes, path: str) -> int:
    form = _NUMERIC.get(len(desc))
    if form is None:
        raise ImageError(
            f"{path}: Xen ELF note {kind} is a number of {len(desc)} bytes; expected 1, 2, 4 or 8"
        )
    value: int = unpack_from(form, desc)[0]
    return value


def parse_features(text: str, path: str) -> tuple[int, int]:
    """``"!a|b"`` -> ``(supported, required)`` masks. A required feature counts as supported too.

    Raises ``ImageError`` for a required feature nobody has heard of; unknown optional ones are ignored.
    """
    supported = required = 0
    for word in text.split("|"):
        name = word.removeprefix("!")
        if name in FEATURES:
            bit = 1 << FEATURES.index(name)
            supported |= bit
            if name != word:
                required |= bit
        elif name != word:
            raise ImageError(f"{path}: the kernel requires the unknown Xen feature {name!r}")
    return supported, required


def parse_legacy(text: str, path: str) -> XenNotes:
    """The ``__xen_guest`` section: ``"GUEST_OS=linux,XEN_VER=xen-3.0,..."``, used before there were notes."""
    values = dict(item.partition("=")[::2] for item in text.split(","))
    supported, required = parse_features(values.get("FEATURES", ""), path)

    def address(name: str) -> int | None:
        raw = values.get(name)
        if raw is None:
            return None
        try:
            number = int(raw, 0)
        except ValueError:
            number = -1
        if not 0 <= number < 1 << 64:
            raise ImageError(f"{path}: __xen_guest has {name}={raw!r}; expected an address")
        return number

    notes = XenNotes(
        origin="legacy",
        guest_os=values.get("GUEST_OS", ""),
        guest_version=values.get("GUEST_VER", ""),
        xen_version=values.get("XEN_VER", ""),
        loader=values.get("LOADER", ""),
        pae_mode=values.get("PAE", ""),
        entry=address("VIRT_ENTRY"),
        virt_base=address("VIRT_BASE"),
        paddr_offset=address("ELF_PADDR_OFFSET"),
        bsd_symtab="BSD_SYMTAB" in values,
        supported_features=supported,
        required_features=required,
    )
    page = address("HYPERCALL_PAGE")
    if page is None:
        return notes
    # Here it is a page number counted from the virtual base, not an address.
    return replace(notes, hypercall_page=(page << 12) + (notes.virt_base or 0) & (1 << 64) - 1)
