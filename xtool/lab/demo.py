"""The demonstration: one PV, one PVH and one HVM guest on the lab, each to its prompt.

It runs what a person would type (``xtool -H lab create FILE -c``), one process per guest, and watches what
each guest prints on its own console. It ends with a table and exit status 0, or a reason and 1.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass, field

from xtool.errors import DomainNotFoundError, XtoolError
from xtool.lab.guests import READY, ensure_guests
from xtool.lab.machine import DEFAULT_NAME, Lab
from xtool.lab.spec import LabSpec, choose_accel
from xtool.lab.sync import project_root

CONFIGS = ("pv", "pvh", "hvm")
#: How long all guests may take to their prompts, seconds. Emulation on a busy machine is slow.
DEADLINE = 420.0
_CREATED = re.compile(rb"^(\S+): domain (\d+), (\w+), \w+, built in ([0-9.]+) s\s*$", re.MULTILINE)
_XTOOL = (sys.executable, "-m", "xtool.cli.app", "-H", "lab")


class PrintedProgress:
    """A line per step, with the time since the start."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def step(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:5.1f} s] {text}", flush=True)

    def advance(self, done: int, total: int | None = None) -> None:
        pass


@dataclass
class Guest:
    """One guest on its way. Times are in seconds since its create began."""

    name: str
    process: subprocess.Popen[bytes]
    begun: float
    output: bytearray = field(default_factory=bytearray)
    domid: int | None = None
    type: str = ""
    build_time: float = 0.0
    userland: float | None = None
    state: str = ""
    failure: str = ""
    lines: int = 0

    def take(self, data: bytes) -> list[str]:
        """Take what came from the process; returns what is worth telling."""
        self.output += data
        told = []
        if self.domid is None:
            match = _CREATED.search(bytes(self.output))
            if match:
                self.domid, self.type = int(match[2]), match[3].decode()
                self.build_time = float(match[4])
                told.append(f"{self.name}: domain {self.domid} built in {self.build_time:.2f} s, running")
        if self.userland is None and at_prompt(self.output):
            self.userland = time.monotonic() - self.begun
            told.append(f"{self.name}: userland prompt after {self.userland:.1f} s")
        lines = self.output.count(b"\n")
        if self.userland is None and self.domid is not None and lines - self.lines >= 80:
            self.lines = lines
            last = last_line(self.output)
            if last:
                told.append(f"{self.name}: {last}")
        return told


def at_prompt(output: bytes | bytearray) -> bool:
    """Whether a guest's console shows its shell's prompt after its ready line."""
    ready = output.find(READY.encode())
    return ready >= 0 and b"\n# " in output[ready:]


def last_line(output: bytes | bytearray) -> str:
    """The last whole line with something in it, made safe to print and short."""
    for line in reversed(bytes(output[-2000:]).split(b"\n")[:-1]):
        text = "".join(c for c in line.decode(errors="replace") if c.isprintable()).strip()
        if text:
            return text[:90]
    return ""


def start_lab(progress: PrintedProgress) -> bool:
    """The default lab, up, with this tree's xtool; whatever settings it was started with. Says whether it
    ran before, and so may have guests."""
    lab = Lab(DEFAULT_NAME)
    before = record = lab.record()
    spec = (
        LabSpec(**record.spec) if record is not None and record.ready else LabSpec(accel=choose_accel("auto"))
    )
    record = lab.up(spec, progress)
    progress.step(f"the lab is up (ssh on 127.0.0.1:{record.port})")
    return before is not None and before.pid == record.pid


def remove_old(progress: PrintedProgress) -> None:
    """Destroy guests of an earlier run, which would be in the way of the new ones."""
    progress.step("destroying the guests of an earlier run")
    done = subprocess.run([*_XTOOL, "destroy", *CONFIGS], capture_output=True, text=True, check=False)
    print("".join(f"          {line}\n" for line in done.stdout.splitlines()), end="")
    if done.returncode not in (0, DomainNotFoundError.exit_code):
        print(done.stderr, end="", file=sys.stderr)
        done.check_returncode()


def start_guest(name: str) -> Guest:
    config = project_root() / "configs" / f"{name}.yaml"
    process = subprocess.Popen(
        [*_XTOOL, "create", str(config), "-c"],
        stdin=subprocess.PIPE,  # kept open and silent: nobody types on the guest's console
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return Guest(name, process, time.monotonic())


def follow(guests: list[Guest], progress: PrintedProgress, deadline: float = DEADLINE) -> None:
    """Read every guest's console until each is at its prompt, has failed, or the time is up."""
    end = time.monotonic() + deadline
    with selectors.DefaultSelector() as selector:
        for guest in guests:
            assert guest.process.stdout is not None
            selector.register(guest.process.stdout, selectors.EVENT_READ, guest)
        while selector.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                guest = key.data
                data = os.read(key.fd, 65536)
                for text in guest.take(data):
                    progress.step(text)
                if not data and guest.userland is None:
                    status = guest.process.wait()
                    guest.failure = f"ended before its prompt (exit status {status})"
                    progress.step(f"{guest.name}: {guest.failure}")
                if not data or guest.userland is not None:
                    selector.unregister(key.fileobj)
    for guest in guests:
        if guest.userland is None and not guest.failure:
            guest.failure = f"no prompt within {deadline:.0f} s"


def let_go(guests: list[Guest]) -> None:
    """Leave the consoles; the guests go on."""
    for guest in guests:
        if guest.process.poll() is None:
            guest.process.terminate()  # not SIGINT: a job in the background may ignore it
    for guest in guests:
        try:
            guest.process.wait(20)
        except subprocess.TimeoutExpired:
            guest.process.kill()
            guest.process.wait()


def table(guests: list[Guest]) -> str:
    rows = [("Name", "Type", "Domain id", "Build time", "Time to userland", "State")]
    for guest in guests:
        rows.append(
            (
                guest.name,
                guest.type or "-",
                "-" if guest.domid is None else str(guest.domid),
                "-" if guest.domid is None else f"{guest.build_time:.2f} s",
                "-" if guest.userland is None else f"{guest.userland:.1f} s",
                guest.failure or guest.state,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


NEXT = """
The lab stays up. Next, for example (xtool is .venv/bin/xtool):
  xtool -H lab list                     the domains
  xtool -H lab console pvh              a guest's prompt; Ctrl-] leaves it
  xtool -H lab info                     the host: Xen, CPUs, memory
  xtool -H lab shutdown pv              ask a guest to power off
  xtool lab shell                       a shell in dom0; "xl list" works there too
  xtool lab down                        stop the lab
"""


def main() -> int:
    """Run it; returns the exit status."""
    progress = PrintedProgress()
    guests: list[Guest] = []
    try:
        ensure_guests(project_root() / "build/guest", progress)
        if start_lab(progress):
            remove_old(progress)
        progress.step("creating a PV, a PVH and an HVM guest, and following their consoles")
        guests = [start_guest(name) for name in CONFIGS]
        follow(guests, progress)
        with subprocess.Popen([*_XTOOL, "list", "-o", "json"], stdout=subprocess.PIPE) as listing:
            let_go(guests)
            listed = listing.communicate()[0]
        if listing.returncode:
            raise subprocess.CalledProcessError(listing.returncode, listing.args)
        present = {str(domain["name"]): domain for domain in json.loads(listed)}
        for guest in guests:
            found = present.get(guest.name)
            guest.state = str(found["state"]) if found else "gone"
            if found and guest.domid is not None and found["domid"] != guest.domid:
                # Emulated SVM now and then loses a guest to a triple fault; on_reboot brings it back.
                guest.state += f" (restarted; it was domain {guest.domid})"
                guest.domid = int(str(found["domid"]))
            if guest.state in ("gone", "crashed", "shutdown", "dying") and not guest.failure:
                guest.failure = guest.state
    except KeyboardInterrupt:
        let_go(guests)
        print("interrupted", file=sys.stderr)
        return 130
    except XtoolError as error:
        let_go(guests)
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        let_go(guests)
        print(f"error: {' '.join(map(str, error.cmd[1:]))} failed ({error.returncode})", file=sys.stderr)
        return 1
    print("\n" + table(guests))
    failed = [guest for guest in guests if guest.failure]
    for guest in failed:
        print(f"\n{guest.name} failed: {guest.failure}. The last it said:", file=sys.stderr)
        tail = bytes(guest.output[-3000:]).decode(errors="replace").splitlines()[-15:]
        for line in tail:
            print("    " + "".join(c for c in line if c.isprintable()), file=sys.stderr)
    print(NEXT)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
