"""The zygote: one process per host that has imported everything, and forks for command lines, keepers and the
watcher.

::

    python -m xtool.daemon.zygote [--idle SECONDS]

    /run/xtool/zygote.sock    where it listens; the conversation is in ``xtool.warmlink``
    /run/xtool/zygote.lock    held while it runs: a second one ends at once; holds its pid

It does nothing itself but fork: what a caller sends is read by the child. A child of a command line has the
caller's standard files, folder and umask, and does to itself what signals the caller passes on. When a keeper
or the watcher dies by a signal, a child looks which domains nobody looks after, and sees to it.

Killing it harms nothing: its children go on, and callers do their work themselves. It ends by itself when the
installed code changes (its children would be of the old), and when nobody asked for a while and no domain
runs.

Facts: ``F_SETOWN`` with ``O_ASYNC`` has the kernel send a signal when bytes arrive on a socket, or its peer
is gone; ``F_SETSIG`` chooses SIGCONT, which wakes even a stopped process. A process may read and set a
terminal that is not its controlling one; the terminal's own signals go to the caller. inotify queues an event
before the write that caused it returns.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from xtool import libc, warmlink
from xtool.cli import app
from xtool.daemon import warmchild
from xtool.daemon.warmaccess import access_of, known_groups

#: What command lines, keepers and the watcher use, except for what is rare and heavy.
MODULES = (
    "encodings.utf_8_sig",
    "typer",
    "typer._click.decorators",
    "yaml",
    "xtool.cli.app",
    "xtool.cli.attach",
    "xtool.cli.create",
    "xtool.cli.devices",
    "xtool.cli.doctor",
    "xtool.cli.lifecycle",
    "xtool.cli.progress",
    "xtool.cli.query",
    "xtool.cli.report",
    "xtool.client.socketclient",
    "xtool.config.load",
    "xtool.config.model",
    "xtool.toolstack.local",
    "xtool.toolstack.create",
    "xtool.toolstack.destroy",
    "xtool.toolstack.devices",
    "xtool.toolstack.dom0",
    "xtool.toolstack.lifecycle",
    "xtool.toolstack.pools",
    "xtool.toolstack.query",
    "xtool.toolstack.keeper",
    "xtool.toolstack.keeping",
    "xtool.toolstack.watching",
    "xtool.builder.build",
    "xtool.devicemodel.process",
    "xtool.hypercall.privcmd",
    "xtool.hypercall.xen",
    "xtool.xenstore.client",
    "xtool.evtchn.device",
    "xtool.grant.device",
    "xtool.backends.server",
    "xtool.backends.block",
    "xtool.backends.net",
    "xtool.backends.console",
    "xtool.backends.profiling",
)
#: Verbs whose commands are made ready.
VERBS = ("create", "list", "info", "destroy", "shutdown", "reboot", "pause", "unpause", "console")
#: Ends after so many seconds without a caller, if no domain of ours runs.
IDLE = 600.0
#: Least time between two looks for domains that nobody looks after, seconds.
_RESCUE_GAP = 1.0
_BACKLOG = 64
_GRACE = 1.0
_LONGEST_SLEEP = 3600.0  # poll takes milliseconds as an int


class Zygote:
    """``idle`` in seconds. Raises ``OSError`` where it cannot listen."""

    def __init__(self, folder: Path, idle: float = IDLE) -> None:
        self._folder = folder
        self._idle = idle
        self._socket_path = folder / "zygote.sock"
        self._leaving = False
        self._rescue_at = 0.0
        self._rescued = float("-inf")

    def run(self) -> bool:
        """Until it is told to end, or is of no use; False if there is one already."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        self._lock = lock = os.open(
            self._folder / "zygote.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        try:
            if not _locked(lock):
                return False
            os.truncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
            changes = _watch_installed()
            self._stamp = warmlink.stamp()
            for name in MODULES:
                import_module(name)
            for verb in VERBS:
                app.command_of(verb)
            self._groups = known_groups()
            libc.set_process_name("xtool-zygote")
            libc.adopt_orphans()
            with _listening(self._socket_path) as listener:
                self._serve(listener, changes)
            return True
        finally:
            os.close(lock)

    def _serve(self, listener: socket.socket, changes: libc.Inotify | None) -> None:
        awake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.signal(signal.SIGTERM, self._leave)
        signal.signal(signal.SIGINT, self._leave)
        heard = {awake, listener.fileno(), *([changes.fileno()] if changes else ())}
        self._private = (*heard, wake, self._lock)
        poller = select.poll()
        for fd in heard:
            poller.register(fd, select.POLLIN)
        self._rescue()
        gc.collect()
        gc.freeze()  # children share what is there; collecting it would copy its pages
        asked = time.monotonic()
        while not self._leaving:
            now = time.monotonic()
            if self._rescue_at and now >= self._rescue_at:
                self._rescue()
            wait = min(self._idle, _LONGEST_SLEEP)
            if self._rescue_at:
                wait = min(wait, max(0.0, self._rescue_at - now))
            ready = {fd for fd, _ in poller.poll(wait * 1000)}
            # First: a caller that came after a change must find nobody, or a zygote of the new code.
            if changes and changes.fileno() in ready and any(map(_is_code, changes.changed())):
                break
            if awake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(awake, 4096)
                self._reap()
            if listener.fileno() in ready:
                self._take(listener)
                asked = time.monotonic()
            elif time.monotonic() - asked >= self._idle and not _domains(self._folder):
                break

    def _leave(self, _number: int, _frame: object) -> None:
        self._leaving = True

    def _take(self, listener: socket.socket) -> None:
        try:
            link, _ = listener.accept()
        except OSError:
            return
        with link:
            access = access_of(link, self._groups)
            if access == "none" or _is_replaced():
                return
            try:
                if libc.lean_fork() == 0:
                    warmchild.begin(link, access, self._stamp, self._private)
            except OSError:
                pass  # no memory, no processes: the caller sees the end of the stream

    def _reap(self) -> None:
        killed = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            killed |= os.WIFSIGNALED(status)
        if killed and not self._rescue_at:  # perhaps it was a keeper, or the watcher
            self._rescue_at = max(time.monotonic(), self._rescued + _RESCUE_GAP)

    def _rescue(self) -> None:
        """See in a child that somebody looks after each domain."""
        self._rescue_at, self._rescued = 0.0, time.monotonic()
        if not _domains(self._folder):
            return
        with contextlib.suppress(OSError):
            if libc.lean_fork() == 0:
                warmchild.rescue(self._private)


def _locked(lock: int) -> bool:
    """One that was just told to end has a moment to do so."""
    end = time.monotonic() + _GRACE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)


def _ignore(_number: int, _frame: object) -> None:
    """So that the signal wakes the loop."""


def _domains(folder: Path) -> bool:
    """Whether there are domains of ours."""
    try:
        return any(name.endswith(".json") for name in os.listdir(folder / "domains"))
    except OSError:
        return False


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A socket anybody may connect to: who it is, the kernel tells. It is there only once it listens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(temporary))
        os.chmod(temporary, 0o666)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        temporary.replace(path)
        ours = path.stat().st_ino
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == ours:
                    path.unlink()


def _watch_installed() -> libc.Inotify | None:
    """Changes of our own code, and of what is installed beside it; None if the kernel has no inotify left."""
    package = Path(warmlink.__file__).parent
    try:
        changes = libc.Inotify()
    except OSError:
        return None
    folders = [package, *(path for path in package.rglob("*") if path.is_dir())]
    with contextlib.suppress(OSError):
        for folder in (folder for folder in folders if folder.name != "__pycache__"):
            changes.watch(str(folder))
        for place in sys.path:
            if os.path.isdir(place):
                changes.watch(place, contents=False)
    return changes


def _is_code(name: str) -> bool:
    return name.endswith((".py", ".so", ".j2", ".dist-info", ".egg-info", ".egg-link", ".pth"))


def _is_replaced() -> bool:
    """Whether the interpreter we run was installed anew: modules still to be imported would not fit it."""
    try:
        return os.readlink("/proc/self/exe").endswith(" (deleted)")
    except OSError:
        return False


def main() -> int:
    from xtool import paths

    idle = float(sys.argv[2]) if sys.argv[1:2] == ["--idle"] and len(sys.argv) == 3 else IDLE
    os.chdir("/")
    Zygote(paths.run_dir(), idle).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
