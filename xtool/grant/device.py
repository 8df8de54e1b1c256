"""/dev/xen/gntdev: other domains' pages, mapped or copied.

Facts about gntdev
------------------
* Mapping takes two steps: an ioctl lists the grants and answers with an offset, ``mmap`` at that offset and
  of exactly that length asks Xen for all of them. If Xen refuses one, ``mmap`` fails with EINVAL and says
  neither which nor why; pages that did get mapped are unmapped again by the kernel. So after a failure each
  grant is tried on its own by copying one byte from it, which does give Xen's status.
* ``PROT_WRITE`` decides whether Xen is asked for a writable mapping; a grant that is read-only refuses that.
* The list entry and the memory are apart: the pages go back when both the memory is unmapped and the entry is
  removed (by ioctl, or by closing the device). An entry can be mapped once.
* A map operation carries at most 65536 grants (module parameter ``limit``). Newer kernels do not know
  ``SET_MAX_GRANTS`` any more, so it is not used. Xen's own limit is the domain's maptrack table, shared by
  all of dom0: what is kept mapped must be bounded.
* One unmap notification for each mapping: setting it again replaces it. The kernel carries it out also when
  the process is killed. Its port must be bound by a process of this domain through /dev/xen/evtchn.
* In a PV dom0 a forked child does not inherit the pages.
* Copies: the kernel splits a segment where our side crosses a page and gives Xen 16 operations at a time. One
  segment that crosses the end of a granted page makes the whole ioctl fail with EINVAL, so ``CopyBatch``
  never lets one through. EAGAIN from Xen (a page that is paged out) is retried by the kernel. Our side has to
  be ordinary memory, not another grant's mapping.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from errno import EINVAL
from fcntl import ioctl
from struct import Struct
from types import TracebackType

from xtool.abi import linux as lx
from xtool.abi.base import PAGE_SIZE
from xtool.abi.grant import GNTST_bad_gntref, GNTST_general_error, status_name
from xtool.devnode import open_device
from xtool.errors import GrantError, LocalProtocolError
from xtool.grant.copy import CopySegment, Foreign, copy_all
from xtool.grant.held import HeldPages
from xtool.grant.window import Buffer, Window

_MAP_HEAD = Struct("<IIQ")  # struct ioctl_gntdev_map_grant_ref before refs
_REF_MAX = 0xFFFF_FFFF


class MappedPages(HeldPages):
    """What ``GrantDevice.map`` gives."""

    def __init__(
        self, device: GrantDevice, grants: tuple[tuple[int, int], ...], window: Window, index: int
    ) -> None:
        super().__init__(device, window, index, len(grants))
        self.grants = grants


class GrantDevice:
    """The ``Grants`` of this domain. Raises ``NoXenError`` or ``PrivilegeError`` when it cannot be opened.

    What is mapped stays so until it is closed, or this is. For one thread.
    """

    NOTIFY = lx.IOCTL_GNTDEV_SET_UNMAP_NOTIFY

    def __init__(self) -> None:
        self._fd = open_device(lx.GNTDEV, "xen-gntdev")
        self._live: set[HeldPages] = set()

    def fileno(self) -> int:
        return self._fd

    # --- mapping ------------------------------------------------------------------------------------
    def map(self, domid: int, refs: Sequence[int], writable: bool = True) -> MappedPages:
        return self.map_many([(domid, ref) for ref in refs], writable)

    def map_many(self, grants: Sequence[tuple[int, int]], writable: bool = True) -> MappedPages:
        if not grants:
            raise LocalProtocolError("no grants to map")
        for domid, ref in grants:
            if not 0 <= ref <= _REF_MAX:
                raise _refused(domid, ref, GNTST_bad_gntref)
        count = len(grants)
        index = self._list(grants)
        try:
            window = Window.of_file(self._fd, index, count * PAGE_SIZE, writable=writable)
        except OSError as error:
            self._unlist(index, count)
            raise self._blame(grants, writable, error.errno or 0) from None
        mapped = MappedPages(self, tuple(grants), window, index)
        self._live.add(mapped)
        return mapped

    def _list(self, grants: Sequence[tuple[int, int]]) -> int:
        request = bytearray(_MAP_HEAD.pack(len(grants), 0, 0))
        request += array("I", [word for grant in grants for word in grant]).tobytes()
        try:
            ioctl(self._fd, lx.IOCTL_GNTDEV_MAP_GRANT_REF, request, True)
        except OSError as error:
            raise GrantError(f"listing {len(grants)} grants to map", error.errno or 0) from None
        return int(_MAP_HEAD.unpack_from(request)[2])

    def _unlist(self, index: int, count: int) -> None:
        ioctl(
            self._fd, lx.IOCTL_GNTDEV_UNMAP_GRANT_REF, bytes(lx.GntdevUnmapGrantRef(index=index, count=count))
        )

    def forget(self, pages: HeldPages, index: int, count: int) -> None:
        self._live.discard(pages)
        if self._fd >= 0:
            self._unlist(index, count)

    def _blame(self, grants: Sequence[tuple[int, int]], writable: bool, number: int) -> GrantError:
        """Which grant could not be mapped, and why."""
        with Buffer(PAGE_SIZE) as scratch:
            try:
                statuses = self.copy(CopySegment(Foreign(*grant), scratch.address, 1) for grant in grants)
            except GrantError:
                statuses = []
        for (domid, ref), status in zip(grants, statuses, strict=False):
            if status:
                return _refused(domid, ref, status, number)
        if writable and len(grants) > 1:
            for domid, ref in grants:
                try:
                    self.map(domid, [ref]).close()
                except GrantError as error:
                    return error
        domid, ref = grants[0]
        if len(grants) == 1 and statuses and writable:
            # It can be read: Xen answers like this when it is read-only.
            return _refused(domid, ref, GNTST_general_error, number, "it may be read-only")
        return GrantError(
            f"mapping {len(grants)} grants of domain {domid}",
            number,
            detail="each can be read: no room for more mappings?",
        )

    # --- copying ------------------------------------------------------------------------------------
    def copy(self, segments: Iterable[CopySegment]) -> list[int]:
        return copy_all(self, segments)

    def copy_block(self, address: int, count: int) -> None:
        try:
            ioctl(
                self._fd, lx.IOCTL_GNTDEV_GRANT_COPY, bytes(lx.GntdevGrantCopy(count=count, segments=address))
            )
        except OSError as error:
            raise GrantError(f"a copy of {count} segments", error.errno or 0) from None

    def close(self) -> None:
        if self._fd < 0:
            return
        busy = None
        for mapped in list(self._live):
            try:
                mapped.close()
            except BufferError as error:
                busy = error
        if busy is not None:
            raise busy
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> GrantDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _refused(domid: int, ref: int, status: int, number: int = EINVAL, more: str = "") -> GrantError:
    return GrantError(
        f"mapping grant {ref} of domain {domid}",
        number,
        domid=domid,
        ref=ref,
        status=status,
        detail=status_name(status) + (f": {more}" if more else ""),
    )
