"""What the first vCPU starts with. Pure."""

from __future__ import annotations

from xtool.abi import hvm as h
from xtool.abi import pv
from xtool.abi.base import PAGE_SHIFT
from xtool.errors import LocalProtocolError

_EFLAGS_IF = 1 << 9
_DR6, _DR7 = 0xFFFF0FF0, 0x400
_CR0_PE, _CR0_ET = 1, 1 << 4
_MTRR_WRITE_BACK, _MTRR_ENABLE = 6, 1 << 11
_DESCRIPTOR = h.HvmSaveDescriptor.size()


def pv_context(*, entry: int, stack: int, start_info: int, cr3_mfn: int) -> bytes:
    """``struct vcpu_guest_context``: a 64-bit PV kernel at its entry; addresses are virtual."""
    context = pv.VcpuGuestContext(flags=pv.VGCF_in_kernel | pv.VGCF_online)
    regs = context.user_regs
    regs.rip, regs.rsp, regs.rsi, regs.rflags = entry, stack, start_info, _EFLAGS_IF
    regs.cs, regs.ss = pv.FLAT_CS64, pv.FLAT_SS64
    context.kernel_ss, context.kernel_sp = regs.ss, stack
    context.ctrlreg[3] = cr3_mfn << PAGE_SHIFT
    context.debugreg[6], context.debugreg[7] = _DR6, _DR7
    return bytes(context)


def _record(code: int, instance: int, body: bytes) -> bytes:
    return bytes(h.HvmSaveDescriptor(code, instance, len(body))) + body


def find_record(saved: bytes, code: int, instance: int = 0) -> bytes:
    """The body of one record in an HVM context. Raises ``LocalProtocolError`` if it is not there."""
    offset = 0
    while offset + _DESCRIPTOR <= len(saved):
        entry = h.HvmSaveDescriptor.from_buffer_copy(saved, offset)
        offset += _DESCRIPTOR
        if entry.typecode == code and entry.instance == instance:
            return saved[offset : offset + entry.length]
        if entry.typecode == h.HVM_SAVE_CODE_END:
            break
        offset += entry.length
    raise LocalProtocolError(f"the domain's HVM context has no record {code}")


def hvm_records(saved: bytes, *, entry: int, start_info: int, write_back_vcpus: int = 0) -> bytes:
    """The context to load: flat 32-bit protected mode without paging at ``entry``, start info in EBX.

    The header is taken over from the domain's own saved context, since it carries the host's CPUID.
    ``write_back_vcpus`` sets that many vCPUs' default memory type to write-back: a PVH guest has no
    firmware that would.
    """
    cpu = h.HvmHwCpu(cr0=_CR0_PE | _CR0_ET, rip=entry, rbx=start_info, dr6=_DR6, dr7=_DR7)
    for name, attributes in (("cs", 0xC9B), ("ds", 0xC93), ("es", 0xC93), ("ss", 0xC93)):
        setattr(cpu, f"{name}_limit", 0xFFFFFFFF)
        setattr(cpu, f"{name}_arbytes", attributes)
    cpu.tr_limit, cpu.tr_arbytes = 0x67, 0x8B
    parts = [_record(h.HVM_SAVE_CODE_HEADER, 0, find_record(saved, h.HVM_SAVE_CODE_HEADER))]
    for vcpu in range(write_back_vcpus):
        mtrr = h.HvmHwMtrr.from_buffer_copy(find_record(saved, h.HVM_SAVE_CODE_MTRR, 0))
        mtrr.msr_mtrr_def_type = _MTRR_WRITE_BACK | _MTRR_ENABLE
        parts.append(_record(h.HVM_SAVE_CODE_MTRR, vcpu, bytes(mtrr)))
    parts.append(_record(h.HVM_SAVE_CODE_CPU, 0, bytes(cpu)))
    parts.append(_record(h.HVM_SAVE_CODE_END, 0, b""))
    return b"".join(parts)
