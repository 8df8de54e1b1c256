"""Grant tables: ``public/grant_table.h``. The entries of version 1 are in ``abi.xen``."""

from __future__ import annotations

from xtool.abi.base import Abi, layout, s16, u16, u32, u64

GNTTABOP_query_size = 6
GNTTABOP_get_version = 10

GTF_invalid = 0
GTF_permit_access = 1
GTF_accept_transfer = 2
GTF_transitive = 3
GTF_type_mask = 3
GTF_readonly = 1 << 2
GTF_reading = 1 << 3
GTF_writing = 1 << 4
GTF_sub_page = 1 << 8

GNTCOPY_source_gref = 1
GNTCOPY_dest_gref = 2

GNTST_okay = 0
GNTST_general_error = -1
GNTST_bad_domain = -2
GNTST_bad_gntref = -3
GNTST_bad_handle = -4
GNTST_bad_virt_addr = -5
GNTST_bad_dev_addr = -6
GNTST_no_device_space = -7
GNTST_permission_denied = -8
GNTST_bad_page = -9
GNTST_bad_copy_arg = -10
GNTST_address_too_big = -11
GNTST_eagain = -12
GNTST_no_space = -13

#: Status -> Xen's name of it.
STATUS_NAMES = {value: name for name, value in list(globals().items()) if name.startswith("GNTST_")}

#: Entries on one page of a table, by the table's version.
ENTRIES_PER_FRAME = {1: 512, 2: 256}


@layout(16, "struct gnttab_query_size", "grant_table.h")
class GnttabQuerySize(Abi):
    _fields_ = [
        ("dom", u16),
        ("_pad0", u16),
        ("nr_frames", u32),
        ("max_nr_frames", u32),
        ("status", s16),
        ("_pad1", u16),
    ]


@layout(8, "struct gnttab_get_version", "grant_table.h")
class GnttabGetVersion(Abi):
    _fields_ = [("dom", u16), ("_pad0", u16), ("version", u32)]


@layout(16, "union grant_entry_v2", "grant_table.h")
class GrantEntryV2(Abi):
    """``page_off`` and ``length`` count with ``GTF_sub_page`` only. For a transitive grant the same bytes
    hold another domid and ref."""

    _fields_ = [("flags", u16), ("domid", u16), ("page_off", u16), ("length", u16), ("frame", u64)]
    C_MEMBERS = {
        "flags": "hdr.flags",
        "domid": "hdr.domid",
        "page_off": "sub_page.page_off",
        "length": "sub_page.length",
        "frame": "sub_page.frame",
    }


def status_name(status: int) -> str:
    """``-3`` -> ``"GNTST_bad_gntref"``; unknown numbers as they are."""
    return STATUS_NAMES.get(status, f"status {status}")
