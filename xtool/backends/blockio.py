"""Carrying out a batch of block requests: their data brought here, the image, the data that were read brought
back. Where the data lie meanwhile is a ``DataPath``'s business.

Writes come in the order of the ring. Of reads, only what was read completely is answered with OK. Requests
next to each other, on the ring and on the disk, are one access to the image.

Requests in flight together may be carried out in any order; so all of a batch's reads come after its writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xtool.abi.io import BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xtool.backends.blockdata import PAGE, DataPath
from xtool.backends.images import Image, Results, Scattered
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
    Transfer,
    Write,
    parse_indirect,
)


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


#: Transfers side by side on the disk: the first one's number, how many, byte offset, length in bytes.
_Run = tuple[int, int, int, int]
#: Longest access put together from several requests, bytes.
_LONGEST = 1 << 20
_UNSUPPORTED = (95, 25, 22)  # EOPNOTSUPP, ENOTTY, EINVAL: what file systems and drivers say


class BlockEngine:
    """Carries out requests on images. ``complain`` gets a line about whatever is wrong. For one thread.

    ``plain`` is the way data go; ``mapped``, if set, is preferred for images that take memory in pieces.
    """

    def __init__(self, plain: DataPath, complain: Callable[[str], None]) -> None:
        self.counters = Counters()
        self.plain = plain
        self.mapped: DataPath | None = None
        self._complain = complain
        self._kinds: dict[type, bool] = {}

    def run(self, image: Image | None, requests: Sequence[Request], limits: Limits) -> list[int]:
        """The status of each request, in order. Never raises for what a guest or an image does."""
        data = self.plain
        if self.mapped is not None and self._scatters(image):
            data = self.mapped
        whole = self._resolve(data, requests, limits)
        statuses: list[int] = []
        start = used = 0
        for index, request in enumerate(whole):
            size = request.sectors * SECTOR if isinstance(request, Transfer) else 0
            if used + size > data.room:
                statuses += self._run(data, image, whole[start:index])
                start, used = index, 0
            used += size
        return statuses + self._run(data, image, whole[start:])

    def _scatters(self, image: Image | None) -> bool:
        kind: type = type(image)
        if kind not in self._kinds:  # asked once: it takes longer than a small request
            self._kinds[kind] = issubclass(kind, Scattered)
        return self._kinds[kind]

    def _run(self, data: DataPath, image: Image | None, requests: Sequence[Request]) -> list[int]:
        batch = _Batch(data, image, requests, self.counters, self._complain)
        try:
            return batch.run()
        finally:
            data.close()

    def _resolve(self, data: DataPath, requests: Sequence[Request], limits: Limits) -> list[Request]:
        """The same with the indirect ones' segments fetched: all their pages together."""
        found: list[Request] = list(requests)
        waiting: list[tuple[int, Indirect]] = []
        used = 0
        for index, request in enumerate(found):
            if not isinstance(request, Indirect):
                continue
            if (used + len(request.refs)) * PAGE > data.room:
                self._fetch(data, found, waiting, limits)
                used = 0
            waiting.append((index, request))
            used += len(request.refs)
        self._fetch(data, found, waiting, limits)
        return found

    def _fetch(
        self, data: DataPath, found: list[Request], waiting: list[tuple[int, Indirect]], limits: Limits
    ) -> None:
        if not waiting:
            return
        pages, statuses = data.snapshot([ref for _, request in waiting for ref in request.refs])
        at = 0
        for index, request in waiting:
            end = at + len(request.refs)
            if any(statuses[at:end]):
                reason = "its indirect pages cannot be read"
                found[index] = BadRequest(request.id, request.operation, reason)
            else:
                found[index] = parse_indirect(request, pages[at * PAGE : end * PAGE], limits)
            at = end
        waiting.clear()


class _Batch:
    """One round of requests whose data fit ``data`` together."""

    def __init__(
        self,
        data: DataPath,
        image: Image | None,
        requests: Sequence[Request],
        counters: Counters,
        complain: Callable[[str], None],
    ) -> None:
        self._data = data
        self._image = image
        self._requests = requests
        self._counters = counters
        self._complain = complain
        self._statuses = [BLKIF_RSP_OKAY] * len(requests)
        # Transfers with data, numbered as ``data`` knows them: which request each is, and the other way.
        self._owners = [n for n, r in enumerate(requests) if isinstance(r, Transfer) and r.segments]
        self._numbers = {index: number for number, index in enumerate(self._owners)}

    def run(self) -> list[int]:
        reads: list[int] = []
        changes: list[int] = []
        for index, request in enumerate(self._requests):
            if type(request) is Read:
                reads.append(index)
            elif isinstance(request, Transfer | Discard):
                changes.append(index)
            else:
                assert isinstance(request, BadRequest)
                self._statuses[index] = request.status
                self._counters.bad += 1
                self._complain(f"refused: {request.reason}")
        if self._image is None:
            for index in (*reads, *changes):
                self._statuses[index] = BLKIF_RSP_ERROR
            return self._statuses
        if self._owners:
            results = self._data.open([r for r in self._requests if isinstance(r, Transfer) and r.segments])
            self._mark(results, self._owners, "a page to be written cannot be copied")
        self._change(self._image, changes)
        if reads:
            self._read(self._image, reads)
        return self._statuses

    def _mark(self, results: list[int], indexes: Sequence[int], what: str) -> None:
        if not any(results):
            return
        for result, index in zip(results, indexes, strict=True):
            if result and self._statuses[index] == BLKIF_RSP_OKAY:
                self._statuses[index] = BLKIF_RSP_ERROR
                self._counters.bad += 1
                self._complain(f"{what}: grant status {result}")

    def _change(self, image: Image, changes: list[int]) -> None:
        plain: list[int] = []
        for index in changes:
            if self._statuses[index] != BLKIF_RSP_OKAY:
                continue
            if type(self._requests[index]) is Write:
                plain.append(index)
                continue
            self._write(image, plain)
            plain = []
            self._statuses[index] = self._special(image, index)
        self._write(image, plain)

    def _special(self, image: Image, index: int) -> int:
        request = self._requests[index]
        try:
            if isinstance(request, Discard):
                self._counters.discards += 1
                image.discard(request.sector * SECTOR, request.sectors * SECTOR)
                return BLKIF_RSP_OKAY
            self._counters.flushes += 1
            image.flush()
            if isinstance(request, Flush | Barrier) and request.sectors:
                self._write(image, [index])
                if isinstance(request, Barrier):
                    image.flush()
        except OSError as error:
            self._counters.errors += 1
            self._complain(f"{type(request).__name__.lower()}: {error}")
            unsupported = isinstance(request, Discard) and error.errno in _UNSUPPORTED
            return BLKIF_RSP_EOPNOTSUPP if unsupported else BLKIF_RSP_ERROR
        return self._statuses[index]

    def _write(self, image: Image, which: list[int]) -> None:
        if which:
            self._counters.written_bytes += self._access(image, which, "write")
            self._counters.writes += len(which)

    def _read(self, image: Image, which: list[int]) -> None:
        self._counters.read_bytes += self._access(image, which, "read")
        self._counters.reads += len(which)
        good = [index for index in which if self._statuses[index] == BLKIF_RSP_OKAY]
        results = self._data.store([self._numbers[index] for index in good])
        self._mark(results, good, "a page to be read into cannot be copied to")

    def _access(self, image: Image, which: list[int], what: str) -> int:
        """Read or write; bytes done. Requests that are one access fail together."""
        runs = self._runs(which)
        done = 0
        for (first, count, offset, length), error in zip(runs, self._do(image, runs, what), strict=True):
            if error is None:
                done += length
                continue
            self._counters.errors += count
            self._complain(f"{what} of {length} bytes at {offset}: {error}")
            for number in range(first, first + count):
                self._statuses[self._owners[number]] = BLKIF_RSP_ERROR
        return done

    def _do(self, image: Image, runs: list[_Run], what: str) -> Results:
        jobs = [(offset, self._data.memory(first, count)) for first, count, offset, _ in runs]
        try:
            if self._data.scattered:
                assert isinstance(image, Scattered)
                return (image.readv if what == "read" else image.writev)(jobs)
            whole = [(offset, memory) for offset, [memory] in jobs]
            return (image.read if what == "read" else image.write)(whole)
        finally:
            for _, pieces in jobs:
                pieces.clear()  # an error's traceback may keep the list

    def _runs(self, which: list[int]) -> list[_Run]:
        """Requests that are side by side both on the ring and on the disk, put together."""
        found: list[_Run] = []
        for index in which:
            request, number = self._requests[index], self._numbers[index]
            assert isinstance(request, Transfer)
            offset, length = request.sector * SECTOR, request.sectors * SECTOR
            if found:
                first, count, start, size = found[-1]
                if start + size == offset and first + count == number and size + length <= _LONGEST:
                    found[-1] = (first, count + 1, start, size + length)
                    continue
            found.append((number, 1, offset, length))
        return found
