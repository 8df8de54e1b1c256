"""The process: one of it, its socket, its parts, its end.

Facts: systemd hands sockets over as descriptors from 3 on, if LISTEN_PID is this process (sd_listen_fds(3));
a Unix socket's file outlives its process, and connecting to such a one is refused; a lock on a file does not.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from xtool import paths
from xtool.client.start import ALREADY, lock_path, socket_path
from xtool.daemon.access import Access, host_access
from xtool.daemon.events import Events
from xtool.daemon.hosts import Hosts, hosts_of
from xtool.daemon.operations import Operations, Runner
from xtool.errors import HostError

if TYPE_CHECKING:
    from xtool.daemon.app import App
    from xtool.daemon.http import Server

_FIRST_FD = 3
log = logging.getLogger("xtoold")


def run(uri: str = "xen:", path: Path | None = None, ready_fd: int = -1) -> int:
    """Be the daemon until SIGTERM or SIGINT; an exit status. ``ready_fd`` is closed after a byte was written
    to it when the daemon listens. Raises ``HostError`` when there is no Xen, or cannot be a socket."""
    logging.basicConfig(
        format="%(asctime)s xtoold: %(message)s", level=logging.INFO, stream=sys.stderr, force=True
    )
    paths.run_dir().mkdir(parents=True, exist_ok=True, mode=0o755)
    lock = _lock()
    if lock < 0:
        return ALREADY
    hosts = hosts_of(uri)
    runner = runner_of(hosts)  # before any thread: it is forked, and so is all it forks
    ended = _signals()
    with hosts.client():
        pass  # without Xen there is nothing to serve: say so now
    access = host_access()
    listeners = inherited() or [listen(path or socket_path(), access)]
    where = path or socket_path() if not os.environ.get("LISTEN_FDS") else "what systemd listens on"
    daemon = Daemon(hosts, runner, access)
    daemon.start(listeners)
    if ready_fd >= 0:
        with suppress(OSError):
            os.write(ready_fd, b"1")
        os.close(ready_fd)
    notify("READY=1")
    log.info("listening on %s", where)
    number = ended()
    log.info("ended by %s", signal.Signals(number).name)
    notify("STOPPING=1")
    daemon.close()
    if not os.environ.get("LISTEN_FDS"):
        (path or socket_path()).unlink(missing_ok=True)
    os.close(lock)
    return 0


def runner_of(hosts: Hosts) -> Runner:
    """Jobs in processes; in threads where the host is this process' memory."""
    if hosts.uri == "fake:":
        from xtool.daemon.threads import ThreadRunner

        return ThreadRunner(hosts)
    from xtool.daemon.jobs import JobRunner
    from xtool.toolstack.local import open_client

    return JobRunner(lambda: open_client(hosts.uri))


class Daemon:
    """The parts, put together. ``close`` lets go of everything; what jobs are at, they finish."""

    def __init__(self, hosts: Hosts, runner: Runner, access: Access | None = None) -> None:
        from xtool.daemon.app import App
        from xtool.daemon.http import Server
        from xtool.daemon.watcher import Watcher

        self.access = access or Access()
        self.events = Events()
        self.operations = Operations(runner, self._operation_changed)
        self.watcher = Watcher(hosts.open, self.events, self._lost_keeper)
        self.hosts = hosts
        self._runner = runner
        self.app: App = App(hosts, self.operations, self.events, self.watcher)
        self.server: Server = Server(self.app.handle, self.app.refuse, self.access.peer)
        self.app.server = self.server

    def start(self, listeners: list[socket.socket], *, adopt: bool = True) -> None:
        watch = getattr(self._runner, "watch", None)
        if watch is not None:
            watch(self._cannot_fork)
        self.watcher.start()
        for listener in listeners:
            self.server.listen(listener)
        if adopt:
            self.operations.submit("adopt", {}, uid=os.geteuid())

    def close(self) -> None:
        self.server.close()
        self.events.close()
        self.watcher.stop()
        self.operations.close()
        self.hosts.close()

    def _operation_changed(self, operation: object) -> None:
        from xtool.client.records import QUEUED, Operation

        assert isinstance(operation, Operation)
        if operation.state == QUEUED:
            return
        if operation.ended is not None:
            self.watcher.look_now()
        details = {
            "id": operation.id,
            "method": operation.method,
            "state": operation.state,
            "stage": operation.stage,
            "error": operation.error.detail if operation.error else None,
        }
        self.events.publish("operation", name=operation.subject, details=details)

    def _lost_keeper(self, names: list[str]) -> None:
        subject = names[0] if len(names) == 1 else f"{len(names)} domains"
        log.warning("nobody looks after %s any more: the process died", subject)
        self.operations.submit("adopt", {}, subject=subject, uid=os.geteuid())

    def _cannot_fork(self) -> None:
        """Nothing that matters is in this process: the next one begins with all that is needed."""
        log.error("the process that forks jobs died: ending, to be started again")
        os._exit(70)


def _lock() -> int:
    fd = os.open(lock_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    os.ftruncate(fd, 0)
    os.write(fd, str(os.getpid()).encode())
    return fd


def _signals() -> Callable[[], int]:
    """From here on they end nothing; the function waits for one that should."""
    wanted = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in wanted:
        signal.signal(number, lambda *_: None)
    os.set_blocking(read, True)
    return lambda: os.read(read, 1)[0]


def listen(path: Path, access: Access) -> socket.socket:
    """A socket at ``path``, in the place of one whose process is gone. The caller holds the lock.

    Raises ``HostError``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX)
    try:
        temporary.unlink(missing_ok=True)
        listener.bind(str(temporary))
        access.open_to(temporary)
        listener.listen(128)
        temporary.replace(path)  # in one step: who finds it can connect
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot listen on {path}: {error.strerror or error}", hint="run as root, or set XTOOL_RUN_DIR"
        ) from error
    return listener


def inherited() -> list[socket.socket]:
    """The sockets systemd made for us."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS") or 0)
    found = []
    for fd in range(_FIRST_FD, _FIRST_FD + count):
        os.set_inheritable(fd, False)
        found.append(socket.socket(fileno=fd))
    return found


def notify(state: str) -> None:
    """Tell systemd, if it asked to be told (sd_notify(3))."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.connect("\0" + where[1:] if where.startswith("@") else where)
        link.sendall(state.encode())


def wait_gone(pid: int, deadline: float) -> bool:
    """Until a process has ended, or ``deadline`` seconds are over."""
    end = time.monotonic() + deadline
    while os.path.exists(f"/proc/{pid}"):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
