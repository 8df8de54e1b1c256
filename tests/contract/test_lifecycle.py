"""What any client of the toolstack does with domains: on the host in memory, real Xen, and libvirt's drivers.

A further client is a further entry of ``CLIENTS``: a context manager that gives a ``Site``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from xtool.config import DomainConfig, parse_config
from xtool.errors import DomainExistsError, DomainNotFoundError, HostError
from xtool.toolstack.api import Client, CreateOptions, DomainInfo

HAVE_XEN = os.path.exists("/dev/xen/privcmd")
GUESTS = Path(__file__).resolve().parents[2] / "build" / "guest"
PAUSED = CreateOptions(paused=True)


@dataclass
class Site:
    """``keys`` are lines of a domain file that runs there."""

    client: Client
    keys: str

    def config(self, name: str, more: str = "") -> DomainConfig:
        return parse_config(f"name: {name}\n{self.keys}\n{more}", "test.yaml", "/")


def _tiny() -> str:
    kernel = GUESTS / "tiny-pv.elf"
    if not kernel.exists():
        pytest.fail(f"{kernel} is missing: run scripts/build-guests")
    return f"type: pv\nmemory: 16\nkernel: {kernel}"


@contextmanager
def fake() -> Iterator[Site]:
    from xtool.toolstack.local import open_client

    client = open_client("fake:")
    yield Site(client, _tiny())
    client.close()


@contextmanager
def xen() -> Iterator[Site]:
    from xtool.toolstack.local import open_client

    client = open_client("xen:")
    before = {d.uuid for d in client.list()}
    yield Site(client, _tiny())
    for domain in client.list():
        if domain.uuid not in before:
            client.destroy(domain.uuid)
    client.close()


def _libvirt(uri: str) -> Client:
    from xtool.drivers.libvirt import open_libvirt

    try:
        return open_libvirt(uri)
    except HostError as error:
        if "binding is missing" in error.message:
            pytest.skip(error.message)
        raise


@contextmanager
def libvirt_test() -> Iterator[Site]:
    client = _libvirt("test:///default")
    yield Site(client, "type: hvm\nmemory: 16")
    client.close()


@contextmanager
def libvirt_embed() -> Iterator[Site]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no QEMU on this machine")
    root = tempfile.mkdtemp(prefix="xt-")
    try:
        client = _libvirt(f"qemu:///embed?root={root}&accel=tcg")
        yield Site(client, "type: hvm\nmemory: 16\nvga: none\nserial: pty")
        for domain in client.list():
            client.destroy(domain.uuid)
        client.close()
        _holder_ends(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _holder_ends(root: str) -> None:
    """It holds this lock from when it decides to end until it has."""
    import fcntl
    import time

    end = time.monotonic() + 60
    while os.path.exists(f"{root}/xtool.sock"):
        assert time.monotonic() < end, "the holder stays although no domain runs"
        time.sleep(0.1)
    with open(f"{root}/xtool.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


CLIENTS: dict[str, Callable[[], AbstractContextManager[Site]]] = {
    "fake": fake,
    "xen": xen,
    "libvirt-test": libvirt_test,
    "libvirt-embed": libvirt_embed,
}
_MARKS = {"xen": [pytest.mark.xen, pytest.mark.skipif(not HAVE_XEN, reason="no Xen on this machine")]}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=_MARKS.get(n, [])) for n in CLIENTS])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    patch = pytest.MonkeyPatch()
    if request.param != "xen":
        patch.setenv("XTOOL_RUN_DIR", str(tmp_path_factory.mktemp("run")))
    with CLIENTS[request.param]() as made:
        yield made
    patch.undo()


@pytest.fixture
def name(site: Site) -> Iterator[str]:
    """A name for a domain, which is gone afterwards."""
    name = f"xtool-test-{uuid4().hex[:8]}"
    yield name
    try:
        site.client.destroy(name)
    except DomainNotFoundError:
        pass


def one(site: Site, name: str) -> DomainInfo:
    (found,) = site.client.list(name)
    return found


def test_create_list_destroy(site: Site, name: str) -> None:
    before = {d.uuid for d in site.client.list()}
    made = site.client.create(site.config(name), PAUSED)
    assert made.name == name and made.domid > 0 and made.build_time > 0 and made.timings
    found = one(site, name)
    assert (found.domid, found.uuid, found.type) == (made.domid, made.uuid, made.type)
    assert found.state == "paused" and found.managed and found.memory == 16 << 20 and found.vcpus == 1
    assert {d.uuid for d in site.client.list()} == {*before, made.uuid}
    gone = site.client.destroy(name)
    assert (gone.domid, gone.name, gone.action) == (made.domid, name, "destroyed")
    assert {d.uuid for d in site.client.list()} == before


def test_a_domain_is_found_by_name_id_and_uuid(site: Site, name: str) -> None:
    made = site.client.create(site.config(name), PAUSED)
    for text in (name, str(made.domid), made.uuid, made.uuid.upper()):
        assert one(site, text).uuid == made.uuid


def test_the_uuid_is_the_files(site: Site, name: str) -> None:
    uuid = str(uuid4())
    assert site.client.create(site.config(name, f"uuid: {uuid}"), PAUSED).uuid == uuid
    assert one(site, uuid).name == name


def test_unpause_and_pause(site: Site, name: str) -> None:
    site.client.create(site.config(name), PAUSED)
    assert site.client.unpause(name).action == "unpaused"
    assert one(site, name).state in ("running", "blocked")
    assert site.client.pause(name).action == "paused"
    assert one(site, name).state == "paused"


def test_pausing_twice_is_no_error(site: Site, name: str) -> None:
    site.client.create(site.config(name), PAUSED)
    assert site.client.pause(name).action == "paused"


@pytest.mark.parametrize("verb", ["destroy", "pause", "unpause", "shutdown", "reboot", "block_list", "list"])
def test_unknown_domains(site: Site, verb: str) -> None:
    for text in ("xtool-test-nobody", "32000", str(uuid4())):
        with pytest.raises(DomainNotFoundError):
            getattr(site.client, verb)(text)


def test_a_name_is_taken_once(site: Site, name: str) -> None:
    made = site.client.create(site.config(name), PAUSED)
    with pytest.raises(DomainExistsError):
        site.client.create(site.config(name), PAUSED)
    assert one(site, name).uuid == made.uuid


def test_a_uuid_is_taken_once(site: Site, name: str) -> None:
    made = site.client.create(site.config(name), PAUSED)
    with pytest.raises(DomainExistsError):
        site.client.create(site.config(f"{name}-2", f"uuid: {made.uuid}"), PAUSED)
    assert one(site, name).uuid == made.uuid


def test_a_name_is_free_again(site: Site, name: str) -> None:
    first = site.client.create(site.config(name), PAUSED)
    site.client.destroy(name)
    second = site.client.create(site.config(name), PAUSED)
    assert second.uuid != first.uuid


def test_names_that_markup_would_suffer_from(site: Site) -> None:
    name = f"xtool-test <a b='c'>&amp;\"{uuid4().hex[:4]}"
    quoted = name.replace("'", "''")
    config = parse_config(f"name: '{quoted}'\n{site.keys}", "test.yaml", "/")
    made = site.client.create(config, PAUSED)
    assert made.name == name and one(site, name).uuid == made.uuid
    site.client.destroy(name)


def test_vcpus(site: Site, name: str) -> None:
    made = site.client.create(site.config(name, "vcpus: 2"), PAUSED)
    found = site.client.vcpu_list(name)
    assert [(v.domain, v.domid, v.vcpu) for v in found] == [(name, made.domid, 0), (name, made.domid, 1)]


def test_info_is_plain_values(site: Site) -> None:
    host = site.client.info()
    assert host.cpus >= 1 and host.total_memory > 0 and host.domains >= 0
    assert bool(host.driver) != bool(host.xen_version)
    assert all(isinstance(v, (str, int, bool, tuple, type(None))) for v in asdict(host).values())
