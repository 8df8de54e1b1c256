"""Memory: populating, mapping, page tables, memory maps, HVM parameters."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Sequence
from struct import Struct

from xtool.abi import grant as g
from xtool.abi import hvm as h
from xtool.abi import memory as m
from xtool.abi import xen as x
from xtool.errors import HypercallError
from xtool.hypercall.calls import Calls
from xtool.hypercall.port import E820Entry, GrantTableSize, Mapping

_E820 = Struct("<QQI")
#: Extents per populate call: what fits the argument memory.
_EXTENTS = 8192


class MemoryCalls(Calls):
    def _memory_op(self, name: str, cmd: int, argument: bytes) -> int:
        return self._device.call(name, x.OP_MEMORY, cmd, self._device.put(argument))

    def populate(
        self, domid: int, extents: Sequence[int], order: int = 0, *, on_demand: bool = False
    ) -> list[int]:
        given: list[int] = []
        for start in range(0, len(extents), _EXTENTS):
            part = array("Q", extents[start : start + _EXTENTS])
            request = m.MemoryReservation(
                extent_start=self._device.put_bulk(part.tobytes()),
                nr_extents=len(part),
                extent_order=order,
                mem_flags=m.XENMEMF_populate_on_demand if on_demand else 0,
                domid=domid,
            )
            done = self._memory_op(
                f"populate_physmap of domain {domid}", m.XENMEM_populate_physmap, bytes(request)
            )
            answer = array("Q")
            answer.frombytes(self._device.get_bulk(8 * done))
            given += answer
            if done < len(part):
                break
        return given

    def set_pod_target(self, domid: int, pages: int) -> None:
        request = m.PodTarget(target_pages=pages, domid=domid)
        name = f"set_pod_target of domain {domid} to {pages} pages"
        self._memory_op(name, m.XENMEM_set_pod_target, bytes(request))

    def claim(self, domid: int, pages: int) -> None:
        request = m.MemoryReservation(nr_extents=pages, domid=domid)
        self._memory_op(f"claim_pages for domain {domid}", m.XENMEM_claim_pages, bytes(request))

    def set_memory_map(self, domid: int, entries: Sequence[E820Entry]) -> None:
        raw = b"".join(_E820.pack(*entry) for entry in entries)
        request = m.ForeignMemoryMap(domid=domid, nr_entries=len(entries), buffer=self._device.put_bulk(raw))
        self._memory_op(f"set_memory_map of domain {domid}", m.XENMEM_set_memory_map, bytes(request))

    def _mmuext(self, name: str, domid: int, cmd: int, mfn: int) -> None:
        operation = self._device.put(x.MmuextOp(cmd=cmd, arg1=mfn))
        done = operation + x.MmuextOp.size()
        self._device.call(name, x.OP_MMUEXT, operation, 1, done, domid)

    def clear_page(self, domid: int, gfn: int) -> None:
        self._mmuext(f"clear_page of domain {domid}", domid, x.MMUEXT_CLEAR_PAGE, gfn)

    def pin_l4_table(self, domid: int, mfn: int) -> None:
        self._mmuext(f"pin_l4_table of domain {domid}", domid, x.MMUEXT_PIN_L4_TABLE, mfn)

    def map_foreign(self, domid: int, gfns: Sequence[int], *, writable: bool = True) -> Mapping:
        return self._device.map_foreign(domid, gfns, writable=writable)

    def grant_table_size(self, domid: int) -> GrantTableSize:
        name = f"grant table size of domain {domid}"
        address = self._device.put(g.GnttabGetVersion(dom=domid))
        self._device.call(name, x.OP_GRANT_TABLE, g.GNTTABOP_get_version, address, 1)
        version = g.GnttabGetVersion.from_buffer_copy(self._device.get(g.GnttabGetVersion.size())).version
        address = self._device.put(g.GnttabQuerySize(dom=domid))
        self._device.call(name, x.OP_GRANT_TABLE, g.GNTTABOP_query_size, address, 1)
        size = g.GnttabQuerySize.from_buffer_copy(self._device.get(g.GnttabQuerySize.size()))
        if size.status:
            raise HypercallError(name, errno.EINVAL, detail=g.status_name(size.status))
        return GrantTableSize(version, size.nr_frames, size.max_nr_frames)

    def _map_grants(self, domid: int, ident: int, frames: int) -> Mapping:
        return self._device.map_resource(domid, m.XENMEM_resource_grant_table, ident, 0, frames)

    def map_grant_table(self, domid: int, frames: int = 1) -> Mapping:
        return self._map_grants(domid, m.XENMEM_resource_grant_table_id_shared, frames)

    def map_grant_status(self, domid: int, frames: int) -> Mapping:
        return self._map_grants(domid, m.XENMEM_resource_grant_table_id_status, frames)

    def set_hvm_param(self, domid: int, index: int, value: int) -> None:
        address = self._device.put(h.HvmParam(domid=domid, index=index, value=value))
        self._device.call(f"set_param {index} of domain {domid}", x.OP_HVM, h.HVMOP_set_param, address)

    def hvm_param(self, domid: int, index: int) -> int:
        address = self._device.put(h.HvmParam(domid=domid, index=index))
        self._device.call(f"get_param {index} of domain {domid}", x.OP_HVM, h.HVMOP_get_param, address)
        return int(h.HvmParam.from_buffer_copy(self._device.get(h.HvmParam.size())).value)
