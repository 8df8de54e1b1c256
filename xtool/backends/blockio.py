"""Carrying out a batch of block requests: one grant copy in, the image, one grant copy out.

Writes: copy in, then the image, in the order of the ring. Reads: the image, then copy out; only what was read
completely goes out. Requests next to each other, on the ring and on the disk, are one access to the image.

Requests in flight together may be carried out in any order; so all of a batch's reads come after its writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xtool.abi.io import BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xtool.backends.images import Image, Results
from xtool.errors import GrantError
from xtool.grant.copy import Copier, CopyBatch
from xtool.grant.window import Buffer
from xtool.proto.blkif import (
    SECTOR,
    BadRequest,
    Barrier,
    Discard,
    Flush,
    Indirect,
    Limits,
    Read,
    Request,
    Write,
    parse_indirect,
)

PAGE = 4096


@dataclass
class Counters:
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    discards: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    bad: int = 0
    errors: int = 0

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes


#: Requests side by side: first one's position, how many, byte offset on the disk, in the buffer, length.
_Run = tuple[int, int, int, int, int]


class BlockEngine:
    """Carries out requests of ``domid`` on one image through ``buffer``, whose size bounds what is done at a
    time; the largest request must fit. ``complain`` gets a line about whatever is wrong. For one thread."""

    def __init__(self, copier: Copier, domid: int, buffer: Buffer, complain: Callable[[str], None]) -> None:
        self.counters = Counters()
        self._buffer = buffer
        self._batch = CopyBatch(copier, domid)
        self._complain = complain

    def run(self, image: Image | None, requests: Sequence[Request], limits: Limits) -> list[int]:
        """The status of each request, in order. Never raises for what a guest or an image does."""
        whole = self._resolve(requests, limits)
        statuses: list[int] = []
        start = used = 0
        for index, request in enumerate(whole):
            size = request.sectors * SECTOR if isinstance(request, Read | Write | Barrier | Flush) else 0
            if used + size > self._buffer.size:
                statuses += self._run(image, whole[start:index])
                start, used = index, 0
            used += size
        return statuses + self._run(image, whole[start:])

    def _resolve(self, requests: Sequence[Request], limits: Limits) -> list[Request]:
        """The same with the indirect ones' segments fetched: all their pages in one copy."""
        found: list[Request] = list(requests)
        waiting: list[tuple[int, Indirect, int]] = []
        used = 0
        for index, request in enumerate(found):
            if not isinstance(request, Indirect):
                continue
            size = len(request.refs) * PAGE
            if used + size > self._buffer.size:
                self._fetch(found, waiting, limits)
                used = 0
            for page, ref in enumerate(request.refs):
                self._batch.read(ref, 0, self._buffer.address + used + page * PAGE, PAGE)
            waiting.append((index, request, used))
            used += size
        self._fetch(found, waiting, limits)
        return found

    def _fetch(self, found: list[Request], waiting: list[tuple[int, Indirect, int]], limits: Limits) -> None:
        statuses = self._copy()
        position = 0
        for index, request, at in waiting:
            count = len(request.refs)
            if any(statuses[position : position + count]):
                reason = "its indirect pages cannot be read"
                found[index] = BadRequest(request.id, request.operation, reason)
            else:
                pages = bytes(self._buffer.view[at : at + count * PAGE])
                found[index] = parse_indirect(request, pages, limits)
            position += count
        waiting.clear()

    def _copy(self) -> list[int]:
        count = len(self._batch)
        try:
            return self._batch.run()
        except GrantError as error:
            self._complain(error.message)
            return [BLKIF_RSP_ERROR] * count

    # --- one bufferful
    def _run(self, image: Image | None, requests: Sequence[Request]) -> list[int]:
        statuses = [BLKIF_RSP_OKAY] * len(requests)
        places = [0] * len(requests)
        reads: list[int] = []
        changes: list[int] = []
        copied: list[int] = []  # which request each segment of the copy belongs to
        address, place, batch = self._buffer.address, 0, self._batch
        for index, request in enumerate(requests):
            if type(request) is Read:
                places[index] = place
                place += request.sectors * SECTOR
                reads.append(index)
            elif isinstance(request, Write | Flush | Barrier):
                places[index] = place
                for ref, offset, length in request.segments:
                    batch.read(ref, offset, address + place, length)
                    copied.append(index)
                    place += length
                changes.append(index)
            elif isinstance(request, Discard):
                changes.append(index)
            else:
                assert isinstance(request, BadRequest)
                statuses[index] = request.status
                self.counters.bad += 1
                self._complain(f"refused: {request.reason}")
        if image is None:
            for index in (*reads, *changes):
                statuses[index] = BLKIF_RSP_ERROR
            batch.clear()
            return statuses
        if changes:
            self._mark(self._copy(), copied, statuses, "a page to be written cannot be copied")
            self._change(image, requests, changes, places, statuses)
        if reads:
            self._read(image, requests, reads, places, statuses)
        return statuses

    def _mark(self, results: list[int], owners: list[int], statuses: list[int], what: str) -> None:
        if not any(results):
            return
        for result, index in zip(results, owners, strict=True):
            if result and statuses[index] == BLKIF_RSP_OKAY:
                statuses[index] = BLKIF_RSP_ERROR
                self.counters.bad += 1
                self._complain(f"{what}: grant status {result}")

    def _change(
        self,
        image: Image,
        requests: Sequence[Request],
        changes: list[int],
        places: list[int],
        statuses: list[int],
    ) -> None:
        plain: list[int] = []
        for index in changes:
            if statuses[index] != BLKIF_RSP_OKAY:
                continue
            if type(requests[index]) is Write:
                plain.append(index)
                continue
            self._write(image, requests, plain, places, statuses)
            plain = []
            statuses[index] = self._special(image, requests, index, places, statuses)
        self._write(image, requests, plain, places, statuses)

    def _special(
        self,
        image: Image,
        requests: Sequence[Request],
        index: int,
        places: list[int],
        statuses: list[int],
    ) -> int:
        request = requests[index]
        try:
            if isinstance(request, Discard):
                self.counters.discards += 1
                image.discard(request.sector * SECTOR, request.sectors * SECTOR)
                return BLKIF_RSP_OKAY
            self.counters.flushes += 1
            image.flush()
            if isinstance(request, Flush | Barrier) and request.sectors:
                self._write(image, requests, [index], places, statuses)
                if isinstance(request, Barrier):
                    image.flush()
        except OSError as error:
            self.counters.errors += 1
            self._complain(f"{type(request).__name__.lower()}: {error}")
            unsupported = isinstance(request, Discard) and error.errno in _UNSUPPORTED
            return BLKIF_RSP_EOPNOTSUPP if unsupported else BLKIF_RSP_ERROR
        return statuses[index]

    def _write(
        self,
        image: Image,
        requests: Sequence[Request],
        which: list[int],
        places: list[int],
        statuses: list[int],
    ) -> None:
        if which:
            done = self._access(image.write, _runs(requests, which, places), which, statuses, "write")
            self.counters.writes += len(which)
            self.counters.written_bytes += done

    def _read(
        self,
        image: Image,
        requests: Sequence[Request],
        which: list[int],
        places: list[int],
        statuses: list[int],
    ) -> None:
        done = self._access(image.read, _runs(requests, which, places), which, statuses, "read")
        self.counters.reads += len(which)
        self.counters.read_bytes += done
        batch, address, owners = self._batch, self._buffer.address, []
        for index in which:
            if statuses[index] != BLKIF_RSP_OKAY:
                continue
            request, place = requests[index], places[index]
            assert isinstance(request, Read)
            for ref, offset, length in request.segments:
                batch.write(ref, offset, address + place, length)
                owners.append(index)
                place += length
        self._mark(self._copy(), owners, statuses, "a page to be read into cannot be copied to")

    def _access(
        self,
        step: Callable[[Sequence[tuple[int, memoryview]]], Results],
        runs: list[_Run],
        which: list[int],
        statuses: list[int],
        what: str,
    ) -> int:
        """Read or write runs of requests; bytes done. A run that fails fails all its requests."""
        view = self._buffer.view
        jobs = [(offset, view[place : place + length]) for _, _, offset, place, length in runs]
        results = step(jobs)
        done = 0
        for (first, count, offset, _, length), error in zip(runs, results, strict=True):
            if error is None:
                done += length
                continue
            self.counters.errors += count
            self._complain(f"{what} of {length} bytes at {offset}: {error}")
            for index in which[first : first + count]:
                statuses[index] = BLKIF_RSP_ERROR
        for _, part in jobs:
            part.release()
        return done


_UNSUPPORTED = (95, 25, 22)  # EOPNOTSUPP, ENOTTY, EINVAL: what file systems and drivers say


def _runs(requests: Sequence[Request], which: list[int], places: list[int]) -> list[_Run]:
    """Requests whose data lie side by side both on the disk and in the buffer, put together.

    A run's first number counts in ``which``.
    """
    found: list[_Run] = []
    for position, index in enumerate(which):
        request = requests[index]
        assert not isinstance(request, BadRequest | Indirect)
        offset, place, length = request.sector * SECTOR, places[index], request.sectors * SECTOR
        if found:
            first, count, start, at, size = found[-1]
            if start + size == offset and at + size == place and size + length <= _LONGEST:
                found[-1] = (first, count + 1, start, at, size + length)
                continue
        found.append((position, 1, offset, place, length))
    return found


#: Longest access put together from several requests, bytes.
_LONGEST = 1 << 20
