"""What is done when a domain has ended, on the host in memory: each action, how fast, and what is left of one
that was interrupted."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtool.config import DomainConfig
from xtool.errors import HostMemoryError
from xtool.toolstack import backoff, journal, lifecycle
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host
from xtool.toolstack.lifecycle import device_model_ended
from xtool.toolstack.local import LocalClient

POWEROFF, REBOOT, CRASH = 0, 1, 3
Config = Callable[..., DomainConfig]


def history(uuid: str) -> dict[str, Any]:
    entry = journal.read(uuid)
    assert entry is not None
    return entry.history or {}


@pytest.fixture
def dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A core writer that writes the domain's number."""
    monkeypatch.setenv("XTOOL_DUMP_DIR", str(tmp_path / "dump"))
    module: Any = types.ModuleType("xtool.toolstack.dumpcore")
    module.dump_core = lambda host, domid, path: path.write_text(str(domid))
    monkeypatch.setitem(sys.modules, "xtool.toolstack.dumpcore", module)
    return tmp_path / "dump"


@pytest.mark.parametrize(("action", "left"), [("coredump-destroy", 0), ("coredump-restart", 1)])
def test_a_core_is_written_first(host: Host, config: Config, dumps: Path, action: str, left: int) -> None:
    client = LocalClient(host)
    done = client.create(config(on_crash=action), CreateOptions())
    host.hv.shutdown_domain(done.domid, CRASH)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == ("restarted" if left else "destroyed")
    assert (dumps / "test.core").read_text() == str(done.domid)
    assert len(client.list()) == left


def test_a_core_that_cannot_be_written_stops_nothing(
    host: Host, config: Config, dumps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dumps.write_text("in the way")
    client = LocalClient(host)
    done = client.create(config(on_crash="coredump-destroy"), CreateOptions())
    host.hv.shutdown_domain(done.domid, CRASH)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == "destroyed" and client.list() == []
    assert "no core of test" in caplog.text


def test_one_that_is_preserved_needs_no_keeper(host: Host, config: Config) -> None:
    client = LocalClient(host)
    done = client.create(config(on_crash="preserve"), CreateOptions())
    host.hv.shutdown_domain(done.domid, CRASH)
    client.settle(done.domid, done.uuid)
    entry = journal.read(done.uuid)
    assert entry is not None and (entry.settled, entry.state) == ("preserved", "running")
    assert history(done.uuid)["last"]["reason"] == "crash"
    client.destroy("test")
    assert journal.entries() == []


def test_rename_restart(host: Host, config: Config) -> None:
    client = LocalClient(host)
    done = client.create(config(on_crash="rename-restart"), CreateOptions())
    host.hv.shutdown_domain(done.domid, CRASH)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and (settled.domid, settled.action) == (done.domid, "restarted")
    again = client.list("test")[0]
    assert again.domid == settled.new_domid and again.uuid != done.uuid
    old, new = journal.read(done.uuid), journal.read(again.uuid)
    assert old is not None and (old.name, old.settled) == (f"test-{done.domid}", "preserved")
    assert new is not None and (new.name, new.state, new.then, new.settled) == ("test", "running", "", "")


@pytest.mark.parametrize("after", ["write", "rename"])
def test_rename_restart_that_is_killed(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Between any two of its steps: the domain is there again in the end, once."""

    class Killed(BaseException):
        pass

    client = LocalClient(host)
    done = client.create(config(on_crash="rename-restart"), CreateOptions())
    host.hv.shutdown_domain(done.domid, CRASH)
    with monkeypatch.context() as struck:

        def killed(*_args: object) -> None:
            raise Killed

        struck.setattr(lifecycle, "_rename" if after == "write" else "create_again", killed)
        with pytest.raises(Killed):
            client.settle(done.domid, done.uuid)
    client.gc()
    client.settle(done.domid, done.uuid)  # as its keeper's successor does
    names = sorted(domain.name for domain in client.list())
    assert names == ["test", f"test-{done.domid}"]
    assert all(entry.state == "running" for entry in journal.entries()) and len(journal.entries()) == 2


@pytest.mark.parametrize("finish", ["gc", "keeper"])
@pytest.mark.parametrize("at", ["destroying", "gone", "half-built"])
def test_a_restart_that_is_killed_is_carried_through(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, at: str, finish: str
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_args: object, **_keys: object) -> None:
        raise Killed

    client = LocalClient(host)
    done = client.create(config(), CreateOptions())
    host.hv.shutdown_domain(done.domid, REBOOT)
    with monkeypatch.context() as struck:
        if at == "destroying":
            struck.setattr(host.hv, "destroy_domain", killed)
        elif at == "gone":
            struck.setattr(lifecycle, "create_again", killed)
        else:
            from contextlib import ExitStack

            from xtool.builder.build import BUILDERS

            struck.setattr(BUILDERS["pv"], "seal", killed)
            struck.setattr(ExitStack, "close", lambda self: None)  # kill -9 undoes nothing
        with pytest.raises(Killed):
            client.settle(done.domid, done.uuid)
    entry = journal.read(done.uuid)
    assert entry is not None and entry.then == "restart" and entry.state != "running"
    if finish == "gc":
        results = client.gc()
        assert [(r.name, r.action) for r in results] == [("test", "restarted")]
    else:
        settled = client.settle(done.domid, done.uuid)
        assert settled is not None and settled.action == "restarted"
    again = client.list("test")
    assert len(client.list()) == 1 and again[0].uuid == done.uuid and again[0].domid != done.domid
    entry = journal.read(done.uuid)
    assert entry is not None and (entry.state, entry.then, entry.domid) == ("running", "", again[0].domid)


def test_a_destroy_that_is_killed_is_no_restart(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = LocalClient(host)
    done = client.create(config(), CreateOptions())
    host.hv.shutdown_domain(done.domid, REBOOT)
    client.settle(done.domid, done.uuid)
    with monkeypatch.context() as struck:

        def killed(_domid: int) -> None:
            raise KeyboardInterrupt

        struck.setattr(host.hv, "destroy_domain", killed)
        with pytest.raises(KeyboardInterrupt):
            client.destroy("test")
    assert [result.action for result in client.gc()] == ["rolled-back"]
    assert client.list() == [] and journal.entries() == []


def test_a_restart_that_fails_is_told_and_forgotten(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = LocalClient(host)
    done = client.create(config(), CreateOptions())
    journal.update(done.uuid, state="destroying", then="restart")
    monkeypatch.setattr(host.hv, "populate", _no_memory)
    assert [result.action for result in client.gc()] == ["rolled-back"]
    assert client.list() == [] and journal.entries() == [] and "could not be restarted" in caplog.text


def _no_memory(*_args: object, **_keys: object) -> None:
    raise HostMemoryError("populate", 12)


def test_a_reboot_loop_slows_down(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The pauses of a guest that ends at once, on a clock that only sleeping moves."""
    now, slept = [1000.0], [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        slept[0] += seconds

    monkeypatch.setattr(lifecycle, "sleep", sleep)
    monkeypatch.setattr(lifecycle, "clock_gettime", lambda clock: now[0])
    monkeypatch.setattr("xtool.toolstack.names.clock_gettime", lambda clock: now[0])
    client = LocalClient(host)
    done = client.create(config(), CreateOptions())
    domid, pauses = done.domid, []
    for _ in range(7):
        slept[0] = 0.0
        host.hv.shutdown_domain(domid, REBOOT)
        settled = client.settle(domid, done.uuid)
        assert settled is not None and settled.new_domid is not None
        domid = settled.new_domid
        pauses.append(round(slept[0]))
    assert pauses == [0, 10, 20, 40, 60, 60, 60]
    assert history(done.uuid)["short"] == 7 and "restarted in 60 s" in caplog.text
    now[0] += 30  # it lives
    slept[0] = 0.0
    host.hv.shutdown_domain(domid, REBOOT)
    client.settle(domid, done.uuid)
    assert slept[0] == 0 and history(done.uuid)["short"] == 0


def test_it_can_be_destroyed_while_it_waits(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = LocalClient(host)
    done = client.create(config(), CreateOptions())
    now = clock_gettime(CLOCK_BOOTTIME)
    journal.update(done.uuid, history={"started": now, "short": 3})
    host.hv.shutdown_domain(done.domid, REBOOT)
    monkeypatch.setattr(lifecycle, "sleep", lambda seconds: client.destroy("test"))
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == "destroyed" and client.list() == []


def test_poweroff_does_not_wait(host: Host, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "sleep", lambda seconds: pytest.fail("waits"))
    client = LocalClient(host)
    done = client.create(config(), CreateOptions())
    journal.update(done.uuid, history={"started": clock_gettime(CLOCK_BOOTTIME), "short": 9})
    host.hv.shutdown_domain(done.domid, POWEROFF)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == "destroyed"


@pytest.mark.parametrize(
    ("action", "result", "state"),
    [
        ("", None, "running"),
        ("preserve", None, "running"),
        ("pause", "paused", "paused"),
        ("destroy", "destroyed", ""),
        ("restart", "restarted", "running"),
    ],
)
def test_its_qemu_dies(
    host: Host,
    config: Config,
    caplog: pytest.LogCaptureFixture,
    action: str,
    result: str | None,
    state: str,
) -> None:
    client = LocalClient(host)
    keys = {"on_dm_exit": action} if action else {}
    done = client.create(config(**keys), CreateOptions())
    settled = device_model_ended(host, done.domid, done.uuid)
    assert (settled.action if settled else None) == result
    assert "has ended by itself" in caplog.text and caplog.records[0].levelno == logging.WARNING
    domains = client.list()
    assert [d.state.replace("blocked", "running") for d in domains] == ([state] if state else [])
    if domains:
        assert (domains[0].domid == done.domid) is (result != "restarted")
        assert history(done.uuid)["last"]["reason"] == "dm-exit"


def test_a_qemu_that_was_ended_on_purpose(host: Host, config: Config) -> None:
    client = LocalClient(host)
    done = client.create(config(on_dm_exit="destroy"), CreateOptions())
    host.hv.shutdown_domain(done.domid, REBOOT)  # what counts is the domain's own end
    assert device_model_ended(host, done.domid, done.uuid) is None
    client.settle(done.domid, done.uuid)
    assert device_model_ended(host, done.domid, done.uuid) is None  # by now it has another number
    assert len(client.list()) == 1
    client.destroy("test")
    assert device_model_ended(host, done.domid, done.uuid) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from(["started", "ended", "short", "until", "last"]), _JSON) | st.none(),
    st.floats(0, 1e9),
)
def test_whatever_the_history_says_the_pause_is_bounded(known: dict[str, Any] | None, now: float) -> None:
    after = backoff.ended(known, now, "reboot")
    assert 0.0 <= backoff.pause(after, now) <= backoff.SPACING[-1]
    assert backoff.ended(after, now + 1, "reboot") == after
    assert "ended" not in backoff.started(after, now)
