"""Pieces of our address space: pages of a device one after the other, and buffers to copy through.

Facts about mmap from Python
----------------------------
* ``mmap.mmap(fd, ...)`` keeps a duplicate of ``fd``: one file descriptor for each mapping. A cache of a
  thousand granted pages cannot afford that, so libc's ``mmap`` is called, and the memory is shown through a
  ctypes array.
* A memoryview keeps the object it looks at alive, and so do its slices. ``release`` of a view says nothing of
  its slices; the array's reference count does: unmapping is refused while anybody can still look.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from types import TracebackType

from xtool.abi.base import PAGE_SIZE, page_up

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_int = ctypes.c_int
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, _int, _int, _int, ctypes.c_long]
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(address: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    where = _mmap(address, size, protection, flags, fd, offset)
    if where == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(where)


class Window:
    """Mapped memory with a ``view`` of it, at ``address``. Drop every view taken from ``view`` before
    ``close``: it raises ``BufferError`` while one exists, and may be called again."""

    def __init__(self, address: int, size: int, *, writable: bool = True) -> None:
        self.address = address
        self.size = size
        self._array: ctypes.Array[ctypes.c_ubyte] | None = (ctypes.c_ubyte * size).from_address(address)
        with memoryview(self._array) as raw, raw.cast("B") as view:
            self.view = view[:] if writable else view.toreadonly()

    @classmethod
    def of_file(cls, fd: int, offset: int, size: int, *, writable: bool = True) -> Window:
        """``size`` bytes of a file or device, shared. Raises ``OSError``."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return cls(_map(None, size, protection, mmap.MAP_SHARED, fd, offset), size, writable=writable)

    @classmethod
    def of_pages(cls, fd: int, offsets: list[int], *, writable: bool = True) -> Window:
        """Single pages of a file, one after the other. Raises ``OSError``."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        size = len(offsets) * PAGE_SIZE
        start = _map(None, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        for number, offset in enumerate(offsets):
            where = start + number * PAGE_SIZE
            _map(where, PAGE_SIZE, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset)
        return cls(start, size, writable=writable)

    def close(self) -> None:
        if self._array is None:
            return
        self.view.release()
        if sys.getrefcount(self._array) > 2:  # ours, and getrefcount's own argument
            raise BufferError("memory cannot be unmapped while views of it exist")
        self._array = None
        _munmap(self.address, self.size)

    @property
    def closed(self) -> bool:
        return self._array is None


class Buffer(Window):
    """Page-aligned memory of our own: ``preadv`` reads straight into ``view``, and grant copies go from and
    to ``address``. ``size`` is in bytes, rounded up to whole pages. Starts as zeroes."""

    def __init__(self, size: int) -> None:
        # Private, so that a forked child cannot disturb a copy; populated, so that no copy waits for a page.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        size = page_up(size)
        super().__init__(_map(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0), size)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
