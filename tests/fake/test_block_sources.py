"""Images that are not raw, and other programs' disks, served to our block frontend."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from time import monotonic, sleep

import pytest
from nbdservers import (
    QEMU_NAMES,
    Server,
    content,
    make,
    needs_curl,
    needs_engine,
    qemu_img,
    qemu_nbds,
    web_server,
)
from splitdrivers import XVDA, Rig
from test_block_recovery import Load

from xtool.backends import nbdimage, nbdsource
from xtool.backends.images import open_image
from xtool.backends.nbdimage import NbdImage, Times
from xtool.devices.vbd import Vbd
from xtool.devices.xenbus import DeviceId
from xtool.errors import HostError
from xtool.frontends.block import BlockFrontend

pytestmark = needs_engine
SIZE = 4 << 20
FORMATS = ("qcow2", "vmdk", "vhd", "vhdx")


class LiveRig(Rig):
    """Time is the machine's own: other processes have a part in it."""

    def turn(self, seconds: float = 0.0, enough: Callable[[], bool] = bool) -> None:
        self.clock.now = max(self.clock.now + 0.003, 1000 + monotonic())
        if self.server is not None:
            self.server.step(min(max(seconds, 0.001), 0.005))
            self.server.step(0)

    def until(self, condition: Callable[[], bool], deadline: float = 30.0) -> None:
        end = monotonic() + deadline
        while not condition():
            assert monotonic() < end
            self.turn(0.005)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[LiveRig]:
    (tmp_path / "run").mkdir()
    rig = LiveRig(tmp_path / "run")
    yield rig
    if rig.server is not None:
        rig.stop()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """``Server``, ended with the test."""
    made: list[Server] = []

    def start(path: Path, unix: Path | None = None, form: str = "raw") -> Server:
        made.append(Server(path, unix, form))
        return made[-1]

    yield start
    for server in made:
        server.kill()


Serve = Callable[..., Server]


@pytest.fixture
def data() -> bytes:
    return random.Random(11).randbytes(SIZE)


def times(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    monkeypatch.setattr(nbdimage, "TIMES", Times()._replace(**seconds))


def attach(rig: Rig, target: Path | str, form: str, **keys: object) -> DeviceId:
    return rig.add_disk(Vbd("xvda", XVDA, str(target), format=form, kind="xtool", **keys))  # type: ignore[arg-type]


def image_of(rig: Rig) -> dict[str, object]:
    found: dict[str, object] = rig.describe()[0]["image"]  # type: ignore[assignment]
    return found


def detach(rig: LiveRig, device: DeviceId) -> None:
    """What the toolstack does when the guest has let go."""
    rig.remove(device)
    rig.until(lambda: not rig.describe())


def refusal(rig: LiveRig, device: DeviceId) -> str:
    """Why the backend does not serve it."""
    rig.until(lambda: rig.toolstack.get(f"{device.error}/error") is not None)
    return rig.toolstack.get(f"{device.error}/error") or ""


def exercise(front: BlockFrontend, model: bytearray, seed: int, rounds: int = 60) -> None:
    """Random sizes and offsets against a copy in memory."""
    rng = random.Random(seed)
    for _ in range(rounds):
        length = rng.choice((1, 512, 4096, 65536, rng.randrange(1, 600_000)))
        offset = rng.randrange(0, len(model) - length)
        if rng.random() < 0.5:
            part = rng.randbytes(length)
            front.pwrite(part, offset)
            model[offset : offset + length] = part
        else:
            assert front.pread(length, offset) == model[offset : offset + length]
    front.flush()
    assert sha256(front.pread(len(model), 0)).digest() == sha256(model).digest()


# --- data
@pytest.mark.parametrize("form", FORMATS)
def test_images_are_what_qemu_img_says(rig: LiveRig, tmp_path: Path, form: str, data: bytes) -> None:
    path = make(tmp_path / "a.img", form, data)
    model = bytearray(content(path, form))
    assert model[:SIZE] == data  # a vhd may be larger
    device = attach(rig, path, form)
    with rig.frontend(device, queues=2, segments=256) as front:
        assert front.size == len(model) // 512 * 512 and qemu_nbds(path)
        exercise(front, model, 1)
        front.discard(1 << 20, 1 << 20)  # zeroes afterwards, or what was there
        part = front.pread(1 << 20, 1 << 20)
        assert part in (bytes(1 << 20), model[1 << 20 : 2 << 20])
        model[1 << 20 : 2 << 20] = part
        assert image_of(rig)["unflushed"]
        front.flush()
        assert not image_of(rig)["unflushed"]
    rig.turns()
    assert rig.state(device) == "6"
    detach(rig, device)
    assert not qemu_nbds(path) and not list(rig.folder.iterdir())
    assert content(path, form) == model
    if form == "qcow2":
        assert "No errors" in qemu_img("check", path)


@pytest.mark.parametrize("unix", [False, True])
def test_an_nbd_servers_disk(rig: LiveRig, tmp_path: Path, data: bytes, serve: Serve, unix: bool) -> None:
    path = make(tmp_path / "a.qcow2", "qcow2", data)
    server = serve(path, tmp_path / "nbd.sock" if unix else None, "qcow2")
    try:
        model = bytearray(data)
        with rig.frontend(attach(rig, server.url, "raw")) as front:
            exercise(front, model, 2)
    finally:
        server.kill()
    assert content(path, "qcow2") == model


@needs_curl
@pytest.mark.parametrize("form", ["raw", "qcow2", "vhd", "vhdx"])
def test_a_web_servers_file(rig: LiveRig, tmp_path: Path, data: bytes, form: str) -> None:
    (tmp_path / "web").mkdir()
    path = make(tmp_path / "web" / "a b.img", form, data)
    with web_server(tmp_path / "web") as url:
        device = attach(rig, f"{url}/a%20b.img", form, readonly=True)
        with rig.frontend(device) as front:
            assert front.offer.readonly and not front.offer.discard_granularity
            assert front.pread(SIZE, 0) == data
            with pytest.raises(OSError):
                front.pwrite(bytes(512), 0)
        assert rig.state(device)
    assert content(path, form)[:SIZE] == data


@needs_curl
def test_a_web_servers_image_names_no_file_of_ours(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "secret").write_bytes(data)
    web = tmp_path / "web"
    web.mkdir()
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", web / "a.qcow2")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/outside", web / "b.qcow2", SIZE)
    with web_server(web) as url:
        for name in ("a", "b"):
            image = open_image(f"{url}/{name}.qcow2", "qcow2", readonly=True)
            assert isinstance(image, NbdImage)
            with pytest.raises(HostError, match="names another file"):
                image.open()
            image.close()
        for target, form, readonly in (
            (f"{url}/a.qcow2", "qcow2", False),
            (f"{url}/a.vmdk", "vmdk", True),
            ("ftp://127.0.0.1/a", "raw", True),
            ("nbd://127.0.0.1/a", "qcow2", False),
            ("relative", "qcow2", False),
            (f"{web}/none", "qcow2", False),
            (f"{web}/a.qcow2", "qed", False),
        ):
            with pytest.raises(HostError):
                open_image(target, form, readonly=readonly)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@needs_curl
def test_who_reads_the_web_is_nobody(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.img").write_bytes(data)
    with web_server(tmp_path) as url:
        image = open_image(f"{url}/a.img", "raw", readonly=True)
        assert isinstance(image, NbdImage)
        image.open()
        status = Path(f"/proc/{image.describe()['pid']}/status").read_text()
        assert "Uid:\t65534\t65534\t65534\t65534" in status and "NoNewPrivs:\t1" in status
        image.close()


def test_the_format_is_never_guessed(rig: LiveRig, tmp_path: Path, data: bytes) -> None:
    """R20: a raw disk whose guest writes a qcow2's header stays raw, also below an image made upon it."""
    make(tmp_path / "secret.qcow2", "qcow2", data)
    base = tmp_path / "base.img"
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "secret.qcow2", "-F", "qcow2", tmp_path / "evil.qcow2")
    evil = (tmp_path / "evil.qcow2").read_bytes().ljust(SIZE, b"\0")
    base.write_bytes(evil)
    qemu_img("create", "-f", "qcow2", "-b", "base.img", "-F", "raw", tmp_path / "said.qcow2")
    # qemu-img writes no image any more that does not say it, but reads those that others wrote.
    guessed = (tmp_path / "said.qcow2").read_bytes().replace(bytes.fromhex("e2792aca"), b"none", 1)
    (tmp_path / "guessed.qcow2").write_bytes(guessed)
    assert (
        b'"backing-filename-format"'
        not in qemu_img("info", "--output=json", tmp_path / "guessed.qcow2").encode()
    )
    device = attach(rig, tmp_path / "guessed.qcow2", "qcow2")
    assert "which format its backing file" in refusal(rig, device)
    detach(rig, device)
    with rig.frontend(attach(rig, tmp_path / "said.qcow2", "qcow2")) as front:
        assert front.pread(SIZE, 0) == evil


def test_a_backing_file_is_followed(rig: LiveRig, tmp_path: Path, data: bytes) -> None:
    base = make(tmp_path / "base.vmdk", "vmdk", data)
    before = base.read_bytes()
    qemu_img("create", "-f", "qcow2", "-b", "base.vmdk", "-F", "vmdk", tmp_path / "top.qcow2")
    model = bytearray(data)
    device = attach(rig, tmp_path / "top.qcow2", "qcow2")
    with rig.frontend(device) as front:
        exercise(front, model, 3)
    detach(rig, device)
    assert base.read_bytes() == before and content(tmp_path / "top.qcow2", "qcow2") == model


# --- what does not open
def test_what_cannot_be_served_says_why(rig: LiveRig, tmp_path: Path, data: bytes, serve: Serve) -> None:
    (tmp_path / "raw.img").write_bytes(data)
    gone = serve(tmp_path / "raw.img")
    gone.kill()
    for target, form, reason in (
        (tmp_path / "raw.img", "qcow2", "not in qcow2 format"),
        (tmp_path / "none", "qcow2", "No such file"),
        (gone.url, "raw", "Connection refused"),
        ("nbd+unix:///?socket=/nowhere", "raw", "No such file"),
    ):
        device = attach(rig, target, form)
        assert reason in refusal(rig, device)
        detach(rig, device)


def test_a_server_that_says_nothing(
    rig: LiveRig, tmp_path: Path, data: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(monkeypatch, connect=0.3)
    (tmp_path / "raw.img").write_bytes(data)
    server = serve(tmp_path / "raw.img")
    server.pause()
    try:
        device = attach(rig, server.url, "raw")
        assert "no answer within" in refusal(rig, device)
    finally:
        server.kill()


def test_qemus_lock_keeps_a_second_writer_out(
    rig: LiveRig, tmp_path: Path, data: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(monkeypatch, opening=0.2)
    path = make(tmp_path / "a.qcow2", "qcow2", data)
    other = serve(path, form="qcow2")
    device = attach(rig, path, "qcow2")
    assert '"write" lock' in refusal(rig, device)
    other.kill()


# --- errors
def test_errors_are_of_their_requests_alone(tmp_path: Path, data: bytes, serve: Serve) -> None:
    (tmp_path / "raw.img").write_bytes(data)
    errors = [
        {"event": "none", "iotype": "read", "sector": 80, "errno": errno.EIO},
        {"event": "none", "iotype": "write", "sector": 160, "errno": errno.ENOSPC},
    ]
    node = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(tmp_path / "raw.img")}}
    (tmp_path / "json").write_text(json.dumps({"driver": "raw", "file": node | {"inject-error": errors}}))
    server = serve(tmp_path / "json", form="json")
    image = open_image(server.url, "raw", readonly=False)
    assert isinstance(image, NbdImage)
    image.open()
    memory = memoryview(bytearray(8192))
    jobs = [(0, memory[:4096]), (80 * 512, memory[4096:6144]), (SIZE, memory[6144:])]
    found = image.read(jobs)
    assert [error and error.errno for error in found] == [None, errno.EIO, errno.EINVAL]
    assert memory[:4096] == data[:4096]
    found = image.write([(160 * 512, memory[:4096]), (8192, memory[:4096])])
    assert [error and error.errno for error in found] == [errno.ENOSPC, None]
    for _, view in jobs:
        view.release()  # nobody holds on to a guest's memory
    image.close()
    server.kill()


def test_another_size_is_noticed(rig: LiveRig, tmp_path: Path, data: bytes, serve: Serve) -> None:
    path = tmp_path / "raw.img"
    path.write_bytes(data)
    server = serve(path)
    device = attach(rig, server.url, "raw")
    with rig.frontend(device) as front:
        assert front.size == SIZE
        server.kill()
        path.write_bytes(data + data)
        server.start()
        rig.toolstack.write(f"{device.backend}/xtool-resized", "1")
        rig.until(lambda: rig.toolstack.get(f"{device.backend}/sectors") == str(2 * SIZE // 512))
    server.kill()


# --- the server goes
def load(
    rig: LiveRig, front: BlockFrontend, data: bytes, disturb: Callable[[], None], rounds: int
) -> bytearray:
    """A verifying load that is disturbed after each round; what must be on the disk."""
    model = bytearray(data)
    run = Load(front, model, random.Random(9))
    for _ in range(rounds):
        goal = run.done + 25

        def enough(goal: int = goal) -> bool:
            run.more()
            front.poll()
            return run.done >= goal

        rig.until(enough, 60)
        disturb()
    rig.until(lambda: front.poll() is None and not run.busy, 60)
    return model


def test_a_killed_qemu_nbd_is_replaced(rig: LiveRig, tmp_path: Path, data: bytes) -> None:
    """Under load, again and again: a pause, no error, and nothing answered is lost though not flushed."""
    path = make(tmp_path / "a.qcow2", "qcow2", bytes(SIZE))
    device = attach(rig, path, "qcow2")
    with rig.frontend(device) as front:

        def kill() -> None:
            for pid in qemu_nbds(path):
                os.kill(pid, signal.SIGKILL)

        model = load(rig, front, bytes(SIZE), kill, 6)
        kill()
        assert front.pread(SIZE, 0) == model
        assert int(str(image_of(rig)["starts"])) >= 7
    detach(rig, device)
    assert content(path, "qcow2") == model


def test_a_hanging_qemu_nbd_is_replaced(
    rig: LiveRig, tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(monkeypatch, request=0.3)
    monkeypatch.setattr(nbdsource, "KILL_TIME", 0.2)
    path = make(tmp_path / "a.qcow2", "qcow2", data)
    with rig.frontend(attach(rig, path, "qcow2")) as front:
        [pid] = qemu_nbds(path)
        os.kill(pid, signal.SIGSTOP)
        assert front.pread(SIZE, 0) == data
        assert qemu_nbds(path) != [pid]


@pytest.mark.parametrize("way", ["stop", "kill"])
def test_a_new_backend_process_goes_on(rig: LiveRig, tmp_path: Path, data: bytes, way: str) -> None:
    path = make(tmp_path / "a.qcow2", "qcow2", data)
    device = attach(rig, path, "qcow2")
    with rig.frontend(device, queues=2) as front:

        def replace() -> None:
            getattr(rig, way)()
            rig.start()

        model = load(rig, front, data, replace, 5)
    detach(rig, device)
    assert content(path, "qcow2") == model


def test_a_server_that_comes_back_in_time(rig: LiveRig, tmp_path: Path, data: bytes, serve: Serve) -> None:
    path = tmp_path / "raw.img"
    path.write_bytes(data)
    server = serve(path)
    with rig.frontend(attach(rig, server.url, "raw")) as front:

        def restart() -> None:
            server.kill()
            end = monotonic() + 0.2
            while monotonic() < end:
                front.poll()
                rig.turn(0.005)
            server.start()

        model = load(rig, front, data, restart, 4)
    server.kill()
    assert path.read_bytes() == model


def test_a_server_that_comes_back_too_late(
    rig: LiveRig, tmp_path: Path, data: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests fail after a while, then at once; other disks go on; and the server is found again."""
    times(monkeypatch, retry=0.5, pause_most=0.2)
    path = tmp_path / "raw.img"
    path.write_bytes(data)
    (tmp_path / "other.img").write_bytes(data)
    server = serve(path)
    device = attach(rig, server.url, "raw")
    other = rig.add_disk(Vbd("xvdb", XVDA + 16, str(tmp_path / "other.img"), kind="xtool"))
    with rig.frontend(device) as front, rig.frontend(other) as beside:
        front.pwrite(b"not flushed".ljust(512), 0)
        server.kill()
        ended: list[OSError | None] = []
        got = memoryview(bytearray(4096))
        front.submit(0, 0, got, ended.append)
        began = monotonic()
        assert beside.pread(SIZE, 0) == data and not ended
        rig.until(lambda: front.poll() is None and bool(ended))
        assert isinstance(ended[0], OSError) and 0.4 < monotonic() - began < 5
        began = monotonic()
        with pytest.raises(OSError):
            front.pread(512, 0)
        assert monotonic() - began < 0.5
        server.start()

        def works() -> bool:
            try:
                return front.pread(512, 0) == b"not flushed".ljust(512)
            except OSError:
                return False

        rig.until(works)
        front.flush()
    server.kill()
    assert path.read_bytes().startswith(b"not flushed")


def test_a_process_that_takes_over_while_the_server_is_away(
    rig: LiveRig, tmp_path: Path, data: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "raw.img"
    path.write_bytes(data)
    server = serve(path)
    with rig.frontend(attach(rig, server.url, "raw")) as front:
        rig.kill()
        server.kill()
        rig.start()
        ended: list[OSError | None] = []
        got = memoryview(bytearray(4096))
        front.submit(0, 4096, got, ended.append)
        for _ in range(50):
            rig.turn(0.005)
            front.poll()
        assert not ended and rig.describe()[0]["sectors"] == SIZE // 512
        server.start()
        rig.until(lambda: front.poll() is None and bool(ended))
        assert ended == [None] and got == data[4096:8192]
    server.kill()


def test_the_cable_is_full_of_nothing(tmp_path: Path, data: bytes) -> None:
    """What is kept until it is flushed is bounded."""
    path = make(tmp_path / "a.qcow2", "qcow2", bytes(48 << 20))
    image = open_image(str(path), "qcow2", readonly=False)
    assert isinstance(image, NbdImage)
    image.open()
    part = memoryview(bytearray(data[: 1 << 20]))
    for number in range(48):
        assert image.write([(number << 20, part)]) == [None]
        assert int(str(image.describe()["unflushed"])) <= nbdimage.KEPT
    image.close()
    assert content(path, "qcow2") == bytes(part) * 48


CHILD = """
import sys
from xtool.backends.images import open_image
image = open_image(sys.argv[1], "qcow2", readonly=False)
image.open()
image.write([(4096, memoryview(b"answered" * 512))])
print(image.describe()["pid"], flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_no_qemu_nbd(tmp_path: Path, data: bytes) -> None:
    """kill -9: the image can be opened at once, with what was written and not flushed."""
    path = make(tmp_path / "a.qcow2", "qcow2", data)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        assert qemu_nbds(path) == [pid]
        child.kill()
    image = open_image(str(path), "qcow2", readonly=False)
    assert isinstance(image, NbdImage)
    image.open()
    memory = memoryview(bytearray(4096))
    assert image.read([(4096, memory)]) == [None] and memory == b"answered" * 512
    assert pid not in qemu_nbds(path)
    image.close()
    end = monotonic() + 10
    while qemu_nbds(path):
        assert monotonic() < end
        sleep(0.01)


EARLY = """
import sys
from pathlib import Path
from xtool.backends import nbdsource
from xtool.backends.nbdlink import Cancel
def stop(*_):
    print("here", flush=True)
    sys.stdin.read()
setattr(nbdsource, sys.argv[2], stop)
source = nbdsource.QemuNbd(sys.argv[1], "qcow2", readonly=False, folder=Path(sys.argv[1]).parent / "run")
source.connect(Cancel(), 10)
"""


@pytest.mark.parametrize("where", ["_dial", "_shake_hands"])
def test_a_process_killed_before_it_has_connected(tmp_path: Path, data: bytes, where: str) -> None:
    """At these moments qemu-nbd may stay: the next one to open the image ends it."""
    path = make(tmp_path / "a.qcow2", "qcow2", data)
    command = [sys.executable, "-c", EARLY, str(path), where]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"here\n"
        child.kill()
    image = open_image(str(path), "qcow2", readonly=False, folder=tmp_path / "run")
    assert isinstance(image, NbdImage)
    image.open()
    assert len(qemu_nbds(path)) == 1
    image.close()
    assert not qemu_nbds(path)


def test_an_orphan_is_ended(tmp_path: Path, data: bytes) -> None:
    path = make(tmp_path / "a.qcow2", "qcow2", data)
    folder = tmp_path / "run" / "nbd-1-x"
    folder.mkdir(parents=True)
    command = ["qemu-nbd", "--persistent", "-f", "qcow2", f"--socket={folder}/nbd", str(path)]
    directory = os.open(folder, os.O_PATH)
    with subprocess.Popen(command, pass_fds=(directory,)) as orphan:
        os.close(directory)
        end = monotonic() + 10
        while orphan.poll() is None:
            assert monotonic() < end
            nbdsource.sweep(tmp_path / "run")
    os.utime(folder, (0, 0))
    nbdsource.sweep(tmp_path / "run")
    assert not folder.exists()


def test_formats_are_qemus() -> None:
    assert nbdsource.DRIVERS == QEMU_NAMES
