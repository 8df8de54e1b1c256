"""Locks that a process takes once and holds as long as it lives: a keeper's, a backend server's.

Facts about flock here: whether one is held can only be asked by taking it, so who asks holds it for a moment;
a child holds its parent's until it closes the descriptor; a holder's pid is written a moment after it has it.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable

#: So often, and so many seconds apart, a lock whose holder is not known is tried.
_TRIES, _LOOKED_AT = 10, 0.02


def try_lock(fd: int) -> bool:
    """Take the lock of the open file if it is free. Raises ``OSError`` where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take(fd: int, has_holder: Callable[[], bool]) -> bool:
    """Take the lock; False if another has it. ``has_holder`` says whether one is known that will keep it: if
    not, somebody may only be asking, and it is tried again for at most 0.2 s. Raises ``OSError``."""
    for left in reversed(range(_TRIES)):
        if try_lock(fd):
            return True
        if has_holder():
            break
        if left:
            time.sleep(_LOOKED_AT)
    return False
