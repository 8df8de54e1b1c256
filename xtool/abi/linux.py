"""Linux's Xen device nodes: ``xen/privcmd.h``, ``evtchn.h``, ``gntdev.h`` and ``gntalloc.h`` of the kernel's
user interface."""

from __future__ import annotations

from xtool.abi.base import Abi, ioc, layout, s16, u16, u32, u64

PRIVCMD = "/dev/xen/privcmd"
HYPERCALL_BUFFER = "/dev/xen/hypercall"
EVTCHN = "/dev/xen/evtchn"
GNTDEV = "/dev/xen/gntdev"
GNTALLOC = "/dev/xen/gntalloc"


@layout(48, "struct privcmd_hypercall", "privcmd.h")
class PrivcmdHypercall(Abi):
    _fields_ = [("op", u64), ("arg", u64 * 5)]


@layout(32, "struct privcmd_mmapbatch_v2", "privcmd.h")
class PrivcmdMmapBatchV2(Abi):
    _fields_ = [("num", u32), ("dom", u16), ("_pad0", u16), ("addr", u64), ("arr", u64), ("err", u64)]


@layout(32, "struct privcmd_mmap_resource", "privcmd.h")
class PrivcmdMmapResource(Abi):
    _fields_ = [
        ("dom", u16),
        ("_pad0", u16),
        ("type", u32),
        ("id", u32),
        ("idx", u32),
        ("num", u64),
        ("addr", u64),
    ]


IOCTL_PRIVCMD_HYPERCALL = ioc("P", 0, 48)
IOCTL_PRIVCMD_MMAPBATCH_V2 = ioc("P", 4, 32)
IOCTL_PRIVCMD_MMAP_RESOURCE = ioc("P", 7, 32)


@layout(4, "struct ioctl_evtchn_bind_virq", "evtchn.h")
class EvtchnBindVirq(Abi):
    _fields_ = [("virq", u32)]


@layout(8, "struct ioctl_evtchn_bind_interdomain", "evtchn.h")
class EvtchnBindInterdomain(Abi):
    _fields_ = [("remote_domain", u32), ("remote_port", u32)]


@layout(4, "struct ioctl_evtchn_bind_unbound_port", "evtchn.h")
class EvtchnBindUnboundPort(Abi):
    _fields_ = [("remote_domain", u32)]


@layout(4, "struct ioctl_evtchn_unbind", "evtchn.h")
class EvtchnUnbind(Abi):
    _fields_ = [("port", u32)]


@layout(4, "struct ioctl_evtchn_notify", "evtchn.h")
class EvtchnNotify(Abi):
    _fields_ = [("port", u32)]


@layout(2, "struct ioctl_evtchn_restrict_domid", "evtchn.h")
class EvtchnRestrictDomid(Abi):
    _fields_ = [("domid", u16)]


IOCTL_EVTCHN_BIND_VIRQ = ioc("E", 0, 4)
IOCTL_EVTCHN_BIND_INTERDOMAIN = ioc("E", 1, 8)
IOCTL_EVTCHN_BIND_UNBOUND_PORT = ioc("E", 2, 4)
IOCTL_EVTCHN_UNBIND = ioc("E", 3, 4)
IOCTL_EVTCHN_NOTIFY = ioc("E", 4, 4)
IOCTL_EVTCHN_RESET = ioc("E", 5, 0)
IOCTL_EVTCHN_RESTRICT_DOMID = ioc("E", 6, 2)


@layout(8, "struct ioctl_gntdev_grant_ref", "gntdev.h")
class GntdevGrantRef(Abi):
    _fields_ = [("domid", u32), ("ref", u32)]


@layout(24, "struct ioctl_gntdev_map_grant_ref", "gntdev.h")
class GntdevMapGrantRef(Abi):
    """``refs`` goes on for ``count`` elements."""

    _fields_ = [("count", u32), ("_pad0", u32), ("index", u64), ("refs", GntdevGrantRef * 1)]


@layout(16, "struct ioctl_gntdev_unmap_grant_ref", "gntdev.h")
class GntdevUnmapGrantRef(Abi):
    _fields_ = [("index", u64), ("count", u32), ("_pad0", u32)]


@layout(16, "struct ioctl_gntdev_unmap_notify", "gntdev.h")
class GntdevUnmapNotify(Abi):
    _fields_ = [("index", u64), ("action", u32), ("event_channel_port", u32)]


@layout(24, "struct gntdev_grant_copy_segment", "gntdev.h")
class GntdevGrantCopySegment(Abi):
    """``source`` and ``dest`` are unions: an address, or ``ref | offset << 32 | domid << 48`` where the flags
    say that it is a grant."""

    _fields_ = [
        ("source", u64),
        ("dest", u64),
        ("len", u16),
        ("flags", u16),
        ("status", s16),
        ("_pad0", u16),
    ]


@layout(16, "struct ioctl_gntdev_grant_copy", "gntdev.h")
class GntdevGrantCopy(Abi):
    _fields_ = [("count", u32), ("_pad0", u32), ("segments", u64)]


IOCTL_GNTDEV_MAP_GRANT_REF = ioc("G", 0, 24)
IOCTL_GNTDEV_UNMAP_GRANT_REF = ioc("G", 1, 16)
IOCTL_GNTDEV_SET_UNMAP_NOTIFY = ioc("G", 7, 16)
IOCTL_GNTDEV_GRANT_COPY = ioc("G", 8, 16)
UNMAP_NOTIFY_CLEAR_BYTE = 1
UNMAP_NOTIFY_SEND_EVENT = 2


@layout(24, "struct ioctl_gntalloc_alloc_gref", "gntalloc.h")
class GntallocAllocGref(Abi):
    """``gref_ids`` goes on for ``count`` elements."""

    _fields_ = [
        ("domid", u16),
        ("flags", u16),
        ("count", u32),
        ("index", u64),
        ("gref_ids", u32 * 1),
        ("_pad0", u32),
    ]


@layout(16, "struct ioctl_gntalloc_dealloc_gref", "gntalloc.h")
class GntallocDeallocGref(Abi):
    _fields_ = [("index", u64), ("count", u32), ("_pad0", u32)]


@layout(16, "struct ioctl_gntalloc_unmap_notify", "gntalloc.h")
class GntallocUnmapNotify(Abi):
    _fields_ = [("index", u64), ("action", u32), ("event_channel_port", u32)]


IOCTL_GNTALLOC_ALLOC_GREF = ioc("G", 5, 24)
IOCTL_GNTALLOC_DEALLOC_GREF = ioc("G", 6, 16)
IOCTL_GNTALLOC_SET_UNMAP_NOTIFY = ioc("G", 7, 16)
GNTALLOC_FLAG_WRITABLE = 1
