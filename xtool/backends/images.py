"""What a block backend reads and writes: raw files and block devices here, all else in ``nbdimage``.

Jobs come in batches, so that an image may work on several at once. Each job has an answer of its own: None,
or the error; a batch never raises.

Facts about files as disks
--------------------------
* A read beyond the end is short, not an error: an image that was cut meanwhile looks like that.
* ``RWF_NOWAIT`` reads what is in the page cache and gives EAGAIN for the rest (EOPNOTSUPP on some file
  systems). Reads that must wait for a disk go to threads, all at once, instead of one after the other.
* A write to a full file system fails with ENOSPC and may be short before that. When there is room again the
  same write succeeds.
* Data written survive the death of this process in the page cache; a guest's flush is an ``fdatasync``.
* An ``fdatasync`` that failed has lost data for good, and the next one says all is well (Linux drops the
  pages). So after a failure every later flush of this image fails, until it is opened anew.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fcntl import ioctl
from pathlib import Path
from struct import Struct, pack
from typing import NamedTuple, Protocol, runtime_checkable

from xtool.backends.iovec import ScatteredJob, read_some, whole
from xtool.errors import HostError
from xtool.libc import punch_hole

#: Byte offset on the disk, and the memory to read into or write from.
Job = tuple[int, memoryview]
Results = list[OSError | None]

_BLKDISCARD = 0x1277
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_INT = Struct("i")
#: Reads of one batch that may wait for the disk at the same time.
THREADS = 8


class Geometry(NamedTuple):
    """Sizes in bytes. ``discard_granularity`` 0: the image cannot discard."""

    size: int
    physical_sector: int = 512
    discard_granularity: int = 0


class Image(Protocol):
    """One open disk image. ``geometry`` may raise ``OSError``.

    ``waits``: requests may take long, as another process or host answers them; it is a ``SlowImage``.
    """

    readonly: bool
    waits: bool

    def geometry(self) -> Geometry: ...

    def read(self, jobs: Sequence[Job]) -> Results:
        """Fill each job's memory, or say why not."""

    def write(self, jobs: Sequence[Job]) -> Results: ...

    def flush(self) -> None:
        """All answered writes are durable afterwards. Raises ``OSError``."""

    def discard(self, offset: int, length: int) -> None:
        """Raises ``OSError``."""

    def close(self) -> None: ...


class SlowImage(Image, Protocol):
    """Its methods are called in a thread of its own, and the process goes on. These, and ``geometry``, are
    not, except ``open`` and ``refresh``; they return at once. ``close`` comes when the thread has nothing."""

    def open(self) -> None:
        """Raises ``HostError``."""

    def assume(self, geometry: Geometry) -> None:
        """Instead of ``open``, when rings are taken over: it opens with the first request."""

    def cancel(self) -> None:
        """Have what is under way fail, until ``allow``."""

    def allow(self) -> None: ...

    def refresh(self) -> None:
        """Look at the geometry again."""

    def describe(self) -> dict[str, object]: ...


@runtime_checkable
class Scattered(Protocol):
    """What an image can do besides that takes memory in pieces, and memory that another may change while it
    is written: as ``read`` and ``write``."""

    def readv(self, jobs: Sequence[ScatteredJob]) -> Results: ...

    def writev(self, jobs: Sequence[ScatteredJob]) -> Results: ...


class RawImage:
    """A file or a block device as it is. Raises ``HostError`` when it cannot be opened.

    Facts: ``RWF_NOWAIT`` reads what is in the page cache and nothing else; file systems in memory do not
    have it (EOPNOTSUPP), nor do some others, whose reads then go to threads.
    """

    waits = False

    def __init__(self, path: str, *, readonly: bool) -> None:
        self.readonly = readonly
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            raise HostError(f"{path} cannot be opened: {error.strerror}") from None
        mode = os.fstat(self._fd).st_mode
        self._device = stat.S_ISBLK(mode)
        if not self._device and not stat.S_ISREG(mode):
            os.close(self._fd)
            raise HostError(f"{path} is neither a file nor a block device")
        self._threads: ThreadPoolExecutor | None = None
        self._nowait = True
        self._in_memory = not self._device and _file_system(self._fd) in ("tmpfs", "ramfs")
        self._lost: OSError | None = None

    def geometry(self) -> Geometry:
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if not self._device:
            return Geometry(size, discard_granularity=0 if self.readonly else 4096)
        physical = _INT.unpack(ioctl(self._fd, _BLKPBSZGET, bytes(4)))[0]
        return Geometry(size, max(512, physical), 0 if self.readonly else max(512, physical))

    def read(self, jobs: Sequence[Job]) -> Results:
        """The hot path: one call of the kernel's for each job whose data are in the page cache."""
        results: Results = [None] * len(jobs)
        cold: list[int] = []
        fd, flags = self._fd, os.RWF_NOWAIT
        for number, (offset, view) in enumerate(jobs if self._nowait else ()):
            try:
                if os.preadv(fd, (view,), offset, flags) != len(view):
                    cold.append(number)
            except OSError as error:
                self._not_cached(error)
                cold.append(number)
        if not self._nowait:
            cold = list(range(len(jobs)))
        if cold:
            answers = self._read_cold([(offset, [view]) for offset, view in map(jobs.__getitem__, cold)])
            for number, answer in zip(cold, answers, strict=True):
                results[number] = answer
        return results

    def write(self, jobs: Sequence[Job]) -> Results:
        results: Results = []
        for offset, view in jobs:
            try:
                done = os.pwritev(self._fd, (view,), offset)
            except OSError as error:
                results.append(error)
                continue
            rest = None if done == len(view) else (offset + done, [view[done:]])
            results.append(rest and _attempt(self._write_whole, rest))
        return results

    def readv(self, jobs: Sequence[ScatteredJob]) -> Results:
        results: Results = [None] * len(jobs)
        cold: list[int] = []
        for number, job in enumerate(jobs):
            if not self._nowait or not self._read_cached(*job):
                cold.append(number)
        for number, answer in zip(cold, self._read_cold([jobs[n] for n in cold]), strict=True):
            results[number] = answer
        return results

    def _read_cold(self, jobs: Sequence[ScatteredJob]) -> Results:
        """What is not in the page cache: at once, as far as there are threads."""
        if len(jobs) < 2 or self._in_memory:
            return self._read_in_turn(jobs)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, "image")
        count = min(len(jobs), THREADS)
        shares = self._threads.map(self._read_in_turn, [jobs[first::count] for first in range(count)])
        results: Results = [None] * len(jobs)
        for first, share in enumerate(shares):
            results[first::count] = share
        return results

    def _read_in_turn(self, jobs: Sequence[ScatteredJob]) -> Results:
        return [_attempt(self._read_whole, job) for job in jobs]

    def _read_cached(self, offset: int, pieces: Sequence[memoryview]) -> bool:
        """True if all of it was in the page cache."""
        try:
            return read_some(self._fd, pieces, offset, os.RWF_NOWAIT) == sum(map(len, pieces))
        except OSError as error:
            self._not_cached(error)
            return False

    def _not_cached(self, error: OSError) -> None:
        """Whatever else it is, the plain read meets it again."""
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            self._nowait = False

    def _read_whole(self, offset: int, pieces: Sequence[memoryview]) -> None:
        end = whole(os.preadv, self._fd, pieces, offset)
        if end is not None:
            raise OSError(errno.EIO, f"the image ends at byte {end}")

    def writev(self, jobs: Sequence[ScatteredJob]) -> Results:
        return [_attempt(self._write_whole, job) for job in jobs]

    def _write_whole(self, offset: int, pieces: Sequence[memoryview]) -> None:
        end = whole(os.pwritev, self._fd, pieces, offset)
        if end is not None:
            raise OSError(errno.EIO, f"nothing was written at byte {end}")

    def flush(self) -> None:
        if self._lost is not None:
            raise self._lost
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS):  # a file that cannot be synced has nothing to
                self._lost = error
                raise

    def discard(self, offset: int, length: int) -> None:
        if self._device:
            ioctl(self._fd, _BLKDISCARD, pack("QQ", offset, length))
        else:
            punch_hole(self._fd, offset, length)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _file_system(fd: int) -> str:
    """The type of the file system an open file lies on, in the kernel's words; empty if it does not say."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo") as file:
            for line in file:
                head, _, tail = line.partition(" - ")
                if head.split()[2] == number:
                    return tail.split()[0]
    except OSError:
        pass
    return ""


def _attempt(step: Callable[[int, Sequence[memoryview]], None], job: ScatteredJob) -> OSError | None:
    try:
        step(*job)
    except OSError as error:
        return error
    return None


def open_image(
    target: str,
    form: str,
    *,
    readonly: bool,
    folder: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Image | SlowImage:
    """Open what ``params`` names. The format is what domain 0 said, never what the content looks like (R20).

    ``folder`` is for sockets, ours alone; ``tell`` gets lines for the log, in any thread. Raises
    ``HostError``.
    """
    if form == "raw" and target.startswith("/"):
        return RawImage(target, readonly=readonly)
    from xtool.backends.nbdimage import NbdImage
    from xtool.backends.nbdsource import source_for

    return NbdImage(source_for(target, form, readonly=readonly, folder=folder), readonly=readonly, tell=tell)


def parse_params(params: str) -> tuple[str, str] | None:
    """``raw:/path`` -> ``("raw", "/path")``; None for an empty drive. Raises ``HostError``."""
    if not params:
        return None
    form, colon, target = params.partition(":")
    if not colon or not target or not form.isalnum():
        raise HostError(f"params {params[:200]!r} is not format:target")
    return form, target
