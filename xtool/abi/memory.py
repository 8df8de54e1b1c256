"""Memory operations: ``public/memory.h``, and e820 types."""

from __future__ import annotations

from xtool.abi.base import Abi, layout, u16, u32, u64

XENMEM_populate_physmap = 6
XENMEM_decrease_reservation = 1
XENMEM_maximum_ram_page = 2
XENMEM_machphys_mfn_list = 5
XENMEM_maximum_gpfn = 14
XENMEM_memory_map = 9
XENMEM_set_memory_map = 13
XENMEM_claim_pages = 24
XENMEM_set_pod_target = 16
XENMEM_get_pod_target = 17
#: memory.h: the pages are only promised; Xen takes them from the cache that set_pod_target filled.
XENMEMF_populate_on_demand = 1 << 16
XENMEM_acquire_resource = 28
XENMEM_resource_grant_table = 1
XENMEM_resource_grant_table_id_shared = 0
XENMEM_resource_grant_table_id_status = 1

E820_RAM = 1
E820_RESERVED = 2
E820_ACPI = 3
E820_NAMES = {E820_RAM: "RAM", E820_RESERVED: "reserved", E820_ACPI: "ACPI"}

_HDR = "memory.h"


@layout(32, "struct xen_memory_reservation", _HDR)
class MemoryReservation(Abi):
    _fields_ = [
        ("extent_start", u64),
        ("nr_extents", u64),
        ("extent_order", u32),
        ("mem_flags", u32),
        ("domid", u16),
        ("_pad0", u16 * 3),
    ]


@layout(40, "struct xen_pod_target", _HDR)
class PodTarget(Abi):
    _fields_ = [
        ("target_pages", u64),
        ("tot_pages", u64),
        ("pod_cache_pages", u64),
        ("pod_entries", u64),
        ("domid", u16),
        ("_pad0", u16 * 3),
    ]


@layout(24, "struct xen_machphys_mfn_list", _HDR)
class MachphysMfnList(Abi):
    """``extent_start``: room for the first machine frame of each 2 MiB of the table."""

    _fields_ = [
        ("max_extents", u32),
        ("_pad0", u32),
        ("extent_start", u64),
        ("nr_extents", u32),
        ("_pad1", u32),
    ]


@layout(24, "struct xen_foreign_memory_map", _HDR)
class ForeignMemoryMap(Abi):
    _fields_ = [
        ("domid", u16),
        ("_pad0", u16 * 3),
        ("nr_entries", u32),
        ("_pad1", u32),
        ("buffer", u64),
    ]
    C_MEMBERS = {"nr_entries": "map.nr_entries", "buffer": "map.buffer"}
