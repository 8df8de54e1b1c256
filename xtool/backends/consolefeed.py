"""A console for viewers that come back: the log's records in place of bare bytes, from any position on.

A viewer connects to ``feed_path`` and says ``hello`` once; what it sends afterwards goes to the guest. It
gets records as the log has them. ``Feed`` is its end: it makes bytes of them and knows how far it has come.
When the connection ends it connects again, to whichever process serves the console then, and goes on from
there: no byte is missing and none comes twice.

Facts about positions
---------------------
* The ring and its indexes outlive the backend's process, so an index names a byte for as long as a boot
  lasts. A later boot may begin at 0 again: a position is a boot, named by its time, and an index.
* Indexes are 32 bits wide and the log holds 8 MiB at most, so a difference of two is small, or it lies back.
* A log that was full has lost its beginning and with it, perhaps, its boot's record.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from xtool import paths
from xtool.backends.consolelog import BOOT, DATA, SKIPPED, Record, encode, micros, parse
from xtool.errors import RemoteProtocolError
from xtool.proto.shm import MASK32

_HELLO = Struct("<4sIQ")
_FROM_BOOT, _FROM_POSITION = b"xCf1", b"xCr1"
HELLO_SIZE = _HELLO.size
#: Longest record, with room to spare: more than this without a whole one is no feed.
_RECORD_ROOM = 1 << 17


def feed_path(domid: int, number: int = 0) -> Path:
    """Where such viewers connect to."""
    return paths.run_dir() / f"console-{domid}-{number}.feed"


class Position(NamedTuple):
    """Behind which byte: ``boot`` is the time in its record, in microseconds, 0 if that was not seen; ``end``
    is the ring's index."""

    boot: int
    end: int


def hello(position: Position | None) -> bytes:
    """None: from the present boot on."""
    if position is None:
        return _HELLO.pack(_FROM_BOOT, 0, 0)
    return _HELLO.pack(_FROM_POSITION, position.end, position.boot)


def parse_hello(raw: bytes) -> Position | None:
    """Raises ``RemoteProtocolError``."""
    magic, end, boot = _HELLO.unpack(raw)
    if magic not in (_FROM_BOOT, _FROM_POSITION):
        raise RemoteProtocolError(f"a viewer that begins with {magic!r}")
    return Position(boot, end) if magic == _FROM_POSITION else None


def shown(record: Record) -> bytes:
    """A record as a viewer sees it."""
    if record.kind == SKIPPED:
        return f"\r\n[{record.skipped} bytes were printed too fast to be kept]\r\n".encode()
    return record.data if record.kind == DATA else b""


class Feed:
    """A viewer's end. ``receive`` raises ``RemoteProtocolError`` for what is no feed."""

    def __init__(self) -> None:
        self.position: Position | None = None
        self._input = bytearray()

    def connected(self) -> bytes:
        """What to say on a new connection. A record that came in part comes again."""
        self._input.clear()
        return hello(self.position)

    def receive(self, data: bytes) -> bytes:
        """What is to be shown."""
        self._input += data
        records, size = parse(bytes(self._input))
        del self._input[:size]
        if len(self._input) > _RECORD_ROOM:
            raise RemoteProtocolError("this is no console's feed")
        for record in records:
            boot = self.position.boot if self.position else 0
            self.position = Position(micros(record.time) if record.kind == BOOT else boot, record.end)
        return b"".join(map(shown, records))


class Since:
    """Passes on what a viewer at ``position`` has not seen of a log with these ``boots``."""

    def __init__(self, position: Position, boots: Iterable[int]) -> None:
        self._end = position.end
        # A boot whose record is lost is the one that the log begins in.
        self._boot = position.boot if position.boot in set(boots) else 0
        self._here = self._boot == 0
        self._all = False

    def __call__(self, record: Record) -> bytes:
        if not self._all and record.kind == BOOT:
            if self._here:
                self._all = True  # a later boot than the viewer's
            elif micros(record.time) == self._boot:
                self._here = True
                return b""
        if self._all:
            return encode(record)
        if not self._here:
            return b""
        ahead = (record.end - self._end) & MASK32
        if not ahead or ahead > MASK32 >> 1:
            return b""
        self._all = True
        size = len(record.data) if record.kind == DATA else record.skipped
        if ahead > size:
            start = (record.end - size) & MASK32
            missing = Record(SKIPPED, record.time, start, skipped=ahead - size)
            return encode(missing) + encode(record)
        if record.kind == DATA:
            return encode(record._replace(data=record.data[size - ahead :]))
        return encode(record._replace(skipped=ahead))
