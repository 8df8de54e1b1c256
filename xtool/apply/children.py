"""Steps at the same time, each in a forked child with a client of its own.

::

    apply ── one thread, no client; forks, listens, waits
      ├─ child: one domain            tells its steps, at last its result (toolstack.telling)
      └─ child: another one

A child is in a session of its own: Ctrl-C on the terminal reaches ``apply`` alone, which interrupts each
child once and waits until it has undone what it had begun. When ``apply`` is killed its children are
interrupted by the kernel and undo it by themselves.

Facts: a create forks keepers, so its process may have one thread only. What a child forks inherits its
socket, so its end is told by a descriptor of its process (pidfd), not by the end of its stream.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

from xtool.apply.carry import Manner, Step, attempt, failure
from xtool.apply.records import FAILED, DomainChange, Failure
from xtool.errors import HostError
from xtool.libc import die_with_parent, set_process_name
from xtool.progress import Progress
from xtool.toolstack.api import Client
from xtool.toolstack.signals import Terminated
from xtool.toolstack.telling import Teller, outcome, tell

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HINT = "xtool list shows what is there; the same apply goes on from there"


@dataclass
class _Child:
    one: DomainChange
    pid: int
    pidfd: int
    link: socket.socket
    heard: bytearray = field(default_factory=bytearray)
    told: dict[str, Any] = field(default_factory=dict)
    silent: bool = False

    def close(self) -> None:
        os.close(self.pidfd)
        self.link.close()


class Children:
    """``Runner``. Make it in a process of one thread; ``open_client`` is called in each child."""

    def __init__(
        self,
        open_client: Callable[[], AbstractContextManager[Client]],
        manner: Manner,
        progress: Progress,
        jobs: int,
    ) -> None:
        self.room = jobs
        self._open_client, self._manner, self._progress = open_client, manner, progress
        self._running: dict[str, _Child] = {}
        self._ended: list[DomainChange] = []

    def begin(self, step: Step) -> None:
        parent = os.getpid()
        near, far = socket.socketpair()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # A signal between the fork and what makes the child known, or ready for it, would be lost.
        with _put_off() as before:
            try:
                pid = os.fork()
            except OSError as error:
                near.close()
                far.close()
                why = HostError(f"cannot fork: {error.strerror}", hint="try fewer --jobs")
                self._ended.append(_failed(step.one, failure(why)))
                return
            if pid == 0:
                self._be_child(far, step, parent, before)
            near.setblocking(False)
            self._running[step.one.name] = _Child(step.one, pid, os.pidfd_open(pid), near)
        far.close()

    def wait(self) -> DomainChange:
        while not self._ended:
            self._listen()
        return self._ended.pop(0)

    def stop(self) -> list[DomainChange]:
        for child in self._running.values():
            with suppress(OSError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGINT)
        try:
            while self._running:
                self._listen(stopping=True)
        except (KeyboardInterrupt, SystemExit, Terminated):
            self._progress.step(f"not waited for, and still undoing: {', '.join(self._running)}")
        ended, self._ended = self._ended, []
        return ended

    # --- the parent's side of a child
    def _listen(self, *, stopping: bool = False) -> None:
        """Wait until something was told or a child ended, and take it in."""
        poll = select.poll()
        for child in self._running.values():
            poll.register(child.pidfd, select.POLLIN)
            if not child.silent:
                poll.register(child.link, select.POLLIN)
        ready = {number for number, _ in poll.poll()}
        with _put_off():
            for child in list(self._running.values()):
                if child.pidfd in ready:
                    self._hear(child)
                    self._see_off(child, stopping)
                elif child.link.fileno() in ready:
                    self._hear(child)

    def _hear(self, child: _Child) -> None:
        while not child.silent:
            try:
                data = child.link.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            child.heard += data
            child.silent = not data
        *lines, rest = bytes(child.heard).split(b"\n")
        child.heard[:] = rest
        for line in lines:
            told = json.loads(line)
            if "step" in told:
                self._progress.step(f"{child.one.name}: {told['step']}")
            elif "advance" not in told:
                child.told = told

    def _see_off(self, child: _Child, stopping: bool) -> None:
        _, status = os.waitpid(child.pid, 0)
        del self._running[child.one.name]
        child.close()
        if stopping and "result" not in child.told:
            return
        one = _ended(child.one, child.told, status)
        self._progress.step(f"{one.name}: {one.result}")
        self._ended.append(one)

    # --- the child
    def _be_child(self, link: socket.socket, step: Step, parent: int, before: Iterable[int]) -> NoReturn:
        code = 70
        try:
            die_with_parent(signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(0)
            os.setsid()
            set_process_name("xtool-apply")
            for other in self._running.values():
                other.close()

            def work() -> dict[str, Any]:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                with self._open_client() as client:
                    return _plain(attempt(client, step, self._manner, Teller(link)))

            tell(link, outcome(work, lambda error: asdict(failure(error)), _STOPPING))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(code)


@contextmanager
def _put_off() -> Iterator[Iterable[int]]:
    """What would interrupt comes when the block is over; gives the signals that were put off before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _plain(one: DomainChange) -> dict[str, Any]:
    """What the step found out; the rest is known."""
    error = None if one.error is None else asdict(one.error)
    return {"domid": one.domid, "uuid": one.uuid, "result": one.result, "error": error}


def _ended(one: DomainChange, told: Mapping[str, Any], status: int) -> DomainChange:
    """The result of a child that ended with this status of ``wait``. Pure."""
    if "result" in told:
        found = dict(told["result"])
        error = found.pop("error")
        return replace(one, **found, error=None if error is None else Failure(**error))
    if "error" in told:
        return _failed(one, Failure(**told["error"]))
    if "cancelled" in told:
        why = "was interrupted; what it had begun is undone"
    elif os.WIFSIGNALED(status):
        why = f"was killed ({signal.Signals(os.WTERMSIG(status)).name})"
    else:
        why = f"ended with status {os.waitstatus_to_exitcode(status)} and no result"
    return _failed(one, failure(HostError(f"the process that carried it out {why}", hint=_HINT)))


def _failed(one: DomainChange, why: Failure) -> DomainChange:
    return replace(one, result=FAILED, error=why)
