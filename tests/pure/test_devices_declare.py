"""The nodes of a domain: exactly these, readable and writable by exactly those."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from xtool.devices.declare import (
    DomainNodes,
    HvmNodes,
    Node,
    device_model_nodes,
    domain_nodes,
    leaving_paths,
    stale_paths,
    write,
)
from xtool.fake.store import FakeStoreDaemon
from xtool.proto.xsperms import may_read, may_write
from xtool.xenstore.client import StoreClient

UUID = "6b1c1b9e-7c3c-4f6a-9b55-0d4c5f1f2a10"
MIB = 1 << 20
GOLDEN = Path(__file__).parent / "golden"

PV = DomainNodes(
    domid=5,
    uuid=UUID,
    name="web",
    type="pv",
    memory=128 * MIB,
    maxmem=256 * MIB,
    vcpus=1,
    maxvcpus=2,
    store_port=1,
    store_gfn=0x1234,
    console_port=2,
    console_gfn=0x1235,
    start_time=1700000000.256,
)
HVM = dataclasses.replace(
    PV, type="hvm", videoram=16 * MIB, hvm=HvmNodes("ovmf", acpi_s4=False, mmio_hole=1 << 30)
)


def text(nodes: list[Node]) -> str:
    lines = (f"{path} = {value!r} ({' '.join(perms)})" for path, value, perms in sorted(nodes))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("name", "spec"), [("pv", PV), ("hvm", HVM)])
def test_whole_tree(name: str, spec: DomainNodes) -> None:
    assert text(domain_nodes(spec)) == (GOLDEN / f"nodes-{name}.txt").read_text()


@pytest.fixture
def daemon() -> FakeStoreDaemon:
    return FakeStoreDaemon()


@pytest.fixture
def store(daemon: FakeStoreDaemon) -> StoreClient:
    return StoreClient(daemon.connect)


@pytest.mark.parametrize("spec", [PV, HVM], ids=["pv", "hvm"])
def test_inherited_permissions_are_those_declared(
    daemon: FakeStoreDaemon, store: StoreClient, spec: DomainNodes
) -> None:
    """What is left out because it is inherited comes out as declared, and no folder between is wider."""
    nodes = domain_nodes(spec)
    store.atomically(lambda tx: write(tx, nodes))
    tree = daemon.dump()
    for node in nodes:
        assert tree[node.path] == (node.value, node.perms)
    own = {node.path for node in nodes if node.perms[0] == "n5"}
    ours = {path: perms for path, (_, perms) in tree.items() if path.startswith(("/local/domain/5", "/vm/"))}
    for path, perms in ours.items():
        if path.count("/") > 2 or path.startswith("/vm/"):
            assert may_write(perms, 5) == (path in own), path
            assert not may_read(perms, 6), path


def test_setting_permissions_is_rare(store: StoreClient) -> None:
    class Counter:
        written = set_too = 0

        def write(self, path: str, value: str | bytes, *, perms: object = None) -> None:
            self.written += 1
            self.set_too += perms is not None

    counter = Counter()
    write(counter, domain_nodes(PV))  # type: ignore[arg-type]
    # The guest's own nodes, and the tops of the three trees. Every one is a request to xenstored.
    assert counter.set_too == 11 + 3
    assert counter.written + counter.set_too <= 50


def test_xsa_57_console_is_read_only_for_the_guest() -> None:
    found = 0
    for node in domain_nodes(HVM):
        if "/console/" in node.path:
            found += 1
            assert node.perms == ("n0", "r5")
    assert found == 6


def test_xsa_115_353_guest_reads_no_host_facts() -> None:
    """Device model pid, ptys and VNC address are domain 0's alone, and so is /libxl."""
    nodes = device_model_nodes(5, 4711, ttys={1: "/dev/pts/8", 0: "/dev/pts/7"}, vnc=("127.0.0.1", "5900"))
    assert [node[:2] for node in nodes] == [
        ("/local/domain/5/image/device-model-pid", "4711"),
        ("/local/domain/5/serial/0/tty", "/dev/pts/7"),
        ("/local/domain/5/serial/1/tty", "/dev/pts/8"),
        ("/local/domain/5/console/vnc-listen", "127.0.0.1"),
        ("/local/domain/5/console/vnc-port", "5900"),
    ]
    private = [node for node in domain_nodes(HVM) if node.path.startswith("/libxl")] + nodes
    assert len(private) == 8
    assert not any(may_read(node.perms, 5) for node in private)


def test_nothing_is_left_when_a_domain_goes(daemon: FakeStoreDaemon, store: StoreClient) -> None:
    before = daemon.dump()
    for path in (
        "/local/domain",
        "/vm",
        "/libxl",
        "/local/domain/0/device-model",
        "/local/domain/0/backend/vbd",
    ):
        store.mkdir(path)
    empty = daemon.dump()
    write(store, domain_nodes(HVM))
    write(store, device_model_nodes(5, 4711, ttys={0: "/dev/pts/7"}))
    store.write("/local/domain/0/device-model/5/state", "running")
    store.write("/local/domain/0/backend/vbd/5/51712/state", "1")
    assert daemon.dump() != empty != before
    for path in leaving_paths(5, UUID, backends=[(0, "vbd")]):
        store.rm(path)
    assert daemon.dump() == empty


def test_stale_paths_name_every_place_of_the_number() -> None:
    assert stale_paths(5) == ("/local/domain/5", "/libxl/5")
    assert set(leaving_paths(5, UUID)) - set(stale_paths(5)) == {
        "/local/domain/0/device-model/5",
        f"/vm/{UUID}",
    }


@pytest.mark.parametrize(
    ("spec", "kib"),
    [
        (PV, 128 << 10),
        (HVM, (128 - 16 - 1) << 10),  # room to grow: as libxl, 1 MiB lower
        (dataclasses.replace(HVM, maxmem=HVM.memory), (128 - 16) << 10),
    ],
)
def test_balloon_target(spec: DomainNodes, kib: int) -> None:
    values = {node.path: node.value for node in domain_nodes(spec)}
    assert values["/local/domain/5/memory/target"] == str(kib)
