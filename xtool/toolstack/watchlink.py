"""Asking the watcher (``toolstack.watching``), the one process that looks after all bare domains.

::

    /run/xtool/watcher.sock    where it listens: SOCK_SEQPACKET, root's alone
    /run/xtool/watcher.lock    held while it runs, holds its pid

A message is ``XW1``, what is wanted, the domid and the uuid, with spaces between; the answer is one byte:

- ``TAKE``: watch over this domain. ``YES`` when it holds the domain's lock, or a keeper does; ``NO`` when it
  will not: then the domain needs a keeper.
- ``GIVE``: let go of the domain's lock, for the asker. ``YES`` when that is done.
- anything else: ``NO``.

The watcher answers within milliseconds, and has no state. So one that leaves a message unanswered for
``PATIENCE`` is killed by whoever sent it, and the next starts another. While nobody wants anything the daemon
asks how it is.

Facts: whoever connects waits in the listener's queue until it is accepted, and sees the end of the stream if
the process that listens ends before.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from xtool import warmlink
from xtool.devicemodel import pidfd
from xtool.toolstack import journal

TAKE, GIVE, _HOW_IS_IT = b"take", b"give", b"how"
_NOBODY = "00000000-0000-0000-0000-000000000000"
YES, NO = b"A", b"N"
MAGIC = b"XW1"
#: What ``ps`` shows.
NAME = "xtool-watcher"
#: How long an answer may take, seconds.
PATIENCE = 15.0
#: A watcher that was started is waited for this long, seconds, before another is; how often one is started,
#: and how often is looked for it.
_START_TIME, _STARTS, _LOOK = 3.0, 2, 0.005
log = logging.getLogger(__name__)


def socket_path() -> str:
    return f"{warmlink.run_dir()}/watcher.sock"


def lock_path() -> str:
    return f"{warmlink.run_dir()}/watcher.lock"


def is_watcher(pid: int) -> bool:
    """Whether this is the pid of a watcher; 0 is nobody's."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return pid > 0 and file.read().strip() == NAME.encode()
    except OSError:
        return False


def pid() -> int:
    """The watcher's, 0 if there is none."""
    try:
        with open(lock_path(), "rb") as file:
            word = file.read(32).strip()
    except OSError:
        return 0
    number = int(word) if word.isdigit() else 0
    return number if is_watcher(number) else 0


def ask(what: bytes, domid: int, uuid: str) -> bytes:
    """The watcher's answer; empty if there is none that answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(PATIENCE)
        try:
            link.connect(socket_path())
            link.send(b" ".join((MAGIC, what, b"%d" % domid, uuid.encode())), socket.MSG_NOSIGNAL)
            return link.recv(1)
        except TimeoutError:
            _end_stuck()
        except OSError:
            pass  # it has ended, or there was none
    return b""


def check() -> None:
    """End a watcher that hangs. May take ``PATIENCE``."""
    ask(_HOW_IS_IT, 0, _NOBODY)


def take(domid: int, uuid: str, start: Callable[[], None]) -> bool:
    """Have the domain watched over; ``start`` starts a watcher, and is called when there is none.

    Returns when its lock is held: by the watcher, or by whoever was faster. False: it needs a keeper.
    """
    starts, look_until = 0, 0.0
    while True:
        answer = ask(TAKE, domid, uuid)
        if answer:
            return answer == YES
        if time.monotonic() >= look_until:
            if starts == _STARTS:
                return False
            start()
            starts += 1
            look_until = time.monotonic() + _START_TIME
        elif journal.keeper_pid(uuid):  # one takes up all there are as it starts
            return True
        else:
            time.sleep(_LOOK)


def listening() -> bool:
    """Whether there is a watcher that can be asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.setblocking(False)
        try:
            link.connect(socket_path())
        except BlockingIOError:  # so many ask it just now
            return True
        except OSError:
            return False
    return True


def _end_stuck() -> None:
    number = pid()
    if not number:
        return
    with suppress(OSError):
        handle = os.pidfd_open(number)
        # Asked after it was opened: from then on the number cannot come to mean another process.
        if is_watcher(number):
            log.warning("the process that watches over domains did not answer: it is ended")
            pidfd.kill(handle)
            pidfd.wait(handle, 1.0)
        os.close(handle)
