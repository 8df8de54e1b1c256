"""Where a batch's data lie while the image reads or writes them: what the engine asks for, and the plain way.

``CopiedData`` has Xen copy between the guest's pages and a buffer of ours: one call for all of a batch's
segments, nothing stays mapped. ``backends.blockpages`` is the other way, for frontends that keep their
grants.

Facts about the two ways
------------------------
* A copy's result is ours: the guest cannot change it. A mapped page is shared: what is *parsed* (an indirect
  request's segments) must be a copy in either way, what is only stored need not be.
* Through a mapped page a read that fails half-way has already changed the guest's page. The answer says
  error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from xtool.errors import GrantError
from xtool.grant.copy import Copier, CopyBatch
from xtool.grant.window import Buffer
from xtool.proto.blkif import SECTOR, Read, Transfer
from xtool.proto.blksegments import WholePages

PAGE = 4096
#: Stands for Xen's status where the call as a whole was impossible.
_FAILED = -1


class DataPath(Protocol):
    """One batch at a time: ``open``, the image by way of ``memory``, ``store`` for what was read, ``close``.

    Nothing here raises for what a guest does: statuses are Xen's, 0 or negative. For one thread.
    """

    #: Bytes of data in a batch; the largest request fits.
    room: int
    #: Whether ``memory`` may be in several pieces.
    scattered: bool

    def snapshot(self, refs: Sequence[int]) -> tuple[bytes, list[int]]:
        """Private copies of whole pages, one after the other, and a status for each. At most ``room``."""

    def open(self, transfers: Sequence[Transfer]) -> list[int]:
        """Provide memory for each one's data: with the data in it, unless it is a ``Read``. A status for
        each; one that failed must not be carried out."""

    def memory(self, first: int, count: int) -> list[memoryview]:
        """Of ``count`` transfers that follow each other in what ``open`` was given, in order. To be
        dropped before ``close``."""

    def store(self, numbers: Sequence[int]) -> list[int]:
        """What was read for these transfers goes to the guest; a status for each."""

    def close(self) -> None:
        """The batch is over."""

    def detach(self) -> None:
        """Let go of everything of the guest's. May be called again."""


class CopiedData:
    """Through ``buffer``, whose size bounds a batch. ``complain`` gets a line when no copy is possible."""

    scattered = False

    def __init__(self, copier: Copier, domid: int, buffer: Buffer, complain: Callable[[str], None]) -> None:
        self.room = buffer.size
        self._buffer = buffer
        self._copies = Copies(copier, domid, complain)
        self._transfers: Sequence[Transfer] = ()
        self._places: list[int] = []

    def snapshot(self, refs: Sequence[int]) -> tuple[bytes, list[int]]:
        return self._copies.pages(refs, self._buffer)

    def open(self, transfers: Sequence[Transfer]) -> list[int]:
        self._transfers = transfers
        self._places = places = [0]
        batch, address, place = self._copies, self._buffer.address, 0
        for number, transfer in enumerate(transfers):
            if type(transfer) is Read:
                place += transfer.sectors * SECTOR
            elif type(transfer.segments) is WholePages:
                batch.read_pages(number, transfer.segments.refs, address + place)
                place += transfer.sectors * SECTOR
            else:
                for ref, offset, length in transfer.segments:
                    batch.read(number, ref, offset, address + place, length)
                    place += length
            places.append(place)
        return batch.run(len(transfers))

    def memory(self, first: int, count: int) -> list[memoryview]:
        return [self._buffer.view[self._places[first] : self._places[first + count]]]

    def store(self, numbers: Sequence[int]) -> list[int]:
        batch = self._copies
        for position, number in enumerate(numbers):
            address = self._buffer.address + self._places[number]
            segments = self._transfers[number].segments
            if type(segments) is WholePages:
                batch.write_pages(position, segments.refs, address)
                continue
            for ref, offset, length in segments:
                batch.write(position, ref, offset, address, length)
                address += length
        return batch.run(len(numbers))

    def close(self) -> None:
        self._transfers = ()

    def detach(self) -> None:
        self.close()


class Copies:
    """A ``CopyBatch`` whose segments belong to requests: the statuses are the requests'."""

    def __init__(self, copier: Copier, domid: int, complain: Callable[[str], None]) -> None:
        self._batch = CopyBatch(copier, domid)
        self._owners: list[int] = []
        self._complain = complain

    def read(self, owner: int, ref: int, offset: int, address: int, length: int) -> None:
        self._batch.read(ref, offset, address, length)
        self._owners.append(owner)

    def write(self, owner: int, ref: int, offset: int, address: int, length: int) -> None:
        self._batch.write(ref, offset, address, length)
        self._owners.append(owner)

    def read_pages(self, owner: int, refs: Sequence[int], address: int) -> None:
        self._batch.read_pages(refs, address)
        self._owners += [owner] * len(refs)

    def write_pages(self, owner: int, refs: Sequence[int], address: int) -> None:
        self._batch.write_pages(refs, address)
        self._owners += [owner] * len(refs)

    def run(self, count: int) -> list[int]:
        """Copy; for each of ``count`` owners 0, or the first status of its segments that is not."""
        owners, self._owners = self._owners, []
        found = [0] * count
        if not owners:
            return found
        try:
            statuses = self._batch.run()
        except GrantError as error:
            self._complain(error.message)
            statuses = [_FAILED] * len(owners)
        if any(statuses):
            for owner, status in zip(owners, statuses, strict=True):
                found[owner] = found[owner] or status
        return found

    def pages(self, refs: Sequence[int], buffer: Buffer) -> tuple[bytes, list[int]]:
        """Private copies of whole pages."""
        self._batch.read_pages(refs, buffer.address)
        self._owners += range(len(refs))
        statuses = self.run(len(refs))
        return bytes(buffer.view[: len(refs) * PAGE]), statuses
