"""The host fails under our backends: full disks, short reads, I/O errors, sources and bridges that vanish, a
xenstored that hangs or crawls. An error reaches the guest as its protocol says it, the log says why, and what
can recover does so by itself. ``docs/hostile.md`` has the table."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from splitdrivers import XVDA, Rig
from test_net_backend import FRONT, World, drive, plain

from xtool.backends.server import STORE_RETRY_MOST
from xtool.devices.vbd import Vbd
from xtool.devices.xenbus import DeviceId
from xtool.errors import HostError
from xtool.fake.store import FakeStoreDaemon
from xtool.fake.store_link import FakeLink
from xtool.xenstore.client import StoreClient

SIZE = 1 << 20


def add(rig: Rig, image: Path, number: int = 0) -> DeviceId:
    return rig.add_disk(Vbd(f"xvd{'abc'[number]}", XVDA + 16 * number, str(image), kind="xtool"))


def reason(rig: Rig, device: DeviceId) -> str:
    return rig.toolstack.get(f"{device.error}/error") or ""


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The kernel lets no file grow beyond ``size`` (EFBIG): the disk is full, for who is not root, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# --- images
def test_a_full_disk(rig: Rig, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ENOSPC under a sparse image: EIO for the write, the rest works, and with room again that does, too."""
    image, filler = small_disk / "sparse.img", small_disk / "filler"
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    device = add(rig, image)
    with rig.frontend(device) as front:
        front.pwrite(b"a" * 65536, 0)
        room = os.statvfs(small_disk)
        filler.write_bytes(bytes(room.f_bavail * room.f_bsize))
        with pytest.raises(OSError) as raised, caplog.at_level(logging.WARNING):
            front.pwrite(b"b" * 65536, 1 << 20)
        assert raised.value.errno == errno.EIO and "No space left on device" in caplog.text
        assert front.pread(65536, 0) == b"a" * 65536 and rig.state(device) == "4"
        filler.unlink()
        front.pwrite(b"b" * 65536, 1 << 20)
        front.flush()
        assert front.pread(65536, 1 << 20) == b"b" * 65536


def test_a_file_that_may_not_grow(rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same without root: the write that begins below the limit and ends beyond it is short."""
    image = tmp_path / "sparse.img"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    device = add(rig, image)
    with rig.frontend(device) as front:
        with files_end_at(SIZE // 2 + 1024), caplog.at_level(logging.WARNING):
            with pytest.raises(OSError) as raised:
                front.pwrite(b"x" * 4096, SIZE // 2)
            front.pwrite(b"y" * 4096, 0)
        assert raised.value.errno == errno.EIO and "File too large" in caplog.text
        assert rig.state(device) == "4"
        front.pwrite(b"x" * 4096, SIZE // 2)
        assert front.pread(4096, SIZE // 2) == b"x" * 4096 and front.pread(4096, 0) == b"y" * 4096


def test_no_room_for_the_journal(small_disk: Path, image: Path) -> None:
    """Met when the frontend connects, never under its writes; the frontend's next try finds the room."""
    rig = Rig(small_disk)
    device = add(rig, image)
    filler = small_disk / "filler"
    room = os.statvfs(small_disk)
    filler.write_bytes(bytes(room.f_bavail * room.f_bsize))
    front = rig.frontend(device, connect=False)
    with pytest.raises(HostError, match="did not connect"):
        front.connect()
    assert "journal" in reason(rig, device) and "No space left" in reason(rig, device)
    assert not rig.grants.live
    filler.unlink()
    front.close()
    rig.guest.write(f"{device.frontend}/state", "1")
    rig.turns(150)
    with rig.frontend(device) as again:
        assert again.pread(SIZE, 0) == image.read_bytes()
    rig.stop()


def test_an_image_that_was_cut(rig: Rig, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Short reads: EIO for what lies beyond the end, whatever else is in the same request."""
    device = add(rig, image)
    content = image.read_bytes()
    with rig.frontend(device) as front:
        os.truncate(image, SIZE // 2 + 512)
        with pytest.raises(OSError), caplog.at_level(logging.WARNING):
            front.pread(4096, SIZE // 2)
        assert f"the image ends at byte {SIZE // 2 + 512}" in caplog.text
        assert front.pread(512, SIZE // 2) == content[SIZE // 2 : SIZE // 2 + 512]
        front.pwrite(content[SIZE // 2 :], SIZE // 2)  # writes make it whole again
        assert front.pread(SIZE, 0) == content


def test_the_medium_fails_and_recovers(rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO from some sectors: the requests that touch them fail, those beside them do not."""
    device = add(rig, image)
    bad = range(65536, 65536 + 4096)
    real = {name: getattr(os, name) for name in ("preadv", "pwritev")}

    def broken(name: str) -> Any:
        def access(fd: int, buffers: Any, offset: int, *flags: int) -> int:
            length = sum(len(part) for part in buffers)
            if offset < bad.stop and offset + length > bad.start:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return int(real[name](fd, buffers, offset, *flags))

        return access

    with rig.frontend(device) as front:
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, broken(name))
            for offset in (65536, 65536 + 3584):
                with pytest.raises(OSError) as raised:
                    front.pread(512, offset)
                assert raised.value.errno == errno.EIO
                with pytest.raises(OSError):
                    front.pwrite(bytes(512), offset)
            assert front.pread(65536, 0) == image.read_bytes()[:65536]
            assert front.pread(4096, bad.stop) == image.read_bytes()[bad.stop : bad.stop + 4096]
        assert front.pread(SIZE, 0) == image.read_bytes()
        [told] = rig.describe()
        assert told["counters"]["errors"] == 4  # type: ignore[index]


def test_an_image_that_was_deleted(rig: Rig, image: Path) -> None:
    """Served on as long as the process has it open. A successor cannot open it, and says so; when the file is
    back, the frontend's next try is served."""
    device = add(rig, image)
    content = image.read_bytes()
    front = rig.frontend(device)
    image.unlink()
    front.pwrite(b"z" * 512, 0)
    assert front.pread(1024, 0) == b"z" * 512 + content[512:1024]
    rig.stop()
    rig.start()
    rig.turns()
    assert rig.state(device) == "5" and "No such file" in reason(rig, device)
    assert not rig.grants.live
    image.write_bytes(content)
    for state, wanted in (("6", "6"), ("1", "2")):
        rig.guest.write(f"{device.frontend}/state", state)
        rig.turns(150)
        assert rig.state(device) == wanted
    with rig.frontend(device) as again:
        assert again.pread(SIZE, 0) == content


# --- interfaces
def test_a_bridge_that_is_missing_when_the_interface_comes(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host.missing = True
    world.add()
    world.start()
    world.until(lambda: world.state() in ("5", "6"))
    assert "no bridge xenbr0" in world.reason()
    # The bridge is there now; the frontend closes and begins anew, as drivers do.
    world.host.missing = False
    world.store.write(f"{FRONT}/state", "6")
    world.until(lambda: world.state() == "6")
    world.store.write(f"{FRONT}/state", "1")
    world.until(lambda: world.state() == "2")
    assert len(drive(world, world.connect(), [plain(60)])) == 1
    world.server.close()
    world.host._close()
    world.loop.close()


# --- xenstored
def test_xenstored_hangs(rig: Rig, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rings are served on; what is asked for meanwhile is done when it answers again."""
    device = add(rig, image)
    front = rig.frontend(device)
    for client in (rig.store, rig.toolstack, rig.guest):
        client._deadline = 0.05
    rig.daemon.hung = True
    rig.store.close()  # whatever it asks next is not answered
    tries: list[float] = []
    real = rig.store._connect

    def connect() -> Any:
        tries.append(rig.clock.now)
        return real()

    rig.store._connect = connect
    begun = rig.clock.now
    with caplog.at_level(logging.WARNING):
        for number in range(800):  # four minutes
            at = 4096 * (number % 200)
            assert front.pread(4096, at) == image.read_bytes()[at : at + 4096]
            rig.turn(0.3)
    assert "did not answer" in caplog.text and rig.server is not None and not rig.server.stopped
    assert len(caplog.records) == 1
    assert 3 < len(tries) < (rig.clock.now - begun) / 10  # each costs the rings the store's deadline
    rig.daemon.hung = False
    for client in (rig.store, rig.toolstack, rig.guest):
        client.close()
        client._deadline = 5.0
    rig.clock.now += STORE_RETRY_MOST
    rig.turns(20)
    assert rig.state(device) == "4"
    with rig.frontend(add(rig, image, 1)) as other:
        assert other.pread(SIZE, 0) == image.read_bytes()
    front.close()
    rig.turns()
    assert rig.state(device) == "6"


class SlowLink:
    """A connection whose answers take ``delay`` seconds each, and come in pieces of ``chunk`` bytes."""

    delay, chunk, pipelines = 0.004, 7, True

    def __init__(self, daemon: FakeStoreDaemon, domid: int = 0) -> None:
        self._link = FakeLink(daemon, domid)
        self._link.chunk = self.chunk
        daemon.links.append(self._link)
        self._ready = 0.0

    def send(self, data: bytes) -> int:
        self._ready = time.monotonic() + self.delay
        return self._link.send(data)

    def recv(self) -> bytes | None:
        return self._link.recv() if time.monotonic() >= self._ready else None

    def fileno(self) -> int:
        return self._link.fileno()

    def close(self) -> None:
        self._link.close()


def test_xenstored_is_slow(rig: Rig, image: Path) -> None:
    """A disk's whole life with answers that crawl: only slower."""
    rig.store.close()
    rig.store._connect = lambda: SlowLink(rig.daemon)
    rig.turns(60)
    device = add(rig, image)
    with rig.frontend(device) as front:
        front.pwrite(b"slow" * 1024, 8192)
        assert front.pread(4096, 8192) == b"slow" * 1024
    rig.turns()
    assert rig.state(device) == "6"
    rig.remove(device)
    rig.turns()
    assert rig.describe() == []
    assert isinstance(rig.store, StoreClient)
