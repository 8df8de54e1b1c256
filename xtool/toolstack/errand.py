"""Something to be done by a child, while a process that must not wait goes on: what keepers and the watcher
have done about a domain's end.

Facts: a lock taken by ``flock`` belongs to the open file, so a child that inherits the descriptor holds it as
well; children close all they inherit. The pipe's end may be held open by what the child started.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from xtool import libc

#: What a child says: the domain is to be watched on, or there is nothing more to do for it. A number says
#: that it goes on under that one.
WATCH, DONE = "watch", "done"

#: The limit of descriptors that what a child starts, QEMU say, is to have: the one there was.
_before: list[tuple[int, int]] = []


def more_descriptors(wanted: int) -> int:
    """Have up to so many; how many it may be. Children have as many as before."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if most > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        _before[:] = [(soft, hard)]
    return max(soft, most)


class Errand:
    """Begins at once. ``work`` gives a word of at most 64 bytes; ``most``: no descriptor is as large. Raises
    ``OSError`` when there is no child to be had."""

    def __init__(
        self,
        uuid: str,
        domid: int,
        work: Callable[[int, str], str],
        fork: Callable[[], int],
        most: int = 4096,
    ) -> None:
        answer, say = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            pid = fork()
        except OSError:
            os.close(answer)
            os.close(say)
            raise
        if pid == 0:
            _carry_out(uuid, domid, work, say, lean=fork is not os.fork, most=most)
        os.close(say)
        self.uuid = uuid
        self.began = time.monotonic()
        self._answer, self._pid = answer, pid
        try:
            #: Readable when it has ended.
            self.pidfd = os.pidfd_open(pid)
        except OSError:  # no descriptors: it goes on, and is followed by another that finds it done
            os.close(answer)
            raise

    def collect(self) -> str:
        """What it said before it ended; nothing if it was killed."""
        try:
            said = os.read(self._answer, 64).decode()
        except BlockingIOError:
            said = ""
        os.close(self._answer)
        os.close(self.pidfd)
        try:
            os.waitpid(self._pid, 0)
        except ChildProcessError:
            pass
        return said


def _carry_out(
    uuid: str, domid: int, work: Callable[[int, str], str], say: int, *, lean: bool, most: int
) -> NoReturn:
    """In the child. It holds nothing of its parent's: not its locks, above all."""
    try:
        _signal.set_wakeup_fd(-1)
        _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)
        _signal.signal(_signal.SIGUSR1, _signal.SIG_DFL)
        os.dup2(say, 3, inheritable=False)
        os.closerange(4, most)
        for limit in _before:
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        if lean:
            libc.after_lean_fork()
        gc.enable()
        libc.set_process_name(f"xtool-act-{domid}")
        _log_to_stderr()
        word = work(domid, uuid).encode()
        with contextlib.suppress(BrokenPipeError):  # who wanted it done was killed meanwhile
            os.write(3, word)
    except BaseException as error:
        message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        sys.stderr.write(f"{uuid}: {message}\n")
    finally:
        os._exit(0)


def _log_to_stderr() -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
