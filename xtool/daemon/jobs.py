"""Operations in processes of their own, forked from a warm, single-threaded parent.

::

    xtoold ── threads, sockets, no fork
      └─ xtoold-jobs ── imports everything, forks; waits for nothing else
           ├─ spare: waits for a job               the next job begins without a fork
           └─ job: one verb in its main thread     a signal interrupts it, as Ctrl-C does on a terminal

A job gets one end of a socket pair. It is sent the request, and sends lines of JSON: steps, how far it is,
and at last the result or the error; before all that, a descriptor of its own process, so that a signal can
never reach another one. When xtoold dies, jobs go on to their end, the spare and the parent end.

Facts: forking a process with threads copies locks that nobody will ever release, so nothing here is forked
from the process that has threads. On a SEQPACKET socket that several processes read, each message goes to one
of them. ``poll`` tells of a peer that is gone even when asked for nothing.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn

from xtool.client.wire import plain, problem, record
from xtool.daemon.carry import carry_out
from xtool.daemon.endpoints import endpoints
from xtool.errors import HostError
from xtool.libc import die_with_parent, set_process_name
from xtool.toolstack.telling import Teller, outcome, tell

if TYPE_CHECKING:
    from xtool.daemon.operations import Work
    from xtool.toolstack.api import Client

#: Imported before the first fork: what a create needs.
_MODULES = (
    "xtool.config.load",
    "yaml",
    "xtool.toolstack.dom0",
    "xtool.toolstack.create",
    "xtool.toolstack.destroy",
    "xtool.toolstack.lifecycle",
    "xtool.toolstack.query",
    "xtool.toolstack.keeper",
    "xtool.toolstack.watching",
    "xtool.builder.build",
    "xtool.devicemodel.process",
    "xtool.hypercall.xen",
    "xtool.xenstore.client",
)
#: How long a job may take to say that it has begun, seconds: the parent may be importing.
_BEGIN_TIME = 120.0
_SIZE = 4


class JobRunner:
    """Make it while this process has one thread only. ``open_client`` is called in each job."""

    def __init__(self, open_client: Callable[[], Client]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._control.close()
            _parent(theirs, open_client)
        theirs.close()

    def watch(self, gone: Callable[[], None]) -> None:
        """Call ``gone`` in a thread when the parent has died: no job can begin any more."""

        def wait() -> None:
            poll = select.poll()
            poll.register(self._control, 0)
            poll.poll()
            gone()

        Thread(target=wait, daemon=True, name="jobs-watch").start()

    def start(self, work: Work, done: Callable[[], None]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"job"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise HostError(
                    f"the process that forks jobs is gone: {error.strerror}", hint="xtool daemon stop"
                ) from None
        name = f"op-{work.snapshot.id}"
        Thread(target=_follow, args=(ours, work, done), daemon=True, name=name).start()

    def close(self) -> None:
        self._control.close()


def _follow(link: socket.socket, work: Work, done: Callable[[], None]) -> None:
    """The daemon's side of one job."""
    pidfd = -1
    try:
        request = json.dumps({"method": work.snapshot.method, "arguments": plain(work.arguments)}).encode()
        link.settimeout(_BEGIN_TIME)
        link.sendall(len(request).to_bytes(_SIZE, "little") + request)
        _, fds, _, _ = socket.recv_fds(link, 1, 1)
        link.settimeout(None)
        if fds:
            pidfd = fds[0]
            work.interrupt = lambda: _interrupt(pidfd)
            if work.cancel_wanted:
                _interrupt(pidfd)
            with link.makefile("rb") as lines:
                for line in lines:
                    _take(work, json.loads(line))
        if not work.ended:
            error = HostError(
                "the process that carried it out died",
                hint="xtool gc cleans up; xtool list shows what is there",
            )
            work.failed(problem(error))
    except BaseException as error:
        work.failed_by(error)
    finally:
        work.interrupt = lambda: None
        link.close()
        if pidfd >= 0:
            os.close(pidfd)
        done()


def _interrupt(pidfd: int) -> None:
    with suppress(OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGINT)


def _take(work: Work, told: dict[str, Any]) -> None:
    from xtool.client.records import Problem

    if "step" in told:
        work.step(told["step"])
    elif "advance" in told:
        work.advance(*told["advance"])
    elif "result" in told:
        work.succeeded(told["result"])
    elif "error" in told:
        work.failed(record(Problem, told["error"]))
    else:
        work.cancelled()


# --- the parent of jobs ---------------------------------------------------------------------------------
def _parent(control: socket.socket, open_client: Callable[[], Client]) -> NoReturn:
    """Keep a spare process until the daemon is gone."""
    from importlib import import_module

    try:
        os.setsid()  # a terminal's signals are for the daemon
        _let_go(control)
        set_process_name("xtoold-jobs")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for name in _MODULES:
            import_module(name)
        endpoints()  # built once, here
        gc.collect()
        gc.freeze()  # children share what is there; collecting it would copy its pages
        awake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        taken, take = os.pipe2(os.O_CLOEXEC)
        poll = select.poll()
        poll.register(control, 0)
        poll.register(awake, select.POLLIN)
        poll.register(taken, select.POLLIN)
        spare = _fork(control, take, open_client)
        while True:
            ready = dict(poll.poll())
            if control.fileno() in ready:
                os._exit(0)
            if awake in ready:
                os.read(awake, 4096)
            renew = spare in _reap()
            if taken in ready:
                os.read(taken, 1)
                renew = True
            if renew:
                spare = _fork(control, take, open_client)
    except BaseException:
        traceback.print_exc()
    os._exit(70)


def _let_go(control: socket.socket) -> None:
    """Nothing of the daemon's but this and the standard files: its lock and its sockets end with it."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != control.fileno():
            with suppress(OSError):
                os.close(int(name))


def _reap() -> set[int]:
    found: set[int] = set()
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.add(pid)


def _fork(control: socket.socket, take: int, open_client: Callable[[], Client]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        die_with_parent(signal.SIGKILL)  # as long as it has nothing to do
        if os.getppid() != parent:
            os._exit(0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, fds, _, _ = socket.recv_fds(control, 16, 1)
        if fds:  # else the daemon is gone
            link = socket.socket(fileno=fds[0])
            control.close()
            die_with_parent(0)
            os.write(take, b"x")
            os.close(take)
            _job(link, open_client)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- a job ----------------------------------------------------------------------------------------------
def _job(link: socket.socket, open_client: Callable[[], Client]) -> None:
    os.setsid()
    set_process_name("xtoold-job")
    # Whatever opens files may need 0 to 2 to be taken; they are the daemon's.
    tell(
        link,
        outcome(lambda: _carry_out(link, open_client), lambda error: plain(problem(error)), (signal.SIGINT,)),
    )


def _carry_out(link: socket.socket, open_client: Callable[[], Client]) -> Any:
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(link, [b"\n"], [pidfd])
    os.close(pidfd)
    size = int.from_bytes(_exactly(link, _SIZE), "little")
    request = json.loads(_exactly(link, size))
    client = open_client()
    try:
        return carry_out(client, request["method"], request["arguments"], Teller(link))
    finally:
        client.close()


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise HostError("the daemon went away before it said what to do")
        data += part
    return bytes(data)
