"""The ACPI tables of a PVH guest: pure bytes, ready to be copied to a guest-physical address.

Facts about ACPI in a Xen PVH guest
-----------------------------------
* Xen emulates a local APIC for PVH and nothing else: no IO-APIC, no PIC, no PM1 block, no PM timer, no
  RTC, no VGA. So the FADT says *hardware reduced* (ACPI 5.0, section 4.1), which spares the guest from
  setting up an SCI and from poking ports that nobody answers. FACS and RSDT are left out, as that mode
  allows.
* The guest learns its vCPUs from the MADT. The processor uid is the vCPU's number (Linux takes it as the
  number to give Xen), the APIC id is twice that (what Xen's own virtual APIC reports). vCPUs that are not
  online yet are listed as disabled; a FADT of revision 5 makes guests take those as possible later on,
  from 6.3 they would need one more flag. They come online through xenstore, not through ACPI.
* There is no ``_S5`` object on purpose. Without it a guest powers off by halting its last vCPU, which Xen
  takes as a power off; with it the guest would write to a sleep register that does not exist.
* ``hvm_start_info.rsdp_paddr`` tells where the RSDP is. Linux before 4.19 looks only into the BIOS area;
  kernels that do not need that set ``linux_rsdp_unrestricted`` in their notes. The RSDP holds no address
  of its own, so ``AcpiTables.rsdp`` may be copied there as well.

Layouts: ACPI specification 5.0, chapter 5; compare ``tools/libacpi`` of Xen.
"""

from __future__ import annotations

from struct import Struct, pack
from typing import NamedTuple

LAPIC_ADDRESS = 0xFEE00000
#: Where Linux before 4.19 finds an RSDP: in the last bytes of the BIOS area below 1 MiB.
LEGACY_RSDP_GPA = 0x100000 - 64
RSDP_SIZE = 36
MAX_VCPUS = 512

_OEM_ID = b"Xen\0\0\0"
_OEM_TABLE_ID = b"xtool\0\0\0"
_CREATOR_ID = b"XTL\0"

_HEADER = Struct("<4sIBB6s8sI4sI")  # signature, length, revision, checksum, oem id/table/revision, creator
_FADT_REVISION = 5
_FADT_SIZE = 268
_FADT_FLAGS = (
    1 << 0  # WBINVD works
    | 1 << 2  # C1 on every processor
    | 1 << 4  # no fixed power button
    | 1 << 5  # no fixed sleep button
    | 1 << 20  # hardware reduced
)
_BOOT_NO_VGA = 1 << 2
_BOOT_NO_CMOS_RTC = 1 << 5
_LAPIC_ENABLED = 1


class AcpiTables(NamedTuple):
    """``blob`` goes to guest-physical ``base_gpa``; the RSDP is its first 36 bytes, at ``rsdp_gpa``.
    ``tables`` maps each signature to the guest-physical address of its table."""

    blob: bytes
    base_gpa: int
    rsdp_gpa: int
    tables: dict[str, int]

    @property
    def rsdp(self) -> bytes:
        """The RSDP alone. It may be copied to a second place, such as ``LEGACY_RSDP_GPA``."""
        return self.blob[:RSDP_SIZE]


def build_acpi(vcpus: int, base_gpa: int, *, online: int | None = None) -> AcpiTables:
    """RSDP, XSDT, FADT, MADT and DSDT for a guest with ``vcpus`` vCPUs, the first ``online`` of them
    enabled (default: all), to be placed at ``base_gpa`` (a multiple of 16).

    Raises ``ValueError`` for arguments that no plan should contain.
    """
    online = vcpus if online is None else online
    if not 1 <= vcpus <= MAX_VCPUS or not 1 <= online <= vcpus:
        raise ValueError(f"{online} of {vcpus} vCPUs online: expected 1 <= online <= vcpus <= {MAX_VCPUS}")
    if base_gpa % 16 or base_gpa < 0:
        raise ValueError(f"ACPI tables at {base_gpa:#x}: not a multiple of 16")

    blob = bytearray(_align16(RSDP_SIZE))
    addresses: dict[str, int] = {}

    def place(signature: str, revision: int, body: bytes) -> int:
        gpa = base_gpa + len(blob)
        table = _table(signature.encode(), revision, body)
        blob.extend(table.ljust(_align16(len(table)), b"\0"))
        addresses[signature] = gpa
        return gpa

    dsdt = place("DSDT", 2, dsdt_aml())
    fadt = place("FACP", _FADT_REVISION, _fadt_body(dsdt))
    madt = place("APIC", 3, _madt_body(vcpus, online))
    xsdt = place("XSDT", 1, pack("<2Q", fadt, madt))
    blob[:RSDP_SIZE] = _rsdp(xsdt)
    return AcpiTables(bytes(blob), base_gpa, base_gpa, addresses)


def apic_id(vcpu: int) -> int:
    """The APIC id Xen gives ``vcpu`` in an HVM or PVH guest."""
    return vcpu * 2


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of ``data`` and itself 0 modulo 256."""
    return -sum(data) & 0xFF


def _align16(value: int) -> int:
    return (value + 15) & ~15


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = _HEADER.size + len(body)
    header = _HEADER.pack(
        signature, length, revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR_ID, 1
    )  # checksum follows
    table = bytearray(header + body)
    table[9] = checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    # signature, checksum (first 20 bytes), oem id, revision, rsdt, length, xsdt, checksum (all), reserved
    rsdp = bytearray(pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, RSDP_SIZE, xsdt, 0))
    rsdp[8] = checksum(rsdp[:20])
    rsdp[32] = checksum(rsdp)
    return bytes(rsdp)


def _fadt_body(dsdt: int) -> bytes:
    """Everything after the header; offsets below count from the start of the table."""
    fadt = bytearray(_FADT_SIZE)
    fadt[40:44] = pack("<I", dsdt if dsdt < 1 << 32 else 0)
    fadt[109:111] = pack("<H", _BOOT_NO_VGA | _BOOT_NO_CMOS_RTC)
    fadt[112:116] = pack("<I", _FADT_FLAGS)
    fadt[140:148] = pack("<Q", dsdt)
    return bytes(fadt[_HEADER.size :])


def _madt_body(vcpus: int, online: int) -> bytes:
    body = bytearray(pack("<II", LAPIC_ADDRESS, 0))
    for vcpu in range(vcpus):
        flags = _LAPIC_ENABLED if vcpu < online else 0
        ident = apic_id(vcpu)
        if ident < 255 and vcpu < 255:
            body += pack("<BBBBI", 0, 8, vcpu, ident, flags)
        else:
            body += pack("<BBHIII", 9, 16, 0, ident, flags, vcpu)
    return bytes(body)


# -- AML: ACPI 5.0 chapter 20. Just enough of it for an (almost) empty namespace.


def dsdt_aml() -> bytes:
    """The DSDT's byte code: an empty system bus scope, since a PVH guest's devices are Xen's."""
    return aml_scope("\\_SB_", b"")


def aml_scope(name: str, body: bytes) -> bytes:
    """``Scope (name) { body }``."""
    content = aml_name(name) + body
    return b"\x10" + aml_package_length(len(content)) + content


def aml_name(name: str) -> bytes:
    """A one-segment name string, with or without the leading backslash."""
    root, segment = (b"\\", name[1:]) if name.startswith("\\") else (b"", name)
    if len(segment) != 4 or not segment.isascii():
        raise ValueError(f"AML name {name!r}: a segment has four characters")
    return root + segment.encode()


def aml_package_length(content: int) -> bytes:
    """The length prefix of a package whose content is ``content`` bytes; it counts itself."""
    if content + 1 < 1 << 6:
        return bytes([content + 1])
    for extra in (1, 2, 3):
        total = content + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {content} bytes is too large")
