"""Bad hosts, dying processes and interrupts, on real Xen. The ``no_leaks`` fixture compares the host before
and after each test: that is the assertion most of these are about."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guests import guest
from xtool.builder.build import BUILDERS
from xtool.builder.spec import STAGES
from xtool.errors import DeviceModelError, HostError, UnknownInterfaceError
from xtool.hypercall.xen import XenHypervisor
from xtool.toolstack import create as create_module
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import open_host
from xtool.toolstack.local import LocalClient
from xtool.toolstack.signals import Terminated


def _struck(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The same, but the process hits itself with a signal when it is done."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        os.kill(os.getpid(), number)
        return result

    return wrapper


def _victim(kind: str, stage: str, number: int) -> None:
    """Creates a domain and is struck at the end of ``stage``."""
    client = LocalClient(open_host())
    if stage == "reserve":
        create_module.reserve = _struck(create_module.reserve, number)
    elif stage == "wire":
        create_module._wire = _struck(create_module._wire, number)
    elif stage == "introduce":
        client.host.store.introduce = _struck(client.host.store.introduce, number)  # type: ignore[method-assign]
    elif stage == "device_model":
        create_module._Qemu.ready = _struck(create_module._Qemu.ready, number)  # type: ignore[method-assign]
    else:
        builder = BUILDERS[kind]  # type: ignore[index]
        setattr(builder, stage, _struck(getattr(builder, stage), number))
    client.create(guest(kind, "victim"), CreateOptions())


POINTS = [
    *((kind, stage) for kind in ("pv", "pvh") for stage in ("reserve", *STAGES, "introduce", "wire")),
    *(("hvm", stage) for stage in ("create", "memory", "seal", "wire", "device_model")),
]


def strike(kind: str, stage: str, number: int) -> int:
    """Run the victim in a process of its own (forked: its imports are paid for); its wait status as
    ``Popen.returncode`` has it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            _victim(kind, stage, number)
        except (KeyboardInterrupt, Terminated):
            os._exit(130)
        except BaseException as error:
            os.write(2, f"victim: {error!r}\n".encode())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("kind", "stage"), POINTS)
def test_kill_9_at_each_stage(client: LocalClient, kind: str, stage: str) -> None:
    """Nothing can be undone by a process that is gone; the next one does it."""
    assert strike(kind, stage, signal.SIGKILL) == -signal.SIGKILL
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
    assert strike(kind, stage, number) == 130
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


def test_r21_a_device_model_listens_nowhere(client: LocalClient) -> None:
    """R21: the host's listening sockets are the same while an HVM guest runs that asked for none."""

    def listening() -> set[str]:
        found = set()
        for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
            path = Path(f"/proc/net/{table}")
            if path.exists():
                rows = [line.split() for line in path.read_text().splitlines()[1:]]
                found |= {f"{table} {row[1]}" for row in rows if row[3] == state}
        return found

    before = listening()
    client.create(guest("hvm", "quiet"), CreateOptions(paused=True))
    assert listening() - before == set()
    client.destroy("xtool-test-quiet")
