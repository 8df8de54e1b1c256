"""The PVH guest's ACPI tables, parsed back and shown to ACPICA's own disassembler."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtool.builder.acpi import (
    LAPIC_ADDRESS,
    AcpiTables,
    aml_name,
    aml_package_length,
    aml_scope,
    build_acpi,
    checksum,
)

BASE = 0xFC009000


def table_at(acpi: AcpiTables, gpa: int) -> tuple[bytes, bytes]:
    """``(signature, whole table)``, its length and checksum verified."""
    offset = gpa - acpi.base_gpa
    signature, length = struct.unpack_from("<4sI", acpi.blob, offset)
    table = acpi.blob[offset : offset + length]
    assert len(table) == length, "the table does not end beyond the blob"
    assert sum(table) % 256 == 0
    return signature, table


def follow(acpi: AcpiTables) -> dict[bytes, bytes]:
    """All tables, found the way an operating system does it: from the RSDP on."""
    rsdp = acpi.blob[acpi.rsdp_gpa - acpi.base_gpa :][:36]
    assert rsdp[:8] == b"RSD PTR " and rsdp[15] == 2
    assert sum(rsdp[:20]) % 256 == 0 and sum(rsdp) % 256 == 0
    length, xsdt_gpa = struct.unpack_from("<IQ", rsdp, 20)
    assert length == 36
    signature, xsdt = table_at(acpi, xsdt_gpa)
    assert signature == b"XSDT"
    found = {}
    for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
        assert gpa % 16 == 0
        name, table = table_at(acpi, gpa)
        found[name] = table
    (dsdt_gpa,) = struct.unpack_from("<Q", found[b"FACP"], 140)
    name, found[b"DSDT"] = table_at(acpi, dsdt_gpa)
    assert name == b"DSDT"
    return found


def cpus(madt: bytes) -> list[tuple[int, int, bool]]:
    """``(uid, APIC id, enabled)`` of every processor entry."""
    found, offset = [], 44
    while offset < len(madt):
        kind, length = madt[offset], madt[offset + 1]
        if kind == 0:
            assert length == 8
            uid, apic, flags = struct.unpack_from("<BBI", madt, offset + 2)
        else:
            assert (kind, length) == (9, 16)
            apic, flags, uid = struct.unpack_from("<III", madt, offset + 4)
        found.append((uid, apic, flags == 1))
        offset += length
    assert offset == len(madt)
    return found


@pytest.mark.parametrize("vcpus", [1, 2, 127, 128, 129, 512])
def test_every_vcpu_is_in_the_madt(vcpus: int) -> None:
    madt = follow(build_acpi(vcpus, BASE))[b"APIC"]
    assert struct.unpack_from("<II", madt, 36) == (LAPIC_ADDRESS, 0)
    assert cpus(madt) == [(n, n * 2, True) for n in range(vcpus)]


def test_128_vcpus_need_no_x2apic_entry() -> None:
    assert len(follow(build_acpi(128, BASE))[b"APIC"]) == 44 + 128 * 8


def test_offline_vcpus_are_listed_disabled() -> None:
    madt = follow(build_acpi(4, BASE, online=1))[b"APIC"]
    assert [enabled for _, _, enabled in cpus(madt)] == [True, False, False, False]


def test_fadt_is_hardware_reduced_and_names_no_legacy_device() -> None:
    fadt = follow(build_acpi(1, BASE))[b"FACP"]
    assert len(fadt) == 268 and fadt[8] == 5
    (flags,) = struct.unpack_from("<I", fadt, 112)
    (boot,) = struct.unpack_from("<H", fadt, 109)
    assert flags & 1 << 20, "HW_REDUCED_ACPI"
    assert boot == 1 << 2 | 1 << 5, "no VGA, no CMOS RTC, no 8042, no ISA devices"
    assert not any(fadt[56:96]), "no PM1, PM timer or GPE block"
    assert not any(fadt[148:268]), "nor their 64-bit twins, nor a sleep register"


def test_fadt_above_4_gib_uses_the_long_pointer_only() -> None:
    fadt = follow(build_acpi(1, 1 << 33))[b"FACP"]
    assert struct.unpack_from("<I", fadt, 40) == (0,)


def test_the_rsdp_may_be_copied_elsewhere() -> None:
    acpi = build_acpi(1, BASE)
    assert len(acpi.rsdp) == 36
    assert struct.unpack_from("<Q", acpi.rsdp, 24) == (acpi.tables["XSDT"],)


def test_padding_between_tables_is_zero() -> None:
    acpi = build_acpi(3, BASE)
    blob = bytearray(acpi.blob)
    blob[:36] = bytes(36)
    for gpa in acpi.tables.values():
        _, table = table_at(acpi, gpa)
        blob[gpa - BASE : gpa - BASE + len(table)] = bytes(len(table))
    assert not any(blob)


@pytest.mark.parametrize(("vcpus", "online", "base"), [(0, 0, BASE), (2, 3, BASE), (513, 1, BASE), (1, 1, 8)])
def test_nonsense_is_refused(vcpus: int, online: int, base: int) -> None:
    with pytest.raises(ValueError, match=r"vCPUs online|multiple of 16"):
        build_acpi(vcpus, base, online=online)


@given(st.binary(max_size=200))
def test_checksum_makes_the_sum_zero(data: bytes) -> None:
    assert (sum(data) + checksum(data)) % 256 == 0


@pytest.mark.parametrize("content", [0, 1, 62, 63, 64, 4093, 4094, 4095, 1 << 20 - 4, (1 << 20) - 3, 1 << 21])
def test_aml_package_length_counts_itself(content: int) -> None:
    raw = aml_package_length(content)
    extra = raw[0] >> 6
    assert len(raw) == 1 + extra
    value = raw[0] & 0x3F if not extra else raw[0] & 0xF | int.from_bytes(raw[1:], "little") << 4
    assert value == content + len(raw)


def test_aml_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ValueError, match="four characters"):
        aml_name("\\_SB")
    with pytest.raises(ValueError, match="too large"):
        aml_package_length(1 << 28)
    assert aml_scope("\\_SB_", b"") == b"\x10\x06\\_SB_"


@pytest.mark.skipif(not shutil.which("iasl"), reason="iasl (Debian: acpica-tools) is not installed")
@pytest.mark.parametrize("vcpus", [1, 129])
def test_acpica_reads_the_tables(tmp_path: Path, vcpus: int) -> None:
    for name, table in follow(build_acpi(vcpus, BASE)).items():
        source = tmp_path / f"{name.decode()}.aml"
        source.write_bytes(table)
        run = subprocess.run(
            ["iasl", "-d", str(source)], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        output = run.stdout + run.stderr
        assert run.returncode == 0, output
        assert "Incorrect checksum" not in output and "Error" not in output, output
        text = source.with_suffix(".dsl").read_text()
        assert "Invalid" not in text and "Unknown" not in text, text
        if name == b"DSDT":
            assert "Scope (\\_SB)" in text or "Scope (_SB)" in text
        if name == b"APIC":
            assert text.count("Processor Enabled : 1") == vcpus
