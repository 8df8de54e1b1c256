"""What every client of the toolstack must do: in this process and through xtoold, on the host in memory and,
in dom0, on Xen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from xtool import paths
from xtool.client.routes import IN_PROCESS, ROUTES
from xtool.client.socketclient import SocketClient
from xtool.config import DomainConfig, parse_config
from xtool.config.single import parse_disk, parse_vif
from xtool.daemon.hosts import shared
from xtool.daemon.main import Daemon, listen
from xtool.daemon.threads import ThreadRunner
from xtool.errors import (
    ConfigError,
    DeviceError,
    DomainExistsError,
    DomainNotFoundError,
    ImageError,
    UsageError,
    XtoolError,
)
from xtool.toolstack.api import Client, CreateOptions, LifecycleResult
from xtool.toolstack.host import open_host
from xtool.toolstack.local import LocalClient

KERNEL = Path(__file__).resolve().parents[2] / "build" / "guest" / "tiny-pv.elf"
NAME = "xtool-test-contract"


class Steps:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, done: int, total: int | None = None) -> None:
        pass


def _fake(tmp_path: Path, through: str) -> Iterator[Client]:
    host = open_host("fake:")
    if through == "local":
        yield LocalClient(host)
        host.close()
        return
    hosts = shared(host)
    daemon = Daemon(hosts, ThreadRunner(hosts))
    path = tmp_path / "sock"
    daemon.start([listen(path, daemon.access)])
    client = SocketClient(str(path))
    yield cast("Client", client)
    client.close()
    daemon.close()


@pytest.fixture(scope="module")
def xen_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a daemon on this host; one for all tests, since a cold start takes long in emulation."""
    read, write = os.pipe()
    path = tmp_path_factory.mktemp("daemon") / "sock"
    argv = [sys.executable, "-m", "xtool.daemon", "--socket", str(path), "--ready-fd", str(write)]
    process = subprocess.Popen(argv, pass_fds=(write,))
    os.close(write)
    assert os.read(read, 1) == b"1", "the daemon did not come up (does another one run?)"
    os.close(read)
    yield str(path)
    process.terminate()
    process.wait(60)


def _xen(request: pytest.FixtureRequest, through: str) -> Iterator[Client]:
    if not os.path.exists("/dev/xen/privcmd"):
        pytest.skip("no Xen on this machine: run in the lab's dom0")
    if through == "local":
        local = LocalClient(open_host())
        yield local
        local.close()
        return
    client = SocketClient(request.getfixturevalue("xen_daemon"))
    yield cast("Client", client)
    client.close()


@pytest.fixture(
    params=[
        "local-fake",
        "daemon-fake",
        *(pytest.param(f"{w}-xen", marks=pytest.mark.xen) for w in ("local", "daemon")),
    ]
)
def client(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Client]:
    through, _, where = request.param.partition("-")
    if where == "fake":
        monkeypatch.setenv("XTOOL_RUN_DIR", str(tmp_path / "run"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        paths.run_dir().mkdir()
    for found in _fake(tmp_path, through) if where == "fake" else _xen(request, through):
        yield found
        for domain in found.list():
            if domain.name.startswith(NAME):
                found.destroy(str(domain.domid))


@pytest.fixture
def config() -> Callable[..., DomainConfig]:
    def make(name: str = NAME, **keys: object) -> DomainConfig:
        lines = [f"{key}: {value}" for key, value in {"memory": 16, "kernel": KERNEL, **keys}.items()]
        return parse_config("\n".join([f"name: {name}", "type: pv", *lines]), "test.yaml", "/")

    return make


Config = Callable[..., DomainConfig]
PAUSED = CreateOptions(paused=True)


def test_a_domain_from_create_to_destroy(client: Client, config: Config) -> None:
    steps = Steps()
    made = client.create(config(vcpus=2), PAUSED, steps)
    assert made.name == NAME and made.type == "pv" and made.domid > 0
    assert {"memory", "seal", "wire"} <= {span.name for span in made.timings}
    assert any("building" in line for line in steps.lines)
    (found,) = client.list(NAME)
    assert (found.domid, found.uuid, found.state, found.managed) == (made.domid, made.uuid, "paused", True)
    assert client.list(made.uuid) == client.list(str(made.domid))
    assert made.domid in [domain.domid for domain in client.list()]
    assert client.unpause(NAME) == LifecycleResult(made.domid, NAME, "unpaused")
    assert client.list(NAME)[0].state != "paused"
    assert client.pause(NAME).action == "paused"
    assert [v.vcpu for v in client.vcpu_list(NAME)] == [0, 1]
    assert client.settle(made.domid, made.uuid) is None  # it has not ended
    assert client.destroy(NAME) == LifecycleResult(made.domid, NAME, "destroyed")
    with pytest.raises(DomainNotFoundError) as caught:
        client.list(NAME)
    assert caught.value.exit_code == 9 and "xtool list" in (caught.value.hint or "")


def test_a_name_is_taken_once(client: Client, config: Config) -> None:
    client.create(config(), PAUSED)
    with pytest.raises(DomainExistsError):
        client.create(config(), PAUSED)
    assert len([d for d in client.list() if d.name == NAME]) == 1


def test_what_cannot_be_created(client: Client, config: Config, tmp_path: Path) -> None:
    before = client.list()
    with pytest.raises(ImageError):
        client.create(config(kernel=tmp_path / "none"), PAUSED)
    (tmp_path / "text").write_text("no kernel")
    with pytest.raises(ImageError):
        client.create(config(kernel=tmp_path / "text"), PAUSED)
    assert [d.domid for d in client.list()] == [d.domid for d in before]


def test_names_that_are_none(client: Client) -> None:
    for name in ("no such", "a/b", "a%2fb", "ü\n", "0x", "-1", "99999", "..", "?a=b"):
        for verb in (client.pause, client.destroy, client.block_list, client.wiring):
            with pytest.raises(DomainNotFoundError):
                verb(name)


def test_domain_0_stays(client: Client) -> None:
    with pytest.raises((UsageError, DomainNotFoundError)):  # the host in memory has none
        client.destroy("0")


def test_the_host(client: Client) -> None:
    info = client.info()
    assert info.xen_version.startswith("4.") and info.cpus > 0 and info.total_memory >= info.free_memory > 0
    assert isinstance(info.xen_caps, tuple) and "xen-3.0-x86_64" in info.xen_caps
    assert isinstance(client.dmesg(), str)
    assert client.gc() == []


def test_a_dry_run(client: Client, config: Config) -> None:
    built = client.dry_run(config())
    assert built.name == NAME and built.pages_populated >= 4096
    assert built.regions and all(region.size > 0 for region in built.regions)


def test_disks_and_interfaces_of_a_paused_guest(client: Client, config: Config, tmp_path: Path) -> None:
    client.create(config(), PAUSED)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    disk = parse_disk([f"vdev=xvda,format=raw,target={image}"])
    done = client.block_attach(NAME, disk)
    assert (done.kind, done.action) == ("vbd", "attached")
    (found,) = client.block_list(NAME)
    assert (found.vdev, found.target, found.devid) == ("xvda", str(image), done.devid)
    with pytest.raises(DeviceError):
        client.block_attach(NAME, disk)
    with pytest.raises(DeviceError):
        client.block_detach(NAME, "xvdz")
    assert client.block_detach(NAME, "xvda", force=True, deadline=0.5).action == "detached"
    assert client.block_list(NAME) == []
    if "fake" in os.environ.get("PYTEST_CURRENT_TEST", ""):  # the lab's bridge is not for every test
        attached = client.network_attach(NAME, parse_vif(["bridge=xenbr0"]))
        (vif,) = client.network_list(NAME)
        assert vif.devid == attached.devid and vif.bridge == "xenbr0"
        limited = client.network_limit(NAME, str(vif.devid), rate="10Mb/s")
        assert limited.action == "limited"
        assert client.network_detach(NAME, vif.mac, force=True, deadline=0.5).action == "detached"


def test_errors_are_the_same(client: Client, config: Config) -> None:
    client.create(config(), PAUSED)
    with pytest.raises(DeviceError, match="kept"):
        list(client.console_log(NAME))
    with pytest.raises(XtoolError) as caught:
        client.cd_insert(NAME, "hdc", "/none.iso")
    assert caught.value.message and caught.value.exit_code
    with pytest.raises(XtoolError) as caught:
        client.shutdown("0")
    assert isinstance(caught.value, (UsageError, DomainNotFoundError))


def test_the_table_of_routes_is_whole() -> None:
    """A verb that is not in the table cannot be asked of the daemon."""
    methods = {name for name in dir(Client) if callable(getattr(Client, name)) and not name.startswith("_")}
    missing = methods - set(ROUTES) - set(IN_PROCESS)
    assert not missing, f"add to xtool/client/routes.py a line such as: Route({min(missing)!r}, 'POST', ...)"
    assert set(ROUTES) <= methods and not set(ROUTES) & set(IN_PROCESS)


def test_a_wrong_configuration_is_told_as_such(client: Client) -> None:
    if isinstance(client, LocalClient):
        pytest.skip("nothing is sent")
    with pytest.raises(ConfigError) as caught:
        client.dry_run({"name": "x", "memroy": 5})  # type: ignore[arg-type]
    assert "memroy" in caught.value.message or "memroy" in str(vars(caught.value))
