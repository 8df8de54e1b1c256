"""Lying frontends on real Xen: ours, driven from domain 0, against our backends; and faults of the host that
need its kernel.

Each attack ends in the same way: the device is closed with a reason in xenstore (or the request refused,
where the protocol has an answer for it), the process that serves it lives, and the leak check that follows
every test finds nothing. A guest with a disk and an interface of its own works on beside it: its throughput
with and without the attack is measured in one run.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import monotonic, process_time, sleep

import pytest
from test_devices import GUEST_IP, HOST_IP, bridge

from guests import Console, ask, boot, linux
from xtool.abi import io
from xtool.backends.control import ask as ask_backend
from xtool.config.single import parse_disk, parse_vif
from xtool.devices.hotplug import link
from xtool.devices.xenbus import DeviceId
from xtool.errors import HostError
from xtool.frontends.block import BlockFrontend
from xtool.frontends.net import NetPort
from xtool.proto import shm
from xtool.proto.blkif import X86_64, build_discard, build_indirect, build_transfer, parse_response
from xtool.proto.netif import EXTRA, TX_REQUEST
from xtool.toolstack import dom0vif
from xtool.toolstack.backends import server_pid, start_backends, stop_backends
from xtool.toolstack.dom0disk import attached
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

__all__ = ["bridge"]  # a fixture

SIZE = 16 << 20
SECTORS = SIZE // 512
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = 0, 4, 8, 12
MAC = "00:16:3e:00:00:31"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(11).randbytes(SIZE))
    return path


def until(what: str, ready: Callable[[], object], deadline: float = 30.0) -> None:
    end = monotonic() + deadline
    while not ready():
        assert monotonic() < end, what
        sleep(0.05)


# --- disks
class Liar:
    """A disk in domain 0 whose ring is ours to spoil."""

    def __init__(self, host: Host, disk: BlockFrontend) -> None:
        self.host, self.disk = host, disk
        self.place = disk.place
        self.pid = server_pid(0)
        assert self.pid is not None

    @property
    def view(self) -> memoryview:
        return self.disk._queues[0].shared.view

    def write(self, name: str, value: str) -> None:
        self.host.store.write(f"{self.place.frontend}/{name}", value)

    def state(self) -> str | None:
        return self.host.store.get(f"{self.place.backend}/state")

    def reason(self) -> str:
        node = self.place.backend.replace("/domain/0/backend/", "/domain/0/error/backend/")
        return self.host.store.get(f"{node}/error") or ""

    def kick(self) -> None:
        self.disk._events.notify(self.disk._queues[0].port)

    def ask(self, *slots: bytes, deadline: float = 30.0) -> list[int]:
        """Put raw requests on the ring; the statuses of their responses."""
        ring = self.disk._queues[0].ring
        for slot in slots:
            ring.push(slot)
        ring.publish()
        self.kick()
        found: list[int] = []
        end = monotonic() + deadline
        while len(found) < len(slots):
            assert monotonic() < end, f"{len(found)} of {len(slots)} were answered"
            found += [parse_response(slot, X86_64).status for slot in ring.take_responses()]
            self.disk._sleep(0.02)
        return found

    def read(self, ref: int | None = None, sector: int = 0) -> bytes:
        segment = (self.disk._pool.refs[0] if ref is None else ref, 0, 4096)
        return build_transfer(io.BLKIF_OP_READ, 7, sector, [segment])

    def closed(self, word: str) -> None:
        """It is closing for that reason, and the process that closed it lives."""
        until(f"still in state {self.state()}", lambda: self.state() in ("5", "6"))
        until("no reason is told", self.reason, 5)
        assert word in self.reason(), self.reason()
        assert server_pid(0) == self.pid

    def again(self, image: Path) -> None:
        """A frontend that closes and begins anew is served by the same process."""
        self.write("state", "6")
        until("it does not let go", lambda: self.state() == "6")
        self.write("state", "1")
        until("it does not offer itself again", lambda: self.state() == "2")
        fresh = BlockFrontend(self.host.store, self.disk._events, self.disk._allocator, self.place)
        try:
            fresh.connect(30)
            assert fresh.pread(65536, 4096) == image.read_bytes()[4096 : 4096 + 65536]
        finally:
            fresh.close()
        assert server_pid(0) == self.pid


@contextmanager
def liar(host: Host, image: Path, more: str = "") -> Iterator[Liar]:
    with attached(host, parse_disk([f"{image},raw,xvda,backendtype=xtool{more}"]), ring_order=0) as disk:
        yield Liar(host, disk)


@pytest.mark.parametrize("ahead", [33, 0x8000_0000, 0xFFFF_FFFF])
def test_hf_1_2_4_indexes(xen_host: Host, image: Path, ahead: int) -> None:
    with liar(xen_host, image) as bad:
        assert bad.ask(bad.read()) == [0]
        shm.store32(bad.view, REQ_PROD, (1 + ahead) & 0xFFFF_FFFF)
        bad.kick()
        bad.closed("req_prod")
        bad.again(image)


def test_hf_4_our_words_overwritten(xen_host: Host, image: Path) -> None:
    with liar(xen_host, image) as bad:
        ring = bad.disk._queues[0].ring
        bad.ask(*[bad.read()] * 3)
        shm.store32(bad.view, REQ_EVENT, 0x7777_7777)
        shm.store32(bad.view, RSP_PROD, 0x1234)
        ring.push(bad.read())
        ring.publish()
        bad.kick()
        until("its count does not stand again", lambda: shm.load32(bad.view, RSP_PROD) == 4)
        assert bad.state() == "4"


@pytest.mark.long
def test_hf_8_9_10_nodes(xen_host: Host, image: Path) -> None:
    """While connected they are not looked at; at the next connection each is refused."""
    with liar(xen_host, image) as bad:
        for name, value in (("protocol", "x86_32-abi"), ("feature-persistent", "1"), ("ring-ref", "1")):
            bad.write(name, value)
        assert bad.ask(bad.read()) == [0] and bad.state() == "4"
        right = {"ring-ref": str(bad.disk._queues[0].shared.refs[0]), "event-channel": "1", "state": "3"}
        nonsense = [
            {"ring-ref": "0"},
            {"ring-ref": "4294967295"},
            {"ring-ref": "-1"},
            {"ring-ref": "9" * 1000},
            {"ring-ref": "60000"},
            {"ring-page-order": "31"},
            {"multi-queue-num-queues": "65535"},
            {"multi-queue-num-queues": "0"},
            {"protocol": "\x1b[2J"},
            {"event-channel": "99999999"},
            {"event-channel": "4000"},
        ]
        for nodes in nonsense:
            bad.write("state", "6")
            until("it does not let go", lambda: bad.state() == "6")
            bad.write("state", "1")
            until("it does not offer itself again", lambda: bad.state() == "2")
            for name, value in {"protocol": X86_64.protocol, **right, **nodes}.items():
                bad.write(name, value)
            until(f"{nodes} were taken", lambda: bad.state() == "5")
            assert bad.reason() and bad.reason().isprintable() and server_pid(0) == bad.pid
            for name in nodes:
                xen_host.store.rm(f"{bad.place.frontend}/{name}")
        bad.write("protocol", X86_64.protocol)
        bad.again(image)


def test_hf_11_12_13_14_grants(xen_host: Host, image: Path) -> None:
    with liar(xen_host, image) as bad:
        with bad.disk._allocator.share(0, 1, False) as readonly:
            elsewhere = bad.disk._allocator.share(1, 1)  # another domain's, if there is one at all
            gone = bad.disk._allocator.share(0, 1)
            refs = [0, 60000, 0xFFFF_FFFF, readonly.refs[0], elsewhere.refs[0], gone.refs[0]]
            gone.close()
            for ref in refs:
                assert bad.ask(bad.read(), bad.read(ref)) == [0, -1], ref
            elsewhere.close()
        page = bad.disk._pool.refs[0]
        same = build_transfer(io.BLKIF_OP_READ, 1, 0, [(page, 0, 4096)] * 11)
        assert bad.ask(same) == [0]
        # Its own ring as a page for data: the indexes are the image's bytes then.
        bad.disk._queues[0].ring.push(bad.read(bad.disk._queues[0].shared.refs[0]))
        bad.disk._queues[0].ring.publish()
        bad.kick()
        sleep(0.2)
        bad.kick()
        bad.closed("req_prod")


def raw(op: int, count: int, sector: int, first: int = 0, last: int = 7) -> bytes:
    head = bytes([op, count, 0, 0]) + bytes(12) + sector.to_bytes(8, "little")
    return (head + (bytes(4) + bytes([first, last, 0, 0])) * 11)[:112]


def test_hf_16_to_19_requests(xen_host: Host, image: Path) -> None:
    before = image.read_bytes()
    wrong = [
        *(raw(io.BLKIF_OP_READ, count, 0) for count in (0, 12, 255)),
        raw(io.BLKIF_OP_READ, 1, 0, 5, 4),
        raw(io.BLKIF_OP_WRITE, 1, 0, 0, 8),
        *(raw(io.BLKIF_OP_WRITE, 1, at) for at in (SECTORS - 7, SECTORS, 1 << 63, (1 << 64) - 8)),
        *(build_indirect(io.BLKIF_OP_WRITE, 5, 0, count, [8]) for count in (0, 257, 65535)),
        build_indirect(io.BLKIF_OP_WRITE, 5, 0, 12, [60000]),
        build_indirect(io.BLKIF_OP_INDIRECT, 5, 0, 12, [8]),
        *(raw(op, 1, 0) for op in (4, 7, 77, 255)),
        build_discard(5, SECTORS, 1),
        build_discard(5, 8, (1 << 64) - 8),
    ]
    with liar(xen_host, image) as bad:
        for slot in wrong:
            first, second = bad.ask(slot, bad.read())
            assert first < 0 and second == 0, slot[:24].hex()
        assert bad.state() == "4" and server_pid(0) == bad.pid
    assert image.read_bytes() == before
    with liar(xen_host, image, ",ro") as bad:
        page = bad.disk._pool.refs[0]
        for op in (io.BLKIF_OP_WRITE, io.BLKIF_OP_WRITE_BARRIER):
            [code] = bad.ask(build_transfer(op, 1, 0, [(page, 0, 4096)]))
            assert code < 0
        [code] = bad.ask(build_discard(1, 0, 8))
        assert code < 0
    assert image.read_bytes() == before


@pytest.mark.long
def test_hf_29_30_33_states_and_storms(xen_host: Host, image: Path) -> None:
    """Flapping states, a storm of writes, a directory that goes: bounded work; it is served in the end."""
    with liar(xen_host, image) as bad:
        spent, own = cpu_seconds(bad.pid or 0), process_time()
        dice = random.Random(12)
        for _ in range(1000):
            bad.write("state", dice.choice(["1", "3", "4", "4", "6", "", "99", "x" * 2000]))
        spent, own = cpu_seconds(bad.pid or 0) - spent, process_time() - own
        print(f"the storm cost the backend {spent:.2f} s of processor time, and the liar {own:.2f} s")
        assert spent < 10 * own
        sleep(3)  # what it is made to wait for flapping
        bad.write("state", "6")
        until("it does not let go", lambda: bad.state() == "6", 60)
        bad.again(image)
        bad.write("state", "1")
        until("it does not offer itself again", lambda: bad.state() == "2", 60)
        xen_host.store.rm(bad.place.frontend)
        until("a frontend without nodes is still there", lambda: bad.state() == "6")
        assert server_pid(0) == bad.pid


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- interfaces
@contextmanager
def lying_port(host: Host, bridge: str) -> Iterator[NetPort]:
    wanted = parse_vif([f"bridge={bridge},mac={MAC},devid=8,backendtype=xtool"])
    with dom0vif.attached(host, wanted, pages=16) as found:
        yield found


def net_state(host: Host, port: NetPort) -> str | None:
    return host.store.get(f"{port._device.backend}/state")


def answered(port: NetPort) -> bool:
    port.pairs[0].tx.take_responses()
    return not port.pairs[0].tx.outstanding


def net_reason(host: Host, port: NetPort) -> str:
    node = port._device.backend.replace("/domain/0/backend/", "/domain/0/error/backend/")
    return host.store.get(f"{node}/error") or ""


def test_hf_23_24_25_frames(xen_host: Host, bridge: str) -> None:
    """Each is dropped with an error; a chain without an end closes the device."""
    more, extra, blank = io.NETTXF_more_data, io.NETTXF_extra_info, io.NETTXF_csum_blank
    with lying_port(xen_host, bridge) as port:
        pid, pair = server_pid(0), port.pairs[0]
        gref = pair.tx_pages.refs[0]
        gso = EXTRA.pack(1, 0, 1448, 9, 0)
        cases = [
            *([TX_REQUEST.pack(gref, 0, 0, 1, size)] for size in (0, 1, 13, 65535)),
            [TX_REQUEST.pack(gref, 4090, 0, 1, 60)],
            [TX_REQUEST.pack(gref, 0, more, 1, 60), TX_REQUEST.pack(gref, 0, 0, 2, 100)],
            [TX_REQUEST.pack(gref, 0, more if n < 18 else 0, n, 19 if n == 0 else 1) for n in range(19)],
            [TX_REQUEST.pack(gref, 0, extra | blank, 1, 60), gso],
            [TX_REQUEST.pack(60000, 0, 0, 1, 60)],
        ]
        for slots in cases:
            for slot in slots:
                pair.tx.push(slot)
            pair.tx.publish()
            port._events.notify(pair.tx_port)
            until("the slots are not answered", lambda: answered(port))
            assert net_state(xen_host, port) == "4"
        [told] = [one for one in ask_backend(0) if one["kind"] == "vif"]
        assert told["counters"]["tx_invalid"] == len(cases) and told["counters"]["tx_frames"] == 0
        for n in range(40):
            pair.tx.push(TX_REQUEST.pack(gref, 0, more, n, 1))
        pair.tx.publish()
        port._events.notify(pair.tx_port)
        until("an endless frame is waited for", lambda: net_state(xen_host, port) == "5")
        assert "in one frame" in net_reason(xen_host, port) and server_pid(0) == pid


@pytest.mark.parametrize("word", [0, 4096])
def test_hf_1_2_indexes_of_an_interface(xen_host: Host, bridge: str, word: int) -> None:
    with lying_port(xen_host, bridge) as port:
        pid, pair = server_pid(0), port.pairs[0]
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as host:
            host.bind((bridge, 0x88B5))

            def closed() -> bool:
                # Again and again: a frame that came before has the port put its own index there.
                shm.store32(pair.rings.view, word, 0x8000_0000)
                port._events.notify(pair.tx_port if word == 0 else pair.rx_port)
                host.send(b"\xff" * 6 + bytes(6) + b"\x88\xb5" + bytes(60))  # for that ring something to take
                return net_state(xen_host, port) == "5"

            until("nonsense was believed", closed)
        assert "req_prod" in net_reason(xen_host, port) and server_pid(0) == pid


# --- others are not hurt
def spoil(bad: Liar, stop: Event, counts: dict[str, int]) -> None:
    """Lies as fast as they go: notifications for nothing, node storms, requests that are refused."""
    dice = random.Random(13)
    while not stop.is_set():
        for _ in range(200):
            bad.kick()
        for _ in range(20):
            bad.write("state", dice.choice(["4", "x" * 1000]))
        statuses = bad.ask(*[bad.read(60000)] * 32)
        assert set(statuses) == {io.BLKIF_RSP_ERROR}
        counts["rounds"] = counts.get("rounds", 0) + 1
    bad.write("state", "4")


def measured(console: Console, command: str) -> float:
    """MB/s of reading the whole disk, the shell's own time included."""
    began = monotonic()
    assert f"{SIZE >> 16}+0 records in" in ask(console, command, 300)
    return SIZE / 1e6 / (monotonic() - began)


@pytest.mark.long
def test_another_guests_disk_and_interface_go_on(
    client: LocalClient, xen_host: Host, bridge: str, image: Path, tmp_path: Path
) -> None:
    """Throughput and round trips of a guest with and without an attack on domain 0's own devices."""
    victim = tmp_path / "victim.img"
    victim.write_bytes(random.Random(14).randbytes(SIZE))
    wanted = linux(
        "pvh",
        "victim",
        disk=f"['{victim},raw,xvda,backendtype=xtool']",
        vif=f"[{{bridge: {bridge}, backendtype: xtool}}]",
    )
    read = "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/xvda of=/dev/null bs=64k"
    pings = f"ping -c 20 -q {HOST_IP}"
    with boot(client, wanted) as console:
        ask(console, f"ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up")
        measured(console, read)  # warm

        def round_trip() -> float:
            answer = ask(console, pings, 300)
            assert " 0% packet loss" in answer, answer
            return float(re.findall(r"= [\d.]+/([\d.]+)/", answer)[-1])

        def both() -> tuple[float, float]:
            return sorted(measured(console, read) for _ in range(3))[1], round_trip()

        quiet, quick = both()
        stop, counts = Event(), dict[str, int]()
        errors: list[BaseException] = []

        with liar(xen_host, image) as bad:

            def attack() -> None:
                try:
                    spoil(bad, stop, counts)
                except BaseException as error:
                    errors.append(error)

            thread = Thread(target=attack)  # the connection to xenstored is its own meanwhile
            thread.start()
            try:
                until("the attack does not begin", lambda: counts.get("rounds") or errors, 60)
                attacked, slow = both()
                assert thread.is_alive()
            finally:
                stop.set()
                thread.join(120)
        assert not errors
        print(
            f"disk {quiet:.1f} MB/s alone, {attacked:.1f} under {counts['rounds']} rounds of attack: "
            f"{attacked / quiet:.2f}; round trip {quick:.2f} and {slow:.2f} ms: {slow / quick:.2f}"
        )
        assert attacked / quiet >= 0.5
        assert hashlib.md5(victim.read_bytes()).hexdigest() in ask(console, "md5sum /dev/xvda")
    client.destroy(wanted.name)


# --- faults that need the kernel
def test_the_disk_is_full(xen_host: Host, tmp_path: Path) -> None:
    """ENOSPC under a sparse image: EIO for that write; with room again it succeeds."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], check=True)
    try:
        image, filler = place / "sparse.img", place / "filler"
        with open(image, "wb") as file:
            file.truncate(64 << 20)
        with attached(xen_host, parse_disk([f"{image},raw,xvda,backendtype=xtool"])) as disk:
            disk.pwrite(b"a" * (1 << 20), 0)
            room = os.statvfs(place)
            filler.write_bytes(bytes(room.f_bavail * room.f_bsize))
            with pytest.raises(OSError):
                disk.pwrite(b"b" * (1 << 20), 8 << 20)
            assert disk.pread(1 << 20, 0) == b"a" * (1 << 20)
            filler.unlink()
            disk.pwrite(b"b" * (1 << 20), 8 << 20)
            disk.flush()
            assert disk.pread(1 << 20, 8 << 20) == b"b" * (1 << 20)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_an_image_that_is_cut(xen_host: Host, image: Path) -> None:
    """EIO from there on, the rest is served; then it is back. (A loop device would give zeros.)"""
    content = image.read_bytes()
    with attached(xen_host, parse_disk([f"{image},raw,xvda,backendtype=xtool"])) as disk:
        assert disk.pread(65536, 0) == content[:65536]
        os.truncate(image, SIZE // 2)
        with pytest.raises(OSError):
            disk.pread(4096, SIZE - 4096)
        assert disk.pread(65536, 65536) == content[65536:131072]
        os.truncate(image, SIZE)
        assert disk.pread(4096, SIZE - 4096) == bytes(4096)


@pytest.mark.long
def test_the_tap_goes_and_the_bridge_is_missing(xen_host: Host, bridge: str) -> None:
    """A tap that is deleted is made again; with no bridge to put it on the device is closed in the end."""
    with lying_port(xen_host, bridge) as port:
        pid = server_pid(0)
        with link.netlink() as ip:
            ip.link("del", index=ip.link_lookup(ifname="vif0.8")[0])
        until("the tap was not made again", lambda: link.exists("vif0.8"))
        until("it is not on its bridge", lambda: os.path.islink("/sys/class/net/vif0.8/master"))
        assert net_state(xen_host, port) == "4"
        with link.netlink() as ip:
            number = ip.link_lookup(ifname=bridge)[0]
            ip.link("set", index=number, state="down")  # before 6.2 nothing that is up can be renamed
            ip.link("set", index=number, ifname="xtgone0")
        try:
            with link.netlink() as ip:
                ip.link("del", index=ip.link_lookup(ifname="vif0.8")[0])
            until("nobody gives up", lambda: net_state(xen_host, port) == "5", 60)
        finally:
            with link.netlink() as ip:
                ip.link("set", index=number, ifname=bridge)
                ip.link("set", index=number, state="up")
        assert f"no bridge {bridge}" in net_reason(xen_host, port) and server_pid(0) == pid


def test_an_interface_without_its_bridge_is_refused(xen_host: Host) -> None:
    """By the process itself: its bridge went after the toolstack had looked."""
    device, store = DeviceId(0, "vif", 9, "xtool-vif"), xen_host.store
    frontend = "/local/domain/0/xtool/device/vif/9"
    nodes = {
        frontend: {"backend": device.backend, "backend-id": "0", "handle": "9", "state": "1"},
        device.backend: {
            "frontend": frontend,
            "frontend-id": "0",
            "handle": "9",
            "online": "1",
            "mac": MAC,
            "bridge": "xtnone0",
            "state": "1",
        },
    }
    with store.batch() as batch:
        for root, values in nodes.items():
            for name, value in values.items():
                batch.write(f"{root}/{name}", value, perms=("n0",))
    try:
        start_backends(xen_host, 0, [device])
        state = partial(store.get, f"{device.backend}/state")
        until("it was not refused", lambda: state() in ("5", "6"))
        assert "no bridge xtnone0" in (store.get(f"{device.error}/error") or "")
        until("its interface stays", lambda: not link.exists("vif0.9"))
    finally:
        stop_backends(xen_host, 0)
        for path in (frontend, device.backend, device.error):
            store.rm(path)
            while (path := path.rpartition("/")[0]).count("/") > 3 and store.list_many([path])[path] == ():
                store.rm(path)


def test_xenstored_stands_still(xen_host: Host, image: Path) -> None:
    """Stopped for twelve seconds under load: requests are answered, late at most by the backend's own
    deadline towards it; afterwards disks come and go as before."""
    found = subprocess.run(["pidof", "oxenstored", "xenstored"], capture_output=True, text=True, check=False)
    if not found.stdout.split():
        pytest.skip("xenstored is no process of this domain")
    daemon = int(found.stdout.split()[0])
    content = image.read_bytes()
    with liar(xen_host, image) as good:
        thread = Thread(target=sleep, args=(12,))
        worst, done = 0.0, 0
        os.kill(daemon, signal.SIGSTOP)
        try:
            thread.start()
            while thread.is_alive():
                begun = monotonic()
                at = 4096 * (done % 512)
                assert good.disk.pread(4096, at) == content[at : at + 4096]
                worst, done = max(worst, monotonic() - begun), done + 1
        finally:
            os.kill(daemon, signal.SIGCONT)
        print(f"{done} reads while xenstored stood still, the slowest took {worst:.2f} s")
        assert done > 20 and worst < 10 and server_pid(0) == good.pid
    with pytest.raises(HostError), attached(xen_host, parse_disk([f"{image}.none,raw,xvda"])):
        pass
    with liar(xen_host, image) as good:
        assert good.disk.pread(4096, 0) == content[:4096]
