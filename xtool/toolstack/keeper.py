"""Keepers, as the rest of the toolstack sees them: who has one, who lacks one, starting one.

A keeper is a process per running domain of ours (``toolstack.keeping`` is what it does). It is forked from
the zygote where there is one, else from the process that asks. It holds a lock on ``domains/<uuid>.keeper``
and no state: one that is killed is replaced by whoever looks next, and what its domain did meanwhile is
carried out then. Several may try at once; the lock lets one of them be it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
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
    """The pid of the domain's keeper, 0 if it has none."""
    return journal.keeper_pid(uuid)


def missing(host: Host | None = None) -> list[journal.Entry]:
    """The running domains of ours that no keeper keeps, and those a killed one was restarting.

    Without a ``host`` only the journal is asked: a keeper that finds its domain gone ends at once.
    """
    unkept = [uuid for uuid in journal.uuids() if not pid_of(uuid)]  # their entries are not even read
    lacking = [entry for uuid in unkept if (entry := journal.read(uuid)) and _wants_one(entry)]
    if host is None or not lacking:
        return lacking
    alive = {uuid_text(state.handle) for state in host.hv.domains() if not state.dying}
    return [entry for entry in lacking if entry.then or entry.uuid in alive]


def _wants_one(entry: journal.Entry) -> bool:
    if entry.settled:
        return False
    if entry.state == "running":
        return True
    if not entry.then:
        return False
    with journal.locked(entry.uuid, wait=False) as ours:  # somebody else is at it
        return ours


def ensure(domid: int, uuid: str) -> bool:
    """See that the domain has a keeper; whether one had to be started. Cheap when it has one."""
    if pid_of(uuid):
        return False
    if not warmlink.ask_for_keeper(domid, uuid):
        leave_behind(
            f"keeper of domain {domid}", LOG, lambda: become_keeper(domid, uuid, os.fork, as_daemon=False)
        )
    return True


def ensure_all(host: Host) -> list[journal.Entry]:
    """Start the keepers that are missing; the domains that now have one again."""
    lacking = missing(host) if host.real else []
    for entry in lacking:
        ensure(entry.domid, entry.uuid)
    return lacking


def start_keeper(domid: int, uuid: str) -> None:
    """See that the domain has a keeper. Returns at once; the keeper outlives this process."""
    ensure(domid, uuid)


def look_again(uuid: str) -> None:
    """Tell the domain's keeper, if there is one, that the domain has a QEMU now, or devices we serve."""
    pid = pid_of(uuid)
    if pid:
        with suppress(OSError):
            os.kill(pid, signal.SIGUSR1)


def rescue(fork: Callable[[], int]) -> None:
    """Start every missing keeper as a child of this process, which may end then."""
    for entry in missing():
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
