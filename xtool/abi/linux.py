"""Linux's Xen device nodes: ``xen/privcmd.h``, ``xen/evtchn.h`` of the kernel's user interface."""

from __future__ import annotations

from xtool.abi.base import Abi, ioc, layout, u16, u32, u64

PRIVCMD = "/dev/xen/privcmd"
HYPERCALL_BUFFER = "/dev/xen/hypercall"


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
