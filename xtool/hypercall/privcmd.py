"""/dev/xen/privcmd: hypercalls and mappings from user space.

Facts about privcmd and /dev/xen/hypercall
------------------------------------------
* Xen reads a hypercall's argument at the virtual address we give it. Ordinary memory can be paged or
  moved in the middle of that; pages mapped from /dev/xen/hypercall cannot. So every argument is copied
  into one such area, and results are copied out of it.
* ``ioctl(HYPERCALL)`` returns what the hypercall returned; a negative result arrives as errno. Python's
  ``fcntl.ioctl`` only returns that number when it is given a *mutable* buffer.
* A foreign mapping is an mmap of privcmd filled by a second ioctl. Frames that could not be mapped are
  reported one by one in an array and the ioctl itself may still succeed.
* While any page of a domain is mapped here, the domain cannot go away: it stays as "dying".
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from array import array
from collections.abc import Sequence
from ctypes import Structure
from fcntl import ioctl
from types import TracebackType

from xtool.abi.base import PAGE_SIZE, page_up
from xtool.abi.linux import (
    HYPERCALL_BUFFER,
    IOCTL_PRIVCMD_HYPERCALL,
    IOCTL_PRIVCMD_MMAP_RESOURCE,
    IOCTL_PRIVCMD_MMAPBATCH_V2,
    PRIVCMD,
    PrivcmdHypercall,
    PrivcmdMmapBatchV2,
    PrivcmdMmapResource,
)
from xtool.devnode import open_device
from xtool.errors import HostMemoryError, HypercallError

#: Room for one argument structure, then for one bulk argument (extents, contexts, log text).
_ARGUMENT = PAGE_SIZE
_BULK = 63 * PAGE_SIZE


def _open(path: str) -> int:
    return open_device(path, "xen-privcmd")


class Area:
    """A memory mapping with a view of it that is dropped in the right order."""

    def __init__(self, area: mmap.mmap) -> None:
        self._area = area
        self.view = memoryview(area)

    def close(self) -> None:
        self.view.release()
        self._area.close()

    def __enter__(self) -> Area:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _PyBuffer(ctypes.Structure):
    """``Py_buffer``. ctypes itself tells the address of writable memory only."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("more", ctypes.c_void_p * 5),
    ]


def _address(area: mmap.mmap) -> int:
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(area), ctypes.byref(buffer), 0)
    address = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    assert address is not None
    return int(address)


class Privcmd:
    """The raw device: ``call`` for hypercalls, ``map_*`` for mappings. Not for use by several threads.

    ``bulk`` is the room for a bulk argument, bytes: locked memory that who keeps this open pays for.
    """

    def __init__(self, bulk: int = _BULK) -> None:
        self.count = 0
        self._fd = _open(PRIVCMD)
        try:
            buffer_fd = _open(HYPERCALL_BUFFER)
            try:
                self._memory = mmap.mmap(buffer_fd, _ARGUMENT + bulk)
            finally:
                os.close(buffer_fd)
        except BaseException:
            os.close(self._fd)
            raise
        self.argument = _address(self._memory)
        self.bulk = self.argument + _ARGUMENT
        self.bulk_size = bulk

    def close(self) -> None:
        self._memory.close()
        os.close(self._fd)

    # --- argument memory ------------------------------------------------------------------------
    def put(self, data: bytes | bytearray | Structure) -> int:
        """Copy an argument into locked memory; its address."""
        raw = bytes(data)
        self._memory[: len(raw)] = raw
        return self.argument

    def put_at(self, offset: int, data: bytes) -> None:
        """Change a part of the argument."""
        self._memory[offset : offset + len(data)] = data

    def get(self, size: int) -> bytes:
        return self._memory[:size]

    def put_bulk(self, data: bytes | array[int]) -> int:
        raw = bytes(data)
        if len(raw) > self.bulk_size:
            raise ValueError(f"a bulk argument of {len(raw)} bytes does not fit")
        self._memory[_ARGUMENT : _ARGUMENT + len(raw)] = raw
        return self.bulk

    def get_bulk(self, size: int) -> bytes:
        return self._memory[_ARGUMENT : _ARGUMENT + size]

    def locked_buffer(self, size: int) -> tuple[Area, int]:
        """Locked memory of its own for an argument too large for ``put_bulk``, and its address. The caller
        closes it."""
        fd = _open(HYPERCALL_BUFFER)
        try:
            area = mmap.mmap(fd, page_up(size))
        finally:
            os.close(fd)
        return Area(area), _address(area)

    # --- operations -----------------------------------------------------------------------------
    def fileno(self) -> int:
        return self._fd

    def call(self, name: str, op: int, *args: int) -> int:
        """One hypercall. ``name`` is for the error message only.

        Raises ``HypercallError``; ``HostMemoryError`` for ENOMEM.
        """
        self.count += 1
        request = bytearray(PrivcmdHypercall(op, (ctypes.c_uint64 * 5)(*args)))
        try:
            return int(ioctl(self._fd, IOCTL_PRIVCMD_HYPERCALL, request, True))
        except OSError as error:
            number = error.errno or 0
            kind = HostMemoryError if number == errno.ENOMEM else HypercallError
            raise kind(name, number) from None

    def map_foreign(self, domid: int, gfns: Sequence[int], *, writable: bool = True) -> Area:
        """Map frames of ``domid`` one after the other, readable and, if ``writable``, writable."""
        count = len(gfns)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        area = mmap.mmap(self._fd, count * PAGE_SIZE, prot=protection)
        frames = gfns if isinstance(gfns, array) else array("Q", gfns)
        errors = array("i", bytes(4 * count))
        request = bytearray(
            PrivcmdMmapBatchV2(
                num=count,
                dom=domid,
                addr=_address(area),
                arr=frames.buffer_info()[0],
                err=errors.buffer_info()[0],
            )
        )
        self.count += 1
        try:
            ioctl(self._fd, IOCTL_PRIVCMD_MMAPBATCH_V2, request, True)
        except OSError as error:
            area.close()
            raise HypercallError(f"mapping {count} pages of domain {domid}", error.errno or 0) from None
        for index, failure in enumerate(errors) if any(errors) else ():
            if failure:
                area.close()
                raise HypercallError(
                    f"mapping frame {frames[index]:#x} of domain {domid}", abs(failure)
                ) from None
        return Area(area)

    def map_resource(self, domid: int, kind: int, ident: int, index: int, count: int) -> Area:
        """Map a resource of a domain that is not its RAM (``XENMEM_acquire_resource``)."""
        area = mmap.mmap(self._fd, count * PAGE_SIZE)
        request = bytearray(
            PrivcmdMmapResource(dom=domid, type=kind, id=ident, idx=index, num=count, addr=_address(area))
        )
        self.count += 1
        try:
            ioctl(self._fd, IOCTL_PRIVCMD_MMAP_RESOURCE, request, True)
        except OSError as error:
            area.close()
            raise HypercallError(f"mapping resource {kind} of domain {domid}", error.errno or 0) from None
        return Area(area)
