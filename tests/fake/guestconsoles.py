"""A real shell on a real terminal as the console of a guest of the host in memory."""

from __future__ import annotations

import os
import pty
import select
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from xtool.toolstack.host import Host
from xtool.xenstore import paths


@contextmanager
def console_of(host: Host, domid: int, argv: Sequence[str]) -> Iterator[None]:
    """While it lasts, ``argv`` runs on the guest's terminal, and a pty as xenconsoled has it leads there."""
    daemon, viewer = pty.openpty()
    pid, guest = pty.fork()
    if pid == 0:
        os.execvp(argv[0], argv)
    stop, stopped = os.pipe()
    thread = threading.Thread(target=_copy, args=(daemon, guest, stop))
    thread.start()
    node = paths.console(domid)
    host.store.write(f"{node}/tty", os.ttyname(viewer), perms=("n0", f"r{domid}"))
    host.store.set_perms(node, ("n0", f"r{domid}"))
    try:
        yield
    finally:
        os.write(stopped, b"x")
        thread.join()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (daemon, viewer, guest, stop, stopped):
            os.close(fd)


def _copy(daemon: int, guest: int, stop: int) -> None:
    other = {daemon: guest, guest: daemon}
    while True:
        ready, _, _ = select.select([daemon, guest, stop], [], [])
        if stop in ready:
            return
        for fd in ready:
            try:
                data = os.read(fd, 1024)
            except OSError:  # nobody has it open just now
                return
            while data:
                data = data[os.write(other[fd], data) :]
