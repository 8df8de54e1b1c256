"""A disk as a Python file: what ``io`` and everything built on it takes.

::

    with DiskFile(disk) as raw:                      # sectors or bytes, as they come
        raw.seek(1 << 20)
        raw.write(b"hello")
    with io.BufferedRandom(DiskFile(disk), 1 << 20) as file:
        header = file.read(512)

``disk`` is a connected ``BlockFrontend``; closing the file flushes the disk and leaves it attached. A disk
has a fixed size: nothing is written beyond it, and ``truncate`` is refused.
"""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from xtool.proto.blkfeatures import BlockOffer

#: Most bytes moved by one call: a caller who asks for more gets a short read or write, as ``io`` allows.
CHUNK = 8 << 20


class Disk(Protocol):
    """What is needed of a disk: ``BlockFrontend`` has it."""

    offer: BlockOffer

    @property
    def size(self) -> int: ...
    def pread(self, length: int, offset: int) -> bytes: ...
    def pwrite(self, data: bytes, offset: int) -> int: ...
    def flush(self) -> None: ...


class DiskFile(io.RawIOBase):
    """Raises ``OSError`` (EIO, ENOSPC at the end) and ``DeadlineError`` as the disk does, ``ValueError`` when
    closed, ``io.UnsupportedOperation`` for what a disk cannot do. For one thread."""

    mode = "rb+"

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._position = 0
        self._dirty = False

    def readable(self) -> bool:
        self._check()
        return True

    def writable(self) -> bool:
        self._check()
        return not self._disk.offer.readonly

    def seekable(self) -> bool:
        self._check()
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        self._check()
        with memoryview(buffer) as whole, whole.cast("B") as view:
            length = min(len(view), CHUNK, max(0, self._disk.size - self._position))
            if length:
                view[:length] = self._disk.pread(length, self._position)
        self._position += length
        return length

    def write(self, data: ReadableBuffer, /) -> int:
        """As much as fits, up to ``CHUNK``; how much. ENOSPC when nothing does."""
        self._check()
        if self._disk.offer.readonly:
            raise io.UnsupportedOperation("the disk is read-only")
        with memoryview(data) as whole, whole.cast("B") as view:
            length = min(len(view), CHUNK, max(0, self._disk.size - self._position))
            if len(view) and not length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            part = bytes(view[:length])
        if part:
            self._dirty = True
            self._disk.pwrite(part, self._position)
        self._position += length
        return length

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._check()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._disk.size}
        if whence not in bases:
            raise ValueError(f"whence {whence} is none of 0, 1, 2")
        position = bases[whence] + offset
        if position < 0:
            raise OSError(errno.EINVAL, f"position {position} lies before the disk's beginning")
        self._position = position
        return position

    def tell(self) -> int:
        self._check()
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        raise io.UnsupportedOperation("a disk keeps its size")

    def flush(self) -> None:
        """What was written is on stable storage afterwards."""
        self._check()
        if self._dirty:
            self._disk.flush()
            self._dirty = False

    def _check(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")
