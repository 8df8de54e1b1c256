"""Disks, interfaces and consoles of domain 0 itself, on the machine in memory: both ends are ours."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from domainzero import DomainZero, domain_zero

from xtool.backends import vnethdr
from xtool.backends.viewers import socket_path
from xtool.cli import app
from xtool.config.single import parse_disk, parse_vif
from xtool.errors import DeviceError, DomainNotFoundError, ImageInUseError, UsageError
from xtool.frontends.file import CHUNK, DiskFile
from xtool.toolstack import dom0, dom0console, dom0disk, dom0vif
from xtool.toolstack.local import LocalClient
from xtool.xenstore.paths import libxl_device

SIZE = (4 << 20) + 512


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DomainZero]:
    with domain_zero(tmp_path, monkeypatch) as found:
        yield found
        found.check_clean()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


def ours(image: Path, more: str = "") -> dom0disk.DiskConfig:
    return parse_disk([f"{image},raw,xvda,backendtype=xtool{more}"])


# --- a disk as a file
def test_a_disk_is_a_file(world: DomainZero, image: Path) -> None:
    model = io.BytesIO(image.read_bytes())
    dice = random.Random(8)
    with dom0disk.attached(world.host, ours(image)) as disk:
        assert disk.size == SIZE
        with DiskFile(disk) as raw:
            assert isinstance(raw, io.RawIOBase)
            assert (raw.readable(), raw.writable(), raw.seekable()) == (True, True, True)
            for _ in range(150):
                at = dice.randrange(SIZE + 1)
                length = dice.choice((0, 1, 511, 512, 4097, 70_000))
                assert raw.seek(at) == model.seek(at) == raw.tell()
                if dice.random() < 0.5:
                    assert raw.read(length) == model.read(length)
                elif at + length <= SIZE:
                    data = dice.randbytes(length)
                    assert raw.write(data) == model.write(data)
            raw.seek(0)
            buffer = bytearray(SIZE + 100)
            assert raw.readinto(buffer) == SIZE and bytes(buffer[:SIZE]) == model.getvalue()
            assert raw.readinto(buffer) == 0 and raw.read() == b""
            assert raw.seek(-512, os.SEEK_END) == SIZE - 512
            assert raw.seek(12, os.SEEK_CUR) == SIZE - 500
        assert raw.closed
        for broken in (raw.tell, raw.readable, lambda: raw.read(1), lambda: raw.write(b"x")):
            with pytest.raises(ValueError):
                broken()
    assert image.read_bytes() == model.getvalue()


def test_the_end_of_a_disk(world: DomainZero, image: Path) -> None:
    with dom0disk.attached(world.host, ours(image)) as disk, DiskFile(disk) as raw:
        raw.seek(SIZE - 100)
        assert raw.write(bytes(200)) == 100  # as write(2) does
        with pytest.raises(OSError, match="No space"):
            raw.write(b"x")
        assert raw.write(b"") == 0
        assert raw.seek(SIZE + 7) == SIZE + 7 and raw.read(1) == b""
        with pytest.raises(io.UnsupportedOperation):
            raw.truncate(1)
        with pytest.raises(OSError, match="before the disk"):
            raw.seek(-1)
        with pytest.raises(ValueError):
            raw.seek(0, 9)
    assert image.read_bytes()[-100:] == bytes(100) and image.stat().st_size == SIZE


def test_buffered_and_what_is_built_on_it(world: DomainZero, image: Path, tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"hello" * 5000)
    with dom0disk.attached(world.host, ours(image)) as disk:
        with io.BufferedRandom(DiskFile(disk), 65536) as file:  # type: ignore[arg-type]
            file.seek(10_000)
            for number in range(1000):
                file.write(b"%06d" % number)
            file.seek(10_006)
            assert file.read(12) == b"000001000002"
        with io.BufferedWriter(DiskFile(disk), CHUNK) as out, tarfile.open(fileobj=out, mode="w|") as tar:
            tar.add(tmp_path / "hello", "hello")
        with io.BufferedReader(DiskFile(disk)) as back, tarfile.open(fileobj=back, mode="r:") as tar:
            found = tar.extractfile("hello")
            assert found is not None and found.read() == b"hello" * 5000


def test_a_read_only_disk(world: DomainZero, image: Path) -> None:
    with dom0disk.attached(world.host, ours(image, ",ro")) as disk, DiskFile(disk) as raw:
        assert not raw.writable() and raw.readable()
        with pytest.raises(io.UnsupportedOperation):
            raw.write(b"x")
        with pytest.raises(io.UnsupportedOperation), io.BufferedRandom(raw):  # type: ignore[arg-type]
            pass
        assert raw.readall() == image.read_bytes()


def test_a_flush_reaches_the_disk_once() -> None:
    class Counting:
        size, flushes = 4096, 0
        offer = type("Offer", (), {"readonly": False})()

        def pread(self, length: int, offset: int) -> bytes:
            return bytes(length)

        def pwrite(self, data: bytes, offset: int) -> int:
            return len(data)

        def flush(self) -> None:
            self.flushes += 1

    disk = Counting()
    with DiskFile(disk) as raw:
        raw.read(100)
        raw.flush()
        assert disk.flushes == 0
        raw.write(b"x")
    assert disk.flushes == 1


# --- several at once, and what is left
def test_several_disks_of_domain_0(world: DomainZero, image: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.img"
    second.write_bytes(b"2" * 8192)
    with dom0disk.attached(world.host, ours(image)) as one:
        with pytest.raises(ImageInUseError), dom0disk.attached(world.host, ours(image)):
            pass
        with dom0disk.attached(world.host, ours(second)) as two:
            assert one.pread(4, 0) == image.read_bytes()[:4] and two.pread(4, 0) == b"2222"
        assert one.pread(4, 512) == image.read_bytes()[512:516]
        world.restart()  # the process is replaced: the frontend sees a pause
        one.pwrite(b"after", 0)
    assert image.read_bytes()[:5] == b"after"


def test_force_share_reads_what_somebody_writes(world: DomainZero, image: Path) -> None:
    with dom0disk.attached(world.host, ours(image)) as writer:
        with pytest.raises(ImageInUseError), dom0disk.attached(world.host, ours(image, ",ro")):
            pass
        with pytest.raises(UsageError), dom0disk.attached(world.host, ours(image), force_share=True):
            pass
        with dom0disk.attached(world.host, ours(image, ",ro"), force_share=True) as reader:
            writer.pwrite(b"seen", 0)
            assert reader.pread(4, 0) == b"seen"
        # Served for reading: who would write to it now is told.
    readonly = dom0disk.attached(world.host, ours(image, ",ro"))
    with readonly, pytest.raises(ImageInUseError), dom0disk.attached(world.host, ours(image)):
        pass


def test_qemu_cannot_serve_it(world: DomainZero, image: Path) -> None:
    wanted = parse_disk([f"{image},raw,xvda,backendtype=qdisk"])
    with pytest.raises(UsageError, match="QEMU"), dom0disk.attached(world.host, wanted):
        pass


def test_what_a_killed_process_left_is_taken_away(world: DomainZero, image: Path) -> None:
    host = world.host
    with dom0disk.attached(host, ours(image)) as disk:
        mirror = libxl_device(0, "vbd", 51712)
        assert dom0.recover(host) == []  # ours lives
        host.store.write(f"{mirror}/xtool-owner", "1 1")  # process 1 began at another time
        assert disk.size
        found = [item for item in LocalClient(host).leftovers() if item.kind == "device"]
        assert [(item.what, item.certain) for item in found] == [("vbd 51712", True)]
        results = LocalClient(host).gc()
        assert [(r.domid, r.name, r.action) for r in results] == [(0, "vbd 51712", "rolled-back")]
        assert not host.store.exists(disk.place.backend) and not host.store.exists(mirror)


# --- interfaces and consoles
def test_frames_both_ways(world: DomainZero) -> None:
    host, plain = world.host, vnethdr.PLAIN
    mac = "00:16:3e:00:00:05"
    raw = bytes.fromhex(mac.replace(":", ""))
    with dom0vif.attached(host, parse_vif([f"bridge=xenbr0,mac={mac},backendtype=xtool"])) as port:
        assert world.kernel.links["vif0.0"].bridge == "xenbr0"
        out = b"\xff" * 6 + raw + b"\x88\xb5" + b"out" * 30
        port.send(out)
        assert world.wire.recv(1 << 16)[len(plain) :] == out
        into = raw + b"\x02" * 6 + b"\x88\xb5" + b"in" * 40
        world.wire.send(plain + into)
        frame = port.receive(5)
        assert frame is not None and frame.data == into
        with dom0vif.attached(host, parse_vif(["bridge=xenbr0,backendtype=xtool"])):
            assert set(world.kernel.links) == {"vif0.0", "vif0.1"}
    assert world.kernel.links == {}


def test_an_interface_without_its_bridge(world: DomainZero) -> None:
    from xtool.errors import HostError

    wanted = parse_vif(["bridge=none,backendtype=xtool"])
    with pytest.raises(HostError, match="no bridge"), dom0vif.attached(world.host, wanted):
        pass
    third = parse_vif(["bridge=xenbr0,devid=3,backendtype=xtool"])
    first = dom0vif.attached(world.host, third)
    with first, pytest.raises(DeviceError), dom0vif.attached(world.host, third):
        pass


def test_a_console_of_domain_0(world: DomainZero) -> None:
    attached = dom0console.attached(world.host, name="org.example.test")
    with attached as console, socket.socket(socket.AF_UNIX) as viewer:
        viewer.settimeout(5)
        viewer.connect(str(socket_path(0, 1)))
        data = random.Random(2).randbytes(50_000)
        writer = threading.Thread(target=console.print, args=(data, 10.0))
        writer.start()
        seen = b""
        while len(seen) < len(data):
            seen += viewer.recv(65536)
        writer.join()
        assert seen == data
        viewer.sendall(b"typed\n")
        assert console.read(5) == b"typed\n"
    assert not socket_path(0, 1).exists()


# --- over NBD
class Serving:
    """``xtool block-serve`` in a thread, ended as Ctrl-C does."""

    def __init__(self, world: DomainZero, monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
        from xtool.frontends.nbd import NbdServer

        step, self.over = NbdServer.step, False

        def stepping(server: NbdServer, timeout: float) -> None:
            if self.over:
                raise KeyboardInterrupt
            step(server, min(timeout, 0.02))

        monkeypatch.setattr(NbdServer, "step", stepping)
        client = LocalClient(world.host)
        monkeypatch.setattr(client, "close", lambda: None)
        self.code: list[int] = []
        self._thread = threading.Thread(
            target=lambda: self.code.append(
                app.main(["block-serve", *argv], opener=lambda: client)  # type: ignore[arg-type, return-value]
            )
        )
        self._thread.start()

    def wait(self, path: Path) -> None:
        end = time.monotonic() + 10
        while not path.is_socket():
            assert self._thread.is_alive() and time.monotonic() < end
            time.sleep(0.01)

    def end(self) -> int:
        self.over = True
        self._thread.join(20)
        return self.code[0]


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")
def test_block_serve(
    world: DomainZero,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "web disk.sock"
    with socket.socket(socket.AF_UNIX) as stale:  # as a killed server leaves it
        stale.bind(str(path))
    url = f"nbd+unix:///?socket={tmp_path}/web%20disk.sock"
    serving = Serving(world, monkeypatch, f"{image},raw,backendtype=xtool", "-k", str(path), "-r")
    end = time.monotonic() + 10
    while "Ctrl-C" not in (said := "".join(capfd.readouterr())):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert (
        said.splitlines()[0] == url
        and f"qemu-img info '{url}'" in said
        and f"{SIZE} bytes, read-only" in said
    )
    info = subprocess.run(["qemu-img", "info", "--output=json", url], capture_output=True, check=True)
    assert json.loads(info.stdout)["virtual-size"] == SIZE
    copy = tmp_path / "copy.img"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(copy)], check=True)
    assert copy.read_bytes() == image.read_bytes()
    wrote = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", url], capture_output=True)
    assert wrote.returncode != 0
    # The second is refused: the image is open for reading, and its place is taken.
    client = LocalClient(world.host)
    from xtool.toolstack.api import ServeOptions

    with pytest.raises(UsageError, match="somebody listens"):
        client.block_serve(ServeOptions(ours(image), socket=str(path)), lambda served: None)
    with pytest.raises(ImageInUseError):
        client.block_serve(ServeOptions(ours(image)), lambda served: None)
    assert serving.end() == 0 and not path.exists()
    assert "detached" in capfd.readouterr().err


def test_block_serve_of_a_domain(world: DomainZero, image: Path, tmp_path: Path) -> None:
    from xtool.config import parse_config
    from xtool.toolstack.api import CreateOptions, ServedDisk, ServeOptions
    from xtool.toolstack.create import create

    kernel = Path(__file__).resolve().parents[2] / "build" / "guest" / "tiny-pvh.elf"
    lines = ["name: web", "type: pvh", "memory: 16", f"kernel: {kernel}"]
    lines.append(f"disk: ['{image},raw,xvda']")
    create(world.host, parse_config("\n".join(lines), "t.yaml", "/"), CreateOptions(devices=0.3))
    client, seen = LocalClient(world.host), []

    def ready(served: ServedDisk) -> None:
        seen.append(served)
        raise KeyboardInterrupt

    with pytest.raises(ImageInUseError) as refused:
        client.block_serve(ServeOptions(domain="web", vdev="xvda"), ready)
    assert "'web' has it open" in refused.value.message and "--force-share" in (refused.value.hint or "")
    # The kernel's backend would be chosen, which is not in memory: ours.
    from xtool.toolstack import blockserve

    disk = blockserve.disk_of(world.host, "web", "xvda").model_copy(update={"backendtype": "xtool"})
    assert disk.readonly and disk.target == str(image)
    with pytest.raises(KeyboardInterrupt):
        client.block_serve(ServeOptions(disk, force_share=True), ready)
    [served] = seen
    assert served.readonly and served.size == SIZE and not Path(served.socket).exists()
    with pytest.raises(DeviceError, match="no disk xvdb"):
        client.block_serve(ServeOptions(domain="web", vdev="xvdb"), ready)
    with pytest.raises(DomainNotFoundError):
        client.block_serve(ServeOptions(domain="nobody", vdev="xvda"), ready)
    client.destroy("web")


def test_a_place_that_cannot_be_listened_at(world: DomainZero, image: Path, tmp_path: Path) -> None:
    from xtool.toolstack.api import ServeOptions

    file = tmp_path / "file"
    file.write_text("")
    client = LocalClient(world.host)
    for place in (file, tmp_path / "no" / "folder", tmp_path / ("x" * 120)):
        with pytest.raises(UsageError):
            client.block_serve(ServeOptions(ours(image), socket=str(place)), lambda served: None)
    assert file.exists()


def test_a_backend_that_gives_up_ends_it(world: DomainZero, image: Path, tmp_path: Path) -> None:
    from xtool.errors import HostError
    from xtool.toolstack.api import ServedDisk, ServeOptions

    def parked(served: ServedDisk) -> None:
        device = "backend/xtool-vbd/0/51712"
        world.host.store.write(f"/local/domain/0/error/{device}/error", "it died")
        world.host.store.write(f"/local/domain/0/{device}/state", "6")

    with pytest.raises(HostError, match="it died"):
        LocalClient(world.host).block_serve(ServeOptions(ours(image)), parked)
