"""The check on Intel's VT-x: xtool and its guests on Xen, in a machine that bochs emulates.

``python -m xtool.lab.vtx [TEST...]`` makes the machine (:mod:`xtool.lab.bochs`), starts it, and reads its
serial line as it grows. In dom0 ``files/vtx-dom0`` runs ``xtool info``, selected tests of ``tests/xen`` and
``xtool doctor``. Exit status 0 means that every sign in the log, every answer and every test was seen.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtool import paths
from xtool.errors import LabError, XtoolError
from xtool.lab import bochs
from xtool.lab.demo import PrintedProgress
from xtool.lab.guests import ensure_guests
from xtool.lab.image import ensure_image
from xtool.lab.steps import locked, require_space
from xtool.lab.sync import project_root

_GUESTS = "tests/xen/test_guests.py::"
#: Two that bochs is not seen passing (docs/lab.md): Linux with two vCPUs, and Linux as HVM.
TESTS = (
    f"{_GUESTS}test_the_host_says_what_it_is",
    f"{_GUESTS}test_a_pv_guest_finds_what_it_was_promised[8]",
    f"{_GUESTS}test_a_pvh_guest_finds_what_it_was_promised[8-1]",
    f"{_GUESTS}test_a_pvh_guest_finds_what_it_was_promised[200-3]",
    f"{_GUESTS}test_xl_sees_and_ends_our_guests",
    f"{_GUESTS}test_hvm_starts_its_firmware",
    f"{_GUESTS}test_debian_boots[pvh-1]",
)
#: What must be in the log, beside what the check in dom0 says: (what it shows, pattern).
SIGNS = (
    ("Xen starts", r"\(XEN\) Xen version 4\."),
    ("VMX with EPT", r"\(XEN\)  - Extended Page Tables \(EPT\)"),
    ("VMX with VPID", r"\(XEN\)  - Virtual-Processor Identifiers \(VPID\)"),
    ("Xen uses VMX", r"\(XEN\) HVM: VMX enabled"),
    ("Xen uses nested paging", r"\(XEN\) HVM: Hardware Assisted Paging \(HAP\) detected"),
    ("dom0 is up", r"XTOOL-LAB-READY"),
)
#: What ``xtool info`` must answer.
INFO: dict[str, object] = {"vendor": "Intel", "hvm": "VT-x", "nested_paging": True, "asid": True}
STEPS = ("info", "snapshot", "tests", "leaks")
#: Told as they pass; nothing depends on them.
_TOLD = (r"\(d\d+\) SeaBIOS \(version .*", r"XTOOL-LAB-STEP .*", r"Linux version \S+")
_FATAL = re.compile(r"XTOOL-LAB-FAILED|\(XEN\) Panic on CPU|Kernel panic - not syncing")
_OTHERS_LINE = re.compile(r"^\((XEN|d\d+)\) ")
#: Xen's words may follow in the same line, before the test's result.
_BEGUN = re.compile(r"tests/\S+::\S+")
_RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (tests/\S+)")
#: Wall-clock seconds without a word on the serial line.
_SILENCE = 1800.0
_POLL = 0.2
_SPACE_NEEDED = 3 << 30


@dataclass
class Report:
    """What the serial line has shown so far. ``fatal`` is a reason to stop at once."""

    tests: tuple[str, ...] = TESTS
    seen: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] | None = None
    ended: dict[str, int] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    done: bool = False
    fatal: str = ""
    _step: str = ""
    _lines: list[str] = field(default_factory=list)

    def feed(self, line: str) -> str | None:
        """Take a line of the serial log; returns what is worth telling."""
        line = line.rstrip()
        if _FATAL.search(line):
            self.fatal = line
            return line
        for what, pattern in SIGNS:
            if what not in self.seen and re.search(pattern, line):
                self.seen[what] = line
                return f"{what}: {line}"
        if "XTOOL-VTX " in line:
            return self._mark(line.split("XTOOL-VTX ", 1)[1].split())
        if self._step and not _OTHERS_LINE.match(line):
            self._lines.append(line)
        if self._step == "tests" and (found := _RESULT.search(line)):
            self.results[found[2]] = found[1]
        elif self._step == "tests" and (found := _BEGUN.match(line)):
            return found[0]
        return next((hit[0] for pattern in _TOLD if (hit := re.search(pattern, line))), None)

    def _mark(self, words: list[str]) -> str | None:
        match words:
            case ["BEGIN", name]:
                self._step, self._lines = name, []
                return f"dom0: {name}"
            case ["END", name, status] if name == self._step:
                self.ended[name] = int(status)
                if name == "info":
                    self.info = _json(self._lines)
                said = self._lines[-1:] if name == "leaks" else []
                self._step = ""
                return f"dom0: {name} ended with status {status} {' '.join(said)}".rstrip()
            case ["DONE"]:
                self.done = True
        return None

    def problems(self) -> list[str]:
        """What was not seen, or not as it must be; empty when all is proven."""
        found = [f"not in the log: {what}" for what, _ in SIGNS if what not in self.seen]
        if self.fatal:
            found.append(f"the machine gave up: {self.fatal}")
        for key, wanted in INFO.items():
            got = "nothing" if self.info is None else repr(self.info.get(key))
            if got != repr(wanted):
                found.append(f"xtool info says {got} for {key}, not {wanted!r}")
        for step in STEPS:
            if (status := self.ended.get(step)) != 0:
                what = "did not end" if status is None else f"ended with status {status}"
                found.append(f"step {step} {what}")
        for test in self.tests:
            hits = {
                r
                for name, r in self.results.items()
                if name == test or name.startswith((f"{test}[", f"{test}::"))
            }
            if hits != {"PASSED"}:
                found.append(f"{test}: {', '.join(sorted(hits)) or 'no result'}")
        return found


def _json(lines: list[str]) -> dict[str, Any] | None:
    try:
        answer = json.loads("\n".join(lines))
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def follow(folder: Path, report: Report, progress: PrintedProgress, deadline: float) -> None:
    """Run the machine of ``folder`` until it is done. Raises LabError when it stops or the time is up."""
    end = time.monotonic() + deadline
    heard = time.monotonic()
    log = folder / "serial.log"
    log.touch()
    rest = b""
    with bochs.running(folder) as process, open(log, "rb") as serial:
        while not report.done and not report.fatal:
            gone = process.poll() is not None
            data = serial.read()
            now = time.monotonic()
            if data:
                heard = now
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if told := report.feed(line.decode(errors="replace")):
                        progress.step(_printable(told))
            elif gone:
                raise LabError(f"bochs ended by itself\n{_tail(folder / 'bochs.log')}")
            elif now - heard > _SILENCE:
                raise LabError(f"nothing on the serial line for {_SILENCE:.0f} s")
            elif now > end:
                raise LabError(f"not done within {deadline / 60:.0f} minutes", hint="give --deadline MINUTES")
            else:
                time.sleep(_POLL)


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:160]


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-8:])
    except OSError:
        return "(it wrote no log)"


def check(tests: tuple[str, ...], deadline: float, keep: bool, progress: PrintedProgress) -> Report:
    """Make the machine, run the check, keep its log. ``deadline`` is in seconds. Raises LabError."""
    bochs.require()
    image = ensure_image(progress)
    ensure_guests(project_root() / "build/guest", progress)
    folder = paths.state_dir() / "vtx"
    with locked(folder / "lock", progress, "running this check"):
        machine = folder / "machine"
        shutil.rmtree(machine, ignore_errors=True)
        require_space(machine, _SPACE_NEEDED, "the emulated machine")
        report = Report(tests)
        try:
            bochs.make_machine(image, machine, tests, progress)
            progress.step(f"starting bochs; all that is said goes to {folder / 'serial.log'}")
            follow(machine, report, progress, deadline)
        finally:
            for log in ("serial.log", "bochs.log"):
                if (machine / log).exists():
                    shutil.copyfile(machine / log, folder / log)
            if not keep:
                shutil.rmtree(machine, ignore_errors=True)
    return report


def main() -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/test-vtx", description=__doc__.splitlines()[0])
    parser.add_argument(
        "tests", nargs="*", metavar="TEST", help="tests of tests/xen, instead of the usual ones"
    )
    parser.add_argument("--deadline", type=float, default=60, metavar="MINUTES", help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="leave the machine's disks")
    given = parser.parse_args()
    # Also where a job in the background begins with SIGINT ignored: bochs must not outlive us.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    progress = PrintedProgress()
    try:
        report = check(tuple(given.tests) or TESTS, given.deadline * 60, given.keep, progress)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except XtoolError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    problems = report.problems()
    for problem in problems:
        print(f"not proven: {problem}", file=sys.stderr)
    if not problems:
        progress.step(f"all seen: {len(report.results)} tests passed on VT-x, nothing was left behind")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
