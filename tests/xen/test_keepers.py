"""The watcher and keepers on real Xen: every action, they and their children killed at any moment, QEMU
killed, reboot loops. A guest without a QEMU and without devices of ours is the watcher's."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from guests import READY, guest, start
from xtool.config.single import parse_disk
from xtool.devicemodel.process import find as find_qemu
from xtool.toolstack import backends, journal, keeper
from xtool.toolstack.api import CreateOptions, DomainInfo
from xtool.toolstack.local import LocalClient
from xtool.toolstack.watchlink import is_watcher

POWEROFF, REBOOT, CRASH, WATCHDOG = 0, 1, 3, 4
KEYS = {POWEROFF: "on_poweroff", REBOOT: "on_reboot", CRASH: "on_crash", WATCHDOG: "on_watchdog"}


def until(what: str, check: Callable[[], Any], seconds: float = 90.0) -> Any:
    end = monotonic() + seconds
    while not (found := check()):
        assert monotonic() < end, what
        sleep(0.05)
    return found


def named(client: LocalClient, name: str) -> DomainInfo | None:
    return next((d for d in client.list() if d.name == name), None)


def again(client: LocalClient, name: str, before: int) -> Callable[[], DomainInfo | None]:
    """The domain under another number, complete."""

    def look() -> DomainInfo | None:
        found = named(client, name)
        if found is None or found.domid == before:
            return None
        entry = journal.read(found.uuid)
        return found if entry and entry.state == "running" and entry.domid == found.domid else None

    return look


def kill(pid: int) -> None:
    try:
        if pid:  # 0 would be all of us
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def processes(prefix: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                name = Path(f"/proc/{entry}/comm").read_text()
            except OSError:
                continue
            if name.startswith(prefix):
                found.append(int(entry))
    return found


@pytest.mark.parametrize("reason", KEYS)
@pytest.mark.parametrize("action", ["destroy", "restart", "preserve", "rename-restart"])
def test_each_action_for_each_end(client: LocalClient, reason: int, action: str) -> None:
    config = guest("pvh", "act", **{KEYS[reason]: action})
    done = client.create(config, CreateOptions())
    until("a keeper", lambda: keeper.pid_of(done.uuid))
    client.host.hv.shutdown_domain(done.domid, reason)
    if action == "destroy":
        until("gone", lambda: named(client, config.name) is None)
        until("no keeper", lambda: not keeper.pid_of(done.uuid))
    elif action == "preserve":
        until("kept", lambda: (e := journal.read(done.uuid)) and e.settled == "preserved")
        until("no keeper", lambda: not keeper.pid_of(done.uuid))
        assert keeper.missing(client.host) == []
        client.destroy(config.name)
    else:
        found = until("restarted", again(client, config.name, done.domid))
        assert (found.uuid == done.uuid) is (action == "restart")
        until("a keeper", lambda: keeper.pid_of(found.uuid))
        client.destroy(config.name)
        if action == "rename-restart":
            assert named(client, f"{config.name}-{done.domid}") is not None
            client.destroy(f"{config.name}-{done.domid}")


@pytest.mark.parametrize("action", ["coredump-destroy", "coredump-restart"])
def test_a_core_of_a_crashed_guest(
    client: LocalClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """In this process: the keeper's folder for cores is not the test's."""
    pytest.importorskip("xtool.toolstack.dumpcore")
    monkeypatch.setenv("XTOOL_DUMP_DIR", str(tmp_path))
    config = guest("pvh", "core", on_crash=action)
    done = client.create(config, CreateOptions())
    pid = until("a keeper", lambda: keeper.pid_of(done.uuid))
    os.kill(pid, signal.SIGTERM)
    until("no keeper", lambda: not keeper.pid_of(done.uuid))
    client.host.hv.shutdown_domain(done.domid, CRASH)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == ("destroyed" if "destroy" in action else "restarted")
    assert (tmp_path / f"{config.name}.core").stat().st_size > 16 << 20
    if settled.new_domid:
        client.destroy(config.name)


def test_a_guest_that_ended_while_it_had_no_keeper(client: LocalClient) -> None:
    config = guest("pv", "late")
    with start(client, config) as console:
        console.line(READY)
        entry = journal.read(client.list(config.name)[0].uuid)
        assert entry is not None
        pid = until("a keeper", lambda: keeper.pid_of(entry.uuid))
        os.kill(pid, signal.SIGTERM)  # nobody starts another: a killed one the zygote would replace
        until("no keeper", lambda: not keeper.pid_of(entry.uuid))
        console.send("r")
        until("it has shut down", lambda: client.list(config.name)[0].reason == "reboot")
    assert [e.uuid for e in keeper.missing(client.host)] == [entry.uuid]
    client.gc()  # as each create does
    until("restarted", again(client, config.name, entry.domid))
    client.destroy(config.name)


def test_keepers_killed_at_random_under_churn(client: LocalClient) -> None:
    """Guests that reboot and power off while keepers, and those that restart them, are killed: none is lost,
    none comes twice, each end is acted upon."""
    rounds = 60 if os.environ.get("XTOOL_LONG") else 12
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    for number in range(rounds):
        config = guest(dice.choice(["pv", "pvh"]), f"churn-{number}")
        done = client.create(config, CreateOptions())
        reason = dice.choice([POWEROFF, REBOOT])
        until("a keeper", lambda d=done: keeper.pid_of(d.uuid))
        early = dice.random() < 0.3
        if early:
            kill(keeper.pid_of(done.uuid))
        client.host.hv.shutdown_domain(done.domid, reason)
        end = monotonic() + dice.uniform(0.0, 1.5)
        while monotonic() < end:
            sleep(dice.uniform(0.0, 0.2))
            for pid in (keeper.pid_of(done.uuid), *processes(f"xtool-act-{done.domid}")):
                if pid and dice.random() < 0.5:
                    kill(pid)

        def carried_out(done: Any = done, reason: int = reason, name: str = config.name) -> bool:
            client.gc()
            if reason == POWEROFF:
                return named(client, name) is None and journal.read(done.uuid) is None
            return again(client, name, done.domid)() is not None

        until(f"round {number}, seed {seed}, reason {reason}", carried_out, 180)
        if reason == REBOOT:
            assert len([d for d in client.list() if d.name == config.name]) == 1
            until("a keeper", lambda d=done: keeper.pid_of(d.uuid) or (client.gc() and False))
            client.destroy(config.name)


@pytest.mark.long
def test_a_reboot_loop_slows_down(client: LocalClient) -> None:
    config = guest("pvh", "loop")
    done = client.create(config, CreateOptions())
    domid, starts = done.domid, [monotonic()]
    for _ in range(3):
        client.host.hv.shutdown_domain(domid, REBOOT)
        domid = until("restarted", again(client, config.name, domid)).domid
        starts.append(monotonic())
    pauses = [b - a for a, b in pairwise(starts)]
    assert pauses[1] > 9 and pauses[2] > 18, pauses
    entry = journal.read(done.uuid)
    assert entry is not None and entry.history is not None and entry.history["short"] == 3
    # While it waits it can be destroyed, and then stays away.
    client.host.hv.shutdown_domain(domid, REBOOT)
    until("noted", lambda: (journal.read(done.uuid) or entry).history["short"] == 4)
    client.destroy(config.name)
    until("no keeper", lambda: not keeper.pid_of(done.uuid))
    assert named(client, config.name) is None


@pytest.mark.parametrize("action", ["preserve", "pause", "destroy", "restart"])
def test_a_qemu_that_is_killed(client: LocalClient, action: str) -> None:
    config = guest("hvm", "qemu", on_dm_exit=action)
    done = client.create(config, CreateOptions())
    qemu = find_qemu(done.domid, uuid=done.uuid)
    assert qemu is not None
    until("a keeper", lambda: keeper.pid_of(done.uuid))
    sleep(1.0)  # it looks for the QEMU as it starts
    kill(qemu.pid)
    qemu.close()
    if action == "destroy":
        until("gone", lambda: named(client, config.name) is None)
        return
    if action == "restart":
        found = until("restarted", again(client, config.name, done.domid))
        other = find_qemu(found.domid, uuid=done.uuid)
        assert other is not None
        other.close()
    else:

        def noted() -> bool:
            entry = journal.read(done.uuid)
            return bool(entry and entry.history and entry.history.get("last", {}).get("reason") == "dm-exit")

        until("noted", noted)
        assert (client.list(config.name)[0].state == "paused") is (action == "pause")
        assert keeper.pid_of(done.uuid)
    client.destroy(config.name)


def test_no_zombies_after_an_hvm_guest_restarted(client: LocalClient) -> None:
    """Its first QEMU is this process' child, and the keeper ends it."""
    config = guest("hvm", "zombie")
    done = client.create(config, CreateOptions())
    client.host.hv.shutdown_domain(done.domid, REBOOT)
    found = until("restarted", again(client, config.name, done.domid))
    client.destroy(str(found.domid))

    def zombies() -> list[int]:
        mine = []
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state == "Z":
                mine.append(int(pid))
        return mine

    until("no zombies", lambda: not zombies(), 30)


def test_a_keeper_and_its_server(client: LocalClient, tmp_path: Path) -> None:
    """One supervising process per domain; killed, its successor adopts the server."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    config = guest("pvh", "served", disk=f"['{image},raw,xvda,backendtype=xtool']")
    done = client.create(config, CreateOptions())
    server = until("a server", lambda: backends.server_pid(done.domid))
    first = until("a keeper", lambda: keeper.pid_of(done.uuid))
    assert backends._pids(done.domid) == [first, server]
    assert processes(f"xtool-be-{done.domid}") == [server]
    kill(first)
    client.gc()
    second = until("another", lambda: (pid := keeper.pid_of(done.uuid)) != first and pid)
    until("adopted", lambda: backends._pids(done.domid) == [second, server])
    kill(server)
    until("a new server", lambda: backends.server_pid(done.domid) not in (None, server))
    client.host.hv.shutdown_domain(done.domid, REBOOT)
    found = until("restarted", again(client, config.name, done.domid))
    until("a keeper", lambda: keeper.pid_of(done.uuid))
    until("a server", lambda: backends.server_pid(found.domid))
    client.destroy(config.name)
    assert processes("xtool-be-") == [] or backends.server_pid(found.domid) is None


def test_one_watcher_for_bare_guests(client: LocalClient, tmp_path: Path) -> None:
    """Killed, it is replaced for all; a guest's first disk of ours gives it a keeper, and the others stay."""
    done = [client.create(guest(kind, f"bare-{kind}"), CreateOptions()) for kind in ("pv", "pvh")]
    hvm = client.create(guest("hvm", "bare-not"), CreateOptions(paused=True))
    pid = keeper.pid_of(done[0].uuid)  # held when a create comes back
    assert is_watcher(pid) and keeper.pid_of(done[1].uuid) == pid
    assert not is_watcher(until("a keeper", lambda: keeper.pid_of(hvm.uuid)))
    kill(pid)
    until("its end", lambda: keeper.pid_of(done[0].uuid) != pid)
    client.gc()
    other, same = (until("another", lambda d=domain: keeper.pid_of(d.uuid)) for domain in done)
    assert is_watcher(other) and other == same != pid
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    client.block_attach(done[1].name, parse_disk([f"{image},raw,xvdb,backendtype=xtool"]))
    own = keeper.pid_of(done[1].uuid)
    assert not is_watcher(own) and backends._pids(done[1].domid)[0] == own
    assert keeper.pid_of(done[0].uuid) == other
    # Each is restarted by who looks after it.
    for domain in done:
        client.host.hv.shutdown_domain(domain.domid, REBOOT)
    for domain in done:
        until("restarted", again(client, domain.name, domain.domid))
    assert keeper.pid_of(done[0].uuid) == other
    until("a keeper", lambda: (pid := keeper.pid_of(done[1].uuid)) and not is_watcher(pid))
    for domain in (*done, hvm):
        client.destroy(domain.name)
    until("it ends with the last one", lambda: not is_watcher(other) or _is_zombie(other))


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.long
def test_many_guests_that_power_off_at_once(client: LocalClient) -> None:
    """A few children at a time (eight, and those that take more than 20 s): the others wait, and none
    is forgotten."""
    done = [client.create(guest("pv", f"off-{n}", memory=8), CreateOptions(paused=True)) for n in range(24)]
    most = 0
    for domain in done:
        client.host.hv.shutdown_domain(domain.domid, POWEROFF)

    def gone() -> bool:
        nonlocal most
        most = max(most, len(processes("xtool-act-")))
        return not any(journal.exists(domain.uuid) for domain in done)

    until("all gone", gone, 240)
    assert 1 <= most <= 16, most


@pytest.mark.long
def test_memory_of_a_further_bare_guest(client: LocalClient) -> None:
    """PSS of the watcher and all that it shares memory with, told in the output; the goal is 0.2 MiB for all
    of domain 0, of which this is a tenth."""

    def pss() -> int:
        """KiB, of all processes of xtool but this one."""
        total = 0
        for pid in processes("xtool-"):
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:  # it has just ended
                continue
            total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        return total

    def create(number: int) -> str:
        return client.create(guest("pv", f"mem-{number}", memory=8), CreateOptions(paused=True)).name

    names = [create(number) for number in range(3)]
    sleep(2.0)
    before = pss()
    names += [create(number) for number in range(3, 23)]
    sleep(2.0)
    each = (pss() - before) / 20
    print(f"KiB PSS per bare guest: {each:.1f}")
    for name in names:
        client.destroy(name)
    assert each < 0.2 * 1024


def test_a_glance_agrees_with_the_hypervisor(client: LocalClient) -> None:
    from uuid import UUID

    from xtool.hypercall.glance import Census, Glance, domain_key

    done = client.create(guest("pvh", "glance", on_crash="preserve"), CreateOptions())
    handle = UUID(done.uuid).bytes
    glance, census = Glance(), Census()
    key = domain_key(done.domid, handle)
    try:
        there = census.domains()
        assert key in there.running and not there.ended & there.running
        states = [state for state in client.host.hv.domains() if not state.dying]
        assert there.running | there.ended == {domain_key(s.domid, s.handle) for s in states}
        assert not glance.ended(done.domid, handle) and not glance.ended(0)
        assert glance.ended(done.domid, bytes(16)) and glance.ended(0x7FE0) and glance.ended(-1)
        client.host.hv.shutdown_domain(done.domid, CRASH)
        assert glance.ended(done.domid, handle)
        there = census.domains()
        assert key in there.ended and key not in there.running
        client.destroy("xtool-test-glance")
        assert glance.ended(done.domid, handle)
        there = census.domains()
        assert key not in there.ended | there.running
    finally:
        glance.close()
        census.close()
