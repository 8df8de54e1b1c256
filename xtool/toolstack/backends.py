"""Our own user-space backends, as the toolstack sees them: a process per domain that serves those of its
devices whose backend kind says ``process``, and a small parent that starts it again when it dies.

::

    /run/xtool/backend-<domid>.lock    held as long as either process lives
    /run/xtool/backend-<domid>.pid     the parent's pid and the server's
    /run/xtool/backend-<domid>.sock    where the server answers
    /run/xtool/console-<domid>.sock    where its console is seen, if it is ours; console-<domid>-<n>.feed
    /run/xtool/backends/<domid>/       response journals: what a successor needs

Who the processes are is asked of these files and of ``/proc``, nothing else is remembered. Both are forked
from the process that creates the domain. A server that dies is followed by another within a second, which
takes the rings over; after ``CRASHES`` in a minute the devices are closed with a reason instead. If the
parent is killed the server goes on, and ``stop_backends`` finds it. On the host in memory the fake kernel
serves these devices like any other.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from xtool import paths
from xtool.backends.control import socket_path
from xtool.backends.frame import FOLDERS as CLASSES
from xtool.backends.viewers import socket_path as viewers_path
from xtool.devicemodel import pidfd
from xtool.devices.backendkinds import FOLDERS
from xtool.devices.xenbus import DeviceId
from xtool.errors import HostError, UsageError
from xtool.toolstack.keeper import leave_behind

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

#: So many deaths within so many seconds, and a server is not started again.
CRASHES, CRASH_TIME = 5, 60.0
#: Pause before a dead server's successor, seconds.
RESTART_PAUSE = 0.2
#: How long a server may take to let go before it is killed, seconds.
LET_GO_TIME = 5.0
#: All servers' messages go there.
LOG = "backends.log"
#: How long a killed process may take to disappear, seconds.
_KILL_TIME = 10.0


def ours(devices: Iterable[DeviceId]) -> list[DeviceId]:
    """The devices that processes of ours serve."""
    return [device for device in devices if FOLDERS[device.folder].server == "process"]


def check_served(host: Host, devices: Iterable[DeviceId]) -> None:
    """Refuse, before anything is made, what no process of ours can serve on this host."""
    for device in ours(devices):
        if host.real and find_spec(CLASSES[device.folder][1]) is None:
            raise UsageError(
                f"backendtype: xtool cannot be used for a {device.kind} yet",
                hint="leave backendtype out, or use phy, qdisk or vif",
            )


def start_backends(host: Host, domid: int, devices: Iterable[DeviceId]) -> None:
    """See that a process serves these devices of the domain; returns at once, their states tell the rest."""
    wanted = ours(devices)
    check_served(host, wanted)
    if wanted and host.real and not is_running(domid):
        _leave_supervisor(domid)


def _leave_supervisor(domid: int) -> None:
    leave_behind(f"backends of domain {domid}", LOG, lambda: _supervise(domid))


def stop_backends(host: Host, domid: int) -> None:
    """End the domain's backend process, if it has one, and remove its files. Devices are to go, too."""
    if host.real:
        _stop(domid)
        _remove_files(domid)


def restart_backends(host: Host, domid: int) -> None:
    """Replace a running backend process by a new one: for an upgrade. Guests see a pause.

    Raises ``HostError`` if the old one cannot be ended.
    """
    _stop(domid)
    if is_running(domid):
        raise HostError(f"the backend process of domain {domid} does not end")
    _leave_supervisor(domid)


def is_running(domid: int) -> bool:
    """Whether somebody serves the domain."""
    try:
        fd = os.open(_lock(domid), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def server_pid(domid: int) -> int | None:
    """The server's, if it runs: for tests and ``doctor``."""
    return next((pid for pid in _pids(domid)[1:] if _is_ours(pid, domid)), None)


# --- files
def _lock(domid: int) -> Path:
    return paths.run_dir() / f"backend-{domid}.lock"


def _pid_file(domid: int) -> Path:
    return paths.run_dir() / f"backend-{domid}.pid"


def _folder(domid: int) -> Path:
    return paths.run_dir() / "backends" / str(domid)


def _remove_files(domid: int) -> None:
    if any(_folder(domid).glob("nbd-*")):  # the server was killed while it started one
        from xtool.backends.nbdsource import sweep

        sweep(_folder(domid))
    shutil.rmtree(_folder(domid), ignore_errors=True)
    with suppress(OSError):
        _folder(domid).parent.rmdir()  # the last one
    run = paths.run_dir()
    consoles = (
        viewers_path(domid),
        *run.glob(f"console-{domid}-*.sock"),
        *run.glob(f"console-{domid}-*.feed"),
    )
    for path in (_lock(domid), _pid_file(domid), socket_path(domid), *consoles):
        path.unlink(missing_ok=True)


def _pids(domid: int) -> list[int]:
    try:
        return [int(word) for word in _pid_file(domid).read_text().split()]
    except (OSError, ValueError):
        return []


def _write_pids(domid: int, *pids: int) -> None:
    path = _pid_file(domid)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(" ".join(map(str, pids)))
    fresh.replace(path)


def _name(domid: int) -> str:
    """How both processes are called; 15 bytes are the most."""
    return f"xtool-be-{domid}"


def _is_ours(pid: int, domid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == _name(domid)
    except OSError:
        return False


def _stop(domid: int) -> None:
    """End both processes. One that has just started holds the lock before its number can be read."""
    end = time.monotonic() + LET_GO_TIME + 1
    _end_processes(domid)
    while is_running(domid) and time.monotonic() < end:
        time.sleep(0.05)
        _end_processes(domid)


def _end_processes(domid: int) -> None:
    found = [pid for pid in _pids(domid) if pid > 0]
    handles = []
    for pid in found:
        with suppress(OSError):
            handle = os.pidfd_open(pid)
            # Asked after it was opened: from then on the number cannot come to mean another process.
            if _is_ours(pid, domid):
                handles.append(handle)
            else:
                os.close(handle)
    # The parent first: it must not start another.
    for handle in handles:
        pidfd.terminate(handle)
    end = time.monotonic() + LET_GO_TIME + 1
    for handle in handles:
        if not pidfd.wait(handle, max(0.0, end - time.monotonic())):
            pidfd.kill(handle)
            pidfd.wait(handle, _KILL_TIME)
        pidfd.reap(handle)
        os.close(handle)


# --- the two processes
def _supervise(domid: int) -> None:
    """Keep a server running until it ends by itself, or we are told to."""
    from xtool.libc import set_process_name

    set_process_name(_name(domid))
    paths.run_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(_lock(domid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # somebody was faster
    _write_pids(domid, os.getpid())
    told: list[int] = []
    child = 0

    def stop(number: int, frame: object) -> None:
        told.append(number)
        if child:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    crashes: deque[float] = deque(maxlen=CRASHES)
    while not told:
        # A signal between the fork and this line's end would be lost to both.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        child = os.fork()
        if not child:
            _serve(domid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        status = _wait(child, told)
        child = 0
        if told:
            break
        if status == 0:  # its domain is gone
            _remove_files(domid)
            break
        crashes.append(time.monotonic())
        if len(crashes) == CRASHES and crashes[-1] - crashes[0] < CRASH_TIME:
            _park(domid)
            break
        time.sleep(RESTART_PAUSE)


def _wait(child: int, told: list[int]) -> int:
    """The child's wait status; a child that does not end when it was told to is killed."""
    end = 0.0
    while True:
        pid, status = os.waitpid(child, os.WNOHANG if told else 0)
        if pid:
            return status
        if not end:
            end = time.monotonic() + LET_GO_TIME
            os.kill(child, signal.SIGTERM)  # if the signal came before there was a child to pass it on to
        elif time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _serve(domid: int) -> None:
    """The forked child; does not return."""
    import logging

    from xtool.backends.profiling import profiled
    from xtool.backends.server import log_to_stderr, serve

    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _write_pids(domid, os.getppid(), os.getpid())
        log_to_stderr()
        with profiled(domid):
            serve(domid)
        code = 0
    except BaseException:
        logging.getLogger(__name__).exception("the backends of domain %d ended", domid)
    finally:
        os._exit(code)


def _park(domid: int) -> None:
    from xtool.backends.server import park
    from xtool.xenstore.client import open_store

    with open_store() as store:
        park(store, domid, f"the backend process died {CRASHES} times within {CRASH_TIME:g} s")
