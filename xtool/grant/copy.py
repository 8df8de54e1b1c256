"""Grant copies in batches: Xen copies between our memory and pages that another domain granted.

One ioctl carries any number of segments; a segment lies within one granted page. Each has a status of its
own: 0, or one of Xen's negative ``GNTST_*`` numbers. A peer can make a segment fail at any time (by taking a
grant back, for one), so a status is an answer, not an exception.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from xtool.abi.base import PAGE_SIZE
from xtool.abi.grant import GNTCOPY_dest_gref, GNTCOPY_source_gref, GNTST_bad_copy_arg, GNTST_bad_gntref

#: Where a segment's fields lie, in its three 64-bit words: see ``abi.linux.GntdevGrantCopySegment``.
SEGMENT_SIZE = 24
#: Which side is foreign, as it stands beside the length in a segment's third word.
SOURCE_FOREIGN = GNTCOPY_source_gref << 16
DEST_FOREIGN = GNTCOPY_dest_gref << 16
_STATUS = 20 // 2  # the status as an index of 16-bit words
_REF_MAX = 0xFFFF_FFFF


def foreign_word(domid: int) -> int:
    """A domain as it stands beside reference and offset in the word of a foreign side."""
    return (domid & 0xFFFF) << 48


def statuses_of(block: array[int]) -> list[int]:
    """The status of each segment in a block of words that was carried out."""
    return memoryview(block).cast("B").cast("h")[_STATUS :: SEGMENT_SIZE // 2].tolist()


class Foreign(NamedTuple):
    """A place in a page that ``domid`` granted to us. ``offset`` in bytes."""

    domid: int
    ref: int
    offset: int = 0


class CopySegment(NamedTuple):
    """``source`` and ``dest``: an address of ours (``Buffer.address`` and more), or ``Foreign``; one at least
    is foreign. ``length`` in bytes."""

    source: int | Foreign
    dest: int | Foreign
    length: int


class Copier(Protocol):
    def copy_block(self, address: int, count: int) -> None:
        """Carry out ``count`` packed ``gntdev_grant_copy_segment``. Each status is written in its place."""


class CopyBatch:
    """Collects segments between us and ``domid``, runs them together, and is used again.

    ::

        batch = CopyBatch(grants, domid)
        batch.read(ref, 0, buffer.address, 4096)  # from the guest
        batch.write(ref, 512, buffer.address, 512)  # to the guest
        if any(statuses := batch.run()):
            ...

    Nothing that is wrong with a segment spoils the others: what the kernel would refuse the whole batch for
    gets its status here. For one thread.
    """

    def __init__(self, copier: Copier, domid: int) -> None:
        self._copier = copier
        self._domid = foreign_word(domid)
        # Three words a segment. A list, since adding to one is what Python does fastest.
        self._pending: list[int] = []
        self._bad: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._pending) // 3

    @property
    def words(self) -> list[int]:
        """What is pending, three words a segment, for those who add many at a time and see for themselves
        that each lies in its page. Good until ``run`` or ``clear``."""
        return self._pending

    @property
    def domid_word(self) -> int:
        """See ``foreign_word``."""
        return self._domid

    def read(self, ref: int, offset: int, address: int, length: int) -> None:
        """From ``offset`` of the granted page to our ``address``."""
        if (ref | offset | length) < 0 or offset + length > PAGE_SIZE or ref > _REF_MAX:
            self._refuse(ref)
        else:
            self._pending += (ref | offset << 32 | self._domid, address, length | SOURCE_FOREIGN)

    def write(self, ref: int, offset: int, address: int, length: int) -> None:
        """From our ``address`` to ``offset`` of the granted page."""
        if (ref | offset | length) < 0 or offset + length > PAGE_SIZE or ref > _REF_MAX:
            self._refuse(ref)
        else:
            self._pending += (address, ref | offset << 32 | self._domid, length | DEST_FOREIGN)

    def read_pages(self, refs: Sequence[int], address: int) -> None:
        """As ``read`` for whole pages, one after the other; each reference fits 32 bits."""
        self._whole(refs, address, 1, PAGE_SIZE | SOURCE_FOREIGN)

    def write_pages(self, refs: Sequence[int], address: int) -> None:
        """As ``write`` for whole pages, one after the other; each reference fits 32 bits."""
        self._whole(refs, address, 0, PAGE_SIZE | DEST_FOREIGN)

    def _whole(self, refs: Sequence[int], address: int, ours: int, flags: int) -> None:
        # By slices: no line of Python is run for a page.
        count, domid = len(refs), self._domid
        block = [flags] * (3 * count)
        block[1 - ours :: 3] = [ref | domid for ref in refs]
        block[ours::3] = range(address, address + count * PAGE_SIZE, PAGE_SIZE)
        self._pending += block

    def add(self, segment: CopySegment) -> None:
        """Any segment, of any domain. Raises ``ValueError`` if neither side is foreign."""
        sides = []
        flags = 0
        for side, flag in ((segment.source, SOURCE_FOREIGN), (segment.dest, DEST_FOREIGN)):
            if isinstance(side, Foreign):
                flags |= flag
                beyond = side.offset + segment.length > PAGE_SIZE
                if min(side.ref, side.offset, segment.length) < 0 or side.ref > _REF_MAX or beyond:
                    self._refuse(side.ref)
                    return
                sides.append(side.ref | side.offset << 32 | (side.domid & 0xFFFF) << 48)
            else:
                sides.append(side)
        if not flags:
            raise ValueError("a grant copy needs a granted page on one side at least")
        self._pending += (*sides, segment.length | flags)

    def _refuse(self, ref: int) -> None:
        self._bad[len(self)] = GNTST_bad_copy_arg if 0 <= ref <= _REF_MAX else GNTST_bad_gntref
        self._pending += (0, 0, SOURCE_FOREIGN)  # copies nothing

    def clear(self) -> None:
        """Drop what was added and not run."""
        self._pending = []
        self._bad = {}

    def run(self) -> list[int]:
        """Copy; the status of each segment, in the order they were added. The batch is empty afterwards.

        Raises ``GrantError`` if it could not be tried as a whole: an address that is not our memory.
        """
        pending, bad = self._pending, self._bad
        self.clear()
        if not pending:
            return []
        block = array("Q", pending)
        self._copier.copy_block(block.buffer_info()[0], len(block) // 3)
        statuses = statuses_of(block)
        for index, status in bad.items():
            statuses[index] = status
        return statuses


def copy_all(copier: Copier, segments: Iterable[CopySegment]) -> list[int]:
    batch = CopyBatch(copier, 0)
    for segment in segments:
        batch.add(segment)
    return batch.run()
