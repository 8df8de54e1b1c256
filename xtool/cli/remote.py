"""``-H``: carry a verb out on another host, as if it were this one.

The target is ``lab``, ``lab:NAME`` or ``ssh://[user@]host[:port]``. If a daemon runs there, verbs that need
nothing else of that host use its socket, forwarded (``forward``). Else the verb runs there by ssh: its input,
output and exit status are ours. Verbs that read a domain file read it here; ``remotefiles`` sends what the
other host lacks.

Facts about OpenSSH: with a terminal there (``-t``) stdout and stderr become one stream, so one is asked
for only when all three of ours are terminals, or the verb is a console; without one a dead client does not
end the remote command, so signals are carried over on a second session; 255 is ssh's own failure.
"""

from __future__ import annotations

import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from xtool.cli.remoteargs import FILE_VERBS, HERE_OPTIONS, split_file, split_trace, take_options
from xtool.errors import HostError, UsageError

if TYPE_CHECKING:
    from xtool.apply.described import Described

_SSH_FAILED = 255
_NOT_FOUND = 127


@dataclass(frozen=True)
class Remote:
    """A host reached by ssh. ``held`` are files known to be there: content hash -> path."""

    name: str
    options: list[str]
    address: str
    held: dict[str, str] = field(default_factory=dict)

    def argv(self, command: str, *flags: str) -> list[str]:
        """``ssh`` running ``command``, a line for the shell there."""
        return ["ssh", *self.options, *flags, "--", self.address, command]


@contextmanager
def open_remote(target: str, *, several: bool = False) -> Iterator[Remote]:
    """The host behind ``target``; ``several`` when more than one command will follow.

    Raises ``UsageError`` for a target that is none, ``LabError`` for a lab that is not up.
    """
    if target == "lab" or target.startswith("lab:"):
        yield _lab(target.partition(":")[2] or "default")
        return
    address, port = parse_ssh(target)
    options = ["-p", port] if port else []
    if not several:
        yield Remote(target, options, address)
        return
    with tempfile.TemporaryDirectory(prefix="xtool-ssh-") as folder, ExitStack() as stack:
        shared = [*options, "-o", f"ControlPath={folder}/s"]
        master = [
            "ssh",
            *shared,
            "-o",
            "ControlMaster=yes",
            "-o",
            "ControlPersist=yes",
            "-fNT",
            "--",
            address,
        ]
        # It asks for a password on the terminal if it must; its stdout stays with it, so it gets none.
        if subprocess.run(
            master, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
        ).returncode:
            raise HostError(
                f"cannot reach {target} by ssh", hint=f"try: ssh {shlex.join([*options, address])}"
            )
        close = ["ssh", *shared, "-O", "exit", "--", address]
        stack.callback(subprocess.run, close, stderr=subprocess.DEVNULL, check=False)
        yield Remote(target, [*shared, "-o", "ControlMaster=no"], address)


def parse_ssh(target: str) -> tuple[str, str]:
    """``ssh://user@host:22`` -> (``user@host``, ``22``); no port is "". Raises ``UsageError``."""
    from urllib.parse import urlsplit

    hint = "a target is lab, lab:NAME or ssh://user@host[:port]"
    try:
        parts = urlsplit(target)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"-H {target}: {error}", hint=hint) from None
    extra = parts.path.strip("/") or parts.query or parts.fragment or parts.password
    if parts.scheme != "ssh" or not parts.hostname or extra:
        raise UsageError(f"-H {target} names no host", hint=hint)
    host = parts.netloc.rpartition("@")[2]
    host = parts.hostname if port is not None or host.startswith("[") else host
    if host.startswith("-") or (parts.username or "").startswith("-"):
        raise UsageError(f"-H {target} names no host", hint=hint)
    return (f"{parts.username}@{host}" if parts.username else host), str(port or "")


def _lab(name: str) -> Remote:
    from xtool.lab.machine import Lab
    from xtool.lab.sync import TARGET

    lab = Lab(name)
    record = lab.require_running()
    target = lab.ssh(record)
    target.open_master()
    # What "xtool lab sync" brought is there under its own path: it need not be sent again.
    held = {digest.removesuffix("x"): f"{TARGET}/{path}" for path, digest in record.tree.items()}
    options = [*target.options(), "-o", "ControlMaster=no"]
    return Remote(f"the lab {name}" if name != "default" else "the lab", options, "root@127.0.0.1", held)


def run_remote(target: str, argv: list[str]) -> int:
    """Run ``xtool ARGV`` on ``target``; returns its exit status.

    Raises ``XtoolError`` when the target cannot be reached, has no xtool, or a file is on neither machine.
    """
    from xtool.cli import forward

    is_file_verb = bool(argv) and argv[0] in FILE_VERBS and not {"-h", "--help"} & set(argv)
    by_socket = bool(argv) and forward.wanted(argv)
    with open_remote(target, several=is_file_verb or by_socket) as remote:
        if argv[:1] == ["explain"]:
            return _here(remote, argv)
        if by_socket:
            with forward.forwarded(remote) as path:
                if path is not None:
                    return _over(remote, str(path), argv)
            if argv[0] in forward.HERE:
                return _with_a_daemon(remote, argv)
        if is_file_verb:
            argv = _with_file(remote, argv)
            argv, traces = split_trace(argv)
            try:
                return _run(remote, argv)
            finally:
                for there, here in traces:
                    _fetch(remote, there, here)
        return _run(remote, argv)


def _with_a_daemon(remote: Remote, argv: list[str]) -> int:
    """Start the daemon there, and carry the verb out by it. Raises ``HostError``."""
    from xtool.cli import forward

    print(f"starting the daemon of {remote.name}", file=sys.stderr)
    done = subprocess.run(
        remote.argv("xtool daemon run -b", "-T", "-n"), capture_output=True, text=True, check=False
    )
    if done.returncode in (_SSH_FAILED, _NOT_FOUND):
        raise _failed(remote, done.returncode)
    with forward.forwarded(remote) as path:
        if path is not None:
            return _over(remote, str(path), argv)
    said = done.stderr.strip().removeprefix("error: ")
    raise HostError(
        f"xtool {argv[0]} reads its files here and needs a daemon there; "
        + (f"it did not start: {said}" if done.returncode else "it runs, and does not answer this user"),
        hint="on that host: xtool daemon run" if done.returncode else "be root there, or in its group xtool",
    )


def _over(remote: Remote, path: str, argv: list[str]) -> int:
    """Carry the verb out here, by the daemon behind that socket."""
    from xtool.cli import client

    client.use(client.over(path), partial(_place, remote))
    try:
        return _here(remote, argv)
    finally:
        client.use(None)


def _place(remote: Remote, described: list[Described], send: bool) -> list[Described]:
    from xtool.cli.progress import progress
    from xtool.cli.remotefiles import place

    with progress() as listener:
        return place(remote, described, listener, send)


def _here(remote: Remote, argv: list[str]) -> int:
    """Carry the verb out here. If it reads domain files, with the defaults of that host."""
    from xtool.cli import app
    from xtool.cli.forward import HERE

    if argv[0] not in (*HERE, "explain") or {"-h", "--help"} & set(argv):
        return app.run_verb(argv[0], argv[1:])
    from xtool.cli.remotefiles import host_defaults
    from xtool.config.layers import defaults_of

    with defaults_of(remote.name, host_defaults(remote)):
        return app.run_verb(argv[0], argv[1:])


def _fetch(remote: Remote, there: str, here: str) -> None:
    """Bring a file of the other host's here, and remove it there."""
    done = subprocess.run(
        remote.argv(f"cat {there} 2>/dev/null; rm -f {there}", "-T", "-n"),
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.stdout:
        try:
            with open(here, "wb") as out:
                out.write(done.stdout)
        except OSError as error:
            raise HostError(f"cannot write {here}: {error.strerror}") from None


def _with_file(remote: Remote, argv: list[str]) -> list[str]:
    from xtool.cli.progress import progress
    from xtool.cli.remotefiles import send_domain

    here, argv = take_options(argv, HERE_OPTIONS)
    file, overrides, rest = split_file(argv)
    if file is None:
        raise UsageError(
            f"{argv[0]} wants a domain file", hint=f"as in: xtool -H lab {argv[0]} configs/pvh.yaml"
        )
    from xtool.config.load import Inputs

    inputs = Inputs(overrides, here["--vars-file"])
    only = here["--only"][-1] if here["--only"] else None
    with progress() as listener:
        path = send_domain(remote, file, inputs, listener, files=argv[0] == "create", only=only)
    return [rest[0], path, *rest[1:]]


def wants_terminal(argv: list[str], ttys: tuple[bool, bool, bool]) -> bool:
    """Whether the verb gets a terminal there; ``ttys`` says which of stdin, stdout, stderr are ones here."""
    console = argv[:1] == ["console"] or (argv[:1] == ["create"] and bool({"-c", "--console"} & set(argv)))
    return all(ttys) or (console and ttys[0] and ttys[1])


def _run(remote: Remote, argv: list[str]) -> int:
    ttys = (sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty())
    command = shlex.join(["xtool", *argv])
    if wants_terminal(argv, ttys):
        status = _run_with_terminal(remote, command)
    else:
        # A terminal as input of something that is no console stays for the next program in the pipe.
        status = run_process(remote, command, ["-n"] if ttys[0] else [])
    if status in (_SSH_FAILED, _NOT_FOUND):
        raise _failed(remote, status)
    return status


def _failed(remote: Remote, status: int) -> HostError:
    """The error for ssh's, or the shell's there, own exit status."""
    if status == _SSH_FAILED:
        return HostError(
            f"the connection to {remote.name} failed", hint="xtool lab status" if remote.held else None
        )
    return HostError(
        f"{remote.name} has no xtool to run", hint="install xtool there, in PATH of a non-interactive shell"
    )


def _run_with_terminal(remote: Remote, command: str) -> int:
    """Every key, Ctrl-C too, goes there; the terminal is as it was afterwards, whatever happened."""
    import termios

    before = termios.tcgetattr(0)
    sys.stdout.flush()
    sys.stderr.flush()
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(remote.argv(command, "-t", "-q"), check=False).returncode
    finally:
        signal.signal(signal.SIGINT, old)
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def run_process(remote: Remote, command: str, flags: list[str]) -> int:
    """Run a program without a terminal; signals that we get are sent on to its process. Returns its exit
    status, 255 when the connection failed."""
    # The inner shell leaves its process id and becomes the program; the outer one cleans up.
    return _run_piped(remote, lambda mark: f"sh -c {shlex.quote(f'echo $$ >{mark}; exec {command}')}", flags)


def run_group(remote: Remote, command: str) -> int:
    """The same for a command that starts others: signals go to all of them, as a terminal's would."""
    # What sshd starts is one process group. Its shell outlives the signals by a handler, which is its own.
    return _run_piped(remote, lambda mark: f"trap : INT TERM HUP; echo -$$ >{mark}; {command}", [])


def _run_piped(remote: Remote, script: Callable[[str], str], flags: list[str]) -> int:
    """``script`` is for the shell there, and writes whom to signal, as ``kill`` takes it, into the file whose
    name it is given."""
    mark = f"/tmp/xtool-remote-{secrets.token_hex(8)}"
    line = f"{script(mark)}; status=$?; rm -f {mark}; exit $status"
    sys.stdout.flush()
    sys.stderr.flush()
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    received: list[int] = []

    def apart() -> None:
        # ssh keeps ignoring what is ignored when it starts: a Ctrl-C reaches us alone.
        for number in caught:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        if len(received) > 2:  # the other side does not listen
            process.kill()
            return
        # It may come before the remote command has left its process id.
        wait = f"for i in 1 2 3 4 5 6 7 8 9 10; do test -s {mark} && break; sleep 0.5; done"
        kill = f"{wait}; read -r whom <{mark} && kill -{number} $whom"
        subprocess.Popen(
            remote.argv(kill, "-T", "-n", "-o", "BatchMode=yes"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    old: dict[signal.Signals, Any] = {}
    # A signal that comes while ssh starts waits until it can be sent on.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, caught)
    try:
        process = subprocess.Popen(remote.argv(line, "-T", *flags), preexec_fn=apart)
        for number in caught:
            if signal.getsignal(number) != signal.SIG_IGN:
                old[number] = signal.signal(number, forward)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = process.wait()
        return 128 + received[0] if received and status in (_SSH_FAILED, -signal.SIGKILL) else status
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
