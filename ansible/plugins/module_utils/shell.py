"""Commands, and files, in a POSIX shell behind a guest's console.

A console is a line that anybody prints to, the guest's kernel too, so nothing that comes over it is believed before it
is whole:

- What a command printed is kept in a file of the guest's and comes as base64 between two marks, with its SHA-256. If a
  kernel's message fell into it, it is asked for again. So is every answer that is not understood.
- What is sent goes as base64 in short lines, some at a time, each lot acknowledged: a terminal in canonical mode takes
  4095 bytes and drops the rest.

Facts about shells and terminals
--------------------------------
- A shell is interactive when its input and (bash, dash) standard error or (busybox) output are terminals. With both
  of these led elsewhere it has no prompt, no line editing and no echo of its own.
- The terminal itself echoes until ``stty -echo``. A mark is therefore typed in two pieces, which its echo has too,
  and printed as one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
import shlex
import time
from typing import NamedTuple

from ansible_collections.xtool.xen.plugins.module_utils.console import Console, ConsoleError, LateError

#: Bytes of base64 in a line, and lines before the guest acknowledges them: together below 4095 bytes.
_LINE, _LOT = 800, 4
#: The most that a file or a command's output may have, bytes.
SIZE_MAX = 16 << 20
_TRIES = 4
#: How long after a key a login or a prompt may take before a shell without one is assumed, seconds; and how long a
#: login may think about a name or a password.
_SILENCE, _LOGIN_TIME = 3.0, 30.0
#: How long a shell may take to end what it was interrupted in, seconds.
_INTERRUPTED = 5.0

LOGIN = rb"login: ?$"
PASSWORD = rb"[Pp]assword: ?$"
REFUSED = rb"Login incorrect|Login timed out|Permission denied"
#: With what some shells send to a terminal behind it: busybox asks where its cursor is.
PROMPT = rb"[#$%>] ?(?:\x1b\[[0-9;?]{0,16}[A-Za-z]){0,4}$"


class Finished(NamedTuple):
    rc: int
    stdout: bytes
    stderr: bytes


class Shell:
    """Commands in a POSIX shell behind a console. A context manager, which leaves the console as it was.

    With ``user`` it logs in where a login is asked for, and out again. The guest needs ``stty``, ``base64`` and
    ``sha256sum``, which coreutils and busybox have. Methods raise ``ConsoleError``.
    """

    def __init__(self, console: Console, user: str | None = None, password: str | None = None) -> None:
        self.console = console
        self._user, self._password = user, password
        self._nonce = secrets.token_hex(6)
        self._count = 0
        self._logged_in = self._inside = self._stuck = False
        self._folder = f"/tmp/.xtool-{self._nonce}"

    def __enter__(self) -> Shell:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- coming and going -----------------------------------------------------------------------------
    def open(self) -> None:
        self._find_shell()
        self._inside = True
        self._say("stty -echo; sh 2>/dev/null | cat")
        # The one that answers now has neither prompt nor echo.
        self._say(f"umask 077; mkdir -p {self._folder}; cd /; export LC_ALL=C PAGER=cat TERM=dumb")
        self._answer()

    def close(self) -> None:
        try:
            if self._inside:
                self._leave()
        except ConsoleError:
            pass  # what it was asked to do is done, or was complained of
        finally:
            self._inside = False
            self.console.close()

    def _leave(self) -> None:
        if not self._stuck:
            try:
                self._answer(timeout=_INTERRUPTED)
            except LateError:
                self._stuck = True
        if self._stuck:  # a command still runs: this ends it, and our shell with it
            self.console.send(b"\x03")
        else:
            self._say("exit")
        self._say(f"rm -rf {self._folder}; stty echo")
        if self._logged_in:
            self._say("exit")
            self.console.expect([LOGIN], _INTERRUPTED)
        else:
            self._answer(timeout=_INTERRUPTED)

    def _find_shell(self) -> None:
        """Until a shell answers: log in if that is asked for."""
        end = time.monotonic() + self.console.timeout
        attempts = 0
        typed = ""  # what the login is thinking about: the user, or the password
        self.console.settle()
        self.console.send(b"\n")
        while True:
            try:
                which, _ = self.console.expect(
                    [LOGIN, PASSWORD, REFUSED, PROMPT], _LOGIN_TIME if typed else _SILENCE
                )
            except LateError:
                if typed:  # what was typed got lost: ask it to ask again
                    typed = ""
                    self.console.send(b"\n")
                    continue
                which = 3
            if which == 3:
                # A shell, or something that is still booting and will read this later, if at all.
                typed = ""
                mark = self._mark()
                self._ask(mark)
                try:
                    which, _ = self.console.expect([LOGIN, PASSWORD, REFUSED, mark], _SILENCE)
                except LateError:
                    if time.monotonic() > end:
                        raise self.console.complaint(
                            "there is no shell, and no login, that answers"
                        ) from None
                    continue
                if which == 3:
                    return
            if which == 2:
                if attempts:
                    raise self.console.complaint(f"the login of {self._user} was refused")
                continue  # what stood there before was refused
            # A prompt counts if it stays the last word; and one more is the answer to our newline.
            if not self.console.quiet() or (which == 0 and typed == "user"):
                continue
            attempts += which == 0
            typed = self._log_in(which == 0, typed, attempts)

    def _log_in(self, wants_user: bool, typed: str, attempts: int) -> str:
        """Answer a login; what was typed."""
        if self._user is None:
            raise self.console.complaint("it wants a login: give the user, and the password if it has one")
        if wants_user:
            if attempts > _TRIES:
                raise self.console.complaint(f"the login of {self._user} was refused")
            self._logged_in = True
            self.console.send(f"{self._user}\n".encode())
            return "user"
        if typed != "user":  # of a login that was there before us
            self.console.send(b"\n")
            return ""
        if self._password is None:
            raise self.console.complaint(f"it wants a password for {self._user}: give one")
        self.console.send(f"{self._password}\n".encode())
        return "password"

    # --- commands -------------------------------------------------------------------------------------
    def run(self, command: str, data: bytes = b"", timeout: float | None = None) -> Finished:
        """Carry a command line out, with ``data`` as its standard input, within ``timeout`` seconds."""
        base = f"{self._folder}/{self._count}"
        self.put(command.encode(), f"{base}.sh")
        if data:
            self.put(data, f"{base}.in")
        source = f"{base}.in" if data else "/dev/null"
        mark = self._mark()
        said = self._printing(mark, "$rc.")
        # Twice, in case something else is printed right into it.
        self._say(f"sh {base}.sh <{source} >{base}.out 2>{base}.err; rc=$?; {said}; {said}")
        try:
            _, match = self.console.expect([mark + rb" ([0-9]+)\."], timeout)
        except LateError:
            self._stuck = True
            raise
        finished = Finished(int(match[1]) & 0xFF, self.get(f"{base}.out"), self.get(f"{base}.err"))
        self._say(f"rm -f {base}.*")
        return finished

    def put(self, data: bytes, path: str) -> None:
        """Write a file in the guest; one that is new is readable for its user alone."""
        if len(data) > SIZE_MAX:
            raise ConsoleError(f"{path} would have {len(data)} bytes; {SIZE_MAX} are the most that is sent")
        there, encoded = shlex.quote(path), base64.b64encode(data).decode()
        digest = hashlib.sha256(data).hexdigest()
        coded = f"{self._folder}/coded"
        lines = [encoded[at : at + _LINE] for at in range(0, len(encoded), _LINE)]
        for _ in range(_TRIES):
            self._say(f": >{coded}")
            for at in range(0, len(lines), _LOT):
                for line in lines[at : at + _LOT]:
                    self._say(f"echo {line} >>{coded}")
                self._answer()
            self._say(f"base64 -d <{coded} >{there}; rm -f {coded}")
            if self._answer(f"$(sha256sum <{there})", rb"([0-9a-f]*)[^\n.]*")[1].decode() == digest:
                return
        raise self.console.complaint(f"{path} did not arrive whole (has the guest base64, sha256sum, space?)")

    def get(self, path: str) -> bytes:
        """What is in a file of the guest's; ``SIZE_MAX`` bytes at most."""
        there = shlex.quote(path)
        match = self._answer(
            f"$(wc -c <{there}) $(sha256sum <{there})", rb" *([0-9]{0,12}) *([0-9a-f]*)[^\n.]*"
        )
        if not match[1] or not match[2]:
            raise self.console.complaint(f"there is no file {path}, or it cannot be read")
        size, digest = int(match[1]), match[2].decode()
        if size > SIZE_MAX:
            raise self.console.complaint(f"{path} has {size} bytes; {SIZE_MAX} are the most that is taken")
        if size == 0:
            return b""
        for _ in range(_TRIES):
            begin, end = self._mark(), self._mark()
            self._say(f"{self._printing(begin)}; base64 <{there}; {self._printing(end)}")
            self.console.expect([begin + rb" +\r?\n"])
            data = _decoded(self.console.take_until(end, size * 2 + (1 << 16)))
            if hashlib.sha256(data).hexdigest() == digest:
                return data
        raise self.console.complaint(
            f"{path} did not come whole {_TRIES} times: what else prints to the console?"
        )

    # --- marks ----------------------------------------------------------------------------------------
    def _mark(self) -> bytes:
        self._count += 1
        return f"xtool-{self._nonce}-{self._count}-".encode()

    def _printing(self, mark: bytes, more: str = "") -> str:
        """Shell words that print the mark (which they do not contain) on a line of its own."""
        text = mark.decode()
        return f"printf '\\n%s%s %s\\n' {text[:9]} {text[9:]} \"{more}\""

    def _ask(self, mark: bytes, more: str = "") -> None:
        self._say(self._printing(mark, more))

    def _answer(self, words: str = "", pattern: bytes = b"", timeout: float | None = None) -> re.Match[bytes]:
        """What the shell makes of ``words``; asked again where the answer was not understood."""
        whole = self.console.timeout if timeout is None else timeout
        for left in reversed(range(_TRIES)):
            mark = self._mark()
            self._ask(mark, f"{words}.")
            try:
                return self.console.expect([mark + b" " + pattern + rb"\."], whole / _TRIES)[1]
            except LateError:
                if not left:
                    raise
        raise AssertionError

    def _say(self, line: str) -> None:
        self.console.send(f"{line}\n".encode())


def _decoded(text: bytes) -> bytes:
    """Base64 in lines; empty if there is anything else in between."""
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error:
        return b""
