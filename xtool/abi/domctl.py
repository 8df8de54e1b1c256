"""Domain control: ``public/domctl.h``. Domctls are versioned: the header's interface version must match.

========  ==================  ======================================================
version   Xen                 what changed here
========  ==================  ======================================================
0x15      4.17                (the baseline, compared with the installed headers)
0x16      4.18                nothing in these layouts
0x17      4.19, 4.20          ``createdomain`` gains ``altp2m_opts`` (64 -> 68 bytes)
0x17      4.21                that word is split in two halves, ``altp2m.opts`` and ``.nr``
0x18      4.22                an automatic id is DOMID_ANY
========  ==================  ======================================================
"""

from __future__ import annotations

from ctypes import c_int32, c_int64

from xtool.abi.base import Abi, Fields, layout, u8, u16, u32, u64

#: The versions this module knows, oldest first.
DOMCTL_VERSIONS = (0x15, 0x16, 0x17, 0x18)

XEN_DOMCTL_createdomain = 1
XEN_DOMCTL_destroydomain = 2
XEN_DOMCTL_pausedomain = 3
XEN_DOMCTL_unpausedomain = 4
XEN_DOMCTL_getdomaininfo = 5
XEN_DOMCTL_setvcpuaffinity = 9
XEN_DOMCTL_max_mem = 11
XEN_DOMCTL_setvcpucontext = 12
XEN_DOMCTL_getvcpucontext = 13
XEN_DOMCTL_getvcpuinfo = 14
XEN_DOMCTL_max_vcpus = 15
XEN_DOMCTL_scheduler_op = 16
XEN_DOMCTL_hypercall_init = 22
XEN_DOMCTL_settimeoffset = 24
XEN_DOMCTL_getvcpuaffinity = 25
XEN_DOMCTL_resumedomain = 27
XEN_DOMCTL_sendtrigger = 28
XEN_DOMCTL_gethvmcontext = 33
XEN_DOMCTL_sethvmcontext = 34
XEN_DOMCTL_set_address_size = 35
XEN_DOMCTL_settscinfo = 60
XEN_DOMCTL_getpageframeinfo3 = 61
XEN_DOMCTL_get_cpu_policy = 82
XEN_DOMCTL_set_cpu_policy = 83
XEN_DOMCTL_get_paging_mempool_size = 85
XEN_DOMCTL_set_paging_mempool_size = 86

XEN_DOMCTL_CDF_hvm = 1 << 0
XEN_DOMCTL_CDF_hap = 1 << 1
XEN_DOMCTL_CDF_oos_off = 1 << 3
XEN_DOMCTL_CDF_iommu = 1 << 5
XEN_DOMCTL_CDF_nested_virt = 1 << 6

XEN_DOMINF_dying = 1 << 0
XEN_DOMINF_hvm_guest = 1 << 1
XEN_DOMINF_shutdown = 1 << 2
XEN_DOMINF_paused = 1 << 3
XEN_DOMINF_blocked = 1 << 4
XEN_DOMINF_running = 1 << 5
XEN_DOMINF_hap = 1 << 8
XEN_DOMINF_shutdownmask = 255
XEN_DOMINF_shutdownshift = 16

XEN_VCPUAFFINITY_HARD = 1
XEN_VCPUAFFINITY_SOFT = 2
XEN_VCPUAFFINITY_FORCE = 4

XEN_SCHEDULER_CREDIT = 5
XEN_SCHEDULER_CREDIT2 = 6
XEN_SCHEDULER_ARINC653 = 7
XEN_SCHEDULER_RTDS = 8
XEN_SCHEDULER_NULL = 9
XEN_DOMCTL_SCHEDOP_putinfo = 0
XEN_DOMCTL_SCHEDOP_getinfo = 1
XEN_DOMCTL_SCHEDOP_putvcpuinfo = 2
XEN_DOMCTL_SCHEDOP_getvcpuinfo = 3
XEN_DOMCTL_SCHEDRT_extra = 1

XEN_DOMCTL_SENDTRIGGER_NMI = 0
XEN_DOMCTL_SENDTRIGGER_RESET = 1
XEN_DOMCTL_SENDTRIGGER_INIT = 2
XEN_DOMCTL_SENDTRIGGER_POWER = 3
XEN_DOMCTL_SENDTRIGGER_SLEEP = 4

# getpageframeinfo3's answer for a frame that cannot be read.
XEN_DOMCTL_PFINFO_BROKEN = 0xD << 28
XEN_DOMCTL_PFINFO_XALLOC = 0xE << 28
XEN_DOMCTL_PFINFO_XTAB = 0xF << 28

# arch-x86/xen.h
XEN_X86_EMU_LAPIC = 1 << 0
XEN_X86_EMU_ALL = 0x7FF
XEN_X86_EMU_VPCI = 1 << 10

_HDR = "domctl.h"


@layout(8, "struct xen_arch_domainconfig", _HDR)
class ArchDomainConfig(Abi):
    _fields_ = [("emulation_flags", u32), ("misc_flags", u32)]


_CREATE_HEAD: Fields = [
    ("ssidref", u32),
    ("handle", u8 * 16),
    ("flags", u32),
    ("iommu_opts", u32),
    ("max_vcpus", u32),
    ("max_evtchn_port", u32),
    ("max_grant_frames", c_int32),
    ("max_maptrack_frames", c_int32),
    ("grant_opts", u32),
]
_CREATE_TAIL: Fields = [("vmtrace_size", u32), ("cpupool_id", u32), ("arch", ArchDomainConfig)]


@layout(64, "struct xen_domctl_createdomain", _HDR)
class CreateDomain(Abi):
    _fields_ = _CREATE_HEAD + _CREATE_TAIL


@layout(68)
class CreateDomain17(Abi):
    """From interface version 0x17; Xen 4.21 splits ``altp2m_opts`` into two halves, both 0 here."""

    _fields_ = [*_CREATE_HEAD, ("altp2m_opts", u32), *_CREATE_TAIL]


#: The ``createdomain`` layout by interface version.
CREATEDOMAIN: dict[int, type[CreateDomain] | type[CreateDomain17]] = {
    0x15: CreateDomain,
    0x16: CreateDomain,
    0x17: CreateDomain17,
    0x18: CreateDomain17,
}
#: What asks for an automatic domain id, by interface version: 0 until 0x17, then DOMID_ANY.
AUTO_DOMID = {0x15: 0, 0x16: 0, 0x17: 0, 0x18: 0x7FF5}


@layout(112, "struct xen_domctl_getdomaininfo", _HDR)
class GetDomainInfo(Abi):
    _fields_ = [
        ("domain", u16),
        ("_pad1", u16),
        ("flags", u32),
        ("tot_pages", u64),
        ("max_pages", u64),
        ("outstanding_pages", u64),
        ("shr_pages", u64),
        ("paged_pages", u64),
        ("shared_info_frame", u64),
        ("cpu_time", u64),
        ("nr_online_vcpus", u32),
        ("max_vcpu_id", u32),
        ("ssidref", u32),
        ("handle", u8 * 16),
        ("cpupool", u32),
        ("gpaddr_bits", u8),
        ("_pad2", u8 * 7),
        ("arch_config", ArchDomainConfig),
    ]


@layout(8, "struct xen_domctl_max_mem", _HDR)
class MaxMem(Abi):
    _fields_ = [("max_memkb", u64)]


@layout(4, "struct xen_domctl_max_vcpus", _HDR)
class MaxVcpus(Abi):
    _fields_ = [("max", u32)]


@layout(16, "struct xen_domctl_vcpucontext", _HDR)
class VcpuContext(Abi):
    _fields_ = [("vcpu", u32), ("_pad0", u32), ("ctxt", u64)]


@layout(24, "struct xen_domctl_getvcpuinfo", _HDR)
class GetVcpuInfo(Abi):
    _fields_ = [
        ("vcpu", u32),
        ("online", u8),
        ("blocked", u8),
        ("running", u8),
        ("_pad0", u8),
        ("cpu_time", u64),
        ("cpu", u32),
        ("_pad1", u32),
    ]


@layout(16, "struct xenctl_bitmap", "xen.h")
class Bitmap(Abi):
    _fields_ = [("bitmap", u64), ("nr_bits", u32), ("_pad0", u32)]


@layout(40, "struct xen_domctl_vcpuaffinity", _HDR)
class VcpuAffinity(Abi):
    _fields_ = [("vcpu", u32), ("flags", u32), ("cpumap_hard", Bitmap), ("cpumap_soft", Bitmap)]


@layout(24, "struct xen_domctl_scheduler_op", _HDR)
class SchedulerOp(Abi):
    """With the credit and credit2 arm of its union, which are the same."""

    _fields_ = [
        ("sched_id", u32),
        ("cmd", u32),
        ("weight", u16),
        ("cap", u16),
        ("_pad0", u8 * 12),
    ]
    C_MEMBERS = {"weight": "u.credit2.weight", "cap": "u.credit2.cap"}


@layout(24, "struct xen_domctl_scheduler_op", _HDR)
class SchedulerVcpusOp(Abi):
    """The same with the arm for parameters of single vCPUs (rtds)."""

    _fields_ = [("sched_id", u32), ("cmd", u32), ("vcpus", u64), ("nr_vcpus", u32), ("_pad0", u32)]
    C_MEMBERS = {"vcpus": "u.v.vcpus", "nr_vcpus": "u.v.nr_vcpus"}


@layout(16, "struct xen_domctl_schedparam_vcpu", _HDR)
class SchedParamVcpu(Abi):
    """Times in microseconds; ``flags`` may hold ``XEN_DOMCTL_SCHEDRT_extra``."""

    _fields_ = [("period", u32), ("budget", u32), ("flags", u32), ("vcpuid", u32)]
    C_MEMBERS = {"period": "u.rtds.period", "budget": "u.rtds.budget", "flags": "u.rtds.flags"}


@layout(16, "struct xen_domctl_getpageframeinfo3", _HDR)
class GetPageFrameInfo3(Abi):
    _fields_ = [("num", u64), ("array", u64)]


@layout(8, "struct xen_domctl_hypercall_init", _HDR)
class HypercallInit(Abi):
    _fields_ = [("gmfn", u64)]


@layout(8, "struct xen_domctl_settimeoffset", _HDR)
class SetTimeOffset(Abi):
    _fields_ = [("time_offset_seconds", c_int64)]


@layout(8, "struct xen_domctl_sendtrigger", _HDR)
class SendTrigger(Abi):
    _fields_ = [("trigger", u32), ("vcpu", u32)]


@layout(16, "struct xen_domctl_hvmcontext", _HDR)
class HvmContext(Abi):
    _fields_ = [("size_", u32), ("_pad0", u32), ("buffer", u64)]
    C_MEMBERS = {"size_": "size"}


@layout(4, "struct xen_domctl_address_size", _HDR)
class AddressSize(Abi):
    _fields_ = [("size_", u32)]
    C_MEMBERS = {"size_": "size"}


@layout(24, "struct xen_domctl_tsc_info", _HDR)
class TscInfo(Abi):
    _fields_ = [
        ("tsc_mode", u32),
        ("gtsc_khz", u32),
        ("incarnation", u32),
        ("_pad0", u32),
        ("elapsed_nsec", u64),
    ]


@layout(40, "struct xen_domctl_cpu_policy", _HDR)
class CpuPolicy(Abi):
    _fields_ = [
        ("nr_leaves", u32),
        ("nr_msrs", u32),
        ("leaves", u64),
        ("msrs", u64),
        ("err_leaf", u32),
        ("err_subleaf", u32),
        ("err_msr", u32),
        ("_pad0", u32),
    ]


@layout(8, "struct xen_domctl_paging_mempool", _HDR)
class PagingMempool(Abi):
    _fields_ = [("size_", u64)]
    C_MEMBERS = {"size_": "size"}


@layout(144, "struct xen_domctl", _HDR)
class Domctl(Abi):
    """The whole argument: a header, then 128 bytes for whichever operation ``cmd`` says."""

    _fields_ = [
        ("cmd", u32),
        ("interface_version", u32),
        ("domain", u16),
        ("_pad0", u16 * 3),
        ("u", u8 * 128),
    ]


HEADER_SIZE = Domctl.u.offset
