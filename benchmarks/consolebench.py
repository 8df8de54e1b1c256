"""Consoles: ours and xenconsoled, each with a Linux guest that prints, and one that answers meanwhile.

A console is read as its users read it: ours by its socket, xenconsoled's by its pty. A guest with a full ring
spins, so what is measured is how fast the ring is emptied. xenconsoled allows a guest 30 looks at its ring in
200 ms; that is part of what it does.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from statistics import median

from benchmarks import cpu
from benchmarks.bench import BOOT, Bench
from benchmarks.contest import MARK, OURS, BenchError, Contest, Race, Sample, parse_load, sample
from benchmarks.cpu import Meter
from benchmarks.peers import DEADLINE
from tests.xen.guests import LINUX_READY, Console, ask
from xtool.config import DomainConfig
from xtool.devices.console import open_tty
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.backends import server_pid

RIVAL = "xenconsoled"
QUIET = "no flood"
#: The guest's own name for its console.
HVC = "/dev/hvc0"
#: Bytes of one sample; and of a flood that is to outlast the keystrokes beside it.
FLOOD, LONG_FLOOD = 512 << 10, 16 << 20
KEYS = 15
_TAIL = 2000

DRAIN = Contest("console drain", "kB/s", True, {RIVAL: 0.5})
ECHO = Contest("console echo", "µs", False, {RIVAL: 1.5})
ECHO_BESIDE = Contest("console echo beside a flood", "µs", False, {QUIET: 2.0})
PROFILED = "drain"


class Line(Console):
    """A console by any descriptor, of a pty or a socket."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seen = b""
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self.fd

    def piece(self) -> bytes:
        """What is there, which may be nothing. Raises ``BenchError`` when the console ended."""
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise BenchError(f"the console ended ({error}); seen: {self.seen[-_TAIL:]!r}") from None
        if not data:
            raise BenchError(f"the console ended; seen: {self.seen[-_TAIL:]!r}")
        # The end is all that is looked at: keeping megabytes would be what is measured.
        self.seen = (self.seen + data)[-_TAIL:]
        return data

    def wait_end(self, text: str, deadline: float) -> str:
        """Read until ``text`` stands among the last lines, and the line with it is whole."""
        end, sought = time.monotonic() + deadline, text.encode()
        while sought not in self.seen or b"\n" not in self.seen.split(sought, 1)[1]:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                raise BenchError(f"no {text!r} within {deadline:g} s; seen: {self.seen!r}")
            self.piece()
        return self.seen.decode("utf-8", "replace")


def flood(line: Line, meter: Meter, tty: str = HVC) -> Sample:
    def run() -> str:
        line.seen = b""
        line.send(f"load flood {tty} {FLOOD}\n")
        return line.wait_end(MARK, DEADLINE)

    said, spent = meter.during(run)
    return sample(parse_load(said), DRAIN.unit, spent)


def keystrokes(line: Line, others: Sequence[Line] = ()) -> Sample:
    """The median time from a key to its echo by the guest, in µs; ``others`` are read meanwhile."""
    line.seen = b""
    line.send("cat >/dev/null; echo EN''D=$?=\n")
    _settle(line, others)
    times = []
    for _ in range(KEYS):
        began = time.perf_counter_ns()
        line.send("x")
        _until_echo(line, others)
        times.append(time.perf_counter_ns() - began)
    line.send("\n\x04")  # the end of what cat reads
    line.wait_end("END=", DEADLINE)
    return Sample(median(times) / 1e3, len(times), 0, sum(times), int(median(times)), max(times))


def _settle(line: Line, others: Sequence[Line]) -> None:
    """Until the echo of the command came, and cat had the time to start."""
    end = time.monotonic() + 0.5
    while (left := end - time.monotonic()) > 0:
        for ready in select.select([line, *others], [], [], left)[0]:
            ready.piece()


def _until_echo(line: Line, others: Sequence[Line]) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise BenchError(f"no echo within {DEADLINE:g} s; seen: {line.seen!r}")
        for ready in select.select([line, *others], [], [], left)[0]:
            if b"x" in ready.piece() and ready is line:
                return


def beside_a_flood(line: Line, loud: Line, tty: str = HVC) -> Sample:
    loud.seen = b""
    loud.send(f"load flood {tty} {LONG_FLOOD}\n")
    while b"abcdef" not in loud.seen:  # it began
        if not select.select([loud], [], [], DEADLINE)[0]:
            raise BenchError(f"no flood within {DEADLINE:g} s; seen: {loud.seen!r}")
        loud.piece()
    found = keystrokes(line, [loud])
    over = MARK.encode() in loud.seen
    loud.send("\x03")
    loud.seen = b""
    loud.send("\nstty sane; echo EN''D=$?=\n")
    loud.wait_end("END=", DEADLINE)
    if over:
        raise BenchError("the flood ended before the keystrokes did: LONG_FLOOD is too short")
    return found


@contextmanager
def three_guests(bench: Bench) -> Iterator[list[Race]]:
    with ExitStack() as undo:
        loud, quiet = (undo.enter_context(_ours(bench, name)) for name in ("loud", "quiet"))
        other = undo.enter_context(_theirs(bench, "other"))
        for line in (loud[0], quiet[0], other[0]):
            ask(line, "true")  # everything else of the boot is over
        pids = {OURS: _server(loud[1]), RIVAL: cpu.named(cpu.names(), "xenconsoled")}
        meters = {name: Meter(bench.host.hv, found) for name, found in pids.items()}
        yield [
            Race(
                DRAIN,
                {OURS: partial(flood, loud[0], meters[OURS]), RIVAL: partial(flood, other[0], meters[RIVAL])},
            ),
            Race(ECHO, {OURS: partial(keystrokes, quiet[0]), RIVAL: partial(keystrokes, other[0])}),
            Race(
                ECHO_BESIDE,
                {OURS: partial(beside_a_flood, quiet[0], loud[0]), QUIET: partial(keystrokes, quiet[0])},
                quick=False,
            ),
        ]


def _server(domid: int) -> list[int]:
    pid = server_pid(domid)
    return [pid] if pid is not None else []


@contextmanager
def _ours(bench: Bench, name: str) -> Iterator[tuple[Line, int]]:
    config = bench.config(name, console_backend="xtool")
    with _created(bench, config) as domid:
        path = bench.client.console(config.name, "pv").socket
        link = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + 60
        while True:
            try:
                link.connect(path)
                break
            except OSError as error:
                if time.monotonic() > end:
                    link.close()
                    raise BenchError(f"nobody listens at {path}: {error}") from None
                time.sleep(0.1)
        with closing(Line(link.detach())) as line:
            yield _booted(bench, config, line), domid


@contextmanager
def _theirs(bench: Bench, name: str) -> Iterator[tuple[Line, int]]:
    config = bench.config(name)
    with _created(bench, config) as domid:
        tty = bench.client.console(config.name, "pv", deadline=60).tty
        with closing(Line(open_tty(tty))) as line:
            yield _booted(bench, config, line), domid


def _booted(bench: Bench, config: DomainConfig, line: Line) -> Line:
    bench.client.unpause(config.name)
    line.wait_end(LINUX_READY, BOOT)
    return line


@contextmanager
def _created(bench: Bench, config: DomainConfig) -> Iterator[int]:
    """Paused: its console is opened before it runs, so that nothing is missed."""
    try:
        bench.client.create(config, CreateOptions(paused=True))
        yield bench.client.list(config.name)[0].domid
    finally:
        bench.destroy(config.name)


PLACES = {"console": three_guests}
