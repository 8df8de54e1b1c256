"""Keepers and the watcher, as the rest of the toolstack sees them: who looks after a domain, starting one.

A *bare* domain, one with neither a backend server of ours nor a QEMU, is looked after by the watcher: one
process for all of them (``toolstack.watching``). Any other has a keeper, a process of its own
(``toolstack.keeping``). Both are forked from the zygote where there is one, else from the process that asks.

Whoever looks after a domain holds a lock on ``domains/<uuid>.keeper`` and no state: one that is killed is
replaced by whoever looks next, and what its domains did meanwhile is carried out then. Several may try at
once; the locks let one of them be it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from xtool import libc, paths, warmlink
from xtool.toolstack import journal
from xtool.toolstack.names import uuid_text

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

LOG = "keeper.log"
#: Known before any keeper is forked, for it need not find out.
_LOG_DIR = str(paths.log_dir())
_DEFAULTS = tuple(
    int(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGCONT)
)

#: Processes this process forked or spawned and has not seen end; a short-lived command never looks.
_children: list[int] = []


def reap_children() -> None:
    """See off keepers and device models that ended, also those that others ended: a domain's QEMU is our
    child if we created it, and stays a zombie when a keeper restarts the domain. A process that lives long
    calls this on SIGCHLD."""
    from xtool.devicemodel.process import reap_ended

    _children[:] = [child for child in _children if not _reaped(child)]
    reap_ended()


def _reaped(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:  # by whoever ended it
        return True


def pid_of(uuid: str) -> int:
    """The pid of who looks after the domain, its keeper or the watcher; 0 if nobody does."""
    return journal.keeper_pid(uuid)


def missing(host: Host | None = None) -> list[journal.Entry]:
    """The running domains of ours that nobody looks after, and those a killed one was restarting.

    Without a ``host`` only the journal is asked: a keeper that finds its domain gone ends at once.
    """
    unkept = [uuid for uuid in journal.uuids() if not pid_of(uuid)]  # their entries are not even read
    lacking = [entry for uuid in unkept if (entry := journal.read(uuid)) and wants_one(entry)]
    if host is None or not lacking:
        return lacking
    alive = {uuid_text(state.handle) for state in host.hv.domains() if not state.dying}
    return [entry for entry in lacking if entry.then or entry.uuid in alive]


def wants_one(entry: journal.Entry) -> bool:
    """Whether a domain nobody looks after should be."""
    if entry.settled:
        return False
    if entry.state == "running":
        return True
    if not entry.then:
        return False
    with journal.locked(entry.uuid, wait=False) as ours:  # somebody else is at it
        return ours


def is_bare(domid: int, host: Host | None = None) -> bool:
    """Whether the domain needs no keeper of its own. ``host`` saves a connection."""
    from xtool.toolstack import backends
    from xtool.xenstore import paths as nodes

    if domid < 0:  # on its way back
        return True
    if backends.is_wanted(domid):
        return False
    if host is not None:
        return not host.store.exists(nodes.device_model_pid(domid))
    from xtool.toolstack import deathwatch

    return not deathwatch.device_model_pid(domid)


def ensure(domid: int, uuid: str, host: Host | None = None) -> bool:
    """See that somebody looks after the domain; whether nobody did. Cheap when somebody does."""
    from xtool.toolstack import watchlink

    if pid_of(uuid):
        return False
    if not (is_bare(domid, host) and watchlink.take(domid, uuid, start_watcher)):
        start_own(domid, uuid)
    return True


def start_own(domid: int, uuid: str) -> None:
    """Give the domain a keeper of its own; the watcher lets go of it then."""
    if not warmlink.ask_for_keeper(domid, uuid):
        leave_behind(
            f"keeper of domain {domid}", LOG, lambda: become_keeper(domid, uuid, os.fork, as_daemon=False)
        )


def start_watcher() -> None:
    """Start one; it ends at once if there is one."""
    if not warmlink.ask_for_watcher():
        leave_behind("watcher", LOG, lambda: become_watcher(os.fork, as_daemon=False))


def ensure_all(host: Host) -> list[journal.Entry]:
    """Have all looked after that nobody does; those domains."""
    lacking = missing(host) if host.real else []
    for entry in lacking:
        ensure(entry.domid, entry.uuid, host)
    return lacking


def start_keeper(domid: int, uuid: str, host: Host | None = None) -> None:
    """See that somebody looks after a domain that has just been created, also if one found it before it was
    complete. Who does outlives this process."""
    if not ensure(domid, uuid, host):
        look_again(domid, uuid, host)


def look_again(domid: int, uuid: str, host: Host | None = None) -> None:
    """Have it seen that the domain has a QEMU now, or devices we serve: its keeper looks, and a domain that
    the watcher has gets a keeper."""
    pid = pid_of(uuid)
    if pid and _tell(pid):
        return
    # Of one that took the lock just now the file does not tell yet; a keeper looks as it starts, anyway.
    if not is_bare(domid, host):
        start_own(domid, uuid)


def _tell(pid: int) -> bool:
    """Have the process look around, if it is a keeper. It may know its domain by an older number."""
    from xtool.toolstack import backends

    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Asked after it was opened: from then on the number cannot come to mean another process.
        if not Path(f"/proc/{pid}/comm").read_text().startswith(backends.KEEPER):
            return False
        signal.pidfd_send_signal(handle, signal.SIGUSR1)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def rescue(fork: Callable[[], int]) -> None:
    """Start the watcher and every missing keeper as children of this process, which may end then."""
    from xtool.toolstack import watchlink

    def start() -> None:
        if fork() == 0:
            become_watcher(fork)
            os._exit(0)

    for entry in missing():
        if pid_of(entry.uuid):  # a watcher that has just started takes up all it can
            continue
        if is_bare(entry.domid) and watchlink.take(entry.domid, entry.uuid, start):
            continue
        if fork() == 0:
            become_keeper(entry.domid, entry.uuid, fork)
            os._exit(0)


def become_keeper(
    domid: int,
    uuid: str,
    fork: Callable[[], int] = libc.lean_fork,
    *,
    as_daemon: bool = True,
    ready: Callable[[], None] = lambda: None,
    keep_open: int = -1,
) -> None:
    """Be the domain's keeper, until there is nothing more to keep or another one is it.

    ``ready`` is called when that is decided; ``keep_open`` is a descriptor it needs.
    """
    from xtool.toolstack import keeping

    if as_daemon:
        os.setsid()
        become_daemon(LOG, keep_open)
    try:
        keeping.keep(domid, uuid, fork, ready)
    except Exception as error:
        sys.stderr.write(f"keeper of domain {domid}: {type(error).__name__}: {error}\n")


def become_watcher(
    fork: Callable[[], int] = libc.lean_fork,
    *,
    as_daemon: bool = True,
    ready: Callable[[], None] = lambda: None,
    keep_open: int = -1,
) -> None:
    """Be the watcher, until there is nothing to watch or another one is it; as ``become_keeper``."""
    from xtool.toolstack import watching

    if as_daemon:
        os.setsid()
        become_daemon(LOG, keep_open)
    try:
        watching.watch(fork, ready)
    except Exception as error:
        sys.stderr.write(f"watcher: {type(error).__name__}: {error}\n")


def leave_behind(what: str, log: str, run: Callable[[], None]) -> None:
    """Fork a process that does ``run`` and outlives this one; ``log`` is a file name for its messages."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    reap_children()
    # One fork only: it is the dearest step of a create, since every page table is copied.
    child = os.fork()
    if child:
        _children.append(child)
        return
    try:
        os.setsid()
        become_daemon(log)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (for the rest of the process)
        run()
    except BaseException as error:
        sys.stderr.write(f"{what}: {type(error).__name__}: {error}\n")
    finally:
        os._exit(0)


def become_daemon(log_name: str, keep_open: int = -1) -> None:
    """Nothing of the parent's: not its terminal, its folder, its descriptors (but one) or its signals."""
    os.chdir("/")
    _signal.set_wakeup_fd(-1)
    for number in _DEFAULTS:
        _signal.signal(number, _signal.SIG_DFL)
    folder = os.environ.get("XTOOL_LOG_DIR") or _LOG_DIR
    if not os.access(folder, os.F_OK):
        os.makedirs(folder, exist_ok=True)
    log = os.open(f"{folder}/{log_name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(log, 2)
    if keep_open >= 0:
        os.closerange(3, keep_open)
    os.closerange(max(3, keep_open + 1), 4096)
