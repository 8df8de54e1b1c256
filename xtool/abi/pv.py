"""PV guests: ``public/xen.h`` (start_info) and ``public/arch-x86/xen.h`` (vcpu_guest_context)."""

from __future__ import annotations

from xtool.abi.base import Abi, layout, u8, u16, u32, u64

MAX_GUEST_CMDLINE = 1024
VGCF_in_kernel = 1 << 2
VGCF_online = 1 << 5

#: Flat segments of a 64-bit PV kernel (arch-x86/xen-x86_64.h: FLAT_RING3_*64).
FLAT_CS64 = 0xE033
FLAT_SS64 = 0xE02B


@layout(1168, "struct start_info", "xen.h")
class StartInfo(Abi):
    _fields_ = [
        ("magic", u8 * 32),
        ("nr_pages", u64),
        ("shared_info", u64),
        ("flags", u32),
        ("_pad0", u32),
        ("store_mfn", u64),
        ("store_evtchn", u32),
        ("_pad1", u32),
        ("console_mfn", u64),
        ("console_evtchn", u32),
        ("_pad2", u32),
        ("pt_base", u64),
        ("nr_pt_frames", u64),
        ("mfn_list", u64),
        ("mod_start", u64),
        ("mod_len", u64),
        ("cmd_line", u8 * MAX_GUEST_CMDLINE),
        ("first_p2m_pfn", u64),
        ("nr_p2m_frames", u64),
    ]
    C_MEMBERS = {"console_mfn": "console.domU.mfn", "console_evtchn": "console.domU.evtchn"}


@layout(200, "struct cpu_user_regs", "xen.h")
class CpuUserRegs(Abi):
    _fields_ = [
        *[(name, u64) for name in ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8")],
        *[(name, u64) for name in ("rax", "rcx", "rdx", "rsi", "rdi")],
        ("error_code", u32),
        ("entry_vector", u32),
        ("rip", u64),
        ("cs", u16),
        ("_pad0", u16),
        ("saved_upcall_mask", u8),
        ("_pad1", u8 * 3),
        ("rflags", u64),
        ("rsp", u64),
        ("ss", u16),
        ("_pad2", u16 * 3),
        ("es", u16),
        ("_pad3", u16 * 3),
        ("ds", u16),
        ("_pad4", u16 * 3),
        ("fs", u16),
        ("_pad5", u16 * 3),
        ("gs", u16),
        ("_pad6", u16 * 3),
    ]


@layout(5168, "struct vcpu_guest_context", "xen.h")
class VcpuGuestContext(Abi):
    _fields_ = [
        ("fpu_ctxt", u8 * 512),
        ("flags", u64),
        ("user_regs", CpuUserRegs),
        ("trap_ctxt", u8 * (256 * 16)),
        ("ldt_base", u64),
        ("ldt_ents", u64),
        ("gdt_frames", u64 * 16),
        ("gdt_ents", u64),
        ("kernel_ss", u64),
        ("kernel_sp", u64),
        ("ctrlreg", u64 * 8),
        ("debugreg", u64 * 8),
        ("event_callback_eip", u64),
        ("failsafe_callback_eip", u64),
        ("syscall_callback_eip", u64),
        ("vm_assist", u64),
        ("fs_base", u64),
        ("gs_base_kernel", u64),
        ("gs_base_user", u64),
    ]
