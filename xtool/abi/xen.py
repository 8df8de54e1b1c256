"""Hypercall numbers and the stable hypercalls: ``public/xen.h``, ``version.h``, ``event_channel.h``,
``sched.h``, ``grant_table.h``."""

from __future__ import annotations

from xtool.abi.base import Abi, layout, u8, u16, u32, u64

__HYPERVISOR_memory_op = 12
__HYPERVISOR_xen_version = 17
__HYPERVISOR_grant_table_op = 20
__HYPERVISOR_mmuext_op = 26
__HYPERVISOR_sched_op = 29
__HYPERVISOR_event_channel_op = 32
__HYPERVISOR_hvm_op = 34
__HYPERVISOR_sysctl = 35
__HYPERVISOR_domctl = 36
__HYPERVISOR_hypfs_op = 42

# The same without the leading underscores, which Python would mangle inside classes.
OP_MEMORY = __HYPERVISOR_memory_op
OP_XEN_VERSION = __HYPERVISOR_xen_version
OP_GRANT_TABLE = __HYPERVISOR_grant_table_op
OP_MMUEXT = __HYPERVISOR_mmuext_op
OP_SCHED = __HYPERVISOR_sched_op
OP_EVENT_CHANNEL = __HYPERVISOR_event_channel_op
OP_HVM = __HYPERVISOR_hvm_op
OP_SYSCTL = __HYPERVISOR_sysctl
OP_DOMCTL = __HYPERVISOR_domctl
OP_HYPFS = __HYPERVISOR_hypfs_op

DOMID_FIRST_RESERVED = 0x7FF0
DOMID_SELF = 0x7FF0
#: Owner of pages of Xen's own that may be mapped, such as the machine-to-physical table.
DOMID_XEN = 0x7FF2

MMUEXT_PIN_L4_TABLE = 3
MMUEXT_CLEAR_PAGE = 16

XENVER_version = 0
XENVER_extraversion = 1
XENVER_compile_info = 2
XENVER_capabilities = 3
XENVER_changeset = 4
XENVER_platform_parameters = 5
XENVER_get_features = 6
XENVER_pagesize = 7
XENVER_commandline = 9

EVTCHNOP_close = 3
EVTCHNOP_send = 4
EVTCHNOP_status = 5
EVTCHNOP_alloc_unbound = 6

SCHEDOP_remote_shutdown = 4
SHUTDOWN_poweroff = 0
SHUTDOWN_reboot = 1
SHUTDOWN_suspend = 2
SHUTDOWN_crash = 3
SHUTDOWN_watchdog = 4
SHUTDOWN_soft_reset = 5

GNTTAB_RESERVED_CONSOLE = 0
GNTTAB_RESERVED_XENSTORE = 1
GTF_permit_access = 1

SIF_MOD_START_PFN = 1 << 3


@layout(24, "struct mmuext_op", "xen.h")
class MmuextOp(Abi):
    _fields_ = [("cmd", u32), ("_pad0", u32), ("arg1", u64), ("arg2", u64)]


@layout(8, "struct evtchn_alloc_unbound", "event_channel.h")
class EvtchnAllocUnbound(Abi):
    _fields_ = [("dom", u16), ("remote_dom", u16), ("port", u32)]


@layout(24, "struct evtchn_status", "event_channel.h")
class EvtchnStatus(Abi):
    """``u`` is a union: the unbound or interdomain peer's domid, or a pirq or virq number."""

    _fields_ = [
        ("dom", u16),
        ("_pad0", u16),
        ("port", u32),
        ("status", u32),
        ("vcpu", u32),
        ("u", u32),
        ("remote_port", u32),
    ]
    C_MEMBERS = {"u": "u.pirq", "remote_port": "u.interdomain.port"}


@layout(8, "struct sched_remote_shutdown", "sched.h")
class RemoteShutdown(Abi):
    _fields_ = [("domain_id", u16), ("_pad0", u16), ("reason", u32)]


@layout(8, "struct grant_entry_v1", "grant_table.h")
class GrantEntryV1(Abi):
    _fields_ = [("flags", u16), ("domid", u16), ("frame", u32)]


@layout(8, "struct xen_feature_info", "version.h")
class FeatureInfo(Abi):
    _fields_ = [("submap_idx", u32), ("submap", u32)]


@layout(64, "struct vcpu_info", "xen.h")
class VcpuInfo(Abi):
    _fields_ = [
        ("evtchn_upcall_pending", u8),
        ("evtchn_upcall_mask", u8),
        ("_pad0", u8 * 6),
        ("evtchn_pending_sel", u64),
        ("_pad1", u8 * 48),
    ]


#: ``shared_info`` starts with this many ``vcpu_info`` (XEN_LEGACY_MAX_VCPUS).
XEN_LEGACY_MAX_VCPUS = 32
