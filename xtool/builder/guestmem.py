"""Giving a domain memory, and writing into it through mappings of bounded size."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from xtool.abi.base import PAGE_SHIFT, PAGE_SIZE, pages
from xtool.errors import HostMemoryError, HypercallError
from xtool.hypercall.port import Hypervisor

#: Pages mapped at once (4 MiB): bounds what a build of any size needs.
WINDOW = 1024
ORDER_1G, ORDER_2M, ORDER_4K = 18, 9, 0
_ZEROS = memoryview(bytes(WINDOW * PAGE_SIZE))

# A p2m entry for each of 512 consecutive frames at once, as one large number: a loop over the entries of a
# guest would cost more than all the rest of its build.
_RUN_BYTES = 8 << ORDER_2M
_ONES = int.from_bytes(array("Q", [1] * (1 << ORDER_2M)), "little")
_COUNT = int.from_bytes(array("Q", range(1 << ORDER_2M)), "little")

Buffer = bytes | bytearray | memoryview


def runs_by_order(run: range, orders: Sequence[int]) -> Iterable[tuple[int, range]]:
    """Cut a run of frames into ``(order, frames)`` pieces, each as large and aligned as it can be.
    ``orders`` is descending and ends with 0."""
    start, end = run.start, run.stop
    order, smaller = orders[0], orders[1:]
    size = 1 << order
    if not smaller:
        if start < end:
            yield order, range(start, end)
        return
    first, last = (start + size - 1) & ~(size - 1), end & ~(size - 1)
    if first >= last:
        yield from runs_by_order(run, smaller)
        return
    yield from runs_by_order(range(start, first), smaller)
    yield order, range(first, last, size)
    yield from runs_by_order(range(last, end), smaller)


def populate(
    hv: Hypervisor,
    domid: int,
    runs: Iterable[range],
    orders: Sequence[int],
    p2m: array[int] | None = None,
    *,
    on_demand: bool = False,
) -> None:
    """Populate runs of frames with the largest pages Xen gives, falling back where memory is fragmented.

    With ``p2m`` (a PV guest), the machine frame of every page is appended to it: runs must then come in
    order from 0. ``on_demand`` promises the memory only. Raises ``HostMemoryError`` when even single pages
    are not to be had.
    """
    for run in runs:
        for order, frames in runs_by_order(run, orders):
            if on_demand:
                if len(hv.populate(domid, frames, order, on_demand=True)) < len(frames):
                    raise HostMemoryError("populate_physmap", 12, detail="on demand")
            else:
                _populate_extents(hv, domid, frames, order, orders, p2m)


def _populate_extents(
    hv: Hypervisor, domid: int, frames: range, order: int, orders: Sequence[int], p2m: array[int] | None
) -> None:
    given = hv.populate(domid, frames, order)
    if p2m is not None:
        if order == ORDER_2M:
            for mfn in given:
                p2m.frombytes((mfn * _ONES + _COUNT).to_bytes(_RUN_BYTES, "little"))
        else:
            for mfn in given:
                p2m.extend(range(mfn, mfn + (1 << order)))
    if len(given) == len(frames):
        return
    missing = frames[len(given) :]
    if order == 0:
        raise HostMemoryError("populate_physmap", 12, detail=f"{len(missing)} pages missing")
    smaller = orders[list(orders).index(order) + 1]
    step = 1 << (order - smaller)
    for start in missing:
        pieces = range(start, start + (1 << order), 1 << smaller)
        assert len(pieces) == step
        _populate_extents(hv, domid, pieces, smaller, orders, p2m)


def claim(hv: Hypervisor, domid: int, count: int) -> None:
    """Set ``count`` pages aside, so that a shortage shows at once and in plain words."""
    try:
        hv.claim(domid, count)
    except HypercallError as error:
        if error.errno != 12:
            raise
        host = hv.host()
        free = max(0, host.free_pages + host.scrub_pages - host.outstanding_pages)
        raise HostMemoryError(
            error.operation,
            error.errno,
            detail=f"the domain needs {-(-count // 256)} MiB, the host has {free // 256} MiB free",
            hint="give the domain less memory, or shut another domain down (xtool list)",
        ) from None


class GuestMemory:
    """Writes to a domain by guest-physical address. ``frames`` gives the frame to map for each page
    number: the p2m of a PV guest, nothing for others (their frames are their page numbers)."""

    def __init__(self, hv: Hypervisor, domid: int, frames: array[int] | None = None) -> None:
        self._hv = hv
        self._domid = domid
        self._frames = frames

    def _map(self, first: int, count: int) -> Sequence[int]:
        if self._frames is None:
            return range(first, first + count)
        return self._frames[first : first + count]

    def fill(self, start: int, size: int, pieces: Sequence[tuple[int, Buffer]]) -> None:
        """Make the pages of ``[start, start + size)`` hold ``pieces`` and zeros everywhere else.

        ``start`` is page-aligned; pieces are ``(address, data)``, in order and not overlapping. No byte of
        what was in those pages before remains (XSA-464).
        """
        first, last = start >> PAGE_SHIFT, (start >> PAGE_SHIFT) + pages(size)
        for window in range(first, last, WINDOW):
            count = min(WINDOW, last - window)
            low, high = window << PAGE_SHIFT, window + count << PAGE_SHIFT
            with self._hv.map_foreign(self._domid, self._map(window, count)) as mapping:
                cursor = low
                for address, data in pieces:
                    begin, end = max(address, cursor), min(address + len(data), high)
                    if begin >= end:
                        continue
                    _zero(mapping.view, cursor - low, begin - low)
                    with memoryview(data) as view, view[begin - address : end - address] as part:
                        mapping.view[begin - low : end - low] = part
                    cursor = end
                _zero(mapping.view, cursor - low, high - low)

    def write_page(self, page: int, data: bytes) -> None:
        """One whole page."""
        self.fill(page << PAGE_SHIFT, PAGE_SIZE, [(page << PAGE_SHIFT, data)])


def _zero(view: memoryview, start: int, end: int) -> None:
    if start < end:
        view[start:end] = _ZEROS[: end - start]
