"""Our block backend killed, replaced, starved and misled by its image, under a verifying load."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
from splitdrivers import GUEST, XVDA, Rig

from xtool.abi import io
from xtool.backends import block
from xtool.backends.images import RawImage
from xtool.devices.vbd import Vbd
from xtool.devices.xenbus import DeviceId
from xtool.errors import HostError, StoreGoneError
from xtool.frontends.block import BlockFrontend
from xtool.grant.persistent import PersistentGrants
from xtool.proto.ring import BackRing

SIZE = 4 << 20


class Killed(BaseException):
    """The process ends here, at this instruction."""


class Load:
    """Writes and reads under way all the time, each checked against a copy in memory when it is answered."""

    def __init__(self, front: BlockFrontend, model: bytearray, rng: random.Random) -> None:
        self.front, self.model, self.rng = front, model, rng
        self.busy: set[int] = set()
        self.done = 0

    def more(self) -> None:
        """Start something in each free part of the disk, a part having one operation at a time."""
        for part in self.rng.sample(range(32), 12):
            if part in self.busy:
                continue
            length = 512 * self.rng.randrange(1, 200)
            offset = part * (SIZE // 32) + 512 * self.rng.randrange(0, 256 - length // 512)
            self.busy.add(part)
            if self.rng.random() < 0.6:
                self._write(part, offset, length)
            else:
                self._read(part, offset, length)

    def _write(self, part: int, offset: int, length: int) -> None:
        data = self.rng.randbytes(length)

        def done(error: OSError | None) -> None:
            assert error is None
            self.model[offset : offset + length] = data
            self.busy.discard(part)
            self.done += 1

        self.front.submit(io.BLKIF_OP_WRITE, offset, memoryview(data), done)

    def _read(self, part: int, offset: int, length: int) -> None:
        data = bytearray(length)

        def done(error: OSError | None) -> None:
            assert error is None and data == self.model[offset : offset + length]
            self.busy.discard(part)
            self.done += 1

        self.front.submit(io.BLKIF_OP_READ, offset, memoryview(data), done)


#: Where the process may be killed: at the beginning of a call, or at its end.
POINTS: list[tuple[Any, str]] = [
    (BackRing, "take"),
    (BackRing, "put"),
    (BackRing, "_copy_in"),
    (BackRing, "publish"),
    (BackRing, "final_check"),
    (RawImage, "writev"),
    (RawImage, "readv"),
    (PersistentGrants, "acquire"),
    (block.BlockBackend, "notify"),
    (block.BlockBackend, "bind"),
]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_under_load(
    rig: Rig, device: DeviceId, image: Path, seed: int, persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at random instructions: the guest sees a pause, no error, no lost or wrong byte."""
    rng = random.Random(seed)
    model = bytearray(image.read_bytes())
    queues = rng.choice((1, 3))
    front = rig.frontend(
        device, queues=queues, ring_order=rng.randrange(2), start=0xFFFF_FFC0, persistent=persistent
    )
    load = Load(front, model, rng)
    kills = 0
    for _ in range(40):
        owner, name = rng.choice(POINTS)
        left = rng.randrange(1, 12)
        at_end = rng.random() < 0.5
        original = getattr(owner, name)

        def deadly(*args: Any, original: Any = original, at_end: bool = at_end, **keys: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not at_end:
                raise Killed
            result = original(*args, **keys)
            if left == 0:
                raise Killed
            return result

        dead = False
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, deadly)
            try:
                for _ in range(12):
                    load.more()
                    front.poll()
                    rig.turn()
                    front.events_came()
            except Killed:
                dead = True
        if dead:
            kills += 1
            rig.kill()
        if rig.server is None:
            rig.start()
        elif rng.random() < 0.2:
            rig.stop()
            rig.start()
    for _ in range(200):
        rig.turn()
        front.events_came()
        front.poll()
    assert not load.busy and kills > 4 and load.done > 200
    assert rig.state(device) == "4"
    assert front.pread(SIZE, 0) == model == image.read_bytes()
    front.close()
    rig.turns()
    assert not rig.grants.live and not rig.machine.guests[0].ports


def test_a_frontend_that_left_while_nobody_served(rig: Rig, device: DeviceId, image: Path) -> None:
    front = rig.frontend(device)
    rig.kill()
    rig.guest.write(f"{device.frontend}/state", "6")
    rig.start()
    rig.turns()
    assert rig.state(device) == "6" and not rig.grants.live
    for queue in front._queues:
        queue.close()
    rig.guest.write(f"{device.frontend}/state", "1")
    rig.turns()
    rig.kill()  # at InitWait
    rig.start()
    with rig.frontend(device) as again:
        assert again.pread(512, 0) == image.read_bytes()[:512]


def test_taken_away_by_the_toolstack(rig: Rig, device: DeviceId) -> None:
    """``online`` 0 and Closing, as a detach does; then the nodes go, and come back for another disk."""
    front = rig.frontend(device)
    rig.toolstack.write(f"{device.backend}/online", "0")
    rig.toolstack.write(f"{device.backend}/state", "5")
    rig.turns()
    assert rig.state(device) == "5" and front.pread(512, 0)  # served until the guest lets go
    front.close()
    rig.turns()
    assert rig.state(device) == "6"
    rig.remove(device)
    rig.turns()
    assert rig.describe() == [] and not rig.toolstack.exists(device.backend)


def test_removed_under_a_connected_guest(rig: Rig, device: DeviceId, image: Path) -> None:
    rig.frontend(device)
    rig.remove(device)
    rig.turns()
    assert not rig.toolstack.exists(device.backend) and not rig.grants.live
    assert rig.describe() == [] and list(rig.folder.iterdir()) == []
    again = rig.add_disk(Vbd("xvda", XVDA, str(image), kind="xtool"))
    with rig.frontend(again) as front:
        assert front.pread(512, 0) == image.read_bytes()[:512]


def test_the_process_ends_with_its_domain(rig: Rig, device: DeviceId) -> None:
    rig.frontend(device)
    rig.remove(device)
    rig.turns()
    assert rig.server is not None and not rig.server.stopped and not rig.server.domain_gone
    rig.toolstack.rm(f"/local/domain/{GUEST}")
    rig.turns(600)
    assert rig.server.stopped and rig.server.domain_gone


def test_one_that_is_told_to_end_does_not_take_its_domain_for_gone(rig: Rig, device: DeviceId) -> None:
    rig.frontend(device)
    assert rig.server is not None
    rig.server.stop()
    assert rig.server.stopped and not rig.server.domain_gone


def test_an_image_that_is_not_there(rig: Rig, tmp_path: Path, image: Path) -> None:
    bad = rig.add_disk(Vbd("xvda", XVDA, str(tmp_path / "none"), kind="xtool"))
    good = rig.add_disk(Vbd("xvdb", XVDA + 16, str(image), kind="xtool"))
    with pytest.raises(HostError, match="did not come up"):
        rig.frontend(bad)
    assert "No such file" in (rig.toolstack.get(f"{bad.error}/error") or "")
    with rig.frontend(good) as front:
        assert front.pread(512, 0) == image.read_bytes()[:512]


def test_faults_of_the_image(
    rig: Rig, device: DeviceId, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF 21: an error reaches the guest as EIO for that request alone; repaired, the same succeeds."""
    content = image.read_bytes()
    front = rig.frontend(device)
    os.truncate(image, SIZE // 2)
    with pytest.raises(OSError) as raised:
        front.pread(4096, SIZE - 4096)
    assert raised.value.errno == errno.EIO
    assert front.pread(4096, 0) == content[:4096]
    os.truncate(image, SIZE)
    assert front.pread(4096, SIZE - 4096) == bytes(4096)
    real = os.pwritev

    def full(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def short(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        return real(fd, [buffers[0][: max(512, len(buffers[0]) // 3)]], offset, *flags)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError):
        front.pwrite(b"x" * 4096, 0)
    monkeypatch.setattr(os, "pwritev", short)
    assert front.pwrite(b"y" * 8192, 512) == 8192
    monkeypatch.setattr(os, "pwritev", real)
    image.unlink()  # the open file serves on
    assert front.pread(8192, 512) == b"y" * 8192
    [told] = rig.describe()
    assert told["counters"]["errors"] == 2 and "ENOSPC" not in str(told["state"])  # type: ignore[index]
    assert rig.state(device) == "4"


def test_a_flush_that_failed_is_not_forgotten(
    rig: Rig, device: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = rig.frontend(device)
    with monkeypatch.context() as patch:

        def fail(fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError):
            front.flush()
    with pytest.raises(OSError):
        front.flush()


def test_resizing_and_changing_the_medium(rig: Rig, tmp_path: Path, image: Path) -> None:
    drive = Vbd("xvdc", XVDA + 32, None, kind="xtool", readonly=True, cdrom=True)
    device = rig.add_disk(drive)
    front = rig.frontend(device)
    assert front.size == 0 and front.offer.cdrom
    seen: list[str | None] = []
    with rig.guest.watch(f"{device.backend}/state") as watch:
        watch.pending()
        rig.toolstack.write(f"{device.backend}/params", f"raw:{image}")
        rig.turns()
        assert watch.pending()  # what makes Linux look at the size again
        seen.append(rig.state(device))
    front.look_again()
    assert seen == ["4"] and front.pread(SIZE, 0) == image.read_bytes()
    rig.toolstack.write(f"{device.backend}/params", "")
    rig.turns()
    front.look_again()
    assert front.size == 0
    front.close()
    disk = rig.add_disk(Vbd("xvda", XVDA, str(image), kind="xtool"))
    front = rig.frontend(disk)
    os.truncate(image, 2 * SIZE)
    rig.toolstack.write(f"{disk.backend}/xtool-resized", "1")
    rig.turns()
    front.look_again()
    assert front.size == 2 * SIZE
    front.pwrite(b"end", 2 * SIZE - 3)


def test_xenstored_goes_away_and_comes_back(rig: Rig, device: DeviceId, image: Path) -> None:
    front = rig.frontend(device)
    rig.daemon.crash()
    rig.turns(100)
    assert front.pread(4096, 0) == image.read_bytes()[:4096]
    rig.turns(100)
    for client in (rig.toolstack, rig.guest):
        with pytest.raises(StoreGoneError):
            client.exists("/")
    with rig.frontend(rig.add_disk(Vbd("xvdb", XVDA + 16, str(image), kind="xtool"))) as other:
        assert other.pread(512, 0) == image.read_bytes()[:512]
