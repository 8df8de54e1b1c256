"""Disks and interfaces as data: what stands in xenstore, who serves what, where an HVM guest gets them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtool.config import DomainConfig, parse_config
from xtool.config.single import parse_disk, parse_vif
from xtool.devicemodel.qdisk import QdiskSpec, build_qdisk_argv
from xtool.devicemodel.spec import DeviceModelSpec
from xtool.devices.backendkinds import FOLDERS, KINDS, TargetFacts, auto_table, choose_backend
from xtool.devices.declare import Node
from xtool.devices.vbd import PhysicalDevice, Vbd, vbd_nodes
from xtool.devices.vif import Vif, stable_mac, vif_nodes
from xtool.devices.xenbus import DeviceId, parse_backend, parse_state
from xtool.errors import HostError, UsageError
from xtool.proto.xenbus import XenbusState
from xtool.proto.xsperms import PRIVATE, may_read, may_write
from xtool.toolstack.host import HostFacts
from xtool.toolstack.plan import DomainPlan, plan

UUID_TEXT = "6b1f5d0e-6f0c-4b2e-9b5e-0d6a3f3c2a11"
FILE, BLOCK = TargetFacts("file", 1 << 20), TargetFacts("block", 1 << 30)
REMOTE = TargetFacts("remote")
FACTS = HostFacts(
    xen_version="4.17",
    pv=True,
    hvm=True,
    hap=True,
    grant_v2=True,
    cpus=2,
    hvmloader="/hvmloader",
    firmware={"seabios": "/bios", "ovmf": None},
    targets={"/a": FILE, "/b": FILE, "/c": FILE, "/dev/x": BLOCK},
)


def as_table(nodes: list[Node]) -> dict[str, str]:
    return {node.path: node.value for node in nodes}


def test_a_disk_in_xenstore() -> None:
    disk = Vbd("xvda", 51712, "/images/a.img", reason="why", loop=True)
    nodes = vbd_nodes(disk, 7, "pv", PhysicalDevice("/dev/loop10", 7, 10, loop=True))
    table = as_table(nodes)
    back, front = "/local/domain/0/backend/vbd/7/51712", "/local/domain/7/device/vbd/51712"
    mirror = "/libxl/7/device/vbd/51712"
    assert table[f"{back}/physical-device"] == "7:a" and table[f"{back}/mode"] == "w"
    assert table[f"{front}/backend"] == table[f"{mirror}/backend"] == back
    assert table[f"{back}/frontend"] == table[f"{mirror}/frontend"] == front
    assert table[f"{front}/state"] == table[f"{back}/state"] == "1"
    assert table[f"{front}/virtual-device"] == "51712" and table[f"{front}/protocol"] == "x86_64-abi"
    assert table[f"{mirror}/xtool-reason"] == "why"
    # What xl reads of each disk.
    for name in ("type", "dev", "removable", "mode", "device-type"):
        assert table[f"{mirror}/{name}"] == table[f"{back}/{name}"]
    # Xen's block script would detach a loop device a second time if it found a file there.
    assert (table[f"{mirror}/params"], table[f"{back}/params"]) == ("/images/a.img", "/dev/loop10")


@pytest.mark.parametrize("guest", ["pv", "pvh", "hvm"])
def test_who_may_read_and_write(guest: str) -> None:
    """The guest owns its frontend alone, reads no path of this host, and touches nothing else (R11, R18)."""
    physical = PhysicalDevice("/dev/loop1", 7, 1, loop=True)
    nodes = vbd_nodes(Vbd("xvda", 51712, "/images/secret.img", script=None), 7, guest, physical)
    nodes += vif_nodes(Vif(0, "00:16:3e:00:00:01", mtu=9000), 7)
    for node in nodes:
        own = node.path.startswith("/local/domain/7/device/") and not node.path.endswith("/mtu")
        assert may_write(node.perms, 7) == own, node
        assert not may_write(node.perms, 8) and not may_read(node.perms, 8)
        told = node.value.startswith(("/images", "/dev", "/etc"))
        if told or node.path.startswith("/libxl"):
            assert not may_read(node.perms, 7), node
        elif not own:
            assert may_read(node.perms, 7) or node.path.endswith("/physical-device"), node


def test_an_interface_in_xenstore() -> None:
    vif = Vif(2, "00:16:3e:00:00:01", bridge="br", rate=(1000, 50_000), mtu=1400, name="lan", model="e1000")
    table = as_table(vif_nodes(vif, 7))
    back = "/local/domain/0/backend/vif/7/2"
    assert table[f"{back}/handle"] == "2" and table[f"{back}/script"]  # netback refuses to go without
    assert (table[f"{back}/rate"], table[f"{back}/hotplug-status"]) == ("1000,50000", "")
    assert (table[f"{back}/vifname"], table[f"{back}/type"]) == ("lan", "vif_ioemu")
    assert table["/local/domain/7/device/vif/2/mtu"] == "1400"
    assert vif.tap(7) == "lan-emu" and Vif(0, "", model="e1000").tap(32751) == "vif32751.0-emu"
    assert all(len(Vif(d, "", model="e1000").tap(32751)) <= 15 for d in (0, 99, 255))


def test_every_kind_has_a_place_of_its_own() -> None:
    assert len(FOLDERS) == len(KINDS)
    device = Vbd("xvda", 51712, "/a", kind="xtool").id(5)
    assert device.backend == "/local/domain/0/backend/xtool-vbd/5/51712"
    assert device.error == "/local/domain/0/error/backend/xtool-vbd/5/51712"
    assert Vif(0, "", kind="xtool").id(5).backend == "/local/domain/0/backend/xtool-vif/5/0"
    assert parse_backend(device.backend) == (0, "xtool-vbd", 5, 51712)


@given(st.text(max_size=60) | st.just("/local/domain/0/backend/vbd/5/51712\0"))
def test_nonsense_is_no_state_and_no_path(text: str) -> None:
    state = parse_state(text)
    assert state is XenbusState.UNKNOWN or text == str(int(state))
    parsed = parse_backend(text)
    assert parsed is None or DeviceId(parsed[2], "vbd", parsed[3], parsed[1], parsed[0]).backend


@pytest.mark.parametrize(
    ("spec", "facts", "kind", "reason"),
    [
        ("/a,raw,xvda", FILE, "phy", "loop device"),
        ("/dev/x,raw,xvda", BLOCK, "phy", "block device"),
        ("/a,qcow2,xvda", FILE, "qdisk", "qcow2"),
        ("/a,vhd,xvda", FILE, "qdisk", "vhd"),
        ("/a,raw,xvda,backendtype=qdisk", FILE, "qdisk", "domain file"),
        ("/a,raw,xvda,backendtype=auto", FILE, "phy", "loop device"),
        ("/a,raw,xvda,backendtype=xtool", FILE, "xtool", "domain file"),
        ("/x,raw,xvda,script=block-iscsi", TargetFacts("missing"), "phy", "block-iscsi"),
        ("vdev=xvdc,cdrom", TargetFacts("none"), "xtool", "without a medium"),
        ("/a,qcow2,xvda,backendtype=xtool", FILE, "xtool", "domain file"),
        ("/a,vmdk,xvda", FILE, "xtool", "qemu-nbd"),
        ("/a,vhdx,xvda", FILE, "xtool", "qemu-nbd"),
        ("nbd://10.0.0.1/vol,raw,xvda", REMOTE, "xtool", "another program or host"),
        ("https://example.org/a.qcow2?b=c,qcow2,xvda,ro", REMOTE, "xtool", "another program or host"),
        ("/a,raw,xvda,bytes-per-second=1MiB", FILE, "xtool", "bytes-per-second is for"),
        ("/dev/x,raw,xvda,ops-per-second=5", BLOCK, "xtool", "ops-per-second is for"),
        ("/a,raw,xvda,persistent=1", FILE, "xtool", "persistent is for"),
        ("/a,raw,xvda,bytes-per-second=none,ops-per-second=0", FILE, "phy", "loop device"),
    ],
)
def test_choosing_a_backend(spec: str, facts: TargetFacts, kind: str, reason: str) -> None:
    chosen = choose_backend(parse_disk([spec], "/"), facts)
    assert chosen.kind is KINDS["vbd", kind] and reason in chosen.reason


@pytest.mark.parametrize(
    ("spec", "facts", "error", "message"),
    [
        ("/a,raw,xvda", TargetFacts("missing", detail="does not exist"), HostError, "/a does not exist"),
        ("/a,raw,xvda", TargetFacts("other"), HostError, "neither a file nor a block device"),
        ("/a,qcow2,xvda,backendtype=phy", FILE, UsageError, "reads raw, not qcow2"),
        ("/a,vmdk,xvda,backendtype=qdisk", FILE, UsageError, "not vmdk"),
        ("/a,qed,xvda,backendtype=xtool", FILE, UsageError, "not qed"),
        ("nbd://10.0.0.1/vol,raw,xvda,backendtype=phy", REMOTE, UsageError, "files and block devices"),
        ("nbd://10.0.0.1/vol,raw,xvda,backendtype=qdisk", REMOTE, UsageError, "files and block devices"),
        ("/a,raw,xvda,backendtype=qdisk,script=x", FILE, UsageError, "script"),
        ("vdev=xvdc,cdrom,backendtype=phy", TargetFacts("none"), UsageError, "without a medium"),
        (
            "/a,qed,xvda,ops-per-second=9",
            FILE,
            UsageError,
            "backendtype: xtool, which ops-per-second needs, reads .*, not qed",
        ),
        ("/x,raw,xvda,script=y,ops-per-second=9", FILE, UsageError, "ops-per-second does not take"),
    ],
)
def test_backends_that_cannot(spec: str, facts: TargetFacts, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_backend(parse_disk([spec], "/"), facts)


def test_auto_is_what_the_page_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    assert auto_table() in page


def test_limits_are_nodes_for_domain_0_alone() -> None:
    limited = Vbd("xvda", 51712, "/a", kind="xtool", bytes_per_second=1 << 20, persistent=True)
    nodes = {node.path: node for node in vbd_nodes(limited, 7, "pvh")}
    back = limited.id(7).backend
    assert nodes[f"{back}/xtool-bytes-per-second"].value == "1048576"
    assert nodes[f"{back}/xtool-persistent"].value == "1"
    assert nodes[f"{back}/xtool-bytes-per-second"].perms == PRIVATE
    assert not any("ops-per-second" in path for path in nodes)


def test_words_of_a_command_line() -> None:
    disk = parse_disk(["target=/a,b.img", "vdev=xvdb", "access=ro"])
    assert (disk.target, disk.vdev, disk.readonly) == ("/a,b.img", "xvdb", True)
    assert parse_vif(["bridge=br0", "rate=1Mb/s"]).bridge == "br0" and parse_vif([]).bridge is None
    for words, message in (
        (["/a,raw"], "vdev is missing"),
        (["/a,raw,xvda,colour=red"], "colour is not a sub-key"),
        (["/a,raw,zzz"], "'zzz' is no virtual device"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_disk(words, "/")


def test_addresses_are_stable_and_seldom_equal() -> None:
    macs = {stable_mac(f"{n:032x}", devid) for n in range(200) for devid in range(4)}
    assert len(macs) >= 799 and stable_mac("u", 0) == stable_mac("u", 0)
    assert all(mac.startswith("00:16:3e:") and int(mac[9:11], 16) < 0x80 for mac in macs)


# --- plans ----------------------------------------------------------------------------------------------
def domain(kind: str, text: str) -> DomainConfig:
    kernel = "" if kind == "hvm" else "kernel: /k\n"
    return parse_config(f"name: x\ntype: {kind}\nmemory: 64\n{kernel}{text}", "x.yaml", "/")


def planned(kind: str, text: str) -> DomainPlan:
    return plan(domain(kind, text), FACTS, UUID(UUID_TEXT))


def test_qemu_serves_disks_of_a_pv_guest() -> None:
    wanted = planned("pv", "disk: ['/a,raw,xvda', '/b,qcow2,xvdb']")
    assert [d.kind for d in wanted.disks] == ["phy", "qdisk"] and wanted.disks[0].loop
    assert isinstance(wanted.devicemodel, QdiskSpec)
    argv = build_qdisk_argv(wanted.devicemodel, 7, "/qemu", 3)
    assert argv[argv.index("-machine") + 1] == "xenpv" and "-xen-attach" in argv
    assert argv[argv.index("-xen-domid") + 1] == "7" and argv[argv.index("-uuid") + 1] == UUID_TEXT
    assert planned("pvh", "disk: ['/a,raw,xvda']").devicemodel is None


@pytest.mark.parametrize("disk", ["/b,qcow2,hda,backendtype=xtool", "/b,vmdk,sda", "nbd://h/x,raw,xvda"])
def test_qemu_and_xtool_do_not_share_an_image_with_tables(disk: str) -> None:
    """Each would write its own tables; so an HVM guest has such a disk where nothing is emulated."""
    facts = replace(FACTS, targets={**FACTS.targets, "nbd://h/x": REMOTE})
    target, form, _, *more = disk.split(",")
    with pytest.raises(UsageError, match="QEMU emulates"):
        plan(domain("hvm", f"disk: ['{disk}']"), facts, UUID(UUID_TEXT))
    free = ",".join([target, form, "xvde", *more])
    wanted = plan(domain("hvm", f"disk: ['{free}']"), facts, UUID(UUID_TEXT))
    assert [d.kind for d in wanted.disks] == ["xtool"]
    assert isinstance(wanted.devicemodel, DeviceModelSpec) and not wanted.devicemodel.disks


def test_an_hvm_guest_gets_both() -> None:
    text = "disk: ['/a,raw,hda', '/b,raw,xvdz', 'vdev=hdc,cdrom,target=/c']\nvif: ['', 'type=vif']"
    wanted = planned("hvm", text)
    model = wanted.devicemodel
    assert isinstance(model, DeviceModelSpec) and model.xen_platform_pci
    assert [d.vdev for d in wanted.disks] == ["hda", "xvdz"]
    assert [d.id for d in model.disks] == ["ide0", "ide2"]
    assert [(n.index, n.model, n.tap) for n in model.nics] == [(0, "rtl8139", "vif1.0-emu")]
    assert [(v.devid, v.model, v.pv) for v in wanted.vifs] == [(0, "rtl8139", True), (1, None, True)]
    assert [d.kind for d in wanted.devices(9)] == ["vbd", "vbd", "vif", "vif"]


def test_without_the_platform_device_all_is_emulated() -> None:
    wanted = planned("hvm", "xen_platform_pci: false\ndisk: ['/a,raw,hda']\nvif: ['model=e1000']")
    model = wanted.devicemodel
    assert isinstance(model, DeviceModelSpec) and not model.xen_platform_pci
    assert wanted.devices(9) == [] and len(model.disks) == len(model.nics) == 1
    only_cd = planned("hvm", "disk: ['vdev=hdc,cdrom,target=/c']").devicemodel
    assert isinstance(only_cd, DeviceModelSpec) and not only_cd.xen_platform_pci
    for text in ("disk: ['/a,raw,xvdz']", "vif: ['type=vif']"):
        with pytest.raises(UsageError):
            planned("hvm", f"xen_platform_pci: false\n{text}")


def test_numbers_of_interfaces() -> None:
    wanted = planned("pvh", "vif: ['devid=1', '', 'mac=00:16:3e:aa:bb:cc', '']")
    assert [v.devid for v in wanted.vifs] == [1, 0, 2, 3]
    assert len({v.mac for v in wanted.vifs}) == 4 and wanted.vifs[2].mac == "00:16:3e:aa:bb:cc"
    with pytest.raises(UsageError, match="too long"):
        planned("hvm", "vif: ['vifname=averylongname']")
