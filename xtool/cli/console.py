"""Attach this terminal (or pipe) to a domain's console.

Facts about terminals
---------------------
- In raw mode every key goes to the guest, Ctrl-C included; only the escape key is ours. It is looked for
  only when the input is a terminal: piped bytes pass unchanged.
- A pty whose other side is gone reads as EIO, or as an empty read.
- After ``poll`` says writable, a pipe takes ``PIPE_BUF`` bytes without blocking. The output is never set
  non-blocking: that would change it for every process that shares it.
- A signal that would end this process must not leave the terminal raw: it ends the loop instead, and is
  raised again once the terminal is as it was.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from xtool.cli.consolelink import Link
from xtool.devices.console import console_lock
from xtool.errors import DeadlineError
from xtool.toolstack.api import ConsoleTarget

ESCAPE = b"\x1d"  # Ctrl-]
_CHUNK = 4096  # PIPE_BUF on Linux
_PENDING_MAX = 64 * 1024
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
#: How often ``is_alive`` is asked when there is no descriptor to wait on, seconds.
_ALIVE_PERIOD = 1.0


def attach(
    target: ConsoleTarget,
    *,
    stdin: int = 0,
    stdout: int = 1,
    escape: bytes = ESCAPE,
    timeout: float | None = None,
    is_alive: Callable[[], bool] | None = None,
    alive_fd: int | None = None,
    on_close: Callable[[], None] | None = None,
) -> int:
    """Copy both ways until the escape key, the end of the console, or ``timeout`` seconds; an exit status.

    0: left with the escape key, the console ended, or nobody reads our output any more.
    ``DeadlineError.exit_code``: ``timeout`` is over. 128 + n does not return: signal n is raised again.

    The end of ``stdin`` does not end it, and neither does a server of the console that is restarted or dies:
    the next one goes on where it was. ``is_alive`` is asked whenever ``alive_fd`` is readable (a watch on
    the domain), or each second without one; ``on_close`` is called after the console ended by itself.
    Raises ``DomainError`` when the console cannot be opened or somebody else is attached.
    """
    with ExitStack() as stack:
        if not target.socket and not target.via:
            stack.enter_context(console_lock(target.domid))
        link = Link(target)
        stack.callback(link.close)
        interactive = os.isatty(stdin)
        wakeups = stack.enter_context(_signals())
        if interactive:
            print(f"Attached to {target.name} ({target.kind} console); Ctrl-] leaves.", file=sys.stderr)
            stack.enter_context(_raw(stdin))
        session = _Session(link, stdin, stdout, escape if interactive else b"", wakeups)
        session.copy_window_size()
        end = None if timeout is None else time.monotonic() + timeout
        reason = session.run(end, is_alive, alive_fd)
    if interactive:
        print(f"\n{_SAID[reason]}", file=sys.stderr)
    if reason == "closed" and on_close is not None:
        on_close()
    if reason == "signal":
        signal.raise_signal(session.ending_signal)
        return 128 + session.ending_signal  # only if somebody ignores that signal
    return DeadlineError.exit_code if reason == "timeout" else 0


_SAID = {
    "escape": "Detached.",
    "closed": "The console has ended.",
    "timeout": "The time is up.",
    "output": "Nobody reads the output any more.",
    "signal": "Interrupted.",
}


class _Session:
    """The copying itself, on descriptors it does not own."""

    def __init__(self, link: Link, stdin: int, stdout: int, escape: bytes, wakeups: int) -> None:
        self.ending_signal = 0
        self._link, self._stdin, self._stdout, self._wakeups = link, stdin, stdout, wakeups
        self._escape = escape
        self._to_guest = bytearray()
        self._to_user = bytearray()
        self._input_open = True
        self._closed = False

    def run(self, end: float | None, is_alive: Callable[[], bool] | None, alive_fd: int | None) -> str:
        """Why it ended: a key of ``_SAID``."""
        next_ask = time.monotonic() + _ALIVE_PERIOD
        while True:
            if self._closed and not self._to_user:
                return "closed"
            now = time.monotonic()
            if end is not None and now >= end:
                return "timeout"
            limits = [] if end is None else [end - now]
            if self._link.fd < 0 and not self._closed:
                self._closed = not self._link.try_again(now)
                self.copy_window_size()
                limits.append(self._link.pause)
            if is_alive is not None and alive_fd is None:
                limits.append(max(next_ask - now, 0))
            ready = self._wait(min(limits) if limits else None, alive_fd)
            if self._wakeups in ready and self._take_signals():
                return "signal"
            if self._link.fd in ready:
                self._exchange(ready[self._link.fd])
            if self._stdout in ready and not self._show():
                return "output"
            if self._stdin in ready and not self._take_input():
                return "escape"
            asked = alive_fd in ready if alive_fd is not None else time.monotonic() >= next_ask
            if is_alive is not None and asked:
                next_ask = time.monotonic() + _ALIVE_PERIOD
                if not is_alive():
                    self._link.final = True
                    self._drain()
                    is_alive = None

    def _wait(self, timeout: float | None, alive_fd: int | None) -> dict[int, int]:
        poll = select.poll()
        poll.register(self._wakeups, select.POLLIN)
        if not self._closed and self._link.fd >= 0:
            wanted = select.POLLIN if len(self._to_user) < _PENDING_MAX else 0
            poll.register(self._link.fd, wanted | (select.POLLOUT if self._to_guest else 0))
        if self._to_user:
            poll.register(self._stdout, select.POLLOUT)
        if self._input_open and not self._closed and len(self._to_guest) < _PENDING_MAX:
            poll.register(self._stdin, select.POLLIN)
        if alive_fd is not None and not self._closed:
            poll.register(alive_fd, select.POLLIN)
        return dict(poll.poll(None if timeout is None else timeout * 1000))

    def _exchange(self, events: int) -> None:
        """Move bytes between the tty and our buffers."""
        try:
            if events & select.POLLOUT:
                del self._to_guest[: os.write(self._link.fd, self._to_guest[:_CHUNK])]
            if events & ~select.POLLOUT:
                data = self._link.read(_CHUNK)
                if data is None:
                    self._closed = self._link.lost()
                else:
                    self._to_user += data
        except BlockingIOError:
            pass
        except OSError:  # EIO: the other side is gone
            self._closed = self._link.lost()

    def _drain(self) -> None:
        """The domain is gone: take what is left in the tty, and end."""
        while not self._closed and self._link.fd >= 0:
            before = self._link.taken
            self._exchange(select.POLLIN)
            if self._link.taken == before:
                break
        self._closed = True

    def _show(self) -> bool:
        try:
            del self._to_user[: os.write(self._stdout, self._to_user[:_CHUNK])]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _take_input(self) -> bool:
        """False when the escape key was pressed."""
        try:
            data = os.read(self._stdin, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            self._input_open = False
        before, found, _ = data.partition(self._escape) if self._escape else (data, b"", b"")
        self._to_guest += before
        if not found:
            return True
        try:  # what was typed before the escape key
            if self._link.fd >= 0:
                os.write(self._link.fd, self._to_guest)
        except OSError:
            pass
        return False

    def _take_signals(self) -> bool:
        """True when one of them ends us."""
        for number in os.read(self._wakeups, 64):
            if number == signal.SIGWINCH:
                self.copy_window_size()
            elif number in _ENDING:
                self.ending_signal = number
                return True
        return False

    def copy_window_size(self) -> None:
        """Give the pty this terminal's size, for whoever looks at it from the other side."""
        try:
            size = fcntl.ioctl(self._stdout, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(self._link.fd, termios.TIOCSWINSZ, size)
        except (OSError, ValueError):
            pass


@contextmanager
def _raw(fd: int) -> Iterator[None]:
    """The terminal in raw mode, and as it was afterwards; raw again after a stop."""
    before = termios.tcgetattr(fd)
    old = signal.signal(signal.SIGCONT, lambda *_: tty.setraw(fd, termios.TCSANOW))
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        signal.signal(signal.SIGCONT, old)
        try:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        except termios.error:  # the terminal itself is gone
            pass


@contextmanager
def _signals() -> Iterator[int]:
    """Turn signals into bytes: a descriptor that gives the number of each signal that came."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    old_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # An ignored signal (nohup, a background job) stays ignored.
    numbers = [n for n in (*_ENDING, signal.SIGWINCH) if signal.getsignal(n) != signal.SIG_IGN]
    old = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield read
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        os.close(read)
        os.close(write)
