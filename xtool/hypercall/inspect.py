"""Xen's own parameters and version, and what a core dump is made of.

Facts about Xen's side:
* The machine-to-physical table is mapped as memory of DOMID_XEN, in pieces of 2 MiB whose first frames Xen
  lists. PV guests update it themselves, so for their frames it says what they want it to say.
* ``getpageframeinfo3`` answers for up to 1024 frames, of a PV guest by machine frame: the only way left to
  find out which frames are a PV guest's without trusting the guest.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Sequence

from xtool.abi import domctl as d
from xtool.abi import hypfs as f
from xtool.abi import memory as m
from xtool.abi import pv
from xtool.abi import xen as x
from xtool.abi.base import PAGE_SIZE
from xtool.errors import HypercallError
from xtool.hypercall.calls import Calls
from xtool.hypercall.tuningport import PodState, XenParameter, XenVersion

_FRAMES = 1024
_EXTENT = 2 << 20
_PER_PAGE = PAGE_SIZE // 8
#: Room for the list of the table's pieces: 16384 of them describe 16 TiB of memory.
_EXTENTS = 16384


class InspectCalls(Calls):
    # --- parameters -------------------------------------------------------------------------------
    def _path(self, path: str) -> tuple[int, int]:
        raw = path.encode() + b"\0"
        if len(raw) > f.XEN_HYPFS_MAX_PATHLEN:
            raise HypercallError(f"hypfs {path[:80]}...", errno.ENAMETOOLONG)
        return self._device.put(raw), len(raw)

    def parameter(self, path: str) -> XenParameter:
        address, length = self._path(path)
        bulk, room = self._device.bulk, self._device.bulk_size
        self._device.call(f"reading {path}", x.OP_HYPFS, f.XEN_HYPFS_OP_read, address, length, bulk, room)
        size = f.HypfsDirEntry.size()
        entry = f.HypfsDirEntry.from_buffer_copy(self._device.get_bulk(size))
        content = self._device.get_bulk(size + entry.content_len)[size:]
        return XenParameter(entry.type, content, entry.max_write_len > 0)

    def set_parameter(self, path: str, content: bytes) -> None:
        address, length = self._path(path)
        bulk = self._device.put_bulk(content)
        self._device.call(
            f"writing {path}", x.OP_HYPFS, f.XEN_HYPFS_OP_write_contents, address, length, bulk, len(content)
        )

    # --- the version ------------------------------------------------------------------------------
    def xen_version(self) -> XenVersion:
        number = self._version_call("version", x.XENVER_version)
        return XenVersion(
            number >> 16,
            number & 0xFFFF,
            self._version_raw("extraversion", x.XENVER_extraversion, 16),
            self._version_raw("compile_info", x.XENVER_compile_info, 144),
            self._version_raw("capabilities", x.XENVER_capabilities, 1024),
            self._version_raw("changeset", x.XENVER_changeset, 64),
            int.from_bytes(self._version_raw("platform", x.XENVER_platform_parameters, 8), "little"),
            self._version_call("pagesize", x.XENVER_pagesize),
        )

    def _version_call(self, name: str, cmd: int) -> int:
        return self._device.call(f"xen_version {name}", x.OP_XEN_VERSION, cmd, 0)

    def _version_raw(self, name: str, cmd: int, size: int) -> bytes:
        self._device.put(bytes(size))
        self._device.call(f"xen_version {name}", x.OP_XEN_VERSION, cmd, self._device.argument)
        return self._device.get(size)

    # --- a domain's state and memory --------------------------------------------------------------
    def vcpu_context(self, domid: int, vcpu: int) -> bytes | None:
        size = pv.VcpuGuestContext.size()
        payload = d.VcpuContext(vcpu=vcpu, ctxt=self._device.put_bulk(bytes(size)))
        try:
            self._domctl("getvcpucontext", d.XEN_DOMCTL_getvcpucontext, domid, payload)
        except HypercallError as error:
            if error.errno in (errno.ENODATA, errno.EINVAL):
                return None
            raise
        return self._device.get_bulk(size)

    def max_gpfn(self, domid: int) -> int:
        address = self._device.put(domid.to_bytes(2, "little"))
        return self._device.call(
            f"maximum_gpfn of domain {domid}", x.OP_MEMORY, m.XENMEM_maximum_gpfn, address
        )

    def ram_end(self) -> int:
        return self._device.call("maximum_ram_page", x.OP_MEMORY, m.XENMEM_maximum_ram_page, 0)

    def present(self, domid: int, frames: Sequence[int]) -> list[bool]:
        found: list[bool] = []
        for start in range(0, len(frames), _FRAMES):
            part = array("Q", frames[start : start + _FRAMES])
            address = self._device.put_bulk(part.tobytes())
            payload = d.GetPageFrameInfo3(num=len(part), array=address)
            self._domctl("getpageframeinfo3", d.XEN_DOMCTL_getpageframeinfo3, domid, payload)
            kinds = array("Q")
            kinds.frombytes(self._device.get_bulk(8 * len(part)))
            # Bit 31 marks a pinned page table, bits 28 to 30 its level; 13 to 15 is no readable page.
            found += [(kind >> 28 & 0xF) < 0xD for kind in kinds]
        return found

    def pod_state(self, domid: int) -> PodState:
        address = self._device.put(m.PodTarget(domid=domid))
        name = f"get_pod_target of domain {domid}"
        self._device.call(name, x.OP_MEMORY, m.XENMEM_get_pod_target, address)
        seen = m.PodTarget.from_buffer_copy(self._device.get(m.PodTarget.size()))
        return PodState(seen.pod_cache_pages, seen.pod_entries)

    def _table_extents(self) -> array[int]:
        address = self._device.put_bulk(bytes(8 * _EXTENTS))
        request = self._device.put(m.MachphysMfnList(max_extents=_EXTENTS, extent_start=address))
        self._device.call("machphys_mfn_list", x.OP_MEMORY, m.XENMEM_machphys_mfn_list, request)
        count = m.MachphysMfnList.from_buffer_copy(self._device.get(m.MachphysMfnList.size())).nr_extents
        extents = array("Q")
        extents.frombytes(self._device.get_bulk(8 * count))
        return extents

    def machine_to_phys(self, first: int, count: int) -> array[int]:
        extents = self._table_extents()
        per_extent = _EXTENT // PAGE_SIZE
        pages = range(first // _PER_PAGE, (first + count - 1) // _PER_PAGE + 1)
        frames = [
            extents[page // per_extent] + page % per_extent
            for page in pages
            if page // per_extent < len(extents)
        ]
        entries = array("Q")
        with self._device.map_foreign(x.DOMID_XEN, frames, writable=False) as table:
            entries.frombytes(bytes(table.view))
        skip = first - pages.start * _PER_PAGE
        return entries[skip : skip + count]
