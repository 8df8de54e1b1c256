"""``preadv`` and ``pwritev`` of memory in any number of pieces.

Facts
-----
* A call takes 1024 pieces (IOV_MAX) and fails with EINVAL for more.
* Both may do less than they were asked to: at the end of a file, when a disk is full, after an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

IOV_MAX = 1024
#: Byte offset on the disk, and the pieces of memory to read into or write from, in order.
ScatteredJob = tuple[int, Sequence[memoryview]]


def read_some(fd: int, pieces: Sequence[memoryview], offset: int, flags: int = 0) -> int:
    """Read with as many calls as the number of pieces asks for, up to the first that is short; bytes."""
    done = 0
    for first in range(0, len(pieces), IOV_MAX):
        part = pieces[first : first + IOV_MAX]
        count = os.preadv(fd, part, offset + done, flags)
        done += count
        if count < sum(map(len, part)):
            break
    return done


def whole(
    step: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    pieces: Sequence[memoryview],
    offset: int,
) -> int | None:
    """Read (``os.preadv``) or write (``os.pwritev``) all of it. None, or the byte of the file at which
    nothing more could be done. Raises ``OSError``."""
    left = list(pieces)
    while left:
        part = left[:IOV_MAX]
        count = step(fd, part, offset)
        if not count:
            return offset
        offset += count
        used = 0
        while used < len(part) and count >= len(part[used]):
            count -= len(part[used])
            used += 1
        del left[:used], part
        if count:
            left[0] = left[0][count:]
    return None
