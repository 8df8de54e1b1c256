"""Interfaces served by us on real Xen: our frontend against netback and against ours; Linux guests through a
bridge and through passt. Gigabytes are the benchmark's business; here data is compared by checksum."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from time import monotonic, sleep

import pytest
from test_devices import BRIDGE, GUEST_IP, HOST_IP, bridge

from guests import Console, ask, boot, linux
from xtool.config.single import parse_vif
from xtool.devices.hotplug import link
from xtool.frontends.net import NetPort
from xtool.toolstack import dom0vif
from xtool.toolstack.backends import server_pid
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

__all__ = ["bridge"]  # a fixture

MAC = "00:16:3e:00:00:21"
GUEST_MAC = "00:16:3e:00:00:07"
SIZE = 32 << 20
ETH_TEST = 0x88B5


def until(what: str, ready: object, deadline: float = 60.0) -> None:
    end = monotonic() + deadline
    while not ready():  # type: ignore[operator]
        assert monotonic() < end, what
        sleep(0.05)


@pytest.fixture(params=["vif", "xtool"])
def port(request: pytest.FixtureRequest, xen_host: Host, bridge: str) -> Iterator[tuple[NetPort, str]]:
    """Our frontend in dom0, connected to the kernel's netback or to ours, its other end on the bridge."""
    wanted = parse_vif([f"bridge={bridge},mac={MAC},devid=7,backendtype={request.param}"])
    with dom0vif.attached(xen_host, wanted) as found:
        yield found, "vif0.7"


def raw_socket(bridge: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_TEST))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    sock.bind((bridge, ETH_TEST))
    sock.settimeout(5)
    return sock


def address(name: str) -> bytes:
    with open(f"/sys/class/net/{name}/address") as file:
        return bytes.fromhex(file.read().strip().replace(":", ""))


@pytest.mark.cell("net", backend="$port", frontend="xtool", guest="dom0")
def test_frames_of_random_sizes(port: tuple[NetPort, str], bridge: str) -> None:
    ours, _ = port
    dice = Random(7)
    mac, host = bytes.fromhex(MAC.replace(":", "")), address(bridge)
    kind = ETH_TEST.to_bytes(2, "big")
    with raw_socket(bridge) as sock:
        for number in range(2000):
            payload = dice.randbytes(dice.randint(46, 1500))
            ours.send(host + mac + kind + payload, chunk=dice.choice((4096, 200)))
            assert sock.recv(4096)[14:] == payload, f"frame {number} to the host"
            sock.send(mac + host + kind + payload)
            while (frame := ours.receive(5.0)) is not None and frame.data[12:14] != kind:
                pass  # others speak on the bridge as well
            assert frame is not None and frame.data[14:] == payload, f"frame {number} from the host"
    assert ours.tx_errors == ours.rx_errors == 0


def test_somebody_elses_address(port: tuple[NetPort, str], bridge: str) -> None:
    """HF 27: ours lets nothing through; netback has no such rule."""
    ours, _ = port
    if "xtool-vif" not in ours._device.backend:
        pytest.skip("the kernel's netback lets it through")
    kind = ETH_TEST.to_bytes(2, "big")
    with raw_socket(bridge) as sock:
        sock.settimeout(1)
        ours.send(address(bridge) + bytes.fromhex("00163e0000ee") + kind + bytes(60))
        with pytest.raises(TimeoutError):
            sock.recv(4096)


class Server:
    """Sends ``SIZE`` bytes to who connects, or takes them and remembers their checksum."""

    def __init__(self, host: str, data: bytes | None) -> None:
        self._sock = socket.create_server((host, 0))
        self._sock.settimeout(300)
        self.port = self._sock.getsockname()[1]
        self.sum = ""
        self._thread = threading.Thread(target=self._run, args=(data,), daemon=True)
        self._thread.start()

    def _run(self, data: bytes | None) -> None:
        with self._sock, self._sock.accept()[0] as peer:
            peer.settimeout(300)
            if data is not None:
                peer.sendall(data)
                return
            summed = hashlib.md5()
            while piece := peer.recv(1 << 20):
                summed.update(piece)
            self.sum = summed.hexdigest()

    def wait(self) -> str:
        self._thread.join(300)
        return self.sum


def transfer(console: Console, server_ip: str, listen: str, size: int = SIZE) -> None:
    """TCP both ways, compared by checksum: GSO and checksum offload are on, as Linux has them."""
    # The guest's half stays open: Debian 12's passt sends to one that closed it the same window for ever.
    ask(console, "mkfifo /tmp/open; (sleep 600 > /tmp/open &)")
    data = os.urandom(size)
    down = Server(listen, data)
    answer = ask(console, f"nc {server_ip} {down.port} < /tmp/open | md5sum", 300)
    assert hashlib.md5(data).hexdigest() in answer
    up = Server(listen, None)
    answer = ask(
        console,
        f"dd if=/dev/urandom of=/tmp/d bs=1M count=8; md5sum /tmp/d; nc {server_ip} {up.port} < /tmp/d",
        300,
    )
    assert up.wait() in answer and up.sum


def vif(**keys: object) -> str:
    return "[{" + ", ".join(f"{key.replace('_', '-')}: {value}" for key, value in keys.items()) + "}]"


@pytest.mark.cell("net", backend="xtool", frontend="linux", guest="$kind")
@pytest.mark.parametrize("kind", [pytest.param("pv", marks=pytest.mark.long), "pvh"])
def test_a_linux_guest_on_a_bridge(client: LocalClient, bridge: str, kind: str) -> None:
    config = linux(kind, "net", vif=vif(bridge=bridge, mac=f"'{GUEST_MAC}'", backendtype="xtool"))
    with boot(client, config) as console:
        [info] = client.network_list(config.name)
        assert info.backend == "xtool" and link.exists(info.interface)
        ask(console, f"ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up")
        assert "END=0=" in ask(console, f"ping -c 3 -W 5 {HOST_IP}")
        transfer(console, HOST_IP, HOST_IP)
    client.destroy(config.name)
    assert not link.exists(info.interface)


@pytest.mark.long
def test_two_queues(client: LocalClient, bridge: str) -> None:
    config = linux("pvh", "mq", vcpus=2, vif=vif(bridge=bridge, backendtype="xtool", queues=2))
    with boot(client, config) as console:
        assert "queues/tx-1" in ask(console, "ls -d /sys/class/net/eth0/queues/*")
        ask(console, f"ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up")
        transfer(console, HOST_IP, HOST_IP)
    client.destroy(config.name)


def test_killed_again_and_again(client: LocalClient, bridge: str) -> None:
    """kill -9 under load: TCP goes on, the guest's interface stays, nothing arrives damaged."""
    config = linux("pvh", "kill", vif=vif(bridge=bridge, backendtype="xtool"))
    with boot(client, config) as console:
        domid = client.list(config.name)[0].domid
        ask(console, f"ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up")
        stop = threading.Event()

        def killer() -> None:
            while not stop.wait(2.0):
                pid = server_pid(domid)
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    stop.wait(14.0)  # more than five a minute and it is given up

        thread = threading.Thread(target=killer)
        thread.start()
        try:
            for _ in range(3):
                transfer(console, HOST_IP, HOST_IP)
        finally:
            stop.set()
            thread.join()
        until("nobody serves it", lambda: server_pid(domid) is not None)
        transfer(console, HOST_IP, HOST_IP)
    client.destroy(config.name)


def test_the_tap_is_deleted(client: LocalClient, bridge: str) -> None:
    config = linux("pvh", "tap", vif=vif(bridge=bridge, backendtype="xtool"))
    with boot(client, config) as console:
        [info] = client.network_list(config.name)
        ask(console, f"ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up")
        with link.netlink() as ip:
            ip.link("del", index=ip.link_lookup(ifname=info.interface)[0])
        until("the tap was not made again", lambda: link.exists(info.interface))
        assert "END=0=" in ask(console, f"ping -c 5 -W 5 {HOST_IP}")
        assert os.path.realpath(f"/sys/class/net/{info.interface}/master").endswith(BRIDGE)
    client.destroy(config.name)


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_a_network_with_nothing_set_up(client: LocalClient, tmp_path: Path) -> None:
    """DHCP, a connection out, a forwarded port in; no listener but that one (R21), and passt goes with it."""
    config = linux("pvh", "user", vif=vif(network="user", forwards="[tcp:28022:22, tcp:28080:8080]"))
    with boot(client, config) as console:
        before = listeners()
        assert {("127.0.0.1", 28022), ("127.0.0.1", 28080)} <= before
        ask(console, "ip link set eth0 up; udhcpc -i eth0 -n -q -s /bin/true; ip addr")
        # No script for udhcpc in the initramfs: take the address that passt gives, which is the host's.
        address = socket.gethostbyname(socket.gethostname())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            address = probe.getsockname()[0]
        gateway = gateway_of_host()
        ask(console, f"ip addr add {address}/24 dev eth0; ip route add default via {gateway}")
        transfer(console, gateway, "127.0.0.1", SIZE // 4)  # passt maps the gateway to the host's loopback
        console.send("nc -l -p 8080 -e /bin/cat &\n")
        sleep(2)
        with socket.create_connection(("127.0.0.1", 28080), 10) as peer:
            peer.sendall(b"hello\n")
            assert peer.recv(100) == b"hello\n"
    client.destroy(config.name)
    until("a listener is left", lambda: not {p for _, p in listeners()} & {28022, 28080}, 10)


def listeners() -> set[tuple[str, int]]:
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A":
            host, port = words[1].split(":")
            found.add((socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)))
    return found


def gateway_of_host() -> str:
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        words = line.split()
        if words[1] == "00000000":
            return socket.inet_ntoa(bytes.fromhex(words[2])[::-1])
    pytest.skip("this host has no default route, which passt needs")
