"""Our own user-space backends, as the toolstack sees them: a process per domain that serves those of its
devices whose backend kind says ``process``, and its parent, which starts it again when it dies: the domain's
keeper, or a small process for this alone where there is none (domain 0, a domain that xl made).

::

    /run/xtool/backend-<domid>.lock    held as long as either process lives
    /run/xtool/backend-<domid>.pid     the parent's pid and the server's
    /run/xtool/backend-<domid>.sock    where the server answers
    /run/xtool/console-<domid>.sock    where its console is seen, if it is ours; console-<domid>-<n>.feed
    /run/xtool/backends/<domid>/       response journals: what a successor needs

Who the processes are is asked of these files and of ``/proc``, nothing else is remembered. A server that dies
is followed by another within a second, which takes the rings over; after ``CRASHES`` in a minute the devices
are closed with a reason instead. If the parent is killed the server goes on, the domain's next keeper adopts
it, and ``stop_backends`` finds it. On the host in memory the fake kernel serves these devices like any other.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from xtool import paths, warmlink
from xtool.backends.control import socket_path
from xtool.backends.frame import FOLDERS as CLASSES
from xtool.backends.viewers import socket_path as viewers_path
from xtool.devicemodel import pidfd
from xtool.devices.backendkinds import FOLDERS
from xtool.devices.xenbus import DeviceId
from xtool.errors import HostError, UsageError
from xtool.toolstack import journal, keeper
from xtool.toolstack.names import uuid_text

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

#: So many deaths within so many seconds, and a server is not started again.
CRASHES, CRASH_TIME = 5, 60.0
#: Pause before a dead server's successor, seconds.
RESTART_PAUSE = 0.2
#: How long a server may take to let go before it is killed, seconds.
LET_GO_TIME = 5.0
#: How keepers are called, before the domid.
KEEPER = "xtool-k-"
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
        _start(host, domid)


def _start(host: Host, domid: int) -> None:
    """Have the domain's keeper see to it; domain 0, and one that is not ours, get a process for this
    alone."""
    state = host.hv.domain(domid) if domid else None
    uuid = uuid_text(state.handle) if state else ""
    if not uuid or journal.read(uuid) is None:
        from xtool.toolstack.supervise import supervise

        keeper.leave_behind(f"backends of domain {domid}", LOG, lambda: supervise(domid))
        return
    paths.run_dir().mkdir(parents=True, exist_ok=True, mode=0o755)
    os.close(os.open(_lock(domid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # its presence asks for it
    if not keeper.ensure(domid, uuid):
        keeper.look_again(domid, uuid)


def stop_backends(host: Host, domid: int) -> None:
    """End the domain's backend process, if it has one, and remove its files. Devices are to go, too."""
    if host.real:
        _stop(domid)
        _remove_files(domid)


def restart_backends(host: Host, domid: int) -> None:
    """Replace a running backend process by a new one: for an upgrade. Guests see a pause.

    Raises ``HostError`` if the old one cannot be ended.
    """
    # Not asked again: one that was started a moment ago may appear meanwhile, and is as new as ours.
    if not _stop(domid):
        raise HostError(f"the backend process of domain {domid} does not end")
    _start(host, domid)


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
        *run.glob(f".backend-{domid}.*"),  # pid file or socket of a process killed before it had a name
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
    """How the processes are called; 15 bytes are the most."""
    return f"xtool-be-{domid}"


def keeper_name(domid: int) -> str:
    return f"{KEEPER}{domid}"


def is_wanted(domid: int) -> bool:
    """Whether the domain has devices that a process of ours is to serve."""
    return os.access(f"{warmlink.run_dir()}/backend-{domid}.lock", os.F_OK)


def _is_ours(pid: int, domid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in (_name(domid), keeper_name(domid))
    except OSError:
        return False


def _stop(domid: int) -> bool:
    """End both processes; whether they did. One that has just started holds the lock before its number can
    be read."""
    end = time.monotonic() + LET_GO_TIME + 1
    _end_processes(domid)
    while is_running(domid):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
        _end_processes(domid)
    return True


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


# --- the processes
def _park(domid: int) -> None:
    from xtool.backends.server import park
    from xtool.xenstore.client import open_store

    with open_store() as store:
        park(store, domid, f"the backend process died {CRASHES} times within {CRASH_TIME:g} s")
