"""The watcher and what it has done, on the machine in memory that real processes share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from churn import CRASH, POWEROFF, REBOOT, processes
from halls import until
from test_churn import Config, Machine

from xtool import paths
from xtool.errors import DomainNotFoundError
from xtool.toolstack import journal, watchlink


@pytest.fixture
def machine(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("XTOOL_WARM", "0")
    paths.run_dir().mkdir()
    (tmp_path / "log").mkdir()
    found = Machine(tmp_path, config)
    yield found
    found.close()


def leave_alone(machine: Machine) -> None:
    """From now on nobody starts a watcher but a command."""
    for child in (machine.daemon, machine.zygote):
        child.kill()
        child.wait()


def create(machine: Machine, name: str, **keys: object) -> journal.Entry:
    machine.by_daemon("create", name, kind="pv", paused=False, **keys)
    return by_name(name)


def by_name(name: str) -> journal.Entry:
    [entry] = [entry for entry in journal.entries() if entry.name == name]
    return entry


def restarted(machine: Machine, before: journal.Entry) -> bool:
    seen = machine.look().get(before.name)
    return seen is not None and seen.settled and seen.state == "up" and seen.domid != before.domid


def test_ends_are_acted_upon_and_after_a_kill_too(machine: Machine) -> None:
    names = ("first", "reboots", "crashes", "stops", "stays")
    first, reboots, crashes, stops, stays = [create(machine, name, on_crash="restart") for name in names]
    pid = watchlink.pid()
    assert pid and {entry.keeper for entry in journal.entries()} == {pid}
    machine.end(first.domid, REBOOT)
    until(lambda: restarted(machine, first))
    assert {entry.keeper for entry in journal.entries()} == {pid}
    leave_alone(machine)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not stays.keeper)
    # Nobody sees these ends.
    machine.end(reboots.domid, REBOOT)
    machine.end(crashes.domid, CRASH)
    machine.end(stops.domid, POWEROFF)
    assert {entry.keeper for entry in journal.entries()} == {0}
    machine.by_command("create", "another", kind="pv", paused=False)
    another = by_name("another")
    other = watchlink.pid()
    # Started by what came first: it took up all there were.
    assert other != pid and another.keeper == other and stays.keeper == other
    until(lambda: "stops" not in machine.look() and restarted(machine, crashes))
    until(lambda: restarted(machine, reboots))
    assert {entry.keeper for entry in journal.entries()} == {other}
    os.kill(other, signal.SIGKILL)
    until(lambda: not stays.keeper)
    machine.by_command("gc", "--yes")
    assert stays.keeper not in (0, pid, other)
    for name in ("first", "reboots", "crashes", "stays", "another"):
        machine.by_daemon("destroy", name)
    until(lambda: not [pid for pid, name in processes() if name == watchlink.NAME and machine.is_ours(pid)])
    assert "files" not in machine.left() and "domains" not in machine.left()


def test_attached_while_it_reboots(machine: Machine) -> None:
    """Whichever comes first, the disk is there afterwards, and the same process looks after the guest. For a
    moment there is no such guest."""
    guest = create(machine, "reboots")
    pid = watchlink.pid()
    machine.end(guest.domid, REBOOT)

    def attached() -> bool:
        try:
            machine.by_daemon("attach", "reboots")
        except DomainNotFoundError:
            return False
        return True

    until(attached)
    until(lambda: restarted(machine, guest) and machine.look()["reboots"].disks == {"xvdb"})
    assert by_name("reboots").keeper == pid
    machine.by_daemon("detach", "reboots")
    assert machine.look()["reboots"].disks == frozenset()
    machine.by_daemon("destroy", "reboots")
