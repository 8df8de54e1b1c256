"""A guest's console as the collection uses it: real shells on real terminals, with a terminal's habits."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pids import ends

ROOT = Path(__file__).parents[2]
pytest.importorskip("ansible")

BUSYBOX = shutil.which("busybox") or pytest.skip("busybox is not installed", allow_module_level=True)
SHELLS = {"busybox": [BUSYBOX, "sh"], "bash": ["bash", "--norc"], "dash": ["dash", "-i"]}
#: A terminal of its own for a program, its bytes on standard input and output: what ``xtool console`` is.
TERMINAL = [sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"]
LOGIN = """
printf 'old words\\nguest login: ops\\nPassword: \\n'; sleep 0.1
while printf 'guest login: '; read -r user; do
    [ "$user" ] || continue
    printf 'Password: '; stty -echo; read -r word; stty echo; echo
    [ "$user/$word" = ops/secret ] && { echo "Welcome"; PS1='$ ' sh -i; continue; }
    echo 'Login incorrect'
done
"""


@pytest.fixture(scope="module", autouse=True)
def importable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The collection under the name ansible gives it."""
    folder = tmp_path_factory.mktemp("collections")
    (folder / "ansible_collections/xtool").mkdir(parents=True)
    (folder / "ansible_collections/xtool/xen").symlink_to(ROOT / "ansible")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    for name in [name for name in sys.modules if name.startswith("ansible_collections")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells of this machine answer at once."""
    utils = "ansible_collections.xtool.xen.plugins.module_utils"
    monkeypatch.setattr(f"{utils}.console._CHATTER", 0.5)
    monkeypatch.setattr(f"{utils}.console._QUIET", 0.1)
    monkeypatch.setattr(f"{utils}.shell._SILENCE", 1.0)


def console(*argv: str, timeout: float = 20) -> Any:
    from ansible_collections.xtool.xen.plugins.module_utils.console import Console

    return Console([*TERMINAL, *argv], timeout)


def shell(*argv: str, user: str | None = None, password: str | None = None, timeout: float = 20) -> Any:
    from ansible_collections.xtool.xen.plugins.module_utils.shell import Shell

    return Shell(console(*argv, timeout=timeout), user, password)


def failing(text: str) -> Any:
    from ansible_collections.xtool.xen.plugins.module_utils.console import ConsoleError

    return pytest.raises(ConsoleError, match=text)


# --- commands -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SHELLS)
def test_what_commands_print_and_end_with(name: str, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(20_000)
    there = tmp_path / "a file's name"
    with shell(*SHELLS[name]) as guest:
        assert guest.run("echo out; echo err >&2; exit 127") == (127, b"out\n", b"err\n")
        assert guest.run("printf 'no end of line'; false") == (1, b"no end of line", b"")
        assert guest.run("cat", data) == (0, data, b"")
        assert guest.run("read -r word") == (1, b"", b"")  # no input is no terminal
        guest.put(data, str(there))
        assert there.read_bytes() == data and there.stat().st_mode & 0o777 == 0o600
        assert guest.get(str(there)) == data
        guest.put(b"", str(there))
        assert guest.get(str(there)) == b""
        folder = guest.run("dirname $0").stdout.decode().strip()
        assert Path(folder).is_dir()
        with failing("there is no file /no/such/file"):
            guest.get("/no/such/file")
        with failing("did not arrive whole"):
            guest.put(b"x", "/no/such/folder/file")
        assert guest.run("true").rc == 0  # and the shell is as it was
    assert not Path(folder).exists()


def test_what_else_is_printed_does_no_harm() -> None:
    """As a kernel prints its messages into whatever a program prints."""
    noise = "while sleep 0.02; do echo '[ 12.345678] eth0: link is up' >/dev/tty; done & exec busybox sh"
    data = random.Random(4).randbytes(3000)
    with shell("sh", "-c", noise) as guest:
        for _ in range(5):
            assert guest.run("cat; exit 3", data) == (3, data, b"")


def test_a_command_that_does_not_end_is_ended() -> None:
    """The console's shell answers afterwards, with its echo, and nothing of ours is left."""
    with console("sh", "-c", "PS1='# ' busybox sh") as line:
        from ansible_collections.xtool.xen.plugins.module_utils.shell import Shell

        guest = Shell(line)
        guest.open()
        with failing("in time"):
            guest.run("echo pid $$ >$0.pid; cat /dev/zero >/dev/null; echo never", timeout=0.5)
        [pid] = Path(guest._folder).glob("*.pid")
        number = int(pid.read_text().split()[1])
        guest._leave()
        assert not Path(guest._folder).exists()
        assert ends(number)
        line.settle()
        line.send(b"echo a''b\n")
        assert b"echo a''b" in line.wait_for("ab")


def test_the_terminal_is_left_as_it_was() -> None:
    with console("sh", "-c", "PS1='# ' busybox sh") as line:
        from ansible_collections.xtool.xen.plugins.module_utils.shell import Shell

        guest = Shell(line)
        guest.open()
        assert guest.run("echo x").stdout == b"x\n"
        guest._leave()
        line.settle()
        line.send(b"echo a''b\n")
        assert b"echo a''b" in line.wait_for("ab")  # the echo is on again, and it is the outer shell


# --- logging in ---------------------------------------------------------------------------------------
def test_logging_in_and_out() -> None:
    with shell("sh", "-c", LOGIN, user="ops", password="secret") as guest:
        assert guest.run("echo in").stdout == b"in\n"


@pytest.mark.parametrize(
    ("user", "password", "said"),
    [
        (None, None, "it wants a login: give the user"),
        ("ops", None, "it wants a password for ops"),
        ("ops", "wrong", "the login of ops was refused"),
    ],
)
def test_logins_that_cannot_be(user: str | None, password: str | None, said: str) -> None:
    with failing(said), shell("sh", "-c", LOGIN, user=user, password=password):
        pass


def test_a_console_that_says_nothing_or_ends() -> None:
    with failing("no shell, and no login"), shell("sleep", "1000", timeout=1):
        pass
    with failing("it ended"), shell("sh", "-c", "exit 7"):
        pass
    with failing("cannot run /no/such/xtool"):
        from ansible_collections.xtool.xen.plugins.module_utils.console import Console

        Console(["/no/such/xtool"], 1)


# --- waiting ------------------------------------------------------------------------------------------
def test_waiting_for_words() -> None:
    talk = "echo one; echo two three; printf 'go on? '; read -r word; echo got $word; cat"
    with console("sh", "-c", talk) as line:
        assert line.wait_for("two*ee").endswith(b"two three")
        line.wait_for("go on?")
        line.send(b"yes\n")
        line.wait_for("got yes")
        with failing("it did not print 'never'"):
            line.wait_for("never", 0.2)


@pytest.mark.parametrize(
    ("pattern", "text", "end"),
    [
        ("b", b"abc", 2),
        ("a*c", b"a\nc", -1),
        ("a*c", b"a\nabc d", 5),
        ("a*b*", b"xaxbx", 4),
        ("(", b"((", 1),
        ("", b"x", 0),
    ],
)
def test_a_pattern_is_found_within_a_line(pattern: str, text: bytes, end: int) -> None:
    from ansible_collections.xtool.xen.plugins.module_utils.console import find_line, pieces

    assert find_line(pieces(pattern), text) == end


def test_a_guest_that_prints_without_end_is_refused() -> None:
    with console("sh", "-c", "yes") as line, failing("far more than it was asked for"):
        line.take_until(b"mark", 1 << 20)
    with console("sh", "-c", "yes") as line, failing("it did not print"):
        line.wait_for("never", 0.5)
    assert len(line.pending) <= 256 << 10
