"""The everyday verbs on the host in memory: rename, set, config, uptime, channels, displays, PCI devices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from xtool.cli.everyday import span, viewer
from xtool.config import DomainConfig
from xtool.errors import (
    ConfigError,
    DeviceError,
    DomainExistsError,
    DomainNotFoundError,
    StoreError,
    UsageError,
)
from xtool.fake.hypervisor import FakeHypervisor
from xtool.toolstack import journal, pci
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.everydayrecords import DisplayInfo, SettingChange
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient
from xtool.toolstack.names import find

Config = Callable[..., DomainConfig]
RUN = CreateOptions(devices=0.3)


@pytest.fixture
def client(host: Host) -> LocalClient:
    return LocalClient(host)


def fake(host: Host) -> FakeHypervisor:
    assert isinstance(host.hv, FakeHypervisor)
    return host.hv


# --- rename ---------------------------------------------------------------------------------------------
def test_rename_is_seen_everywhere(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config(), RUN)
    result = client.rename("test", "other")
    assert (result.domid, result.name, result.action) == (done.domid, "other", "renamed from test")
    assert host.store.get(f"/local/domain/{done.domid}/name") == "other"
    assert host.store.get(f"/vm/{done.uuid}/name") == "other"
    entry = journal.read(done.uuid)
    assert entry is not None and entry.name == "other" and (entry.config or {})["name"] == "other"
    with pytest.raises(DomainNotFoundError):
        client.list("test")
    # A restart keeps it, and the old name is free.
    host.hv.shutdown_domain(done.domid, 1)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == "restarted"
    assert client.list("other")[0].domid == settled.new_domid
    client.create(config(), RUN)


@pytest.mark.parametrize("name", ["7", "a/b", " x", "", "11111111-2222-3333-4444-555555555555"])
def test_a_name_that_is_none(client: LocalClient, config: Config, name: str) -> None:
    client.create(config(), RUN)
    with pytest.raises(UsageError):
        client.rename("test", name)
    assert client.list("test")


def test_a_name_that_is_taken(host: Host, client: LocalClient, config: Config) -> None:
    client.create(config(), RUN)
    client.create(config(name="other"), RUN)
    with pytest.raises(DomainExistsError, match="already named 'other'"):
        client.rename("test", "other")
    journal.write(journal.Entry("11111111-2222-3333-4444-555555555555", "soon", "pv", "creating"))
    with pytest.raises(DomainExistsError, match="is being created"):
        client.rename("test", "soon")
    assert client.rename("test", "test").name == "test"


class OneAtATime:
    """A port whose calls do not overlap: the host in memory is for one thread. What lies between two calls
    does."""

    def __init__(self, port: object, lock: AbstractContextManager[object]) -> None:
        self._port, self._lock = port, lock

    def __getattr__(self, name: str) -> object:
        value = getattr(self._port, name)
        if not callable(value) or name in ("batch", "watch", "transaction"):
            return value

        def call(*args: object, **more: object) -> object:
            with self._lock:
                return value(*args, **more)

        return call


def test_of_many_who_want_a_name_one_gets_it(host: Host, client: LocalClient, config: Config) -> None:
    """Renames and a create, all at once: the name stands for exactly one domain afterwards."""
    names = [f"guest{n}" for n in range(4)]
    for name in names:
        client.create(config(name=name), RUN)
    lock = threading.RLock()
    host.store, host.hv = OneAtATime(host.store, lock), OneAtATime(host.hv, lock)  # type: ignore[assignment]
    start = threading.Barrier(len(names) + 1)
    won: list[str] = []
    lost: list[DomainExistsError] = []

    def wants(act: Callable[[], object], who: str) -> None:
        start.wait()
        try:
            act()
            won.append(who)
        except DomainExistsError as error:
            lost.append(error)

    def rename(who: str) -> Callable[[], object]:
        return lambda: client.rename(who, "web")

    acts = [(rename(name), name) for name in names]
    acts.append((lambda: client.create(config(name="web"), RUN), "created"))
    threads = [threading.Thread(target=wants, args=act) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == len(names)
    assert [d.name for d in client.list()].count("web") == 1
    assert [e.name for e in journal.entries()].count("web") == 1


def test_a_rename_that_fails_changes_nothing(
    host: Host, client: LocalClient, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = client.create(config(), RUN)

    def fail(*_: object, **__: object) -> None:
        raise StoreError("write", "/x", "EIO")

    monkeypatch.setattr(host.store, "atomically", fail)
    with pytest.raises(StoreError):
        client.rename("test", "other")
    entry = journal.read(done.uuid)
    assert entry is not None and entry.name == "test"


def test_a_domain_of_somebody_elses_is_renamed(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config(), RUN)
    journal.remove(done.uuid)
    assert client.rename("test", "theirs").action == "renamed from test"
    assert client.list("theirs")[0].managed is False and journal.entries() == []
    with pytest.raises(UsageError):
        client.rename("0", "x") if fake(host).domain(0) else _rename_zero(host)


def _rename_zero(host: Host) -> None:
    from xtool.toolstack.rename import rename

    found = find(host, "theirs")
    rename(host, found._replace(state=found.state._replace(domid=0)), "x")


# --- set and config -------------------------------------------------------------------------------------
def when(changes: tuple[SettingChange, ...]) -> dict[str, str]:
    return {change.key: change.when for change in changes}


def test_what_can_be_changed_now_is(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config("pvh", memory=64, maxmem=128, vcpus=1, maxvcpus=2), RUN)
    result = client.set_config("test", ["memory=32", "vcpus=2", "cpus=1-2", "on_crash=preserve", "cap=50"])
    assert set(when(result.changes).values()) == {"now"}
    root = f"/local/domain/{done.domid}"
    assert host.store.get(f"{root}/memory/target") == str(32 << 10)
    assert fake(host).all[done.domid].max_pages == (32 + 1) << 8
    assert host.store.get(f"{root}/cpu/1/availability") == "online"
    assert fake(host).all[done.domid].affinities[0][0] == {1, 2}
    host.hv.shutdown_domain(done.domid, 3)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == "preserved"
    [shown] = client.config("test")
    assert shown.config is not None and shown.config["memory"] == 32 and shown.config["maxmem"] == 128


def test_the_rest_is_kept_for_the_next_start(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config("pvh", memory=64, cmdline="a"), RUN)
    result = client.set_config("test", ["memory=96", "cmdline=b c", "vcpus=2"])
    assert when(result.changes) == dict.fromkeys(("memory", "vcpus", "cmdline"), "next start")
    memory = next(change for change in result.changes if change.key == "memory")
    assert (memory.before, memory.after) == (64, 96) and "at most 64 MiB" in memory.why
    assert fake(host).all[done.domid].max_pages == (64 + 1) << 8
    host.hv.shutdown_domain(done.domid, 1)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.new_domid is not None
    state = client.list("test")[0]
    assert state.maxmem >= 96 << 20 and fake(host).all[settled.new_domid].vcpus == 2


def test_with_a_name_that_is_taken_nothing_changes(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config(), RUN)
    client.create(config(name="other"), RUN)
    before = journal.read(done.uuid)
    with pytest.raises(DomainExistsError):
        client.set_config("test", ["memory=8", "name=other"])
    assert journal.read(done.uuid) == before
    assert client.set_config("test", ["cmdline=x", "name=free"]).name == "free"
    entry = journal.read(done.uuid)
    assert entry is not None and entry.config is not None
    assert (entry.name, entry.config["name"], entry.config["cmdline"]) == ("free", "free", "x")


def test_paths_are_relative_to_the_callers_folder(client: LocalClient, config: Config) -> None:
    client.create(config(), RUN)
    [change] = client.set_config("test", ["ramdisk=rd.img"], base_dir="/boot").changes
    assert (change.after, change.when) == ("/boot/rd.img", "next start")


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_a_restart_with_less_memory(host: Host, client: LocalClient, config: Config, kind: str) -> None:
    done = client.create(config(kind, memory=64), RUN)
    client.set_config("test", ["memory=32"])
    host.hv.shutdown_domain(done.domid, 1)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == "restarted"
    [shown] = client.config("test")
    assert shown.config is not None and (shown.config["memory"], shown.config["maxmem"]) == (32, 64)


def test_less_memory_leaves_the_room_to_grow(host: Host, client: LocalClient, config: Config) -> None:
    client.create(config("pvh", memory=64), RUN)
    [change] = client.set_config("test", ["memory=32"]).changes
    assert change.when == "now"
    [change] = client.set_config("test", ["memory=64"]).changes  # and back, still without a restart
    assert change.when == "now"
    assert client.set_config("test", ["memory=64MiB"]).changes == ()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["memroy=64"], ConfigError),
        (["memory=lots"], ConfigError),
        (["memory=32", "vcpus=0"], ConfigError),
        (["memory"], ConfigError),
        (["type=pv"], UsageError),
        (["uuid=11111111-2222-3333-4444-555555555555"], UsageError),
        ([], UsageError),
    ],
)
def test_a_wrong_setting_changes_nothing(
    host: Host, client: LocalClient, config: Config, settings: list[str], error: type[Exception]
) -> None:
    done = client.create(config("pvh", memory=64), RUN)
    before = journal.read(done.uuid)
    with pytest.raises(error):
        client.set_config("test", settings)
    assert journal.read(done.uuid) == before
    assert host.store.get(f"/local/domain/{done.domid}/memory/target") == str(64 << 10)


def test_what_was_changed_before_a_failure_is_kept(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config("pvh", memory=64), RUN)
    fake(host).fail = {"set_affinity": 22}
    with pytest.raises(Exception, match="set_affinity"):
        client.set_config("test", ["memory=32", "cpus=0-1", "cmdline=x"])
    entry = journal.read(done.uuid)
    assert entry is not None and entry.config is not None
    assert entry.config["memory"] == 32 and "cpus" not in entry.config and "cmdline" not in entry.config


def test_a_name_and_limits_by_set(host: Host, client: LocalClient, config: Config, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    disks = f"['{image},raw,xvda,backendtype=xtool', 'vdev=xvdb,target={image}2']"
    (tmp_path / "disk.img2").write_bytes(bytes(4096))
    done = client.create(config(disk=disks, vif="['bridge=xenbr0']"), RUN)
    result = client.set_config("test", ["disk[0].bytes-per-second=1MiB", "vif[0].rate=10Mb/s", "name=new"])
    assert when(result.changes) == {"disk": "now", "vif": "now", "name": "now"} and result.name == "new"
    back = f"/local/domain/0/backend/xtool-vbd/{done.domid}/51712"
    assert host.store.get(f"{back}/xtool-bytes-per-second") == str(1 << 20)
    assert host.store.get(f"/local/domain/0/backend/vif/{done.domid}/0/rate") == "62500,50000"
    assert client.block_list("new")[0].bytes_per_second == 1 << 20
    [change] = client.set_config("new", ["disk[1].ops-per-second=5"]).changes
    assert change.when == "next start" and "knows no limits" in change.why
    [change] = client.set_config("new", [f"disk[1].target={image}3"]).changes
    assert change.when == "next start" and "block-attach" in change.why
    entry = journal.read(done.uuid)
    assert entry is not None and entry.name == "new"


def test_a_stranger_has_no_configuration(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config(), RUN)
    journal.remove(done.uuid)
    with pytest.raises(UsageError, match="not created by xtool"):
        client.set_config("test", ["memory=32"])
    assert client.config("test")[0].config is None and client.config()[0].config is None


def test_passwords_are_left_out(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config(), RUN)
    entry = journal.read(done.uuid)
    assert entry is not None
    journal.update(done.uuid, config={**(entry.config or {}), "vncpasswd": "hush"})
    [shown] = client.config("test")
    assert shown.hidden == ("vncpasswd",) and "hush" not in str(shown)
    assert client.config("test", secrets=True)[0].config == {**(entry.config or {}), "vncpasswd": "hush"}


# --- looking --------------------------------------------------------------------------------------------
def test_uptime(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config(), RUN)
    [one] = client.uptime(["test"])
    assert one.uptime is not None and 0 <= one.uptime < 60 and one.start_time
    host.store.write(f"/vm/{done.uuid}/start_time", "soon")
    assert client.uptime()[0].uptime is None
    with pytest.raises(DomainNotFoundError):
        client.uptime(["nobody"])
    texts = [span(value) for value in (None, 59, 3661, 90061, 200000)]
    assert texts == ["-", "0:00:59", "1:01:01", "1 day, 1:01:01", "2 days, 7:33:20"]


def test_channels(host: Host, client: LocalClient, config: Config) -> None:
    channel = "['name=agent,connection=socket,path=/run/agent', 'name=log,connection=pty']"
    client.create(config("pvh", channel=channel), RUN)
    first, second = client.channel_list("test")
    assert (first.devid, first.name, first.connection, first.path) == (1, "agent", "socket", "/run/agent")
    assert (second.name, second.connection, second.backend) == ("log", "pty", "xtool")
    assert second.path.endswith("console-1-2.sock") and second.state == "init-wait"


def test_a_display(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config(), RUN)
    with pytest.raises(DeviceError, match="has no VNC display"):
        client.display("test")
    root = f"/local/domain/{done.domid}/console"
    for port in ("x", "0", "70000", "99999999999"):
        host.store.write(f"{root}/vnc-port", port)
        with pytest.raises(DeviceError):
            client.display("test")
    host.store.write(f"{root}/vnc-port", "5901")
    assert client.display("test") == DisplayInfo(done.domid, "test", "127.0.0.1", 5901, False)
    host.store.write(f"/vm/{done.uuid}/vncpasswd", "xl's")
    assert client.display("test").password == "" and client.display("test").protected
    assert client.display("test", password=True).password == "xl's"


def test_a_viewer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = DisplayInfo(1, "w", "0.0.0.0", 5902, True, "pw")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    assert viewer(at) is None
    for name, words in (
        ("remote-viewer", ["vnc://127.0.0.1:5902"]),
        ("gvncviewer", ["127.0.0.1:2"]),
        ("vncviewer", ["-autopass", "127.0.0.1::5902"]),
    ):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert viewer(at) == [str(tmp_path / name), *words]
    monkeypatch.delenv("DISPLAY")
    assert viewer(at) is None


def test_pci_devices(host: Host, client: LocalClient, config: Config, tmp_path: Path) -> None:
    done = client.create(config(), RUN)
    assert client.pci_list("test") == [] and client.pci_assignable_list() == []
    for address, vendor in (("0000:03:00.0", "0x8086"), ("0000:03:00.1", "0x8086")):
        device = tmp_path / "sys/bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "device").write_text("0x10fb\n")
        (device / "class").write_text("0x020000\n")
        (tmp_path / "groups/7").mkdir(parents=True, exist_ok=True)
        (device / "iommu_group").symlink_to(tmp_path / "groups/7")
        (tmp_path / "sys/bus/pci/drivers/pciback" / address).mkdir(parents=True)
    (tmp_path / "sys/bus/pci/drivers/pciback/new_slot").write_text("")
    back = f"/local/domain/0/backend/pci/{done.domid}/0"
    nodes = {"num_devs": "1", "dev-0": "0000:03:00.1", "vdevfn-0": "28", "state-0": "3"}
    for name, value in nodes.items():
        host.store.write(f"{back}/{name}", value)
    host.store.write("/libxl/pciback/0000-03-00-0/driver_path", "/sys/bus/pci/drivers/ixgbe")
    free, taken = pci.assignable(host, tmp_path)
    assert (free.address, free.assigned, free.original_driver) == ("0000:03:00.0", None, "ixgbe")
    assert (free.vendor, free.device, free.device_class, free.iommu_group) == ("8086", "10fb", "020000", "7")
    assert (taken.address, taken.assigned) == ("0000:03:00.1", done.domid)
    [given] = pci.of_domain(host, find(host, "test"), tmp_path)
    assert (given.address, given.vdevfn, given.state) == ("0000:03:00.1", "28", "initialised")
    assert given.description == "8086:10fb class 020000"
    host.store.write(f"{back}/num_devs", "9" * 50)  # nonsense is no device
    assert client.pci_list("test") == []
