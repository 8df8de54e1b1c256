"""Bad hosts, dying processes and interrupts, on real Xen. The ``no_leaks`` fixture compares the host before
and after each test: that is the assertion most of these are about."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests import ROOT, guest
from xtool.builder.spec import STAGES
from xtool.errors import DeviceModelError, HostError, UnknownInterfaceError
from xtool.hypercall.xen import XenHypervisor
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

#: Runs a create and stops itself, by the given signal, at the end of the given stage.
_VICTIM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from guests import guest
from xtool.builder.build import BUILDERS
from xtool.toolstack import create as create_module
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.local import LocalClient, open_client
kind, stage, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
def struck(function):
    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        os.kill(os.getpid(), number)
        return result
    return wrapper
client = open_client()
if stage == "reserve":
    create_module.reserve = struck(create_module.reserve)
elif stage == "wire":
    create_module._wire = struck(create_module._wire)
elif stage == "introduce":
    client.host.store.introduce = struck(client.host.store.introduce)
elif stage == "device_model":
    create_module._Qemu.ready = struck(create_module._Qemu.ready)
else:
    setattr(BUILDERS[kind], stage, struck(getattr(BUILDERS[kind], stage)))
client.create(guest(kind, "victim"), CreateOptions())
"""

POINTS = [
    *((kind, stage) for kind in ("pv", "pvh") for stage in ("reserve", *STAGES, "introduce", "wire")),
    *(("hvm", stage) for stage in ("create", "memory", "seal", "wire", "device_model")),
]


@pytest.fixture
def client(xen_host: Host) -> Iterator[LocalClient]:
    client = LocalClient(xen_host)
    yield client
    for domain in client.list():
        if domain.name.startswith("xtool-test-"):
            client.destroy(str(domain.domid))


def strike(kind: str, stage: str, number: int) -> subprocess.CompletedProcess[str]:
    code = _VICTIM.format(tests=str(ROOT / "tests" / "xen"))
    argv = [sys.executable, "-c", code, kind, stage, str(number)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize(("kind", "stage"), POINTS)
def test_kill_9_at_each_stage(client: LocalClient, kind: str, stage: str) -> None:
    """Nothing can be undone by a process that is gone; the next one does it."""
    done = strike(kind, stage, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [entry.name for entry in journal.entries()]
    assert left == ["xtool-test-victim"]
    assert [r.name for r in client.gc()] == left
    assert journal.entries() == []
    assert client.gc() == []


@pytest.mark.parametrize(("kind", "stage"), POINTS[1::3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_undo_everything(
    client: LocalClient, kind: str, stage: str, number: signal.Signals
) -> None:
    done = strike(kind, stage, number)
    assert done.returncode != 0
    assert journal.entries() == []


def test_qemu_missing(client: LocalClient) -> None:
    with pytest.raises(DeviceModelError, match="/nonexistent/qemu"):
        client.create(guest("hvm", "noqemu", device_model_override="/nonexistent/qemu"), CreateOptions())


def test_qemu_dying_at_start(client: LocalClient, tmp_path: Path) -> None:
    fake = tmp_path / "qemu"
    fake.write_text("#!/bin/sh\necho 'the dog ate my firmware' >&2\nexit 3\n")
    fake.chmod(0o755)
    with pytest.raises(DeviceModelError, match="the dog ate my firmware"):
        client.create(guest("hvm", "dying", device_model_override=fake), CreateOptions())


def test_qemu_killed_at_start(client: LocalClient, tmp_path: Path) -> None:
    fake = tmp_path / "qemu"
    fake.write_text("#!/bin/sh\nkill -9 $$\n")
    fake.chmod(0o755)
    with pytest.raises(DeviceModelError, match="domain"):
        client.create(guest("hvm", "killed", device_model_override=fake), CreateOptions())


def test_hvmloader_missing(client: LocalClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtool.toolstack.host._HVMLOADER", ("/nonexistent",))
    with pytest.raises(HostError, match="hvmloader is missing") as caught:
        client.create(guest("hvm", "noloader"), CreateOptions())
    assert caught.value.hint and "firmware_override" in caught.value.hint


def test_an_unknown_interface_version() -> None:
    with pytest.raises(UnknownInterfaceError, match=r"Xen 4\.\d+.* speaks a domctl interface") as caught:
        XenHypervisor(domctl_versions=(0x7, 0x99))
    assert "0x7, 0x99" in caught.value.message
    with pytest.raises(UnknownInterfaceError, match="sysctl"):
        XenHypervisor(sysctl_versions=(0x3,))


def test_no_privilege() -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "xtool", "list"], capture_output=True, text=True
    )
    assert done.returncode == 5, done
    assert "not allowed to open /dev/xen/privcmd" in done.stderr and "root" in done.stderr


def test_twice_the_same_name(client: LocalClient) -> None:
    from xtool.errors import DomainExistsError

    client.create(guest("pv", "twice"), CreateOptions())
    with pytest.raises(DomainExistsError, match="already named"):
        client.create(guest("pvh", "twice"), CreateOptions())
    assert len([d for d in client.list() if d.name == "xtool-test-twice"]) == 1


def test_many_cycles_return_every_page(client: LocalClient) -> None:
    """B5's soak in small: the fixture compares free memory to the page."""
    for _ in range(5):
        for kind in ("pv", "pvh"):
            client.create(guest(kind, "cycle"), CreateOptions(paused=True))
            client.destroy("xtool-test-cycle")


def test_a_keeper_that_is_killed_changes_nothing(client: LocalClient) -> None:
    from time import monotonic, sleep

    result = client.create(guest("pv", "orphan"), CreateOptions())
    until = monotonic() + 30
    while not (entry := journal.read(result.uuid)) or not entry.keeper:
        assert monotonic() < until
        sleep(0.1)
    os.kill(entry.keeper, signal.SIGKILL)
    assert client.list("xtool-test-orphan")[0].state in ("blocked", "running")
    assert client.shutdown("xtool-test-orphan", wait=True, deadline=60).action == "destroyed"
