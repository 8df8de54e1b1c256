"""Processes by file descriptor (Linux 5.3): a pidfd never comes to mean another process, as a pid does.

Facts about pidfds: readable once the process has ended, whether or not anybody has reaped it; signalling
an ended one gives ESRCH; ``waitid`` on one that is not our child gives ECHILD.
"""

from __future__ import annotations

import os
import select
import signal


def wait(fd: int, seconds: float) -> bool:
    """Whether the process has ended, waiting at most so long. A closed descriptor (-1) counts as ended."""
    if fd < 0:
        return True
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0, int(seconds * 1000))))


def terminate(fd: int) -> None:
    _send(fd, signal.SIGTERM)


def kill(fd: int) -> None:
    _send(fd, signal.SIGKILL)


def _send(fd: int, number: signal.Signals) -> None:
    if fd < 0:
        return
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        pass


def reap(fd: int) -> str:
    """Collect an ended child and say how it ended (``"ended with status 1"``); "" if it is not ours."""
    if fd < 0:
        return ""
    try:
        result = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return ""
    if result is None:
        return ""
    if result.si_code == os.CLD_EXITED:
        return f"ended with status {result.si_status}"
    try:
        return f"was killed by {signal.Signals(result.si_status).name}"
    except ValueError:
        return f"was killed by signal {result.si_status}"


def serves(pid: int, domid: int, uuid: str = "") -> bool:
    """Whether the command line of process ``pid`` says ``-xen-domid <domid>`` (and ``-uuid <uuid>``)."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(1 << 17).split(b"\0")
    except OSError:
        return False
    return _follows(words, b"-xen-domid", str(domid)) and (not uuid or _follows(words, b"-uuid", uuid))


def _follows(words: list[bytes], flag: bytes, value: str) -> bool:
    return any(word == flag and words[i + 1 : i + 2] == [value.encode()] for i, word in enumerate(words))
