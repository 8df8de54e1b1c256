"""The short way for batches of small requests: reads and writes of one segment each on a raw image.

Random access comes as many such requests at once, and what Python does for each decides how many a second
there are. So this does per request only what must be: check it, read or write the image, one entry in a grant
copy, one answer. Whatever is not as expected (another operation, a segment beyond the page, an error of the
image) leaves the whole batch to ``BlockEngine``, which carries it out from the start: requests
that are not answered may be repeated.

The order is the engine's: writes as they are on the ring, then reads.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from xtool.abi.grant import GNTST_general_error
from xtool.abi.io import BLKIF_OP_WRITE, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xtool.backends.blockio import Counters
from xtool.backends.images import Job, RawImage
from xtool.errors import GrantError
from xtool.grant.copy import DEST_FOREIGN, SOURCE_FOREIGN, Copier, foreign_word, statuses_of
from xtool.grant.window import Buffer
from xtool.proto.blkif import SECTOR, Layout, Limits
from xtool.proto.blksegments import PAGE

#: A sector of a page as it stands in a copy's offset.
_SECTOR_SHIFT = 32 + 9


class _Way:
    """A batch's reads, or its writes: which requests, their pieces of the image, their copies' words."""

    __slots__ = ("indexes", "jobs", "words")

    def __init__(self) -> None:
        self.indexes: list[int] = []
        self.jobs: list[Job] = []
        self.words: list[int] = []


class Lane:
    """Uses ``buffer`` while it runs, a page of it for each request. For one thread."""

    def __init__(
        self,
        copier: Copier,
        domid: int,
        buffer: Buffer,
        counters: Counters,
        complain: Callable[[str], None],
    ) -> None:
        self._complain = complain
        self._copier = copier
        self._domid = foreign_word(domid)
        self._address = buffer.address
        self._pages = [buffer.view[at : at + PAGE] for at in range(0, buffer.size - PAGE + 1, PAGE)]
        self._counters = counters

    def carry_out(
        self, image: RawImage, slots: Sequence[bytes], limits: Limits, layout: Layout
    ) -> list[bytes] | None:
        """The answers; None: nothing is answered, the engine is to do it."""
        if len(slots) > len(self._pages):
            return None
        unpack = layout.transfers[1].unpack_from
        capacity, domid, most = limits.capacity, self._domid, 0 if limits.readonly else BLKIF_OP_WRITE
        asked: list[tuple[int, int]] = []
        reads, writes = _Way(), _Way()
        address = self._address
        for slot, page in zip(slots, self._pages, strict=False):
            op, segments, _, request_id, sector, ref, first, last = unpack(slot)
            if op > most or segments != 1 or not first <= last < 8 or sector + last - first >= capacity:
                return None
            size = (last + 1 - first) * SECTOR
            place = ref | first << _SECTOR_SHIFT | domid
            if op:
                writes.words += (place, address, size | SOURCE_FOREIGN)
                way = writes
            else:
                reads.words += (address, place, size | DEST_FOREIGN)
                way = reads
            way.jobs.append((sector * SECTOR, page if size == PAGE else page[:size]))
            way.indexes.append(len(asked))
            asked.append((request_id, op))
            address += PAGE
        bad: dict[int, int] = {}
        if writes.jobs:
            self._copy(writes, bad)
            jobs = [job for job, index in zip(writes.jobs, writes.indexes, strict=True) if index not in bad]
            if any(image.write(jobs)):
                return None
            self._counters.writes += len(jobs)
            self._counters.written_bytes += sum(len(view) for _, view in jobs)
        if reads.jobs:
            if any(image.read(reads.jobs)):
                return None
            self._copy(reads, bad)
            self._counters.reads += len(reads.jobs)
            self._counters.read_bytes += sum(len(view) for _, view in reads.jobs)
        answer = layout.response.pack
        if not bad:
            return [answer(request_id, op, BLKIF_RSP_OKAY) for request_id, op in asked]
        self._counters.bad += len(bad)
        for status in bad.values():
            self._complain(f"a page cannot be copied: grant status {status}")
        return [
            answer(request_id, op, BLKIF_RSP_ERROR if index in bad else BLKIF_RSP_OKAY)
            for index, (request_id, op) in enumerate(asked)
        ]

    def _copy(self, way: _Way, bad: dict[int, int]) -> None:
        """Adds to ``bad`` the status of each request whose page Xen did not copy."""
        block = array("Q", way.words)
        try:
            self._copier.copy_block(block.buffer_info()[0], len(way.jobs))
        except GrantError as error:
            self._complain(error.message)
            bad.update(dict.fromkeys(way.indexes, GNTST_general_error))
            return
        statuses = statuses_of(block)
        if any(statuses):
            bad.update((index, status) for index, status in zip(way.indexes, statuses, strict=True) if status)

    def close(self) -> None:
        """Let go of the buffer."""
        self._pages.clear()
