"""Calls of the C library that Python does not have."""

from __future__ import annotations

import ctypes
import os

_FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE = 0x02
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_NAME = 15

_libc = ctypes.CDLL(None, use_errno=True)
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
