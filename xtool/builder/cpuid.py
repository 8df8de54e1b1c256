"""A guest's CPUID policy: the host's default for its type, with the topology a guest must see. Pure.

Facts about CPUID policies
--------------------------
* Xen gives a new domain the default policy already; what has to be set is what depends on the toolstack:
  the vCPU numbering (an HVM guest's APIC id is twice the vCPU's number), invariant TSC off, nesting.
* Xen checks what it is given and says which leaf it objects to.
* A PV guest without CPUID faulting sees the real topology, so its policy follows the host there.
"""

from __future__ import annotations

from struct import Struct

_LEAF = Struct("<6I")  # leaf, subleaf, eax, ebx, ecx, edx
_INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)  # ebx, ecx, edx of leaf 0
_HTT, _PAE, _VMX = 1 << 28, 1 << 6, 1 << 5  # leaf 1: edx, edx, ecx
_CMP_LEGACY, _SVM = 1 << 1, 1 << 2  # leaf 0x80000001 ecx
_ITSC = 1 << 8  # leaf 0x80000007 edx


def _bit(value: int, mask: int, on: bool) -> int:
    return value | mask if on else value & ~mask


def guest_policy(leaves: bytes, *, hvm: bool, pae: bool = True, nested: bool = False) -> bytes:
    """The policy to set: packed ``xen_cpuid_leaf_t`` records in, the same records adjusted out."""
    vendor: tuple[int, int, int] | None = None
    out = bytearray()
    for leaf, subleaf, eax, ebx, ecx, edx in _LEAF.iter_unpack(leaves):
        if leaf == 0:
            vendor = (ebx, ecx, edx)
        elif leaf == 0x80000007:
            edx = _bit(edx, _ITSC, False)
        elif hvm and leaf == 1:
            ebx = ebx & ~0xFF0000 | _logical_processors(ebx >> 16 & 0xFF) << 16
            edx = _bit(_bit(edx, _HTT, True), _PAE, pae)
            ecx = _bit(ecx, _VMX, nested)
        elif hvm and leaf == 4 and vendor == _INTEL and eax & 0x1F:
            cores = eax >> 26 & 0x3F
            eax = eax & ~0xFFFFC000 | ((cores << 1 | 1) & 0x3F) << 26
        elif hvm and leaf == 0x80000001:
            ecx = _bit(_bit(ecx, _CMP_LEGACY, False), _SVM, nested)
        elif hvm and leaf == 0x80000008 and vendor != _INTEL:
            ecx = _amd_cores(ecx)
        out += _LEAF.pack(leaf, subleaf, eax, ebx, ecx, edx)
    return bytes(out)


def _logical_processors(count: int) -> int:
    """Twice as many APIC ids per package, without overflowing eight bits."""
    if not count:
        return 2
    return count if count & 0x80 else count * 2


def _amd_cores(ecx: int) -> int:
    cores, bits = ecx & 0xFF, ecx >> 12 & 0xF
    if cores >= 0x7F:
        return ecx
    if 0 < bits < 7:
        bits += 1
    return ecx & ~0xF0FF | bits << 12 | (cores << 1 | 1)
