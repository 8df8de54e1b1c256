"""Calls of the C library that Python does not have."""

from __future__ import annotations

import ctypes
import os

_FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE = 0x02
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_IN_MODIFY, _IN_MOVED, _IN_CREATE, _IN_DELETE = 0x02, 0xC0, 0x100, 0x200  # linux/inotify.h
_IN_NONBLOCK, _IN_CLOEXEC = 0o4000, 0o2000000

_libc = ctypes.CDLL(None, use_errno=True)
_fork = ctypes.PyDLL(None, use_errno=True).fork  # PyDLL: the child must own the interpreter's lock, too
_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make bytes of a file zeroes, giving their space back. Raises ``OSError``."""
    if _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def set_process_name(name: str) -> None:
    """What ``ps`` shows beside the pid; at most 15 bytes of it."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def die_with_parent(number: int) -> None:
    """Have the kernel send us this signal when the thread that forked us ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ended, in init's place; we reap them, then."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def lean_fork() -> int:
    """``os.fork`` without what Python and its modules do around it; only for a process of one thread.

    Those hooks (fresh locks, a fresh random state) write to hundreds of pages that a child could share with
    its parent. A child that goes on to do ordinary work calls ``after_lean_fork`` first. Raises ``OSError``.
    """
    pid = int(_fork())
    if pid < 0:
        raise OSError(ctypes.get_errno(), "fork")
    return pid


def after_lean_fork() -> None:
    """Make up for the hooks that ``lean_fork`` left out, in the child."""
    ctypes.pythonapi.PyOS_AfterFork_Child()


class Inotify:
    """Tells that something in some folders changed. Raises ``OSError``."""

    def __init__(self) -> None:
        self._fd = int(_libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC))
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")

    def watch(self, folder: str, *, contents: bool = True) -> None:
        """Its entries, and with ``contents`` what is written to its files."""
        mask = _IN_MOVED | _IN_CREATE | _IN_DELETE | (_IN_MODIFY if contents else 0)
        if _libc.inotify_add_watch(self._fd, os.fsencode(folder), mask) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)

    def fileno(self) -> int:
        return self._fd

    def changed(self) -> list[str]:
        """Names, without their folders, of what changed since the last call."""
        found, offset = [], 0
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return []
        while offset < len(data):  # struct inotify_event: wd, mask, cookie, len, name
            size = int.from_bytes(data[offset + 12 : offset + 16], "little")
            name = data[offset + 16 : offset + 16 + size].rstrip(b"\0")
            found.append(os.fsdecode(name))
            offset += 16 + size
        return found

    def close(self) -> None:
        os.close(self._fd)
