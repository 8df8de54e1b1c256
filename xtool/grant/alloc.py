"""/dev/xen/gntalloc: pages of ours that another domain may map.

Facts about gntalloc
--------------------
* The kernel allocates the pages (zeroed) and grants them; ``mmap`` at the offset it answers with shows them
  to us. The offset counts on within one open file and is not used again.
* A page lives while anything holds it: the list entry (until DEALLOC or close), our mapping, and the peer's.
  Only when we have let go is the grant taken back, and if the peer has it mapped then, that happens at some
  later operation of the device. Nobody can force the peer.
* So all users together get a limited number of pages (module parameter ``limit``, 1024): ENOSPC when it is
  reached, also by pages that peers do not give back.
* Unmap notifications belong to single pages, one for each. They are carried out when *we* let go of the page,
  also by being killed; the offset has 12 bits, within the page.
* Grants are entries of dom0's table like any other: if that is full, allocation fails with ENOSPC as well.
"""

from __future__ import annotations

import errno
import os
from array import array
from fcntl import ioctl
from struct import Struct
from types import TracebackType

from xtool.abi import linux as lx
from xtool.abi.base import PAGE_SIZE
from xtool.devnode import open_device
from xtool.errors import GrantError, LocalProtocolError
from xtool.grant.held import HeldPages
from xtool.grant.window import Window

_ALLOC_HEAD = Struct("<HHIQ")  # struct ioctl_gntalloc_alloc_gref before gref_ids


class SharedPages(HeldPages):
    """What ``AllocDevice.share`` gives."""

    def __init__(
        self, device: AllocDevice, domid: int, refs: tuple[int, ...], window: Window, index: int
    ) -> None:
        super().__init__(device, window, index, len(refs))
        self.domid = domid
        self.refs = refs


class AllocDevice:
    """The ``GrantAllocator`` of this domain. Raises ``NoXenError`` or ``PrivilegeError`` when it cannot be
    opened. For one thread."""

    NOTIFY = lx.IOCTL_GNTALLOC_SET_UNMAP_NOTIFY

    def __init__(self) -> None:
        self._fd = open_device(lx.GNTALLOC, "xen-gntalloc")
        self._live: set[HeldPages] = set()

    def fileno(self) -> int:
        return self._fd

    def share(self, domid: int, count: int, writable: bool = True) -> SharedPages:
        if count < 1:
            raise LocalProtocolError("no pages to share")
        flags = lx.GNTALLOC_FLAG_WRITABLE if writable else 0
        request = bytearray(_ALLOC_HEAD.pack(domid, flags, count, 0)) + bytes(4 * count)
        request += bytes(max(0, lx.GntallocAllocGref.size() - len(request)))
        try:
            ioctl(self._fd, lx.IOCTL_GNTALLOC_ALLOC_GREF, request, True)
        except OSError as error:
            full = (
                "raise the limit parameter of the xen-gntalloc module"
                if error.errno == errno.ENOSPC
                else None
            )
            raise GrantError(
                f"sharing {count} pages with domain {domid}", error.errno or 0, domid=domid, hint=full
            ) from None
        index = int(_ALLOC_HEAD.unpack_from(request)[3])
        refs = tuple(array("I", bytes(request[_ALLOC_HEAD.size : _ALLOC_HEAD.size + 4 * count])))
        try:
            window = Window.of_file(self._fd, index, count * PAGE_SIZE)
        except OSError as error:
            self._dealloc(index, count)
            raise GrantError(f"mapping {count} shared pages", error.errno or 0, domid=domid) from None
        shared = SharedPages(self, domid, refs, window, index)
        self._live.add(shared)
        return shared

    def _dealloc(self, index: int, count: int) -> None:
        ioctl(
            self._fd,
            lx.IOCTL_GNTALLOC_DEALLOC_GREF,
            bytes(lx.GntallocDeallocGref(index=index, count=count)),
        )

    def forget(self, pages: HeldPages, index: int, count: int) -> None:
        self._live.discard(pages)
        if self._fd >= 0:
            self._dealloc(index, count)

    def close(self) -> None:
        if self._fd < 0:
            return
        busy = None
        for shared in list(self._live):
            try:
                shared.close()
            except BufferError as error:
                busy = error
        if busy is not None:
            raise busy
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> AllocDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
