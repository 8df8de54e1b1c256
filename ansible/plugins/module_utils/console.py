"""A guest's console, as programs use it: wait for what it prints, and type. ``shell.py`` runs commands behind it.

Facts about ``xtool console``
-----------------------------
- Of a console that xtool serves it shows what was printed since the boot: a prompt that is seen first may be hours
  old. ``settle`` lets that pass.
- Where its input is no terminal, bytes pass unchanged both ways; the end of its input does not end it, SIGTERM does.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Sequence

_CHUNK = 4096
#: What is kept of what was not matched, bytes: nothing looks further back.
_WINDOW = 256 << 10
#: A console that is silent for so long has said what it had to say, seconds; and how long it may go on.
_QUIET, _CHATTER = 0.3, 5.0


class ConsoleError(Exception):
    """The console did not do what was expected; the text says what it printed last."""


class LateError(ConsoleError):
    """It did not do it in time."""


def pieces(pattern: str) -> list[bytes]:
    """What a text must have in its order; ``*`` stands for anything. As in the domain files' ``ready:``, it is no
    regular expression: no guest can make the search last."""
    return [piece.encode() for piece in pattern.split("*")]


def find_line(wanted: Sequence[bytes], text: bytes) -> int:
    """Where the match of ``pieces`` within one line of ``text`` ends, -1 if no line has them. The last line need
    not be whole: a prompt is none."""
    begin = 0
    for line in text.splitlines(keepends=True):
        at = 0
        for piece in wanted:
            found = line.find(piece, at)
            if found < 0:
                break
            at = found + len(piece)
        else:
            return begin + at
        begin += len(line)
    return -1


class Console:
    """What ``argv`` (``xtool console NAME``) reads and writes. A context manager; ends the process.

    Methods raise ``ConsoleError``; ``LateError`` when ``timeout`` seconds, for each of them, are over.
    """

    def __init__(self, argv: Sequence[str], timeout: float) -> None:
        self.timeout = timeout
        #: What was printed and not matched yet.
        self.pending = b""
        self._argv = list(argv)
        self._complaints = b""
        try:
            # Ctrl-C ends us; we end it, in order.
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise ConsoleError(f"cannot run {argv[0]}: {error.strerror}") from None
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._err = self._process.stderr.fileno()
        os.set_blocking(self._in, False)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called again."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def send(self, data: bytes) -> None:
        """Type ``data``; what is printed meanwhile is kept."""
        end = time.monotonic() + self.timeout
        while data:
            self._wait(end, "it takes no more input", write=True)
            try:
                data = data[os.write(self._in, data[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._ended() from None

    def quiet(self) -> bool:
        """Wait until it is silent; whether it was silent already."""
        end = time.monotonic() + _CHATTER
        waited = False
        while time.monotonic() < end:
            try:
                self._wait(time.monotonic() + _QUIET, "silent")
            except LateError:
                break
            waited = True
        return not waited

    def settle(self) -> None:
        """Wait until it is silent, and forget what it printed so far."""
        self.quiet()
        self.pending = b""

    def expect(self, patterns: Sequence[bytes], timeout: float | None = None) -> tuple[int, re.Match[bytes]]:
        """Wait until one of these regular expressions is printed: which of them, and the match. What stands before
        it, and the match itself, are not looked at again."""
        known = [re.compile(pattern) for pattern in patterns]
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            found = [(index, match) for index, one in enumerate(known) if (match := one.search(self.pending))]
            if found:
                index, match = min(found, key=lambda one: one[1].start())
                self.pending = self.pending[match.end() :]
                return index, match
            self._wait(end, f"it did not print {' or '.join(one.decode() for one in patterns)}")

    def wait_for(self, pattern: str, timeout: float | None = None) -> bytes:
        """Wait until a line has the pattern (see ``pieces``): what was printed up to there."""
        wanted = pieces(pattern)
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while (at := find_line(wanted, self.pending)) < 0:
            self._wait(end, f"it did not print {pattern!r}")
        seen, self.pending = self.pending[:at], self.pending[at:]
        return seen

    def take_until(self, mark: bytes, most: int) -> bytes:
        """All that is printed before ``mark``: ``most`` bytes, each lot of them within ``timeout``."""
        taken = bytearray()
        searched = 0
        while True:
            taken += self.pending
            self.pending = b""
            if (at := taken.find(mark, searched)) >= 0:
                break
            searched = max(len(taken) - len(mark), 0)  # the mark may come in two
            if len(taken) > most:
                raise self.complaint("it prints far more than it was asked for")
            self._wait(time.monotonic() + self.timeout, "it stopped in the middle of an answer")
        self.pending = bytes(taken[at + len(mark) :])
        return bytes(taken[:at])

    def complaint(self, why: str, kind: type[ConsoleError] = ConsoleError) -> ConsoleError:
        last = self.pending[-400:].decode(errors="backslashreplace")
        said = self._complaints.decode(errors="replace").strip()
        return kind(
            f"the console of {self._argv[-1]}: {why}; its last words: {last!r}"
            + (f". xtool said: {said}" if said else "")
        )

    def _ended(self) -> ConsoleError:
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return self.complaint("it was closed")
        while data := os.read(self._err, _CHUNK):
            self._complaints = (self._complaints + data)[-_CHUNK:]
        return self.complaint(f"it ended (status {status})")

    def _wait(self, end: float, late: str, *, write: bool = False) -> None:
        """Return when something came, or with ``write`` when it can be written."""
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise self.complaint(f"{late} in time", LateError)
            ready, writable, _ = select.select([self._out, self._err], [self._in] if write else [], [], left)
            if self._err in ready:
                data = os.read(self._err, _CHUNK)
                if not data:
                    raise self._ended()
                self._complaints = (self._complaints + data)[-_CHUNK:]
            if self._out in ready:
                data = os.read(self._out, 64 << 10)
                if not data:
                    raise self._ended()
                self.pending = (self.pending + data)[-_WINDOW:]
            if writable or (self._out in ready and not write):
                return
