"""Completion in real shells: keys typed into an interactive one, and what it then runs."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import pytest

from xtool.cli import app, completion, names
from xtool.cli.manual import verbs

#: An xtool that knows two domains and writes down what else it is asked. The first line: who asked, for -H.
STUB = """#!/bin/sh
host=
if [ "$1" = -H ]; then host=$2; shift 2; fi
case "$1 $2 $3" in
"__complete domains "*) [ "$host" = lab ] && echo inside || printf '%s\\n' web-one db ;;
"__complete vdevs db") echo xvdz ;;
"__complete devices db") echo 00:16:3e:00:00:07 ;;
__complete*) exit 1 ;;
*)
    for word in ${host:+-H} $host "$@"; do printf '%s\\n' "$word"; done > "$XTOOL_LOG.new"
    mv "$XTOOL_LOG.new" "$XTOOL_LOG"
    ;;
esac
"""
START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
READY = {
    "bash": "bind 'set bell-style none'; bind 'set enable-bracketed-paste off'; source {script}; "
    "PS1='REA''DY> '",
    "zsh": "autoload -U compinit; compinit -u -D; source {script}; unsetopt prompt_sp zle_bracketed_paste; "
    "unset zle_bracketed_paste; PS1='REA''DY> '",
    "fish": "source {script}; function fish_prompt; echo -n 'REA''DY> '; end",
}


class Shell:
    """An interactive shell on a terminal of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.log = folder / "asked"
        (folder / "bin").mkdir()
        stub = folder / "bin/xtool"
        stub.write_text(STUB)
        stub.chmod(0o755)
        script = folder / f"completion.{name}"
        script.write_text(completion.script(name) + "\n")
        (folder / "dir").mkdir()
        (folder / "dir/guest.yaml").write_text("")
        environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TERM": "dumb" if name != "fish" else "xterm",
            "XTOOL_LOG": str(self.log),
            "LC_ALL": "C.UTF-8",
        }
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(  # with the terminal as its own: fish wants to control one
            START[name], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=folder / "dir",
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""
        if name == "fish":
            self._wait(lambda: bool(self.seen))  # it answers no keys before its first prompt
        self.send(READY[name].format(script=script) + "\r")
        self._wait(lambda: "READY> " in self.seen)

    def send(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def _wait(self, done: Callable[[], bool], deadline: float = 60.0) -> None:
        end = monotonic() + deadline
        while not done():
            assert monotonic() < end, f"seen: {self.seen!r}"
            if select.select([self._ours], [], [], 0.02)[0]:
                data = os.read(self._ours, 65536).decode("utf-8", "replace")
                self.seen += data
                if "\x1b[c" in data or "\x1b[0c" in data:  # fish asks what terminal this is
                    self.send("\x1b[?6c")

    def runs(self, typed: str) -> list[str]:
        """The words the shell calls xtool with after these keys and Enter."""
        self.log.unlink(missing_ok=True)
        before = len(self.seen)
        # Each Tab's work is waited for: the shell would take what follows for its own keys.
        for part in re.split("(\t)", typed):
            self.send(part)
            if part == "\t":
                self._settle()
        self.send("\r")
        self._wait(self.log.exists)
        self._wait(lambda: "READY> " in self.seen[before:])
        return self.log.read_text().splitlines()

    def _settle(self) -> None:
        """Until nothing has been drawn for a while."""
        quiet = monotonic() + 0.4
        while monotonic() < quiet:
            if select.select([self._ours], [], [], 0.05)[0]:
                self.seen += os.read(self._ours, 65536).decode("utf-8", "replace")
                quiet = monotonic() + 0.4

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"no {name} here"))
        for name in completion.SHELLS
    ],
)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    started = Shell(request.param, tmp_path_factory.mktemp(request.param))
    yield started
    started.close()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("xtool vcpu-l\t", ["vcpu-list"]),
        ("xtool shutdown --forc\t w\t", ["shutdown", "--force", "web-one"]),
        ("xtool shutdown web-one d\t", ["shutdown", "web-one", "db"]),
        ("xtool list -o ya\t", ["list", "-o", "yaml"]),
        ("xtool block-detach db xv\t", ["block-detach", "db", "xvdz"]),
        ("xtool check gue\t", ["check", "guest.yaml"]),
        ("xtool set db on_soft\tx", ["set", "db", "on_soft_reset=x"]),
        ("xtool doctor snap\t", ["doctor", "snapshot"]),
        ("xtool -H lab pause i\t", ["-H", "lab", "pause", "inside"]),
        ("xtool completion zs\t", ["completion", "zsh"]),
    ],
)
def test_a_tab_completes(shell: Shell, typed: str, words: list[str]) -> None:
    assert shell.runs(typed) == words


@pytest.mark.parametrize("name", completion.SHELLS)
def test_every_verb_and_option_is_in_the_script(name: str) -> None:
    text = completion.script(name)
    for one in verbs():
        assert one.words[-1] in text
        for option in one.options:
            for word in option.names:
                assert (word if name != "fish" else word.lstrip("-")) in text
    if checker := shutil.which(name):
        done = subprocess.run([checker, "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_names_cost_next_to_no_imports(tmp_path: Path) -> None:
    code = (
        "import sys; from xtool.cli.app import main; code = main(['__complete', 'domains']);"
        "heavy = [m for m in ('typer', 'rich', 'pydantic', 'yaml', 'asyncio', 'jinja2') if m in sys.modules];"
        "print(code, heavy)"
    )
    environment = {**os.environ, "XTOOL_CONNECT": "fake:", "XTOOL_RUN_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "0 []", done


def test_names_that_cannot_be_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xtool.cli.client._opener", None)
    monkeypatch.setenv("XTOOL_CONNECT", "nowhere:")
    assert names.main(["domains"]) == 1
    assert app.main(["__complete", "vdevs", "x"]) == 1
    assert capsys.readouterr() == ("", "")


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
