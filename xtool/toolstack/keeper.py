"""The process that stays with a domain and does what its configuration says when it ends.

One per domain, forked from the process that created it: everything it needs is in memory already. It
holds nothing but two connections of its own, sleeps until xenstored announces that some domain changed,
and ends when its domain is gone. Killing it harms nothing: the domain goes on, and ``shutdown -w``,
``reboot -w`` or an attached console carry the action out instead.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from time import monotonic, sleep
from typing import TYPE_CHECKING

from xtool import paths
from xtool.errors import XtoolError
from xtool.toolstack import journal

if TYPE_CHECKING:
    from xtool.toolstack.api import LifecycleResult
    from xtool.toolstack.host import Host

#: A missed announcement is noticed after this many seconds.
_RESCAN = 10.0
#: A domain that ends sooner than this after its start is not restarted faster than that (seconds).
_SHORTEST_LIFE = 2.0


#: Keepers this process forked and has not seen end; a short-lived command never looks.
_children: list[int] = []


def reap_children() -> None:
    """See off keepers that ended. A process that lives long calls this on SIGCHLD."""
    _children[:] = [child for child in _children if not _reaped(child)]


def _reaped(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:  # by whoever ended it
        return True


def start_keeper(domid: int, uuid: str) -> None:
    """Leave a keeper behind for the domain. Returns at once; the keeper outlives this process."""
    leave_behind(f"keeper of domain {domid}", "keeper.log", lambda: keep(domid, uuid))


def leave_behind(what: str, log: str, run: Callable[[], None]) -> None:
    """Fork a process that does ``run`` and outlives this one; ``log`` is a file name for its messages."""
    sys.stdout.flush()
    sys.stderr.flush()
    reap_children()
    # One fork only: it is the dearest step of a create, since every page table is copied.
    child = os.fork()
    if child:
        _children.append(child)
        return
    try:
        os.setsid()
        _become_daemon(log)
        run()
    except BaseException as error:
        sys.stderr.write(f"{what}: {type(error).__name__}: {error}\n")
    finally:
        os._exit(0)


def _become_daemon(log_name: str) -> None:
    """Nothing of the parent's: not its terminal, its folder, its descriptors or its signals."""
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    folder = paths.log_dir()
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / log_name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(log, 2)
    os.closerange(3, 4096)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (for the rest of the process)


def keep(domid: int, uuid: str) -> None:
    """Stay until the domain is gone for good; follow it through its restarts."""
    from xtool.toolstack.host import open_host

    host = open_host()
    with journal.locked(uuid):
        journal.update(uuid, keeper=os.getpid())
    while True:
        since = monotonic()
        _wait_for_end(host, domid)
        try:
            settled = _settle(host, domid, uuid, monotonic() - since)
        except XtoolError as error:
            sys.stderr.write(f"{uuid}: {error.message}\n")
            return
        if settled is None or settled.new_domid is None:
            return
        domid = settled.new_domid


def _wait_for_end(host: Host, domid: int) -> None:
    with host.store.watch("@releaseDomain") as watch:
        while True:
            state = host.hv.domain(domid)
            if state is None or state.dying or state.shutdown:
                return
            watch.wait(_RESCAN)


def _settle(host: Host, domid: int, uuid: str, lived: float) -> LifecycleResult | None:
    from xtool.toolstack.lifecycle import settle

    state = host.hv.domain(domid)
    if state and state.shutdown and lived < _SHORTEST_LIFE:
        sleep(_SHORTEST_LIFE - lived)  # a guest that dies as it starts must not keep the host busy
    return settle(host, domid, uuid)
