"""A warm xtool in the lab: one process that has imported everything, and forks for each command line.

An emulated CPU imports twenty times slower than a real one: a cold ``xtool create`` spends most of its ten
seconds on that. The lab's ``xtool`` therefore hands its arguments, environment, folder and three standard
files to this server over a Unix socket. The server forks, the child runs the command line as if it had been
started there, and the answer is its pid, then its exit status. Where no server answers, the command line is
carried out in the caller's own process. ``XTOOL_WARM=0`` asks for that.

Facts: descriptors travel as SCM_RIGHTS; a process may read and set a terminal that is not its controlling
one, but the terminal's signals go to the caller, which passes them on; fork() keeps what was imported, so
the server must be started anew whenever the tree changes.
"""

from __future__ import annotations

import os
import sys

from xtool.lab.warmup import PID_FILE, SOCKET

_MODULES = (
    "encodings.utf_8_sig",
    "typer",
    "typer._click.decorators",
    "yaml",
    "xtool.cli.app",
    "xtool.cli.attach",
    "xtool.cli.create",
    "xtool.cli.doctor",
    "xtool.cli.lifecycle",
    "xtool.cli.progress",
    "xtool.cli.query",
    "xtool.cli.report",
    "xtool.config.load",
    "xtool.config.model",
    "xtool.toolstack.local",
    "xtool.toolstack.create",
    "xtool.toolstack.destroy",
    "xtool.toolstack.lifecycle",
    "xtool.toolstack.query",
    "xtool.toolstack.keeper",
    "xtool.builder.build",
    "xtool.devicemodel.process",
    "xtool.hypercall.privcmd",
    "xtool.xenstore.client",
)
_STANDARD_FILES = 3


def ask() -> int:
    """Have ``sys.argv`` carried out by the server, or here if there is none; returns the exit status."""
    if os.environ.get("XTOOL_WARM") != "0":
        import _socket  # the module "socket" around it takes as long to import as all of this takes to run

        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        while True:
            try:
                connection.connect(SOCKET)
            except OSError:
                if not _importing():
                    connection.close()
                    break
                import time

                time.sleep(0.1)
            else:
                return _handed_over(connection)
    from xtool.cli.app import main

    return main()


def _importing() -> bool:
    """Whether a server is on its way up: waiting for it is faster than doing the same work beside it."""
    try:
        with open(PID_FILE) as file:
            os.kill(int(file.read()), 0)
    except (OSError, ValueError):
        return False
    return not os.path.exists(SOCKET)


def _handed_over(connection: object) -> int:
    import _socket
    import marshal
    import signal

    assert isinstance(connection, _socket.socket)
    request = marshal.dumps((sys.argv[1:], dict(os.environ), os.getcwd()))
    fds = (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + (2).to_bytes(4, "little")
    length = len(request).to_bytes(4, "little")
    connection.sendmsg([length], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
    connection.sendall(request)
    pid = int.from_bytes(_exactly(connection, 4), "little")

    def pass_on(number: int, _frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    return int.from_bytes(_exactly(connection, 4), "little")


def _exactly(connection: object, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))  # type: ignore[attr-defined]
        if not part:
            raise SystemExit("the warm xtool of this lab died; XTOOL_WARM=0 does without it")
        data += part
    return data


def serve() -> None:
    """Import, listen, fork for each caller. SIGTERM ends it once nobody is served any more."""
    import fcntl
    import gc
    import selectors
    import signal
    import socket
    from importlib import import_module

    for name in _MODULES:
        import_module(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = f"{SOCKET}.{os.getpid()}"
    listener.bind(temporary)
    os.chmod(temporary, 0o600)
    listener.listen(64)
    os.rename(temporary, SOCKET)
    gc.collect()
    gc.freeze()  # children share what is there; collecting it would copy its pages
    awake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    leaving = False

    def leave(_number: int, _frame: object) -> None:
        nonlocal leaving
        leaving = True

    signal.signal(signal.SIGTERM, leave)
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(awake, selectors.EVENT_READ)
        while children or not leaving:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    connection.settimeout(10)
                    pid = _fork(connection)
                    if pid is None:
                        connection.close()
                        continue
                    children[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                elif key.fileobj == awake:
                    os.read(awake, 4096)
                else:  # the caller went away (it says nothing more): so goes what it asked for
                    selector.unregister(key.fileobj)
                    if key.data in children:
                        os.kill(key.data, signal.SIGHUP)
            for pid, status in _ended(set(children)):
                connection = children.pop(pid)
                fcntl.fcntl(connection, fcntl.F_SETFL, os.O_NONBLOCK)
                try:
                    connection.sendall(status.to_bytes(4, "little"))
                    selector.unregister(connection)
                except (OSError, KeyError):
                    pass
                connection.close()


def _fork(connection: object) -> int | None:
    """Start what a caller asks for; its pid, or None if it asked for nothing."""
    import marshal
    import socket

    assert isinstance(connection, socket.socket)
    try:
        head, fds, _, _ = socket.recv_fds(connection, 4, _STANDARD_FILES)
        if len(head) < 4 or len(fds) != _STANDARD_FILES:
            return None
        arguments, environment, folder = marshal.loads(_exactly(connection, int.from_bytes(head, "little")))
    except (OSError, SystemExit, ValueError, EOFError):
        return None
    pid = os.fork()
    if pid == 0:
        _child(fds, arguments, environment, folder)
    for fd in fds:
        os.close(fd)
    try:
        connection.sendall(pid.to_bytes(4, "little"))
    except OSError:
        pass  # gone already: the selector will say so
    return pid


def _child(fds: list[int], arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Become the command line. Does not return."""
    import atexit
    import signal

    status: int = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os.closerange(_STANDARD_FILES, 1024)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv[1:] = arguments
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
        from xtool.cli.app import main

        status = main(arguments)
        atexit._run_exitfuncs()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status & 0xFF)


def _ended(children: set[int]) -> list[tuple[int, int]]:
    """``(pid, status as a shell counts it)`` of those that ended."""
    found = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        if pid in children:
            code = os.waitstatus_to_exitcode(status)
            found.append((pid, code if code >= 0 else 128 - code))
    return found


if __name__ == "__main__":
    serve()
