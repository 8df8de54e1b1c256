"""The zygote and the thin command line, as real processes: what they carry out is the command line itself."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xtool import warmlink

ROOT = Path(__file__).resolve().parents[2]
THIN = "import sys; sys.path[:0] = [{root!r}]; from xtool.cli.entry import main; sys.exit(main())"

#: Verbs that show what a command line sees of its surroundings, in place of the verb "list".
PROBE = '''
import os, signal, sys, time
import typer
from typing import Annotated
from xtool.cli import query

def probe(argument: Annotated[str, typer.Argument()] = "") -> int:
    """What a test asks for."""
    word, _, rest = argument.partition(":")
    if word == "pid":
        print(os.getpid(), os.getppid())
    elif word == "seen":
        mask = os.umask(0)
        print(os.getcwd(), mask, os.environ.get("PROBE"), len(os.environb.get(b"RAW", b"")), sys.argv[1:])
    elif word == "code":
        return int(rest)
    elif word == "raise":
        raise ValueError(rest)
    elif word == "stdin":
        print(sys.stdin.read() if sys.stdin else "no stdin")
    elif word == "size":
        sized = []
        signal.signal(signal.SIGWINCH, lambda *_: sized.append(os.get_terminal_size(0)))
        print("ready", flush=True)
        while not sized:
            time.sleep(0.01)
        print(sized[0].columns, sized[0].lines)
    elif word == "flood":
        while True:
            print("y" * 1000, flush=True)
    elif word == "wait":
        signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"term\\n"), sys.exit(143)))
        signal.signal(signal.SIGHUP, lambda *_: (open(rest, "w").write("hup"), sys.exit(129)))
        print("ready", os.getpid(), flush=True)
        while True:
            time.sleep(0.01)
    elif word == "tick":
        while True:
            print("tick", flush=True)
            time.sleep(0.02)
    elif word == "closed":
        with open(rest, "w") as file:
            print(sys.stdin is None, sys.stdout is None, sys.stderr is None, file=file)
    elif word == "tty":
        print(sys.stdin.isatty(), sys.stdout.isatty(), flush=True)
        print("got", input(), flush=True)
    return 0

query.list_domains = probe
'''


class Host:
    """Folders of its own, and a copy of the package: a test may change the code."""

    def __init__(self, tmp_path: Path) -> None:
        self.run_dir = tmp_path / "run"
        self.environment = {
            **os.environ,
            "XTOOL_RUN_DIR": str(self.run_dir),
            "XTOOL_LOG_DIR": str(tmp_path / "log"),
            "PYTHONPATH": str(ROOT),
            "PROBE": "probe",
        }
        self.zygotes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, package: Path = ROOT, probe: str = PROBE) -> subprocess.Popen[bytes]:
        program = (
            f"{probe}\nfrom xtool.daemon.zygote import main\nsys.argv[:] = ['zygote', *{arguments!r}]\nmain()"
        )
        environment = {**self.environment, "PYTHONPATH": str(package)}
        zygote = subprocess.Popen([sys.executable, "-c", program], env=environment, cwd="/")
        self.zygotes.append(zygote)
        until((self.run_dir / "zygote.sock").exists, 60)
        return zygote

    def thin(self, *arguments: str, package: Path = ROOT, **keys: Any) -> subprocess.Popen[bytes]:
        environment = {**self.environment, "PYTHONPATH": str(package), **keys.pop("environment", {})}
        keys = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **keys}
        program = THIN.format(root=str(package))
        return subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, **keys)

    def run(self, *arguments: str, **keys: Any) -> tuple[int, str, str]:
        process = self.thin(*arguments, **keys)
        out, err = process.communicate(timeout=60)
        return process.returncode, (out or b"").decode(), (err or b"").decode()


def until(check: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    for zygote in host.zygotes:
        zygote.kill()
        zygote.wait()


@pytest.fixture
def host(plain: Host) -> Host:
    plain.start()
    return plain


def test_it_is_carried_out_by_a_child_of_the_zygote(host: Host) -> None:
    code, out, _ = host.run("list", "pid")
    pid, parent = map(int, out.split())
    assert (code, parent) == (0, host.zygotes[0].pid) and pid != parent


def test_asked_not_to_or_without_a_zygote_it_is_carried_out_here(host: Host) -> None:
    for environment in ({"XTOOL_WARM": "0"}, {"XTOOL_RUN_DIR": "/nonexistent"}):
        code, out, _ = host.run("--version", environment=environment)
        assert (code, out) == (0, "xtool 0.1.0\n")
    host.zygotes[0].kill()
    host.zygotes[0].wait()
    assert (host.run_dir / "zygote.sock").exists()  # it could not clean up
    assert host.run("--version")[:2] == (0, "xtool 0.1.0\n")


def test_folder_umask_environment_and_arguments_are_the_callers(host: Host, tmp_path: Path) -> None:
    here = tmp_path / "a folder"
    here.mkdir()
    command = ["sh", "-c", f"umask 027; cd '{here}'; exec \"$@\"", "sh", sys.executable, "-c"]
    command += [THIN.format(root=str(ROOT)), "list", "seen"]
    environment = {os.fsencode(k): os.fsencode(v) for k, v in host.environment.items()}
    out = subprocess.run(
        command, env={**environment, b"RAW": b"\xff\n\xfe"}, capture_output=True, check=True, timeout=60
    ).stdout.decode()
    assert out == f"{here} {0o027} probe 3 ['list', 'seen']\n"
    # A folder that is gone has no path any more.
    here.rmdir()


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_exit_codes(host: Host, code: int) -> None:
    assert host.run("list", f"code:{code}")[0] == code


def test_errors_are_told_as_without_it(host: Host) -> None:
    for line in (["lst"], ["list", "raise:oops"], ["-v", "list", "raise:oops"], ["list", "--no"]):
        code, out, err = host.run(*line)
        assert code in (1, 2, 70) and out == "" and err, line
    assert "ValueError: oops" in host.run("-v", "list", "raise:oops")[2]


def test_standard_input_reaches_it(host: Host, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with open(tmp_path / "text") as file:
        assert host.run("list", "stdin", stdin=file)[1] == "hello\n"


def test_closed_files_are_closed_over_there(host: Host, tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", THIN.format(root=str(ROOT))]
    subprocess.run(
        [*command, "list", f"closed:{tmp_path}/seen"], env=host.environment, check=True, timeout=60
    )
    assert (tmp_path / "seen").read_text() == "True True True\n"


def test_a_reader_that_goes_away(host: Host) -> None:
    process = host.thin("list", "flood")
    assert process.stdout and process.stdout.read(100)
    process.stdout.close()
    assert process.wait(20) == 141


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, b""), (signal.SIGTERM, 143, b"term\n"), (signal.SIGQUIT, 131, b"")],
)
def test_signals_are_passed_on(host: Host, tmp_path: Path, number: int, code: int, said: bytes) -> None:
    process = host.thin("list", f"wait:{tmp_path}/hup")
    assert process.stdout and process.stdout.readline().startswith(b"ready")
    process.send_signal(number)
    assert process.wait(20) == code
    assert process.stdout.read() == said


def test_a_caller_that_is_killed_takes_it_along(host: Host, tmp_path: Path) -> None:
    process = host.thin("list", f"wait:{tmp_path}/hup")
    assert process.stdout and process.stdout.readline().startswith(b"ready")
    process.kill()
    until((tmp_path / "hup").exists)


def test_a_child_that_is_killed(host: Host, tmp_path: Path) -> None:
    process = host.thin("list", f"wait:{tmp_path}/hup")
    assert process.stdout and process.stderr
    pid = int(process.stdout.readline().split()[1])
    os.kill(pid, signal.SIGKILL)
    assert process.wait(20) == 137 and b"was killed" in process.stderr.read()


def test_a_zygote_that_is_killed_harms_nothing(host: Host, tmp_path: Path) -> None:
    """What is under way goes on, hears signals, and its status arrives."""
    process = host.thin("list", f"wait:{tmp_path}/hup")
    assert process.stdout and process.stdout.readline().startswith(b"ready")
    host.zygotes[0].kill()
    host.zygotes[0].wait()
    process.terminate()
    assert process.wait(20) == 143 and process.stdout.read() == b"term\n"
    host.start()  # a socket left behind is no obstacle
    assert host.run("list", "code:5")[0] == 5


def test_stopping_and_going_on(host: Host) -> None:
    """Ctrl-Z: nothing is printed while the caller is stopped."""
    process = host.thin("list", "tick")
    assert process.stdout and process.stdout.readline() == b"tick\n"
    process.send_signal(signal.SIGTSTP)
    until(lambda: b"T (stopped)" in Path(f"/proc/{process.pid}/status").read_bytes())
    time.sleep(0.2)  # what it printed before
    os.set_blocking(process.stdout.fileno(), False)
    while process.stdout.read():
        pass
    assert not select.select([process.stdout], [], [], 0.3)[0]
    process.send_signal(signal.SIGCONT)
    assert select.select([process.stdout], [], [], 10)[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def _terminal(host: Host, *arguments: str) -> tuple[int, int]:
    """A thin command line on a terminal of its own; its pid and the terminal's master."""
    pid, master = pty.fork()
    if pid == 0:
        os.execve(
            sys.executable, [sys.executable, "-c", THIN.format(root=str(ROOT)), *arguments], host.environment
        )
    return pid, master


def _read_until(master: int, text: bytes) -> bytes:
    seen = b""
    end = time.monotonic() + 30
    while text not in seen:
        assert time.monotonic() < end, seen
        if select.select([master], [], [], 1)[0]:
            seen += os.read(master, 4096)
    return seen


def test_a_terminal(host: Host) -> None:
    pid, master = _terminal(host, "list", "tty")
    _read_until(master, b"True True")
    os.write(master, b"word\n")
    _read_until(master, b"got word")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(master)


def test_its_size_changes(host: Host) -> None:
    pid, master = _terminal(host, "list", "size")
    _read_until(master, b"ready")
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 33, 111, 0, 0))
    _read_until(master, b"111 33")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(master)


def test_ctrl_c_on_the_terminal(host: Host) -> None:
    pid, master = _terminal(host, "list", "tick")
    _read_until(master, b"tick")
    os.write(master, b"\x03")
    _read_until(master, b"interrupted")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(master)


def test_changed_code_makes_it_step_aside(plain: Host, tmp_path: Path) -> None:
    package = tmp_path / "installed"
    package.mkdir()
    subprocess.run(["cp", "-r", str(ROOT / "xtool"), str(package)], check=True)
    zygote = plain.start(package=package)
    assert plain.run("list", "code:3", package=package)[0] == 3
    # Another installation is not this one's to carry out, and does not end it.
    assert plain.run("--version", package=ROOT)[1] == "xtool 0.1.0\n" and zygote.poll() is None
    query = package / "xtool" / "cli" / "query.py"
    query.write_text(query.read_text() + "\n# changed\n")
    assert zygote.wait(20) == 0 and not (plain.run_dir / "zygote.sock").exists()


def test_there_is_one(host: Host) -> None:
    first = (host.run_dir / "zygote.sock").stat().st_ino
    second = host.start()
    assert second.wait(60) == 0
    assert (host.run_dir / "zygote.sock").stat().st_ino == first
    assert host.run("list", "code:4")[0] == 4


def test_it_ends_when_idle(plain: Host) -> None:
    assert plain.start("--idle", "0.2").wait(20) == 0
    assert not (plain.run_dir / "zygote.sock").exists()


def test_however_long_it_may_be_idle(plain: Host) -> None:
    zygote = plain.start("--idle", "1e9")
    assert plain.run("list", "code:3")[0] == 3 and zygote.poll() is None


def test_not_while_a_domain_runs(plain: Host) -> None:
    domains = plain.run_dir / "domains"
    domains.mkdir(parents=True)
    (domains / "x.json").write_text("{}")
    zygote = plain.start("--idle", "0.2")
    with pytest.raises(subprocess.TimeoutExpired):
        zygote.wait(1.5)
    (domains / "x.json").unlink()
    assert zygote.wait(20) == 0


@pytest.mark.parametrize(
    "data", [b"", b"XT", b"GET / HTTP/1.1\r\n\r\n", b"XT1C\x07\xff\xff\xff\xff", b"XT1C\0\4\0\0\0abcd"]
)
def test_nonsense_on_its_socket(host: Host, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(host.run_dir / "zygote.sock"))
        link.sendall(data)
        link.shutdown(socket.SHUT_WR)
        link.settimeout(20)
        try:
            assert link.recv(1) == b""
        except ConnectionResetError:
            pass
    assert host.run("list", "code:6")[0] == 6


def test_one_that_says_nothing_holds_nobody_up(host: Host) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for link in silent:
        link.connect(str(host.run_dir / "zygote.sock"))
    assert host.run("list", "code:6")[0] == 6
    for link in silent:
        link.close()


def test_many_at_once(host: Host) -> None:
    started = [host.thin("list", f"code:{number}") for number in range(30)]
    assert [process.wait(60) for process in started] == list(range(30))
    for process in started:
        process.communicate()
    until(lambda: not _children(host.zygotes[0].pid))


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_the_thin_start_imports_next_to_nothing() -> None:
    program = (
        "import sys; before = set(sys.modules); from xtool.cli import entry; "
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.split() == ["xtool", "xtool.cli", "xtool.cli.entry", "xtool.warmlink"]


def test_its_own_numbers_are_the_kernels() -> None:
    names = ("INT", "TERM", "HUP", "QUIT", "USR1", "WINCH")
    assert {getattr(signal, f"SIG{name}") for name in names} == set(warmlink.PASSED_ON)
    assert (warmlink._TSTP, warmlink._CONT, warmlink._STOP) == (
        signal.SIGTSTP,
        signal.SIGCONT,
        signal.SIGSTOP,
    )
