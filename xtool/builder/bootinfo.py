"""The pages that tell a guest about itself. Pure: values in, bytes out."""

from __future__ import annotations

from collections.abc import Sequence

from xtool.abi import hvm as h
from xtool.abi import pv
from xtool.abi.base import PAGE_SHIFT, PAGE_SIZE
from xtool.abi.xen import SIF_MOD_START_PFN
from xtool.errors import UsageError
from xtool.hypercall.port import E820Entry

PV_MAGIC = b"xen-3.0-x86_64"
_START_INFO = h.HvmStartInfo.size()
_MODULE = h.HvmModlistEntry.size()
_MEMMAP = h.HvmMemmapEntry.size()


def encode_cmdline(cmdline: str, limit: int) -> bytes:
    """NUL-terminated. Raises ``UsageError`` if it does not fit: a cut command line boots the wrong thing."""
    raw = cmdline.encode() + b"\0"
    if len(raw) > limit:
        raise UsageError(f"the kernel command line is {len(raw) - 1} bytes long, at most {limit - 1} fit")
    return raw


def pv_start_info(
    *,
    pages: int,
    shared_info_mfn: int,
    store_mfn: int,
    store_port: int,
    console_mfn: int,
    console_port: int,
    table_base: int,
    table_pages: int,
    p2m_virtual: int,
    p2m_frames: tuple[int, int] | None,
    ramdisk: tuple[int, int] | None,
    ramdisk_is_pfn: bool,
    cmdline: str,
) -> bytes:
    """One page with ``struct start_info`` (``public/xen.h``). ``ramdisk`` is (start, bytes): a virtual
    address, or a pfn if ``ramdisk_is_pfn``. ``p2m_frames`` is (first pfn, count) of a p2m with a mapping of
    its own, its page tables included."""
    info = pv.StartInfo(
        nr_pages=pages,
        shared_info=shared_info_mfn << PAGE_SHIFT,
        flags=SIF_MOD_START_PFN if ramdisk and ramdisk_is_pfn else 0,
        store_mfn=store_mfn,
        store_evtchn=store_port,
        console_mfn=console_mfn,
        console_evtchn=console_port,
        pt_base=table_base,
        nr_pt_frames=table_pages,
        mfn_list=p2m_virtual,
    )
    info.magic[: len(PV_MAGIC)] = PV_MAGIC
    raw = encode_cmdline(cmdline, pv.MAX_GUEST_CMDLINE)
    info.cmd_line[: len(raw)] = raw
    if ramdisk:
        info.mod_start, info.mod_len = ramdisk
    if p2m_frames:
        info.first_p2m_pfn, info.nr_p2m_frames = p2m_frames
    return bytes(info).ljust(PAGE_SIZE, b"\0")


def hvm_start_info_size(cmdline: str, modules: Sequence[tuple[int, int, str]], entries: int) -> int:
    texts = len(cmdline.encode()) + 1 + sum(len(text.encode()) + 1 for _, _, text in modules)
    return _START_INFO + len(modules) * _MODULE + entries * _MEMMAP + texts


def hvm_start_info(
    base: int,
    *,
    cmdline: str,
    modules: Sequence[tuple[int, int, str]],
    memory_map: Sequence[E820Entry],
    rsdp: int = 0,
) -> bytes:
    """``struct hvm_start_info`` and what it points to, for guest-physical address ``base``.

    ``modules`` are (address, bytes, command line). Order: the structure, the module list, the memory map,
    then the strings.
    """
    modules_at = base + _START_INFO
    memmap_at = modules_at + len(modules) * _MODULE
    texts_at = memmap_at + len(memory_map) * _MEMMAP
    texts = bytearray()

    def text(value: str) -> int:
        if not value:
            return 0
        address = texts_at + len(texts)
        texts.extend(value.encode() + b"\0")
        return address

    info = h.HvmStartInfo(
        magic=h.XEN_HVM_START_MAGIC_VALUE,
        version=1,
        nr_modules=len(modules),
        modlist_paddr=modules_at if modules else 0,
        cmdline_paddr=text(cmdline),
        rsdp_paddr=rsdp,
        memmap_paddr=memmap_at if memory_map else 0,
        memmap_entries=len(memory_map),
    )
    parts = [bytes(info)]
    parts += [bytes(h.HvmModlistEntry(at, size, text(line))) for at, size, line in modules]
    parts += [bytes(h.HvmMemmapEntry(*entry)) for entry in memory_map]
    return b"".join(parts) + bytes(texts)


def hvm_info_page(
    *, vcpus: int, max_vcpus: int, apic: bool, low_end: int, high_end: int, reserved_first: int
) -> bytes:
    """The page with ``struct hvm_info_table`` that hvmloader reads; addresses in bytes but the last, a
    frame number."""
    info = h.HvmInfoTable(
        length=h.HvmInfoTable.size(),
        apic_mode=apic,
        nr_vcpus=max_vcpus,
        low_mem_pgend=low_end >> PAGE_SHIFT,
        high_mem_pgend=high_end >> PAGE_SHIFT,
        reserved_mem_pgstart=reserved_first,
    )
    info.signature[:] = b"HVM INFO"
    info.vcpu_online[:] = ((1 << vcpus) - 1).to_bytes(16, "little")
    info.checksum = -sum(bytes(info)) & 0xFF
    return (bytes(h.HVM_INFO_OFFSET) + bytes(info)).ljust(PAGE_SIZE, b"\0")
