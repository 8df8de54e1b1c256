"""``xtool gc``: planted leftovers are found and go; whatever a running domain uses stays."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xtool import paths
from xtool.config import DomainConfig
from xtool.fake.hypervisor import FakeHypervisor
from xtool.hypercall.port import CreateSpec
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.everydayrecords import Leftover
from xtool.toolstack.host import Host
from xtool.toolstack.leftovers import find_leftovers, remove_leftovers
from xtool.toolstack.local import LocalClient

Config = Callable[..., DomainConfig]
RUN = CreateOptions(devices=0.3)
GONE, UUID = 90, "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"


@pytest.fixture
def client(host: Host) -> LocalClient:
    return LocalClient(host)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("proc", "sys/block", "sys/class/net", "run/xen", "var/lib/xen", "dev"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    return tmp_path / "root"


def tree(host: Host, path: str = "/") -> set[str]:
    found = {path}
    for child in host.store.list(path):
        found |= tree(host, f"{path.rstrip('/')}/{child}")
    return found


def what(found: list[Leftover], certain: bool = True) -> set[str]:
    return {item.what for item in found if item.certain == certain}


def plant_nodes(host: Host, domid: int, uuid: str) -> set[str]:
    zero = "/local/domain/0"
    roots = {
        f"/local/domain/{domid}",
        f"/libxl/{domid}",
        f"/vm/{uuid}",
        f"{zero}/device-model/{domid}",
        f"{zero}/backend/vbd/{domid}",
        f"{zero}/backend/xtool-vif/{domid}",
        f"{zero}/error/backend/vbd/{domid}",
    }
    for path in roots:
        host.store.write(f"{path}/some/thing", "x")
    return roots


def test_nothing_is_nothing(host: Host, client: LocalClient, config: Config) -> None:
    assert client.leftovers() == []
    client.create(config(), RUN)
    assert client.leftovers() == [] and client.remove_leftovers() == []


def test_nodes_of_a_domain_that_is_gone(host: Host, client: LocalClient, config: Config) -> None:
    client.create(config(vif="['bridge=xenbr0']"), RUN)
    before = tree(host)
    planted = plant_nodes(host, GONE, UUID)
    host.store.write("/vm/not-a-uuid/x", "")
    found = client.leftovers()
    assert what(found) == planted and what(found, False) == {"/vm/not-a-uuid"}
    assert tree(host) >= planted  # a dry run
    done = client.remove_leftovers()
    assert all(item.removed == item.certain for item in done)
    host.store.rm("/vm/not-a-uuid")
    left = tree(host) - before
    assert not any("90" in path or UUID in path for path in left)  # empty folders of a kind may stay
    assert tree(host) >= before


def test_a_number_that_is_taken_again_is_left_alone(
    host: Host, client: LocalClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new domain has the number by the time the old one's leftovers are to be removed."""
    plant_nodes(host, GONE, UUID)
    monkeypatch.setattr(host.hv, "domain", lambda domid: object() if domid == GONE else None)
    done = client.remove_leftovers()
    assert [item for item in done if item.removed] == [item for item in done if item.domid is None]
    assert all("is there now" in item.problem for item in done if item.domid == GONE)
    assert host.store.exists(f"/local/domain/{GONE}/some/thing")


def test_what_is_in_one_look_only_is_nothing(
    host: Host, client: LocalClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody is removing a domain at this moment: it is gone in the second look."""
    planted = plant_nodes(host, GONE, UUID)
    monkeypatch.setattr(
        "xtool.toolstack.leftovers.time.sleep", lambda _: [host.store.rm(path) for path in planted]
    )
    assert find_leftovers(host, pause=1.0) == []


def test_half_built_and_half_gone_domains(host: Host, client: LocalClient, config: Config) -> None:
    built, gone, kept = (client.create(config(name=name), RUN) for name in ("built", "gone", "kept"))
    journal.update(built.uuid, state="creating")
    host.hv.destroy_domain(gone.domid)
    found = client.leftovers()
    assert {"built", "gone"} <= what(found) and "kept" not in what(found)
    with journal.locked(built.uuid):  # somebody is at work on it
        assert "built" not in what(client.leftovers())
    done = client.remove_leftovers()
    assert all(item.removed for item in done if item.certain), done
    assert [d.name for d in client.list()] == ["kept"] and [e.name for e in journal.entries()] == ["kept"]
    assert client.leftovers() == []
    assert client.list("kept")[0].uuid == kept.uuid


def test_somebody_elses_half_built_domain_is_only_named(host: Host, client: LocalClient) -> None:
    domid = host.hv.create_domain(CreateSpec(handle=bytes(range(16))))
    [item] = client.leftovers()
    assert (item.kind, item.certain, item.domid) == ("domain", False, domid) and "xtool destroy" in item.why
    assert client.remove_leftovers() == [item]
    host.store.write(f"/local/domain/{domid}/name", "theirs")
    assert client.leftovers() == []


def test_files(host: Host, client: LocalClient, config: Config, root: Path) -> None:
    alive = client.create(config(), RUN)
    run = paths.run_dir()
    dead = [run / name for name in (f"qmp-{GONE}.sock", f"backend-{GONE}.pid", f"console-{GONE}.sock")]
    dead += [run / f"console-{GONE}-2.feed", run / "backends" / str(GONE), root / f"run/xen/qmp-libxl-{GONE}"]
    dead.append(run / f".backend-{GONE}.sock.12")
    dead.append(root / f"var/lib/xen/userdata-d.{GONE}.{UUID}.libxl-json")
    keep = [run / f"qmp-{alive.domid}.sock", run / "hvm-boot.bin", run / f"backend-{GONE}.lock"]
    keep += [root / f"var/lib/xen/userdata-d.{alive.domid}.{alive.uuid}.libxl-json", root / "run/xen/other"]
    keep.append(
        root / f"var/lib/xen/userdata-d.{GONE}.{alive.uuid}.xl"
    )  # as xl restore leaves it for a moment
    (run / "backends" / str(GONE)).mkdir(parents=True)
    for path in (*dead, *keep):
        if not path.is_dir():
            path.write_text("x")
    with open(run / f"backend-{GONE}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a backend process lives: its files are not dead
        found = find_leftovers(host, root=root)
        assert not any(item.key.endswith((".lock", f"backends/{GONE}")) for item in found)
    found = remove_leftovers(host, root=root)
    assert {Path(item.key) for item in found} == {*dead, run / f"backend-{GONE}.lock"}
    assert all(item.removed for item in found) and not any(path.exists() for path in dead)
    assert all(path.exists() for path in keep if not path.name.endswith(".lock"))


def test_loop_devices(host: Host, client: LocalClient, config: Config, root: Path) -> None:
    alive = client.create(config(), RUN)

    def loop(number: int, file: str, *, autoclear: str = "0", holder: bool = False) -> None:
        folder = root / f"sys/block/loop{number}"
        (folder / "loop").mkdir(parents=True)
        (folder / "holders").mkdir()
        (folder / "loop/backing_file").write_text(f"{file}\n")
        (folder / "loop/autoclear").write_text(autoclear)
        if holder:
            (folder / "holders/dm-0").mkdir()

    loop(0, "/images/dead.img")
    loop(1, "/images/alive.img")
    loop(2, "/images/mounted.img", holder=True)
    loop(3, "/images/whose.img")
    loop(4, "/images/ours.img", autoclear="1")
    (root / "sys/block/loop5").mkdir()  # free
    dead, living = (f"/local/domain/0/backend/vbd/{domid}/51712" for domid in (GONE, alive.domid))
    host.store.write(f"{dead}/physical-device", "7:0")
    host.store.write(f"{living}/physical-device-path", "/dev/loop1")
    found = [item for item in find_leftovers(host, root=root) if item.kind == "loop"]
    assert {(item.key, item.certain) for item in found} == {("loop0", True), ("loop3", False)}
    # A disk of a domain that runs has it as well: hands off.
    host.store.write(f"{living}/node", "/dev/loop0")
    assert "loop0" not in [item.key for item in find_leftovers(host, root=root)]


def test_interfaces(host: Host, client: LocalClient, config: Config, root: Path) -> None:
    alive = client.create(config(), RUN)
    for name, tap in (
        (f"vif{GONE}.0", True),
        (f"vif{GONE}.1", False),
        (f"vif{GONE}.2-emu", True),
        (f"vif{alive.domid}.0", True),
        ("tap0", True),
        ("eth0", False),
    ):
        (root / "sys/class/net" / name).mkdir()
        if tap:
            (root / "sys/class/net" / name / "tun_flags").write_text("0x1002")
    found = find_leftovers(host, root=root)
    assert what(found) == {f"vif{GONE}.0", f"vif{GONE}.2-emu"} and what(found, False) == {f"vif{GONE}.1"}


@pytest.fixture
def sleeper() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """A process whose command line looks like QEMU's."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        code = "import sys, time; print(flush=True); time.sleep(600)"
        argv = ["qemu-system-i386", "-c", code, *words]
        process = subprocess.Popen(argv, executable=sys.executable, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_processes(
    host: Host,
    client: LocalClient,
    config: Config,
    root: Path,
    sleeper: Callable[..., subprocess.Popen[bytes]],
) -> None:
    """Real processes, by the real /proc: a dead domain's ends, a living one's and a stranger stay."""
    alive = client.create(config(), RUN)
    dead = sleeper("-xen-domid", str(GONE))
    living, stranger = sleeper("-xen-domid", str(alive.domid)), sleeper("-xen-domid", "x")
    for process in (dead, living, stranger):
        (root / "proc" / str(process.pid)).symlink_to(f"/proc/{process.pid}")
    [item] = find_leftovers(host, root=root)
    assert (item.kind, item.key, item.certain, item.domid) == ("process", str(dead.pid), True, GONE)
    [done] = remove_leftovers(host, root=root)
    assert done.removed and not os.path.exists(f"/proc/{dead.pid}")
    assert living.poll() is None and stranger.poll() is None


def test_a_process_that_keeps_a_dying_domain_is_named(
    host: Host, root: Path, sleeper: Callable[..., subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtool.abi import domctl

    domid = host.hv.create_domain(CreateSpec(handle=bytes(range(16))))
    assert isinstance(host.hv, FakeHypervisor)
    host.hv.all[domid].flags |= domctl.XEN_DOMINF_dying
    qemu = sleeper("-xen-domid", str(domid))
    (root / "proc" / str(qemu.pid)).symlink_to(f"/proc/{qemu.pid}")
    found = find_leftovers(host, root=root)
    assert {(item.kind, item.certain) for item in found} == {("domain", False), ("process", False)}
    assert all(not item.removed for item in remove_leftovers(host, root=root)) and qemu.poll() is None


def test_the_host_in_memory_never_looks_at_this_machine(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ``fake:`` every QEMU of this machine would seem to serve a domain that is gone."""
    listed = os.listdir
    asked: list[str] = []
    monkeypatch.setattr(os, "listdir", lambda path=".": asked.append(str(path)) or listed(path))
    find_leftovers(host)
    assert not any(path.startswith(("/proc", "/sys", "/var", "/run/xen")) for path in asked)


def test_on_the_command_line(host: Host, client: LocalClient, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from xtool.cli import app

    client.close = lambda: None  # type: ignore[method-assign]
    plant_nodes(host, GONE, UUID)

    def run(*argv: str) -> tuple[int, str]:
        return app.main(argv, opener=lambda: client), capsys.readouterr().out

    code, out = run("gc")
    assert (
        code == 0
        and f"/local/domain/{GONE}" in out
        and out.endswith("xtool gc --yes removes what is dead.\n")
    )
    code, out = run("gc", "-y", "-o", "json")
    assert code == 0 and all(item["removed"] for item in json.loads(out))
    assert run("gc") == (0, "nothing was left behind\n")
