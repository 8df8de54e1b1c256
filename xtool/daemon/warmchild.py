"""What a child of the zygote does first: read what the caller wants, and become that."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from xtool import libc, warmlink
from xtool.daemon.warmaccess import Access, environment_for, may_look

#: How long a caller may take to say what it wants, seconds.
_PATIENCE = 10.0
_STANDARD = (0, 1, 2)
_DEFAULTS = (int(signal.SIGCHLD), int(signal.SIGTERM), int(signal.SIGHUP))


class CommandLine(NamedTuple):
    """``files``: number -> descriptor, without those that are closed at the caller's."""

    arguments: list[str]
    environment: dict[bytes, bytes]
    umask: int
    folder: int
    files: dict[int, int]


class KeeperRequest(NamedTuple):
    domid: int
    uuid: str
    environment: dict[bytes, bytes]


class WatcherRequest(NamedTuple):
    environment: dict[bytes, bytes]


Request = CommandLine | KeeperRequest | WatcherRequest


def begin(link: socket.socket, access: Access, stamp: bytes, private: Iterable[int]) -> NoReturn:
    """In the zygote's child: do what the caller at ``link`` wants. ``private`` is for the zygote alone."""
    try:
        _forget_zygote(private)
        link.settimeout(_PATIENCE)
        wanted = read_request(link, stamp)
        if isinstance(wanted, KeeperRequest | WatcherRequest):
            if access == "root":
                _look_after(link, wanted)
        elif wanted is not None:
            libc.after_lean_fork()
            if access != "look" or may_look(wanted.arguments):
                _command(link, wanted, access)
    except BaseException as error:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"zygote: {type(error).__name__}: {error}\n")
    finally:
        os._exit(0)


def rescue(private: Iterable[int]) -> NoReturn:
    """In the zygote's child: start the watcher and the keepers that are missing."""
    try:
        _forget_zygote(private)
        from xtool.toolstack import keeper

        keeper.rescue(libc.lean_fork)
    except BaseException as error:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"zygote: {type(error).__name__}: {error}\n")
    finally:
        os._exit(0)


def _forget_zygote(private: Iterable[int]) -> None:
    _signal.set_wakeup_fd(-1)
    for number in _DEFAULTS:
        _signal.signal(number, _signal.SIG_DFL)
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    for fd in private:
        os.close(fd)


def read_request(link: socket.socket, stamp: bytes) -> Request | None:
    """What the caller wants; None if it makes no sense, or is for other code than ours."""
    files: list[int] = []
    head = link.recv(4, socket.MSG_PEEK)
    if head[3:] in (b"K", b"W"):  # has none: a keeper imports as little as it can
        head = link.recv(warmlink.HEAD)
    else:
        head, files, _, _ = socket.recv_fds(link, warmlink.HEAD, 1 + len(_STANDARD))
    while len(head) < warmlink.HEAD:
        part = link.recv(warmlink.HEAD - len(head))
        if not part:
            return None
        head += part
    size = int.from_bytes(head[-4:], "little")
    if not head.startswith(warmlink.MAGIC) or size > warmlink.MAX_REQUEST:
        return None
    body = bytearray()
    while len(body) < size:
        part = link.recv(size - len(body))
        if not part:
            return None
        body += part
    kind, mask = head[3:4], head[4]
    try:
        return parse_request(kind, mask, bytes(body), files, stamp)
    except (ValueError, IndexError):
        return None


def parse_request(kind: bytes, mask: int, body: bytes, files: list[int], stamp: bytes) -> Request | None:
    """The same from what was received. Raises ``ValueError`` and ``IndexError`` for what makes no sense."""
    fields = body.split(b"\0")
    if fields.pop() != b"" or fields[0] != stamp:
        return None
    if kind == b"K":
        return KeeperRequest(int(fields[1]), fields[2].decode("ascii"), _pairs(fields[3:]))
    if kind == b"W":
        return WatcherRequest(_pairs(fields[1:]))
    open_there = [number for number in _STANDARD if mask >> number & 1]
    if kind != b"C" or len(files) != 1 + len(open_there) or mask >> len(_STANDARD):
        return None
    count = int(fields[2])
    if not 0 <= count <= len(fields) - 3:
        return None
    arguments = [os.fsdecode(word) for word in fields[3 : 3 + count]]
    umask = int(fields[1]) & 0o777
    return CommandLine(
        arguments, _pairs(fields[3 + count :]), umask, files[0], dict(zip(open_there, files[1:], strict=True))
    )


def _pairs(fields: list[bytes]) -> dict[bytes, bytes]:
    split = [field.partition(b"=") for field in fields]
    return {name: value for name, equals, value in split if name and equals}


def _look_after(link: socket.socket, wanted: KeeperRequest | WatcherRequest) -> None:
    """Become the keeper, or the watcher. It says that it is taken when it has the lock, or somebody else
    has."""
    from xtool.toolstack import keeper

    for name, value in wanted.environment.items():
        if os.environb.get(name) != value:
            os.environb[name] = value

    def ready() -> None:
        link.send(warmlink.TAKEN, socket.MSG_NOSIGNAL)
        link.close()

    if isinstance(wanted, WatcherRequest):
        keeper.become_watcher(ready=ready, keep_open=link.fileno())
    else:
        keeper.become_keeper(wanted.domid, wanted.uuid, ready=ready, keep_open=link.fileno())


def _command(link: socket.socket, wanted: CommandLine, access: Access) -> None:
    """Become the command line. Does not return, but for what goes wrong before it is taken."""
    os.setsid()
    number = fcntl.fcntl(link.fileno(), fcntl.F_DUPFD_CLOEXEC, 16)
    link.close()
    link = socket.socket(fileno=number)
    folder = fcntl.fcntl(wanted.folder, fcntl.F_DUPFD_CLOEXEC, 16)
    copies = {fd: fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 16) for fd, theirs in wanted.files.items()}
    os.closerange(0, 16)
    for fd, copy in copies.items():
        os.dup2(copy, fd)
        os.close(copy)
    os.fchdir(folder)
    os.close(folder)
    os.umask(wanted.umask if access == "root" else 0o077)
    environment = environment_for(access, wanted.environment, dict(os.environb))
    os.environb.clear()
    os.environb.update(environment)
    _signals_from(link)
    sys.argv[:] = ["xtool", *wanted.arguments]
    sys.stdin = os.fdopen(0, closefd=False) if 0 in copies else None
    sys.stdout = os.fdopen(1, "w", closefd=False) if 1 in copies else None
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False) if 2 in copies else None
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    link.send(warmlink.TAKEN, socket.MSG_NOSIGNAL)
    status = _carry_out(wanted.arguments)
    _say_end(link, status)
    os._exit(status)


def _carry_out(arguments: list[str]) -> int:
    import atexit

    status: int = 70
    try:
        from xtool.cli.app import main

        status = main(arguments)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
    return status & 0xFF


def _say_end(link: socket.socket, status: int) -> None:
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        link.settimeout(_PATIENCE)
        link.send(warmlink.ENDED + bytes((status,)), socket.MSG_NOSIGNAL)


def _signals_from(link: socket.socket) -> None:
    """Do to ourselves what the caller was told, and hang up when it is gone."""

    def arrived(_number: int, _frame: object) -> None:
        try:
            told = link.recv(64, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            told = b""
        if not told:
            signal.signal(signal.SIGCONT, signal.SIG_DFL)
            told = bytes((signal.SIGHUP,))
        for number in told:
            _strike(link, number)

    signal.signal(signal.SIGCONT, arrived)
    link.setblocking(False)
    fcntl.fcntl(link, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(link, fcntl.F_SETSIG, signal.SIGCONT)
    fcntl.fcntl(link, fcntl.F_SETFL, fcntl.fcntl(link, fcntl.F_GETFL) | os.O_ASYNC)
    arrived(signal.SIGCONT, None)  # what came before


def _strike(link: socket.socket, number: int) -> None:
    """As the kernel would: a terminal's signals go to all of a job."""
    if number == signal.SIGTSTP:
        os.killpg(0, signal.SIGSTOP)
    elif number == signal.SIGCONT:
        os.killpg(0, number)  # it woke us, and shall the others
    elif number in (signal.SIGQUIT, signal.SIGUSR1) and signal.getsignal(number) == signal.SIG_DFL:
        _say_end(link, 128 + number)
        os.killpg(0, number)
    elif number in (signal.SIGINT, signal.SIGWINCH, signal.SIGQUIT):
        os.killpg(0, number)
    elif number in warmlink.PASSED_ON:
        os.kill(os.getpid(), number)
