"""Disks and interfaces on real Xen, served by the kernel's and QEMU's backends, seen from Debian guests.

Every test is followed by the leak check: no loop device, interface, node or process may be left.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from guests import GUESTS, ask, boot, linux, wait_state
from xtool.config.single import parse_disk, parse_vif
from xtool.devices.hotplug import link, loop
from xtool.errors import DeadlineError, HostError, ImageInUseError
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

PAUSED = CreateOptions(paused=True)
BRIDGE = "xtbr0"
HOST_IP, GUEST_IP = "10.99.0.1", "10.99.0.2"
SIZE = 8 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def bridge(no_leaks: None) -> Iterator[str]:
    """A bridge of our own, made after the leak check looked and gone before it looks again."""
    with link.netlink() as ip:
        ip.link("add", ifname=BRIDGE, kind="bridge")
        [number] = ip.link_lookup(ifname=BRIDGE)
        ip.link("set", index=number, state="up")
        ip.addr("add", index=number, address=HOST_IP, prefixlen=24)
        yield BRIDGE
        ip.link("del", index=number)


@pytest.mark.cell("block", backend="$backend", frontend="linux", guest="$kind")
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *(("pv", "phy"), ("pvh", "qdisk")),
        *(pytest.param(*cell, marks=pytest.mark.long) for cell in (("pv", "qdisk"), ("pvh", "phy"))),
    ],
)
def test_a_disk_holds_what_was_written(client: LocalClient, image: Path, kind: str, backend: str) -> None:
    config = linux(kind, "disk", disk=f"['{image},raw,xvda,backendtype={backend}']")
    before = hashlib.md5(image.read_bytes()).hexdigest()
    with boot(client, config) as console:
        wait_state(client, config.name, "xvda", "connected")
        assert before in ask(console, "md5sum /dev/xvda")
        ask(console, f"dd if=/dev/zero of=/dev/xvda bs=64k count={SIZE >> 17}; sync")
    client.destroy(config.name)
    data = image.read_bytes()
    assert not any(data[: SIZE // 2]) and hashlib.md5(data).hexdigest() != before
    assert any(data[SIZE // 2 :])


def test_a_read_only_disk_stays_as_it_is(client: LocalClient, image: Path) -> None:
    before = image.read_bytes()
    config = linux("pvh", "ro", disk=f"['{image},raw,xvda,ro', '{image},raw,xvdb,ro']")
    with boot(client, config) as console:
        wait_state(client, config.name, "xvdb", "connected")
        assert "END=1=" in ask(console, "dd if=/dev/zero of=/dev/xvda bs=4k count=1")
    client.destroy(config.name)
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_an_interface_on_a_bridge(client: LocalClient, bridge: str, kind: str) -> None:
    config = linux(kind, "net", vif=f"['bridge={bridge},mac=00:16:3e:00:00:07,mtu=1400']")
    with boot(client, config) as console:
        [vif] = client.network_list(config.name)
        with open(f"/sys/class/net/{vif.interface}/address") as file:
            assert file.read().strip() == "fe:ff:ff:ff:ff:ff"
        assert "00:16:3e:00:00:07" in ask(console, "ip link show eth0")
        ask(console, f"ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up")
        assert "END=0=" in ask(console, f"ping -c 3 -W 5 {HOST_IP}")
    client.destroy(config.name)


def test_attaching_and_detaching_live(client: LocalClient, bridge: str, image: Path) -> None:
    config = linux("pvh", "live")
    with boot(client, config) as console:
        for backend in ("phy", "qdisk"):
            client.block_attach(config.name, parse_disk([f"{image},raw,xvdb,backendtype={backend}"]))
            wait_state(client, config.name, "xvdb", "connected")
            expected = hashlib.md5(image.read_bytes()).hexdigest()
            assert expected in ask(console, "md5sum /dev/xvdb")
            with pytest.raises(ImageInUseError):
                client.block_attach(config.name, parse_disk([f"{image},raw,xvdc"]))
            client.block_detach(config.name, "xvdb", deadline=30)
            assert "END=1=" in ask(console, "ls /dev/xvdb")
            assert client.block_list(config.name) == []
        client.network_attach(config.name, parse_vif([f"bridge={bridge}"]))
        until = monotonic() + 60
        while client.network_list(config.name)[0].state != "connected":
            assert monotonic() < until
            sleep(0.1)
        client.network_detach(config.name, "0", deadline=30)
        assert client.network_list(config.name) == []
    client.destroy(config.name)


def test_a_guest_that_does_not_answer_is_not_needed(client: LocalClient, image: Path) -> None:
    config = linux("pvh", "held", disk=f"['{image},raw,xvda']")
    with boot(client, config):
        wait_state(client, config.name, "xvda", "connected")
        client.pause(config.name)
        with pytest.raises(DeadlineError, match="does not let go"):
            client.block_detach(config.name, "xvda", deadline=2)
        client.block_detach(config.name, "xvda", force=True, deadline=1)
        assert client.block_list(config.name) == []
    client.destroy(config.name)


def test_a_reboot_keeps_disk_and_interface(client: LocalClient, bridge: str, image: Path) -> None:
    config = linux("pvh", "again", disk=f"['{image},raw,xvda']", vif=f"['bridge={bridge}']")
    with boot(client, config) as console:
        first = client.network_list(config.name)[0]
        console.send("reboot\n")
        until = monotonic() + 120
        # In between the name is nobody's: what is asked for is not there for a moment.
        while {info.domid for info in client.list() if info.name == config.name} <= {first.domid}:
            assert monotonic() < until
            sleep(0.2)
    second = client.network_list(config.name)[0]
    assert second.mac == first.mac and client.block_list(config.name)[0].vdev == "xvda"
    client.destroy(config.name)


@pytest.mark.cell("block", backend="phy", frontend="linux", guest="hvm")
def test_an_hvm_guest_finds_paravirtual_ones(client: LocalClient, bridge: str, image: Path) -> None:
    config = linux("hvm", "hvm", disk=f"['{image},raw,hda', 'vdev=hdc,cdrom']", vif=f"['bridge={bridge}']")
    with boot(client, config, "serial") as console:
        wait_state(client, config.name, "hda", "connected", 120)
        assert hashlib.md5(image.read_bytes()).hexdigest() in ask(console, "md5sum /dev/xvda")
        client.cd_insert(config.name, "hdc", str(GUESTS / "cd.iso"))
        assert [d.target for d in client.block_list(config.name) if d.cdrom] == [str(GUESTS / "cd.iso")]
        client.cd_eject(config.name, "hdc")
        assert link.exists(client.network_list(config.name)[0].interface)
    client.destroy(config.name)


def test_xl_sees_and_takes_our_devices(client: LocalClient, bridge: str, image: Path) -> None:
    config = linux("pvh", "xl", disk=f"['{image},raw,xvda']", vif=f"['bridge={bridge}']")
    with boot(client, config):
        wait_state(client, config.name, "xvda", "connected")
        listed = subprocess.run(["xl", "block-list", config.name], capture_output=True, text=True, check=True)
        assert "51712" in listed.stdout
        subprocess.run(["xl", "block-detach", config.name, "xvda"], check=True, timeout=60)
        assert client.block_list(config.name) == []
    subprocess.run(["xl", "destroy", config.name], check=True, timeout=60)
    client.gc()


def test_what_this_host_has_not(client: LocalClient, image: Path) -> None:
    with pytest.raises(HostError, match="no bridge xtnone"):
        client.create(linux("pvh", "nobr", vif="['bridge=xtnone']"), PAUSED)
    held = loop.attach(str(image), readonly=False)
    with pytest.raises(ImageInUseError, match=held.path):
        client.create(linux("pvh", "busy", disk=f"['{image},raw,xvda']"), PAUSED)
    held.close()


@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8, 1.2, 1.8, 3.0])
def test_killed_creates_leave_nothing_after_gc(
    client: LocalClient, xen_host: Host, bridge: str, image: Path, seconds: float
) -> None:
    """kill -9 at some point of a create with a disk and an interface (fault list 1)."""
    config = linux("pvh", "killed", disk=f"['{image},raw,xvda']", vif=f"['bridge={bridge}']")
    child = os.fork()
    if not child:
        try:
            from xtool.toolstack.create import create
            from xtool.toolstack.host import open_host

            create(open_host(), config, PAUSED)
        finally:
            os._exit(0)
    sleep(seconds)
    os.kill(child, 9)
    os.waitpid(child, 0)
    client.gc()
    for info in client.list():
        if info.name == config.name:
            client.destroy(str(info.domid))
