"""Xen's file system of run-time parameters: ``public/hypfs.h``. Stable, so not versioned."""

from __future__ import annotations

from xtool.abi.base import Abi, layout, u8, u16, u32

XEN_HYPFS_OP_get_version = 0
XEN_HYPFS_OP_read = 1
XEN_HYPFS_OP_write_contents = 2

XEN_HYPFS_MAX_PATHLEN = 1024

XEN_HYPFS_TYPE_DIR = 0
XEN_HYPFS_TYPE_BLOB = 1
XEN_HYPFS_TYPE_STRING = 2
XEN_HYPFS_TYPE_UINT = 3
XEN_HYPFS_TYPE_INT = 4
XEN_HYPFS_TYPE_BOOL = 5
XEN_HYPFS_ENC_PLAIN = 0

_HDR = "hypfs.h"


@layout(12, "struct xen_hypfs_direntry", _HDR)
class HypfsDirEntry(Abi):
    """``max_write_len`` is 0 for what cannot be written."""

    _fields_ = [
        ("type", u8),
        ("encoding", u8),
        ("pad", u16),
        ("content_len", u32),
        ("max_write_len", u32),
    ]


#: ``struct xen_hypfs_dirlistentry``: an entry, the offset to the next, and the name from byte 14 on.
NEXT_AT = 12
NAME_AT = 14
C_CONSTANTS = {
    "NEXT_AT": "offsetof(struct xen_hypfs_dirlistentry, off_next)",
    "NAME_AT": "offsetof(struct xen_hypfs_dirlistentry, name)",
}
