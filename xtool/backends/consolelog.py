"""What a console printed, kept in two files of bounded size.

Each file is a sequence of records::

    "xC"  kind  0  length:u32  end:u32  time:u64  data[length]       (little-endian, 20 bytes of header)

=====  ====================================================================================
kind
=====  ====================================================================================
``B``  the console was connected: a boot. No data
``D``  what was printed, byte for byte; ``end`` is the ring's index behind it
``S``  so many bytes (a u64) were printed too fast to be kept, or while the disk was full
=====  ====================================================================================

``time`` is in microseconds since the epoch, for people; the order of the records is what counts. A full file
becomes ``NAME.1`` in place of the one before.

Facts about files
-----------------
* What ``write`` returned for is kept when the process is killed (not when the host is). Nothing is synced.
* A killed process may leave its last record torn, and only the last: it is cut off when the log is opened.
* A guest that prints for ever costs two files and ``rate`` bytes a second of writing, not more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from xtool import paths

_HEADER = Struct("<2sBxIIQ")
_COUNT = Struct("<Q")
_MAGIC = b"xC"
BOOT, DATA, SKIPPED = b"BDS"
#: Longest data of a record; a console ring holds 2048 bytes.
RECORD_MAX = 1 << 16
#: Bytes of one file; there are two.
FILE_LIMIT = 4 << 20
#: Bytes a second kept over time, and how many at once.
RATE, BURST = 1 << 20, 4 << 20
#: How many consoles' logs are kept in one folder; the oldest go.
KEPT = 200


class Record(NamedTuple):
    """``time`` in seconds since the epoch; ``end`` the ring's index behind ``data``; ``skipped`` in bytes."""

    kind: int
    time: float
    end: int
    data: bytes = b""
    skipped: int = 0


class Piece(NamedTuple):
    """A part of the log that will not change: whole records from ``start`` to ``stop`` of an open file."""

    fd: int
    start: int
    stop: int


def log_path(uuid: str, number: int = 0) -> Path:
    """Where the output is kept. By uuid: it outlives the domain's number, and another does not inherit it."""
    return paths.log_dir() / "console" / (f"{uuid}-{number}.log" if number else f"{uuid}.log")


def older(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def parse(raw: bytes) -> tuple[list[Record], int]:
    """The whole records at the beginning of ``raw``, and where they end. Takes any bytes."""
    found, at = [], 0
    while at + _HEADER.size <= len(raw):
        magic, kind, length, end, stamp = _HEADER.unpack_from(raw, at)
        stop = at + _HEADER.size + length
        if magic != _MAGIC or kind not in (BOOT, DATA, SKIPPED) or length > RECORD_MAX or stop > len(raw):
            break
        data = raw[at + _HEADER.size : stop]
        if kind == SKIPPED:
            if length != _COUNT.size:
                break
            found.append(Record(kind, stamp / 1e6, end, b"", _COUNT.unpack(data)[0]))
        else:
            found.append(Record(kind, stamp / 1e6, end, data))
        at = stop
    return found, at


def read_log(path: Path) -> Iterator[Record]:
    """What is kept, oldest first; nothing for a log that is not there. Raises ``OSError``."""
    # The newer file is opened first: should it be moved meanwhile, nothing of it is missed.
    with ExitStack() as stack:
        files = []
        for name in (path, older(path)):
            try:
                files.append(stack.enter_context(open(name, "rb")))
            except FileNotFoundError:
                continue
        same = len(files) == 2 and os.path.samestat(*(os.fstat(file.fileno()) for file in files))
        for file in reversed(files[:1] if same else files):
            yield from parse(file.read(FILE_LIMIT + RECORD_MAX))[0]


def micros(seconds: float) -> int:
    """A record's time as it is kept."""
    return round(seconds * 1e6)


def encode(record: Record) -> bytes:
    """The record as ``parse`` takes it."""
    data = _COUNT.pack(record.skipped) if record.kind == SKIPPED else record.data
    return _HEADER.pack(_MAGIC, record.kind, len(data), record.end, micros(record.time)) + data


class ConsoleLog:
    """The log at ``path``, continued. ``limit`` is the size of each file, ``rate`` and ``burst`` are bytes
    (per second). Raises ``OSError`` when it cannot be opened; later a full disk costs records, no more."""

    def __init__(
        self,
        path: Path,
        *,
        limit: int = FILE_LIMIT,
        rate: int = RATE,
        burst: int = BURST,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.skipped = 0  # bytes, in all
        self._limit, self._rate, self._burst = limit, rate, burst
        self._clock, self._now = clock, now
        self._credit, self._credited = float(burst), clock()
        self._missing = 0  # bytes not kept since the last record
        self._end = 0
        #: The ring's index behind the last thing printed that is kept; None if the log is empty.
        self.last_end: int | None = None
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _prune(path)
        self._fd = self._open()
        self._continue()

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def _continue(self) -> None:
        raw = os.pread(self._fd, self._limit + RECORD_MAX, 0)
        records, self._size = parse(raw)
        if self._size != os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, self._size)
        if not records and older(self.path).exists():
            records = parse(older(self.path).read_bytes()[: self._limit + RECORD_MAX])[0]
        if records:
            self.last_end = records[-1].end

    # --- writing --------------------------------------------------------------------------------------
    def boot(self, end: int) -> Record:
        """A console was connected whose ring stands at ``end``; what was noted of it."""
        record = Record(BOOT, self._now(), end)
        self._append(record)
        return record

    def add(self, data: bytes, end: int) -> bool:
        """Keep ``data``, which ends at ``end`` in the ring; false if it was too much."""
        now = self._clock()
        self._credit = min(self._burst, self._credit + (now - self._credited) * self._rate)
        self._credited = now
        if self._credit < len(data):
            self._miss(len(data), end)
            return False
        self.note_missing()
        if self._missing or not self._append(Record(DATA, self._now(), end, data)):
            self._miss(len(data), end)
            return False
        self._credit -= len(data)
        return True

    def _miss(self, count: int, end: int) -> None:
        self._missing += count
        self.skipped += count
        self._end = end

    def note_missing(self) -> None:
        """Say in the log what was not kept."""
        if self._missing and self._append(Record(SKIPPED, self._now(), self._end, skipped=self._missing)):
            self._missing = 0

    def _append(self, record: Record) -> bool:
        raw = encode(record)
        try:
            if self._size and self._size + len(raw) > self._limit:
                self._rotate()
            if os.write(self._fd, raw) != len(raw):
                raise OSError("a short write")
        except OSError:
            # What was written of it would end the log for every reader.
            os.ftruncate(self._fd, self._size)
            return False
        self._size += len(raw)
        self.last_end = record.end
        return True

    def _rotate(self) -> None:
        os.replace(self.path, older(self.path))
        fresh = self._open()
        os.close(self._fd)
        self._fd, self._size = fresh, 0

    # --- reading back ---------------------------------------------------------------------------------
    def since_boot(self) -> list[Piece]:
        """What is kept of the present boot, oldest first. The caller closes each ``fd``."""
        pieces = []
        start = _last_boot(os.pread(self._fd, self._size, 0))
        if start is None and (fd := self._open_older()) is not None:
            raw = os.pread(fd, self._limit + RECORD_MAX, 0)
            pieces.append(Piece(fd, _last_boot(raw) or 0, parse(raw)[1]))
        pieces.append(Piece(os.dup(self._fd), start or 0, self._size))
        return pieces

    def whole(self) -> tuple[list[Piece], set[int]]:
        """All that is kept, as ``since_boot`` gives it, and the times of the boots in it (``micros``)."""
        pieces, boots = [], set()
        if (fd := self._open_older()) is not None:
            raw = os.pread(fd, self._limit + RECORD_MAX, 0)
            records, stop = parse(raw)
            pieces.append(Piece(fd, 0, stop))
            boots = {micros(record.time) for record in records if record.kind == BOOT}
        pieces.append(Piece(os.dup(self._fd), 0, self._size))
        records = parse(os.pread(self._fd, self._size, 0))[0]
        return pieces, boots | {micros(record.time) for record in records if record.kind == BOOT}

    def _open_older(self) -> int | None:
        try:
            return os.open(older(self.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    def close(self) -> None:
        if self._fd >= 0:
            self.note_missing()
            os.close(self._fd)
            self._fd = -1


def _last_boot(raw: bytes) -> int | None:
    """Where the last boot's record begins in whole records ``raw``."""
    found, at = None, 0
    for record in parse(raw)[0]:
        if record.kind == BOOT:
            found = at
        at += _HEADER.size + (_COUNT.size if record.kind == SKIPPED else len(record.data))
    return found


def _prune(path: Path) -> None:
    """Remove the oldest logs beside ``path``: guests come and go, their logs would stay."""
    logs = [entry for entry in path.parent.glob("*.log") if entry != path]
    if len(logs) < KEPT:
        return
    by_age = sorted((os.stat(entry).st_mtime, entry) for entry in logs)
    for _, entry in by_age[: len(logs) - KEPT + 1]:
        entry.unlink(missing_ok=True)
        older(entry).unlink(missing_ok=True)
