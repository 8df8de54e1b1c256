"""HVM: ``public/hvm/params.h``, ``hvm_op.h``, ``hvm_info_table.h``, ``save.h``, ``arch-x86/hvm/*.h``."""

from __future__ import annotations

from xtool.abi.base import Abi, Fields, layout, u8, u16, u32, u64

HVMOP_set_param = 0
HVMOP_get_param = 1

HVM_PARAM_STORE_PFN = 1
HVM_PARAM_STORE_EVTCHN = 2
HVM_PARAM_IOREQ_PFN = 5
HVM_PARAM_BUFIOREQ_PFN = 6
HVM_PARAM_VIRIDIAN = 9
HVM_PARAM_TIMER_MODE = 10
HVM_PARAM_HPET_ENABLED = 11
HVM_PARAM_IDENT_PT = 12
HVM_PARAM_ACPI_S_STATE = 14
HVM_PARAM_VPT_ALIGN = 16
HVM_PARAM_CONSOLE_PFN = 17
HVM_PARAM_CONSOLE_EVTCHN = 18
HVM_PARAM_PAGING_RING_PFN = 27
HVM_PARAM_MONITOR_RING_PFN = 28
HVM_PARAM_SHARING_RING_PFN = 29
HVM_PARAM_IOREQ_SERVER_PFN = 32
HVM_PARAM_NR_IOREQ_SERVER_PAGES = 33

HVM_INFO_PFN = 0x9F
HVM_INFO_OFFSET = 0x800
HVM_MAX_VCPUS = 128

XEN_HVM_START_MAGIC_VALUE = 0x336EC578

HVM_SAVE_CODE_END = 0
HVM_SAVE_CODE_HEADER = 1
HVM_SAVE_CODE_CPU = 2
HVM_SAVE_CODE_MTRR = 14


@layout(16, "struct xen_hvm_param", "hvm/hvm_op.h")
class HvmParam(Abi):
    _fields_ = [("domid", u16), ("_pad0", u16), ("index", u32), ("value", u64)]


@layout(48, "struct hvm_info_table", "hvm/hvm_info_table.h")
class HvmInfoTable(Abi):
    _fields_ = [
        ("signature", u8 * 8),
        ("length", u32),
        ("checksum", u8),
        ("apic_mode", u8),
        ("_pad0", u16),
        ("nr_vcpus", u32),
        ("low_mem_pgend", u32),
        ("reserved_mem_pgstart", u32),
        ("high_mem_pgend", u32),
        ("vcpu_online", u8 * 16),
    ]


@layout(8, "struct hvm_save_descriptor", "hvm/save.h")
class HvmSaveDescriptor(Abi):
    _fields_ = [("typecode", u16), ("instance", u16), ("length", u32)]


def _regs(*names: str) -> Fields:
    return [(name, u64) for name in names]


_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr")


@layout(1032, "struct hvm_hw_cpu", "hvm/save.h")
class HvmHwCpu(Abi):
    _fields_ = [
        ("fpu_regs", u8 * 512),
        *_regs("rax", "rbx", "rcx", "rdx", "rbp", "rsi", "rdi", "rsp"),
        *_regs("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
        *_regs("rip", "rflags", "cr0", "cr2", "cr3", "cr4"),
        *_regs("dr0", "dr1", "dr2", "dr3", "dr6", "dr7"),
        *[(f"{s}_sel", u32) for s in _SEGMENTS],
        *[(f"{s}_limit", u32) for s in (*_SEGMENTS, "idtr", "gdtr")],
        *[(f"{s}_base", u64) for s in (*_SEGMENTS, "idtr", "gdtr")],
        *[(f"{s}_arbytes", u32) for s in _SEGMENTS],
        *_regs("sysenter_cs", "sysenter_esp", "sysenter_eip", "shadow_gs", "msr_flags"),
        *_regs("msr_lstar", "msr_star", "msr_cstar", "msr_syscall_mask", "msr_efer", "msr_tsc_aux", "tsc"),
        ("pending_event", u32),
        ("error_code", u32),
        ("flags", u32),
        ("_pad0", u32),
    ]


@layout(240, "struct hvm_hw_mtrr", "hvm/save.h")
class HvmHwMtrr(Abi):
    _fields_ = [
        ("msr_pat_cr", u64),
        ("msr_mtrr_var", u64 * 16),
        ("msr_mtrr_fixed", u64 * 11),
        ("msr_mtrr_cap", u64),
        ("msr_mtrr_def_type", u64),
    ]


@layout(56, "struct hvm_start_info", "arch-x86/hvm/start_info.h")
class HvmStartInfo(Abi):
    _fields_ = [
        ("magic", u32),
        ("version", u32),
        ("flags", u32),
        ("nr_modules", u32),
        ("modlist_paddr", u64),
        ("cmdline_paddr", u64),
        ("rsdp_paddr", u64),
        ("memmap_paddr", u64),
        ("memmap_entries", u32),
        ("reserved", u32),
    ]


@layout(32, "struct hvm_modlist_entry", "arch-x86/hvm/start_info.h")
class HvmModlistEntry(Abi):
    _fields_ = [("paddr", u64), ("size_", u64), ("cmdline_paddr", u64), ("reserved", u64)]
    C_MEMBERS = {"size_": "size"}


@layout(24, "struct hvm_memmap_table_entry", "arch-x86/hvm/start_info.h")
class HvmMemmapEntry(Abi):
    _fields_ = [("addr", u64), ("size_", u64), ("type", u32), ("reserved", u32)]
    C_MEMBERS = {"size_": "size"}
