"""Block data by way of pages that stay mapped (``feature-persistent``): no copy by Xen, no hypercall.

The image reads straight into the guest's pages and writes straight out of them. A page is mapped when it is
met first and kept; what cannot be mapped, or not now, is copied as ``CopiedData`` does it, through the same
buffer, so every grant that is good for a copy is good here, and one that is not gets the same answer.

What is bounded, and by what
----------------------------
* Pages mapped: ``page_limit``, which is what frontends hand out, and ``MOST_PAGES`` for a disk. A page makes
  room for another when it was not used for ``IDLE`` seconds. A guest that goes through more pages than that
  in a second is copied for: mapping and unmapping all the time would cost the host more than it saves.
* Mappings that Xen refuses: after ``REFUSALS`` no new page of this frontend is mapped any more.

Facts about persistent grants
-----------------------------
* The frontend must let each of its grants be mapped for writing, also the data it only writes from.
* Linux's blkfront hands out (32 + 1) grants for each slot of a ring: the segments of its largest indirect
  request and the page they stand in. It takes one back only when it sees that it is not mapped.
* A grant that is taken back by force stays mapped: the page is the guest's until we let go, so only the guest
  is hurt when it goes on to use that reference for another page. The pages of a dead domain stay, too.
* An ordinary ``preadv`` or ``pwritev`` copies between the page cache and a mapped page as with any memory;
  a mapping of each page on its own is one mmap, of which a process has 65530.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xtool.backends.blockdata import Copies
from xtool.errors import GrantError
from xtool.grant.persistent import PersistentGrants
from xtool.grant.port import Grants
from xtool.grant.window import Buffer
from xtool.proto.blkif import Read, Transfer

#: Grants a frontend keeps for each slot of its rings.
PAGES_PER_SLOT = 33
MOST_PAGES = 2048
#: Seconds without use, and a page may be unmapped for another.
IDLE = 1.0
REFUSALS = 64


def page_limit(slots: int) -> int:
    """Pages to keep mapped for a disk whose rings have so many slots together."""
    return min(MOST_PAGES, PAGES_PER_SLOT * slots)


class MappedData:
    """``DataPath`` by mapped pages; ``buffer`` is for what has to be copied. ``clock`` gives seconds."""

    scattered = True

    def __init__(
        self,
        grants: Grants,
        domid: int,
        buffer: Buffer,
        limit: int,
        clock: Callable[[], float],
        complain: Callable[[str], None],
    ) -> None:
        self.room = buffer.size
        self.copied = 0
        self._domid = domid
        self._buffer = buffer
        self._complain = complain
        self._copies = Copies(grants, domid, complain)
        self._cache = PersistentGrants(grants, limit, idle=IDLE, clock=clock)
        self._refusals = 0
        self._memory: list[list[memoryview]] = []
        self._used: list[int] = []
        # Of transfer N: the segments that are copied, each with its address in the buffer.
        self._spilled: dict[int, list[tuple[int, int, int, int]]] = {}

    def snapshot(self, refs: Sequence[int]) -> tuple[bytes, list[int]]:
        pages = self._pages(refs)
        if None in pages:
            found = self._copies.pages(refs, self._buffer)
        else:
            found = b"".join(page for page in pages if page is not None), [0] * len(refs)
        pages.clear()
        self._release()
        return found

    def open(self, transfers: Sequence[Transfer]) -> list[int]:
        pages = iter(self._pages([ref for transfer in transfers for ref, _, _ in transfer.segments]))
        place = 0
        for number, transfer in enumerate(transfers):
            pieces: list[memoryview] = []
            for ref, offset, length in transfer.segments:
                page = next(pages)
                if page is not None:
                    pieces.append(page[offset : offset + length])
                    continue
                pieces.append(self._buffer.view[place : place + length])
                address = self._buffer.address + place
                place += length
                self._spilled.setdefault(number, []).append((ref, offset, address, length))
                if type(transfer) is not Read:
                    self._copies.read(number, ref, offset, address, length)
            self._memory.append(pieces)
        return self._copies.run(len(transfers))

    def memory(self, first: int, count: int) -> list[memoryview]:
        return [piece for pieces in self._memory[first : first + count] for piece in pieces]

    def store(self, numbers: Sequence[int]) -> list[int]:
        for position, number in enumerate(numbers):
            for ref, offset, address, length in self._spilled.get(number, ()):
                self._copies.write(position, ref, offset, address, length)
        return self._copies.run(len(numbers))

    def close(self) -> None:
        self._memory.clear()
        self._release()
        for segments in self._spilled.values():
            self.copied += len(segments)
        self._spilled.clear()

    def detach(self) -> None:
        self.close()
        self._cache.close()

    def describe(self) -> dict[str, int]:
        """Pages mapped, how many there may be, and segments that had to be copied."""
        return {"mapped": len(self._cache), "limit": self._cache.limit, "copied": self.copied}

    def _pages(self, refs: Sequence[int]) -> list[memoryview | None]:
        """The mapped pages, in use until ``_release``; None for one that is to be copied."""
        pages = self._cache.acquire_mapped(self._domid, refs)
        if None not in pages:
            self._used += refs
            return pages
        for index, ref in enumerate(refs):
            if pages[index] is None:
                pages[index] = self._map(ref)
            if pages[index] is not None:
                self._used.append(ref)
        return pages

    def _map(self, ref: int) -> memoryview | None:
        # It may have been mapped for an earlier segment of the same batch.
        if self._refusals >= REFUSALS and (self._domid, ref) not in self._cache:
            return None
        try:
            return self._cache.acquire(self._domid, ref)
        except GrantError as error:
            self._refusals += 1
            if self._refusals == REFUSALS:
                self._complain(f"no further page is mapped: {error.message}")
            return None

    def _release(self) -> None:
        self._cache.release_all(self._domid, self._used)
        self._used.clear()
