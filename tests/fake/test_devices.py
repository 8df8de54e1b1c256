"""Disks and interfaces on the host in memory: at creation, on running domains, and when things go wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from xtool import paths
from xtool.cli.devices import _disks as disk_table
from xtool.config import DomainConfig
from xtool.config.single import parse_disk, parse_vif
from xtool.devices.hotplug.fake import FakeKernel
from xtool.devices.vif import stable_mac
from xtool.errors import (
    DeadlineError,
    DeviceError,
    DomainNotFoundError,
    HostError,
    ImageInUseError,
    UsageError,
    XtoolError,
)
from xtool.fake.hypervisor import FakeHypervisor
from xtool.toolstack import journal, wiring
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.create import create
from xtool.toolstack.destroy import recover
from xtool.toolstack.devices import attach_disk, attach_vif, detach, disks
from xtool.toolstack.host import Host
from xtool.toolstack.live import in_flight
from xtool.toolstack.local import LocalClient
from xtool.toolstack.names import find

Config = Callable[..., DomainConfig]
RUN = CreateOptions(devices=0.3)


class Killed(BaseException):
    """The process is gone: no undo runs."""


def kernel(host: Host) -> FakeKernel:
    assert isinstance(host.hotplug, FakeKernel)
    return host.hotplug


def tree(host: Host, path: str = "/") -> set[str]:
    found = {path}
    for child in host.store.list(path):
        found |= tree(host, f"{path.rstrip('/')}/{child}")
    return found


#: Folders that stay empty once a device of their kind was there, by custom.
CUSTOM = {"/local/domain/0/backend", "/local/domain/0/error", "/local/domain/0/error/backend"}


def assert_clean(host: Host) -> None:
    """No domain, no node, no loop device, no interface, no journal entry."""
    assert isinstance(host.hv, FakeHypervisor) and host.hv.all == {}
    assert kernel(host).served == {} and kernel(host).loops == {} and kernel(host).links == {}
    left = {
        path
        for path in tree(host)
        if path.startswith(("/libxl/", "/vm/", "/local/domain/0/")) or path.count("/") > 3
    }
    left = {path for path in left if path.rpartition("/")[0] not in CUSTOM} - CUSTOM
    assert left == set()
    assert [name for name in os.listdir(paths.run_dir() / "domains") if name != "names.lock"] == []


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def client(host: Host) -> LocalClient:
    return LocalClient(host)


def with_devices(config: Config, image: Path, kind: str = "pv", **keys: object) -> DomainConfig:
    return config(kind, disk=f"['{image},raw,xvda']", vif="['bridge=xenbr0,rate=10Mb/s@50ms']", **keys)


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_devices_from_create_to_destroy(
    host: Host, client: LocalClient, config: Config, image: Path, kind: str
) -> None:
    done = create(host, with_devices(config, image, kind), RUN)
    domid, fake = done.domid, kernel(host)
    assert [span.name for span in done.timings][-2:] == ["wire", "devices"]
    # The loop device is held by its backend alone, and the interface is on its bridge.
    [(file, writes, holders)] = fake.loops.values()
    assert (file, writes) == (str(image), True) and "toolstack" not in holders and len(holders) == 1
    assert fake.links[f"vif{domid}.0"].bridge == "xenbr0"
    back = f"/local/domain/0/backend/vif/{domid}/0"
    assert host.store.get(f"{back}/hotplug-status") == "connected"
    assert host.store.get(f"{back}/rate") == "62500,50000"
    assert host.store.get(f"{back}/mac") == stable_mac(done.uuid, 0)
    fake.run_drivers(domid)
    [disk] = client.block_list("test")
    assert (disk.vdev, disk.backend, disk.state, disk.target) == ("xvda", "phy", "connected", str(image))
    assert "loop device" in disk.reason and disk.format == "raw" and not disk.readonly
    [vif] = client.network_list("test")
    assert (vif.interface, vif.state, vif.bridge) == (f"vif{domid}.0", "connected", "xenbr0")
    # A guest that rewrites what it owns hides nothing from us (R18).
    front = f"/local/domain/{domid}/device/vbd/51712"
    host.store.write(f"{front}/backend", "/local/domain/0/backend/vbd/99/1")
    host.store.rm(f"/local/domain/{domid}/device/vif")
    assert len(client.block_list("test")) == 1
    client.destroy("test")
    assert_clean(host)


def test_a_restart_brings_back_what_was_attached(
    host: Host, client: LocalClient, config: Config, image: Path
) -> None:
    done = client.create(with_devices(config, image), RUN)
    second = image.with_name("second.img")
    second.write_bytes(bytes(4096))
    client.block_attach("test", parse_disk([f"{second},raw,xvdb,ro"]))
    client.network_attach("test", parse_vif([]))
    assert [n.devid for n in client.network_list("test")] == [0, 1]
    macs = [n.mac for n in client.network_list("test")]
    client.network_detach("test", "0")
    host.hv.shutdown_domain(done.domid, 1)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == "restarted"
    assert [(d.vdev, d.readonly) for d in client.block_list("test")] == [("xvda", False), ("xvdb", True)]
    [left] = client.network_list("test")
    assert (left.devid, left.mac) == (1, macs[1])
    client.destroy("test")
    assert_clean(host)


def test_restarted_while_somebody_waited_for_its_lock(
    host: Host, client: LocalClient, config: Config, image: Path
) -> None:
    """What was looked up before is followed to its new number, or is told to be gone."""
    done = create(host, config("pv", name="web"), CreateOptions())
    before = find(host, "web")
    host.hv.shutdown_domain(done.domid, 1)
    assert client.settle(done.domid, done.uuid) is not None
    after = find(host, "web")
    assert after.state.domid != before.state.domid
    tree = f"/local/domain/{before.state.domid}"
    attached = attach_disk(host, before, parse_disk([f"{image},raw,xvdb"]), 5.0)
    assert attached.domid == after.state.domid and not host.store.exists(tree)
    attach_vif(host, before, parse_vif(["bridge=xenbr0"]), 5.0)
    assert [d.vdev for d in client.block_list("web")] == ["xvdb"] and len(client.network_list("web")) == 1
    assert detach(host, before, "vbd", "xvdb", force=True, deadline=0.1).domid == after.state.domid
    client.destroy("web")
    for wanted in (
        lambda: attach_disk(host, before, parse_disk([f"{image},raw,xvdb"]), 5.0),
        lambda: detach(host, before, "vif", "0", force=True, deadline=0.1),
    ):
        with pytest.raises(DomainNotFoundError, match="has just ended"):
            wanted()


def test_killed_while_undoing(
    host: Host, config: Config, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The domain is gone already, its devices' nodes are not: ``gc`` finds them by the domain's number."""

    def die(*_: object) -> None:
        raise Killed

    kernel(host).deaf.add("vif")
    with monkeypatch.context() as patch:
        for name in ("forget", "offline"):
            patch.setattr(f"xtool.toolstack.create.{name}", die)
        patch.setattr(journal, "remove", die)
        with pytest.raises((Killed, DeadlineError)):
            create(host, with_devices(config, image), RUN)
    assert kernel(host).loops and not host.hv.domains()
    assert [done.action for done in recover(host)] == ["rolled-back"]
    assert_clean(host)


def test_a_domain_that_is_kept_gives_its_disks_to_the_next(
    host: Host, client: LocalClient, config: Config, image: Path
) -> None:
    done = client.create(with_devices(config, image, on_crash="rename-restart"), RUN)
    host.hv.shutdown_domain(done.domid, 3)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.new_domid is not None
    assert client.block_list(f"test-{done.domid}") == client.network_list(str(done.domid)) == []
    assert client.block_list("test")[0].target == str(image)
    for name in ("test", f"test-{done.domid}"):
        client.destroy(name)
    assert_clean(host)


def test_attaching_and_detaching(host: Host, client: LocalClient, config: Config, image: Path) -> None:
    done = client.create(config(), RUN)
    kernel(host).run_drivers(done.domid)
    assert client.block_attach("test", parse_disk([f"{image},raw,xvdb"])).action == "attached"
    with pytest.raises(DeviceError, match="there is a vbd 51728"):
        client.block_attach("test", parse_disk(["vdev=51728", f"target={image}", "shared=1"]))
    with pytest.raises(ImageInUseError):
        client.block_attach("test", parse_disk([f"{image},raw,xvdc"]))
    assert len(client.block_list("test")) == 1
    entry = journal.read(done.uuid)
    assert entry is not None and entry.config is not None and len(entry.config["disk"]) == 1
    # A guest that holds on is asked again, or told.
    kernel(host).stubborn.add(done.domid)
    with pytest.raises(DeadlineError, match="does not let go"):
        client.block_detach("test", "xvdb", deadline=0.05)
    assert client.block_list("test")[0].state == "closing"
    assert client.block_detach("test", "xvdb", force=True, deadline=0.05).action == "detached"
    assert client.block_list("test") == [] and kernel(host).loops == {}
    with pytest.raises(DeviceError, match="no disk xvdb"):
        client.block_detach("test", "xvdb")
    entry = journal.read(done.uuid)
    assert entry is not None and "disk" not in (entry.config or {}) and entry.pending is None
    client.destroy("test")
    assert_clean(host)


def test_limits_of_a_running_domain(
    host: Host, client: LocalClient, config: Config, image: Path, tmp_path: Path
) -> None:
    """At creation, changed while it runs, and as they are after a restart."""
    other = tmp_path / "other.img"
    other.write_bytes(bytes(4096))
    disks = f"[{{target: {image}, vdev: xvda, bytes-per-second: 20MiB}}, '{other},raw,xvdb']"
    done = client.create(config(disk=disks, vif="['bridge=xenbr0,rate=10Mb/s', '']"), RUN)
    first, second = client.block_list("test")
    assert (first.backend, first.bytes_per_second, first.ops_per_second) == ("xtool", 20 << 20, None)
    assert "bytes-per-second" in first.reason
    assert (second.backend, second.bytes_per_second, second.live) == ("phy", None, {})
    base = f"/local/domain/0/backend/xtool-vbd/{done.domid}/51712"
    assert host.store.get(f"{base}/xtool-bytes-per-second") == str(20 << 20)

    assert client.block_limit("test", "xvda", ops_per_second=500).action == "limited"
    assert host.store.get(f"{base}/xtool-ops-per-second") == "500"
    assert host.store.get(f"{base}/xtool-bytes-per-second") == str(20 << 20)
    client.block_limit("test", "51712", bytes_per_second=0)
    assert not host.store.exists(f"{base}/xtool-bytes-per-second")
    assert (client.block_list("test")[0].bytes_per_second, client.block_list("test")[0].ops_per_second) == (
        None,
        500,
    )
    with pytest.raises(UsageError, match="served by phy, which knows no limits"):
        client.block_limit("test", "xvdb", ops_per_second=5)
    with pytest.raises(DeviceError, match="no disk xvdc"):
        client.block_limit("test", "xvdc", ops_per_second=5)

    back = f"/local/domain/0/backend/vif/{done.domid}"
    client.network_limit("test", "1", rate="1MB/s@20ms")
    assert host.store.get(f"{back}/1/rate") == "20000,20000"
    assert host.store.get_perms(f"{back}/1/rate") == host.store.get_perms(f"{back}/1/mac")
    client.network_limit("test", "0", rate="")
    assert not host.store.exists(f"{back}/0/rate")
    assert [n.rate for n in client.network_list("test")] == ["", "1000000B/s@20000us"]
    with pytest.raises(UsageError, match="netback"):
        client.network_limit("test", "0", rate_in="1Mb/s")
    with pytest.raises(UsageError, match="is not a rate"):
        client.network_limit("test", "0", rate="quick")

    entry = journal.read(done.uuid)
    assert entry is not None and entry.config is not None
    kept = DomainConfig.model_validate(entry.config)
    assert [(d.bytes_per_second, d.ops_per_second) for d in kept.disks] == [(None, 500), (None, None)]
    assert [v.rate for v in kept.vifs] == [None, "1MB/s@20ms"]
    client.destroy("test")
    assert_clean(host)


def test_lists_show_what_our_backends_say(
    host: Host, client: LocalClient, config: Config, image: Path
) -> None:
    done = client.create(config(disk=f"['{image},raw,xvda,backendtype=xtool']"), RUN)
    found = find(host, "test")
    line = {"folder": "xtool-vbd", "kind": "vbd", "domid": done.domid, "devid": 51712, "reason": ""}
    counters = {"read_bytes": 3 << 20, "written_bytes": 512, "errors": 2}
    queues = [{"unanswered": 2, "pending": 1, "refs": [8]}, {"unanswered": 4, "pending": 0, "refs": [9]}]
    line |= {"state": "connected", "queues": queues, "counters": counters}
    asked: list[int] = []

    def answers(domid: int) -> list[dict[str, object]]:
        asked.append(domid)
        return [line]

    [disk] = disks(host, found, answers)
    assert asked == [done.domid] and disk.problem == ""
    assert disk.live == {"queues": queues, "counters": counters} and in_flight(disk.live) == 7
    table = disk_table([disk])
    assert "In flight" in table and "3MiB" in table and "512B" in table and "Limit" not in table
    assert "In flight" not in disk_table(disks(host, found))

    line["reason"] = "ring: req_prod is 77"
    assert disk_table(disks(host, found, answers)).endswith("\nxvda: ring: req_prod is 77")

    def silent(domid: int) -> list[dict[str, object]]:
        raise DeadlineError("the backends did not answer")

    assert disks(host, found, silent)[0].problem == "the backends did not answer"
    # Parked: nobody is there to be asked, xenstore has the reason.
    base = f"/local/domain/0/backend/xtool-vbd/{done.domid}/51712"
    host.store.write(f"{base}/state", "6")
    host.store.write(f"/local/domain/0/error/backend/xtool-vbd/{done.domid}/51712/error", "died 5 times")
    [disk] = disks(host, found, lambda domid: [])
    assert (disk.state, disk.problem, disk.live) == ("closed", "died 5 times", {})
    client.destroy("test")


def test_qdisk_lets_go_by_itself(host: Host, client: LocalClient, config: Config, image: Path) -> None:
    done = client.create(config(disk=f"['{image},qcow2,xvda']"), RUN)
    [disk] = client.block_list("test")
    assert (disk.backend, disk.format, disk.target) == ("qdisk", "qcow2", str(image))
    base = f"/local/domain/0/backend/qdisk/{done.domid}/51712"
    assert host.store.get(f"{base}/params") == f"qcow2:{image}"
    client.block_detach("test", "xvda")
    assert not host.store.exists(base)
    client.destroy("test")
    assert_clean(host)


@pytest.mark.parametrize("folder", ["vbd", "vif"])
@pytest.mark.parametrize("how", ["refusing", "deaf"])
def test_a_backend_that_does_not_come_up(
    host: Host, config: Config, image: Path, folder: str, how: str
) -> None:
    if how == "refusing":
        kernel(host).refusing[folder] = "22 creating vbd structure"
    else:
        kernel(host).deaf.add(folder)
    error = {"refusing": HostError, "deaf": DeadlineError}[how]
    match = {"refusing": "gave up: 22 creating vbd structure", "deaf": f"did not come up.*{folder}"}[how]
    with pytest.raises(error, match=match):
        create(host, with_devices(config, image), RUN)
    assert_clean(host)
    done = create(host, config(), RUN)
    client = LocalClient(host)
    with pytest.raises(error, match=match):
        if folder == "vbd":
            client.block_attach("test", parse_disk([f"{image},raw,xvdb"]), deadline=0.1)
        else:
            client.network_attach("test", parse_vif([]), deadline=0.1)
    entry = journal.read(done.uuid)
    assert entry is not None and entry.pending is None and not {"disk", "vif"} & set(entry.config or {})
    client.destroy("test")
    assert_clean(host)


@pytest.mark.parametrize("point", ["open", "nodes", "ready", "_look", "_plug"])
def test_a_failure_anywhere_leaves_nothing(
    host: Host, config: Config, image: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    original = getattr(wiring.Wiring, point)

    def fail(*arguments: object, **named: object) -> object:
        original(*arguments, **named)
        raise RuntimeError("injected")

    monkeypatch.setattr(wiring.Wiring, point, fail)
    with pytest.raises(RuntimeError):
        create(host, with_devices(config, image), RUN)
    assert_clean(host)


@pytest.mark.parametrize("verb", ["create", "attach", "detach"])
@pytest.mark.parametrize("nth", range(1, 40, 3))
def test_killed_anywhere_then_gc(
    host: Host,
    client: LocalClient,
    config: Config,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    nth: int,
) -> None:
    """kill -9 at the nth request to xenstore: afterwards ``gc`` leaves the old or the new state (fault
    lists 1 and 2). Undo is made harmless, and what the process held open is let go as the kernel does."""
    domain = with_devices(config, image) if verb == "create" else config()
    if verb != "create":
        client.create(domain, RUN)
    disk = parse_disk([f"{image},raw,xvdb"])
    if verb == "detach":
        client.block_attach("test", disk)
    calls = {"create": lambda: create(host, domain, RUN), "attach": lambda: client.block_attach("test", disk)}
    calls["detach"] = lambda: client.block_detach("test", "xvdb")  # type: ignore[assignment, return-value]
    left = [nth]
    dead = [False]
    exchange = type(host.store)._exchange  # type: ignore[attr-defined]

    def counted(store: object, *arguments: object, **named: object) -> object:
        if store is host.store:
            left[0] -= 1
            if left[0] <= 0:
                dead[0] = True
                raise Killed
        return exchange(store, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(type(host.store), "_exchange", counted)
        for module, name in ((journal, "write"), (journal, "remove")):
            patch.setattr(module, name, _unless(dead, getattr(module, name)))
        for name in ("destroy_domain",):
            patch.setattr(host.hv, name, _unless(dead, getattr(host.hv, name)))
        patch.setattr(host.hotplug, "run_script", _unless(dead, host.hotplug.run_script))
        try:
            calls[verb]()
        except Killed:
            pass
    for device in list(kernel(host).loops):
        kernel(host).let_go(device, "toolstack")
    recover(host)
    if verb == "create" and dead[0]:
        assert_clean(host)
    elif verb != "create":
        entry = journal.entries()[0]
        shown = [d.vdev for d in client.block_list("test")]
        kept = [d["vdev"] for d in (entry.config or {}).get("disk", ())]
        assert shown == kept and entry.pending is None
        assert len(kernel(host).loops) == len(shown)
    for info in client.list():
        client.destroy(str(info.domid))
    assert_clean(host)


def _unless(dead: list[bool], function: Callable[..., object]) -> Callable[..., object]:
    def call(*arguments: object, **named: object) -> object:
        if dead[0]:
            raise Killed
        return function(*arguments, **named)

    return call


def test_a_qcow2_and_a_url_are_written_by_one_only(
    host: Host, client: LocalClient, config: Config, image: Path, tmp_path: Path
) -> None:
    disks = f"['{image},qcow2,xvda,backendtype=xtool', 'nbd://HOST/a,raw,xvdb']"
    client.create(config(name="first", disk=disks), RUN)
    assert [disk.backend for disk in client.block_list("first")] == ["xtool", "xtool"]
    (tmp_path / "hard").hardlink_to(image)
    for other in (f"{tmp_path}/hard,qcow2,xvda", "nbd://host:10809/a,raw,xvda", "nbd://host/%61,raw,xvda,ro"):
        with pytest.raises(ImageInUseError, match="'first' has it open"):
            create(host, config(name="b", disk=f"['{other}']"), RUN)
    client.create(config(name="b", disk="['nbd://host/b,raw,xvda']"), RUN)
    web = "http://host/a.qcow2,qcow2,xvdc,ro"
    for name in ("first", "b"):
        client.block_attach(name, parse_disk([web]))
        client.destroy(name)


def test_an_image_is_written_by_one_only(
    host: Host, client: LocalClient, config: Config, image: Path, tmp_path: Path
) -> None:
    """The same image under other names: symbolic link, hard link, a loop device of the host (fault 9)."""
    client.create(config(name="first", disk=f"['{image},raw,xvda']"), RUN)
    (tmp_path / "soft").symlink_to(image)
    (tmp_path / "hard").hardlink_to(image)
    for name in ("disk.img", "soft", "hard"):
        for access in ("rw", "ro"):
            with pytest.raises(ImageInUseError, match="'first' has it open"):
                create(host, config(name="b", disk=f"['{tmp_path}/{name},raw,xvda,{access}']"), RUN)
    both = f"[{{target: {image}, vdev: xvda}}, {{target: {tmp_path}/hard, vdev: xvdb}}]"
    client.destroy("first")
    with pytest.raises(ImageInUseError, match="its own disk xvda"):
        create(host, config(disk=both), RUN)
    readers = [f"r{n}" for n in range(2)]
    for name in readers:
        client.create(config(name=name, disk=f"['{image},raw,xvda,ro']"), RUN)
    with pytest.raises(ImageInUseError):
        client.block_attach("r0", parse_disk([f"{image},raw,xvdb"]))
    for name in readers:
        client.destroy(name)
    held = host.hotplug.open_disk(str(image), readonly=False, direct_io=False, loop=True)
    with pytest.raises(ImageInUseError, match="/dev/loop0"):
        create(host, config(disk=f"['{image},raw,xvda']"), RUN)
    held.close()
    assert_clean(host)


def test_domains_of_other_tools_count_too(host: Host, config: Config, image: Path) -> None:
    host.store.write("/libxl/77/device/vbd/51712/params", str(image))
    host.store.write("/libxl/77/device/vbd/51712/mode", "w")
    host.store.write("/libxl/77/device/vbd/51712/dev", "xvda")
    with pytest.raises(ImageInUseError, match=r"domain 77 \(xvda\)"):
        create(host, config(disk=f"['{image},raw,xvda']"), RUN)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"disk": "['/nowhere/x.img,raw,xvda']"}, HostError, "does not exist"),
        ({"disk": "['/dev/null,raw,xvda']"}, HostError, "neither a file nor a block device"),
        ({"vif": "['bridge=nobr']"}, HostError, "no bridge nobr"),
        ({"vif": "['ip=10.0.0.1']"}, UsageError, "ip has no effect without a script"),
        ({"vif": "['backend=net']"}, UsageError, "backends in other domains"),
    ],
)
def test_refused_before_anything_is_made(
    host: Host, config: Config, keys: dict[str, object], error: type[XtoolError], message: str
) -> None:
    count = host.hv.count
    with pytest.raises(error, match=message):
        create(host, config(**keys), RUN)
    assert host.hv.all == {} and host.hv.count - count < 5  # type: ignore[attr-defined]


def test_scripts_are_run_as_xl_does(host: Host, client: LocalClient, config: Config, image: Path) -> None:
    done = client.create(
        config(vif="['script=vif-route,ip=10.0.0.1']", disk="['x,raw,xvda,script=block-iscsi']"), RUN
    )
    fake, domid = kernel(host), done.domid
    ran = {script.path: script for script in fake.scripts}
    vif = ran["/etc/xen/scripts/vif-route"]
    assert vif.arguments == ("online", "type_if=vif") and vif.environment["vif"] == f"vif{domid}.0"
    assert vif.environment["XENBUS_PATH"] == f"backend/vif/{domid}/0"
    assert ran["/etc/xen/scripts/block-iscsi"].arguments == ("add",)
    client.destroy("test")
    assert [s.arguments[0] for s in fake.scripts[2:]] == ["remove", "offline"]
    assert_clean(host)


def test_media_of_paravirtual_drives(host: Host, client: LocalClient, config: Config, image: Path) -> None:
    done = client.create(config(disk="['vdev=xvdc,cdrom']"), RUN)
    [drive] = client.block_list("test")
    assert (drive.backend, drive.target, drive.cdrom) == ("xtool", "", True)
    assert client.cd_insert("test", "xvdc", str(image)).action == "inserted"
    base = f"/local/domain/0/backend/xtool-vbd/{done.domid}"
    assert host.store.get(f"{base}/51744/params") == f"raw:{image}"
    assert client.block_list("test")[0].target == str(image)
    client.cd_eject("test", "xvdc")
    assert client.block_list("test")[0].target == ""
    with pytest.raises(DeviceError, match="no CD drive xvdd"):
        client.cd_eject("test", "xvdd")
    client.destroy("test")
    assert_clean(host)


def test_a_flood_of_state_changes_is_harmless(
    host: Host, client: LocalClient, config: Config, image: Path
) -> None:
    """A guest that writes nonsense into its own nodes while its device goes (R6, R7, fault list 29)."""
    done = client.create(with_devices(config, image), RUN)
    front = f"/local/domain/{done.domid}/device/vbd/51712/state"
    for value in ("", "99", "x" * 2000, "4", "-1", "6", "\u00e9", "4") * 50:
        host.store.write(front, value)
    assert client.block_list("test")[0].state == "init-wait"
    client.block_detach("test", "xvda", deadline=1)
    client.destroy("test")
    assert_clean(host)


def test_an_hvm_guest_from_create_to_destroy(
    host: Host, client: LocalClient, image: Path, tmp_path: Path
) -> None:
    """Emulated and paravirtual disks and cards side by side, and the medium of an emulated drive."""
    from xtool.config import parse_config

    firmware = Path(__file__).resolve().parents[2] / "build" / "guest" / "tiny-pvh.elf"

    other = tmp_path / "cd.iso"
    other.write_bytes(bytes(4096))
    lines = ["name: test", "type: hvm", "memory: 64", f"firmware: {firmware}", "vif: ['']"]
    lines.append(f"disk: ['{image},raw,hda', 'vdev=hdc,cdrom']")
    done = client.create(parse_config("\n".join(lines), "x.yaml", "/"), RUN)
    assert [(d.vdev, d.backend, d.target) for d in client.block_list("test")] == [
        ("hda", "phy", str(image)),
        ("hdc", "emulated", ""),
    ]
    assert client.network_list("test")[0].type == "vif_ioemu"
    client.cd_insert("test", "hdc", str(other))
    entry = journal.read(done.uuid)
    assert entry is not None and (entry.config or {})["disk"][1]["target"] == str(other)
    assert client.block_list("test")[1].target == str(other)
    with pytest.raises(ImageInUseError):
        client.cd_insert("test", "hdc", str(_held(host, tmp_path / "busy")))
    client.cd_eject("test", "hdc")
    assert client.block_list("test")[1].target == ""
    with pytest.raises(DeviceError):
        client.cd_eject("test", "hda")
    with pytest.raises(UsageError, match="emulated"):
        client.block_attach("test", parse_disk(["vdev=hdd", "devtype=cdrom"]))
    with pytest.raises(UsageError, match="emulated"):
        client.network_attach("test", parse_vif(["type=ioemu"]))
    for device in list(kernel(host).loops):
        kernel(host).let_go(device, "toolstack")
    client.destroy("test")
    assert_clean(host)


def _held(host: Host, path: Path) -> Path:
    """A file that this host itself has open for writing."""
    path.write_bytes(bytes(4096))
    host.hotplug.open_disk(str(path), readonly=False, direct_io=False, loop=True)
    return path


@pytest.mark.parametrize("way", ["destroy", "detach", "killed"])
def test_an_interface_of_ours_has_a_tap(host: Host, client: LocalClient, config: Config, way: str) -> None:
    """Made and plugged before the backend looks; gone with the device, also when we are killed between."""
    vifs = "[{backendtype: xtool, mtu: 1400}, {network: user, forwards: [tcp:2222:22]}]"
    made = create(host, config(vif=vifs), RUN)
    links, folder = kernel(host).links, f"/local/domain/0/backend/xtool-vif/{made.domid}"
    assert list(links) == [f"vif{made.domid}.0"] and links[f"vif{made.domid}.0"].bridge == "xenbr0"
    assert host.store.get(f"{folder}/0/hotplug-status") == "connected"
    assert host.store.get(f"/local/domain/{made.domid}/device/vif/0/mtu") == "1400"
    assert host.store.get(f"{folder}/1/forwards") == "tcp:127.0.0.1:2222:22"
    assert host.store.get(f"{folder}/1/bridge") is None
    if way == "detach":
        client.network_detach("test", "0", deadline=0.3, force=True)
        assert not links and host.store.get(f"{folder}/1/state") is not None
    elif way == "killed":
        entry = journal.entries()[0]
        journal.update(entry.uuid, state="destroying")
        recover(host)
        assert_clean(host)
        return
    client.destroy("test")
    assert_clean(host)
