"""The cells of the interop matrix that no other test is about (``cells.py``): guests with every backend at
once, and what our frontends carry in domain 0. Data is compared by checksum.

``XTOOL_INTEROP_MIB`` says how much each disk and interface carries, 64 MiB by default. Images stay small:
more is more rounds.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import socket
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_block import exercise
from test_block import image as big_image
from test_devices import BRIDGE, HOST_IP, bridge
from test_net import Server

from guests import Console, ask, boot, console_carries, linux, wait_state
from xtool.backends.consolelog import log_path
from xtool.backends.viewers import socket_path
from xtool.config.single import parse_disk
from xtool.devices.hotplug import link
from xtool.toolstack import dom0console
from xtool.toolstack.dom0disk import attached
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

__all__ = ["big_image", "bridge"]  # fixtures

DEFAULT_MIB = 64
MIB = int(os.environ.get("XTOOL_INTEROP_MIB") or DEFAULT_MIB)
#: A disk is copied region by region, each with blocks of another size, all of which divide it. 1536 bytes are
#: three sectors: requests begin and end within pages.
REGION, REGIONS = 3 << 20, 4
BLOCKS = (1536, 4096, 12288, 196608, 1 << 20, 3 << 20)
#: Each round writes a disk once and reads it twice.
ROUNDS = max(1, MIB * (1 << 20) // (3 * REGION * REGIONS))
SECOND_IP, SECOND_GUEST_IP = "10.98.0.1", "10.98.0.2"
MACS = {"vif": "00:16:3e:00:00:31", "xtool": "00:16:3e:00:00:32"}
DISKS = {"xvda": "phy", "xvdb": "qdisk", "xvdc": "xtool"}


@pytest.fixture
def second_address(bridge: str) -> Iterator[None]:
    """Another subnet on the bridge, so that the guest's two interfaces are told apart. It goes with it."""
    with link.netlink() as ip:
        [number] = ip.link_lookup(ifname=BRIDGE)
        ip.addr("add", index=number, address=SECOND_IP, prefixlen=24)
    yield


@pytest.mark.cell("block", backend="phy", frontend="linux", guest="$kind")
@pytest.mark.cell("block", backend="qdisk", frontend="linux", guest="$kind")
@pytest.mark.cell("block", backend="xtool", frontend="linux", guest="$kind")
@pytest.mark.cell("net", backend="vif", frontend="linux", guest="$kind")
@pytest.mark.cell("net", backend="xtool", frontend="linux", guest="$kind")
@pytest.mark.cell("console", backend="xenconsoled", frontend="linux", guest="$kind")
@pytest.mark.timeout(600 + 30 * MIB)
@pytest.mark.long
@pytest.mark.parametrize("kind", ["pv", "pvh", "hvm"])
def test_a_guest_with_every_backend(
    client: LocalClient, bridge: str, second_address: None, tmp_path: Path, kind: str
) -> None:
    dice = random.Random(kind)
    model = {}
    for name in DISKS:
        model[name] = [dice.randbytes(REGION) for _ in range(REGIONS)]
        (tmp_path / name).write_bytes(b"".join(model[name]))
    disks = [f"'{tmp_path / name},raw,{name},backendtype={served}'" for name, served in DISKS.items()]
    vifs = [f"'bridge={bridge},mac={mac},backendtype={name},type=vif'" for name, mac in MACS.items()]
    config = linux(kind, "all", disk=f"[{', '.join(disks)}]", vif=f"[{', '.join(vifs)}]")
    with boot(client, config, "serial" if kind == "hvm" else None) as console:
        for name in DISKS:
            wait_state(client, config.name, name, "connected", 120)
        found = {info.vdev: info.backend for info in client.block_list(config.name)}
        assert found == DISKS
        assert {info.mac: info.backend for info in client.network_list(config.name)} == {
            mac: name for name, mac in MACS.items()
        }
        for _ in range(ROUNDS):
            copy_around(console, model, dice)
        address(console, MACS["vif"], "10.99.0.2")
        address(console, MACS["xtool"], SECOND_GUEST_IP)
        for host_ip in (HOST_IP, SECOND_IP):
            transfer(console, host_ip, b"".join(model["xvda"]))
        if kind == "hvm":  # the shell is on the serial port, which QEMU emulates
            hvc0_carries(client, config.name, console)
        else:
            console_carries(console)
    client.destroy(config.name)
    for name in DISKS:
        assert (tmp_path / name).read_bytes() == b"".join(model[name]), f"what {DISKS[name]} wrote"


def copy_around(console: Console, model: dict[str, list[bytes]], dice: random.Random) -> None:
    """Each disk becomes a shuffled copy of the one before it, past the guest's cache."""
    ask(
        console,
        "c() { dd if=/dev/$1 of=/dev/$2 bs=$3 skip=$4 seek=$5 count=$6 iflag=direct oflag=direct"
        " conv=notrunc 2>/dev/null || echo BA''D $*; }",
    )
    names = list(model)
    for source, target in zip(names, names[1:] + names[:1], strict=True):
        order = dice.sample(range(REGIONS), REGIONS)
        commands = []
        for to, at in enumerate(order):
            block = dice.choice(BLOCKS)
            per = REGION // block
            commands.append(f"c {source} {target} {block} {at * per} {to * per} {per}")
        assert "BAD" not in ask(console, "; ".join(commands), 600)
        model[target] = [model[source][at] for at in order]
    for name, regions in model.items():
        ask(console, "echo 3 > /proc/sys/vm/drop_caches")
        expected = hashlib.md5(b"".join(regions)).hexdigest()
        assert expected in ask(console, f"md5sum /dev/{name}", 600), DISKS[name]


def address(console: Console, mac: str, ip: str) -> None:
    answer = ask(console, f"grep -l {mac} /sys/class/net/*/address")
    found = re.search(r"/sys/class/net/(eth\d+)/address", answer)
    assert found, answer
    # Else either interface would answer for both addresses.
    ask(
        console,
        "echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore; echo 2 > /proc/sys/net/ipv4/conf/all/arp_announce",
    )
    ask(console, f"ip addr add {ip}/24 dev {found[1]}; ip link set {found[1]} up")


def transfer(console: Console, host_ip: str, disk: bytes) -> None:
    """TCP both ways: down what the host makes up, up what xvda holds."""
    for _ in range(max(1, MIB // 32)):
        data = os.urandom(16 << 20)
        down = Server(host_ip, data)
        answer = ask(console, f"nc {host_ip} {down.port} < /dev/null | md5sum", 600)
        assert hashlib.md5(data).hexdigest() in answer
        up = Server(host_ip, None)
        ask(console, f"nc {host_ip} {up.port} < /dev/xvda", 600)
        assert up.wait() == hashlib.md5(disk).hexdigest()


def hvc0_carries(client: LocalClient, domain: str, shell: Console) -> None:
    """As ``console_carries``, for a console that the shell is not on."""
    with Console(client, domain, "pv") as far:
        listed = ask(shell, "head -c 57000 /dev/urandom > /tmp/c; md5sum < /tmp/c")
        shell.seen = b""
        # Opened once: the driver's settings go with the last close.
        shell.send("{ base64 /tmp/c; echo AL''L.; } > /dev/hvc0; echo EN''D=$?=\n")
        far.wait_for("ALL.", 300)  # base64 has no dot
        shell.wait_for("END=", 60)
        lines = re.findall(rb"(?m)^[A-Za-z0-9+/]{76}\r?$", far.seen)
        assert hashlib.md5(b64decode(b"".join(lines))).hexdigest() in listed
        typed = os.urandom(5700)
        shell.seen = b""
        shell.send(
            "{ stty -echo; echo GO''ON >&2; head -n 100; } < /dev/hvc0 | base64 -d | md5sum; echo EN''D=$?=\n"
        )
        shell.wait_for("GOON", 60)
        text = b64encode(typed).decode()
        far.send("".join(text[at : at + 76] + "\n" for at in range(0, len(text), 76)))
        assert hashlib.md5(typed).hexdigest() in shell.wait_for("END=", 120)


@pytest.mark.cell("console", backend="xtool", frontend="xtool", guest="dom0")
def test_our_console_in_domain_0(xen_host: Host) -> None:
    dice = random.Random(9)
    data, typed = dice.randbytes(min(MIB, 4) << 20), dice.randbytes(50_000)
    logs = log_path("x").parent
    before = set(logs.glob("*")) if logs.exists() else set()
    seen: list[bytes] = []
    with (
        dom0console.attached(xen_host, name="org.xtool.test") as console,
        socket.socket(socket.AF_UNIX) as viewer,
    ):
        viewer.settimeout(60)
        viewer.connect(str(socket_path(0, 1)))
        reader = threading.Thread(target=lambda: seen.append(exactly(viewer, len(data))))
        reader.start()
        at = 0
        while at < len(data):
            size = dice.randrange(1, 5000)
            console.print(data[at : at + size], deadline=60)
            at += size
        reader.join(120)
        assert seen and hashlib.sha256(seen[0]).digest() == hashlib.sha256(data).digest()
        writer = threading.Thread(target=viewer.sendall, args=(typed,))
        writer.start()
        got = b""
        while len(got) < len(typed):
            got += console.read(60)
        writer.join()
        assert got == typed
    for path in set(logs.glob("*")) - before:
        path.unlink()


def exactly(link: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count and (part := link.recv(1 << 16)):
        found += part
    return bytes(found)


@pytest.mark.skipif(MIB <= DEFAULT_MIB, reason="test_block.py does as much: XTOOL_INTEROP_MIB asks for more")
@pytest.mark.timeout(600 + 30 * MIB)
@pytest.mark.parametrize("backend", ["phy", "xtool"])
def test_gigabytes_through_our_frontend(xen_host: Host, big_image: Path, backend: str) -> None:
    wanted = parse_disk([f"{big_image},raw,xvda,backendtype={backend}"])
    with attached(xen_host, wanted) as disk:
        exercise(disk, big_image, 5 * MIB, MIB)  # a fifth of a MiB each on average
