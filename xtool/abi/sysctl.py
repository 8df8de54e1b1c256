"""System control: ``public/sysctl.h``. Versioned like domctls: 0x15 up to Xen 4.20, 0x16 from 4.21; the
layouts here are the same in both."""

from __future__ import annotations

from xtool.abi.base import Abi, layout, u8, u16, u32, u64
from xtool.abi.domctl import Bitmap

SYSCTL_VERSIONS = (0x15, 0x16)

XEN_SYSCTL_readconsole = 1
XEN_SYSCTL_physinfo = 3
XEN_SYSCTL_sched_id = 4
XEN_SYSCTL_getdomaininfolist = 6
XEN_SYSCTL_debug_keys = 7
XEN_SYSCTL_cputopoinfo = 16
XEN_SYSCTL_cpupool_op = 18
XEN_SYSCTL_scheduler_op = 19
XEN_SYSCTL_get_cpu_policy = 29

XEN_SYSCTL_CPUPOOL_OP_CREATE = 1
XEN_SYSCTL_CPUPOOL_OP_DESTROY = 2
XEN_SYSCTL_CPUPOOL_OP_INFO = 3
XEN_SYSCTL_CPUPOOL_OP_ADDCPU = 4
XEN_SYSCTL_CPUPOOL_OP_RMCPU = 5
XEN_SYSCTL_CPUPOOL_OP_MOVEDOMAIN = 6
XEN_SYSCTL_CPUPOOL_OP_FREEINFO = 7
XEN_SYSCTL_CPUPOOL_PAR_ANY = 0xFFFFFFFF

XEN_SYSCTL_SCHEDOP_putinfo = 0
XEN_SYSCTL_SCHEDOP_getinfo = 1
#: Least and most time slice of the credit scheduler, milliseconds.
XEN_SYSCTL_CSCHED_TSLICE_MIN = 1
XEN_SYSCTL_CSCHED_TSLICE_MAX = 1000
#: Least and most rate limit of credit and credit2 (0 is none), microseconds.
XEN_SYSCTL_SCHED_RATELIMIT_MIN = 100
XEN_SYSCTL_SCHED_RATELIMIT_MAX = 500000
XEN_SYSCTL_CSCHED_MGR_DLY_MAX_US = 100000

#: A core, socket or node number of a CPU that is not there.
XEN_INVALID_CORE_ID = 0xFFFFFFFF

XEN_SYSCTL_PHYSCAP_hvm = 1 << 0
XEN_SYSCTL_PHYSCAP_pv = 1 << 1
XEN_SYSCTL_PHYSCAP_directio = 1 << 2
XEN_SYSCTL_PHYSCAP_hap = 1 << 3
XEN_SYSCTL_PHYSCAP_shadow = 1 << 4
XEN_SYSCTL_PHYSCAP_iommu_hap_pt_share = 1 << 5
XEN_SYSCTL_PHYSCAP_vmtrace = 1 << 6
XEN_SYSCTL_PHYSCAP_vpmu = 1 << 7
XEN_SYSCTL_PHYSCAP_gnttab_v1 = 1 << 8
XEN_SYSCTL_PHYSCAP_gnttab_v2 = 1 << 9

XEN_SYSCTL_cpu_policy_host = 1
XEN_SYSCTL_cpu_policy_pv_default = 4
XEN_SYSCTL_cpu_policy_hvm_default = 5

_HDR = "sysctl.h"


@layout(24, "struct xen_sysctl_readconsole", _HDR)
class ReadConsole(Abi):
    _fields_ = [
        ("clear", u8),
        ("incremental", u8),
        ("_pad0", u16),
        ("index", u32),
        ("buffer", u64),
        ("count", u32),
        ("_pad1", u32),
    ]


@layout(112, "struct xen_sysctl_physinfo", _HDR)
class PhysInfo(Abi):
    _fields_ = [
        ("threads_per_core", u32),
        ("cores_per_socket", u32),
        ("nr_cpus", u32),
        ("max_cpu_id", u32),
        ("nr_nodes", u32),
        ("max_node_id", u32),
        ("cpu_khz", u32),
        ("capabilities", u32),
        ("arch_capabilities", u32),
        ("_pad0", u32),
        ("total_pages", u64),
        ("free_pages", u64),
        ("scrub_pages", u64),
        ("outstanding_pages", u64),
        ("max_mfn", u64),
        ("hw_cap", u32 * 8),
    ]


@layout(4, "struct xen_sysctl_sched_id", _HDR)
class SchedId(Abi):
    _fields_ = [("sched_id", u32)]


@layout(24, "struct xen_sysctl_getdomaininfolist", _HDR)
class GetDomainInfoList(Abi):
    _fields_ = [
        ("first_domain", u16),
        ("_pad0", u16),
        ("max_domains", u32),
        ("buffer", u64),
        ("num_domains", u32),
        ("_pad1", u32),
    ]


@layout(16, "struct xen_sysctl_debug_keys", _HDR)
class DebugKeys(Abi):
    _fields_ = [("keys", u64), ("nr_keys", u32), ("_pad0", u32)]


@layout(12, "struct xen_sysctl_cputopo", _HDR)
class CpuTopo(Abi):
    _fields_ = [("core", u32), ("socket", u32), ("node", u32)]


@layout(16, "struct xen_sysctl_cputopoinfo", _HDR)
class CpuTopoInfo(Abi):
    _fields_ = [("num_cpus", u32), ("_pad0", u32), ("cputopo", u64)]


@layout(40, "struct xen_sysctl_cpupool_op", _HDR)
class CpupoolOp(Abi):
    _fields_ = [
        ("op", u32),
        ("cpupool_id", u32),
        ("sched_id", u32),
        ("domid", u32),
        ("cpu", u32),
        ("n_dom", u32),
        ("cpumap", Bitmap),
    ]


@layout(32, "struct xen_sysctl_scheduler_op", _HDR)
class PoolSchedulerOp(Abi):
    """The credit arm of its union; credit2's only member, ``ratelimit_us``, stands first in its own."""

    _fields_ = [
        ("cpupool_id", u32),
        ("sched_id", u32),
        ("cmd", u32),
        ("_pad0", u32),
        ("tslice_ms", u32),
        ("ratelimit_us", u32),
        ("vcpu_migr_delay_us", u32),
        ("_pad1", u32),
    ]
    C_MEMBERS = {
        "tslice_ms": "u.sched_credit.tslice_ms",
        "ratelimit_us": "u.sched_credit.ratelimit_us",
        "vcpu_migr_delay_us": "u.sched_credit.vcpu_migr_delay_us",
    }


@layout(32, "struct xen_sysctl_scheduler_op", _HDR)
class PoolCredit2Op(Abi):
    _fields_ = [
        ("cpupool_id", u32),
        ("sched_id", u32),
        ("cmd", u32),
        ("_pad0", u32),
        ("ratelimit_us", u32),
        ("_pad1", u32 * 3),
    ]
    C_MEMBERS = {"ratelimit_us": "u.sched_credit2.ratelimit_us"}


@layout(32, "struct xen_sysctl_cpu_policy", _HDR)
class SystemCpuPolicy(Abi):
    _fields_ = [
        ("index", u32),
        ("nr_leaves", u32),
        ("nr_msrs", u32),
        ("_rsvd", u32),
        ("leaves", u64),
        ("msrs", u64),
    ]


@layout(136, "struct xen_sysctl", _HDR)
class Sysctl(Abi):
    _fields_ = [("cmd", u32), ("interface_version", u32), ("u", u8 * 128)]


HEADER_SIZE = Sysctl.u.offset
