"""Guests without Xen and without libvirtd: libvirt's embedded QEMU driver, held open by a process of ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from xtool.errors import HostError

ROOT = Path(__file__).resolve().parents[2]
GUESTS = ROOT / "build" / "guest"
READY = "XTOOL-GUEST-READY"
#: A guest boots in emulation within this many seconds, also on a busy machine.
BOOT = 240.0


def _ready() -> str:
    from xtool.drivers.libvirt.binding import binding

    if shutil.which("qemu-system-x86_64") is None:
        return "no QEMU on this machine"
    try:
        binding()
    except HostError as error:
        return error.message
    return ""


pytestmark = pytest.mark.skipif(bool(_ready()), reason=_ready() or "there")


@dataclass
class Here:
    """A root, and the command line on it."""

    root: Path
    folder: Path

    def argv(self, *words: str) -> list[str]:
        uri = f"qemu:///embed?root={self.root}&accel=tcg"
        return [sys.executable, "-m", "xtool.cli.app", "-H", uri, *words]

    def start(self, *words: str, **options: object) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            self.argv(*words), text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    def run(self, *words: str, code: int = 0) -> str:
        """Standard output, or the errors where ``code`` says that it fails."""
        done = self.start(*words, stdin=subprocess.DEVNULL)
        out, err = done.communicate(timeout=120)
        assert done.returncode == code, f"{words}: {done.returncode}\n{out}\n{err}"
        return err if code else out

    def names(self) -> list[str]:
        return [domain["name"] for domain in json.loads(self.run("list", "-o", "json"))]

    def file(self, name: str, *lines: str) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text("\n".join([f"name: {name}", "type: hvm", "memory: 16", "vga: none", *lines]))
        return str(path)

    def holder(self) -> int | None:
        """The holder's process id."""
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"xtool.drivers.libvirt.holder" in words and os.fsencode(self.root) in words:
                return int(entry.parent.name)
        return None


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    root = Path(tempfile.mkdtemp(prefix="xt-"))
    here = Here(root, tmp_path_factory.mktemp("files"))
    yield here
    for name in here.names():
        here.run("destroy", name)
    wait_for(lambda: here.holder() is None)
    shutil.rmtree(root, ignore_errors=True)


def test_the_root_is_private_and_an_empty_host_holds_nothing(here: Here) -> None:
    assert here.names() == []
    assert here.root.stat().st_mode & 0o077 == 0
    wait_for(lambda: here.holder() is None)
    assert not (here.root / "xtool.sock").exists()


def test_a_guest_from_create_to_its_own_poweroff(here: Here) -> None:
    guest = (
        f"kernel: {GUESTS}/vmlinuz",
        f"ramdisk: {GUESTS}/initramfs.cpio.gz",
        "cmdline: console=ttyS0 quiet",
    )
    if not (GUESTS / "vmlinuz").exists():
        pytest.skip("no test guests: run scripts/build-guests")
    file = here.file("boots", *guest, "serial: pty")
    console = here.start("create", "-c", "--set", "memory=128", file, stdin=subprocess.PIPE)
    assert console.stdin is not None and console.stdout is not None
    killer = threading.Timer(BOOT, console.kill)
    killer.start()
    seen = ""
    try:
        while READY not in seen:
            piece = console.stdout.read(1)
            assert piece, f"the console ended:\n{seen}"
            seen += piece
        assert here.names() == ["boots"]
        console.stdin.write("poweroff -f\n")
        console.stdin.flush()
        assert console.wait(60) == 0
    finally:
        killer.cancel()
        console.kill()
        console.communicate()
    wait_for(lambda: here.holder() is None)
    assert here.names() == []


def test_a_holder_that_is_killed_harms_no_guest(here: Here) -> None:
    made = json.loads(here.run("create", "-p", "-o", "json", here.file("stays", "serial: pty")))
    holder = here.holder()
    assert holder is not None
    os.kill(holder, signal.SIGKILL)
    wait_for(lambda: here.holder() is None)
    (found,) = json.loads(here.run("list", "-o", "json", "stays"))
    assert (found["uuid"], found["domid"], found["state"]) == (made["uuid"], made["domid"], "paused")
    assert here.holder() not in (None, holder)
    here.run("destroy", "stays")


def test_commands_at_once(here: Here) -> None:
    names = [f"many{n}" for n in range(3)]
    commands = [here.start("create", "-p", here.file(name), stdin=subprocess.DEVNULL) for name in names]
    for command in commands:
        _, err = command.communicate(timeout=240)
        assert command.returncode == 0, err
    assert sorted(here.names()) == names
    for name in names:
        here.run("destroy", name)


def test_disks_and_interfaces(here: Here) -> None:
    image = here.folder / "a b&c.img"
    image.write_bytes(bytes(1 << 20))
    iso = here.folder / "cd.iso"
    iso.write_bytes(bytes(1 << 20))
    here.run("create", "-p", here.file("devices", "disk: [{vdev: hdc, devtype: cdrom}]", "serial: pty"))
    here.run("block-attach", "devices", "vdev=xvdb", f"target={image}")
    here.run("block-limit", "devices", "xvdb", "--bytes-per-second", "1MiB")
    here.run("cd-insert", "devices", "hdc", str(iso))
    disks = {disk["vdev"]: disk for disk in json.loads(here.run("block-list", "devices", "-o", "json"))}
    assert disks["xvdb"]["target"] == str(image) and disks["xvdb"]["bytes_per_second"] == 1 << 20
    assert disks["hdc"]["target"] == str(iso) and disks["hdc"]["readonly"]
    assert "already" in here.run("block-attach", "devices", f"{image},raw,xvdb", code=15)
    here.run("cd-eject", "devices", "hdc")
    assert "is no CD drive" in here.run("cd-eject", "devices", "xvdb", code=15)
    mac = "00:16:3e:00:00:07"
    here.run("network-attach", "devices", "network=user", f"mac={mac}")
    (vif,) = json.loads(here.run("network-list", "devices", "-o", "json"))
    assert (vif["mac"], vif["type"], vif["backend"]) == (mac, "user", "virtio")
    disks = {disk["vdev"]: disk for disk in json.loads(here.run("block-list", "devices", "-o", "json"))}
    assert disks["hdc"]["target"] == ""
    here.run("destroy", "devices")


def test_what_cannot_be_done_is_said(here: Here) -> None:
    file = here.file("never", "tsc_mode: native", "disk: [{vdev: hda, target: a, format: vhdx}]")
    said = here.run("create", file, code=3)
    assert f"{file}:5:11: tsc_mode has no effect" in said and "no image format vhdx" in said
    missing = here.file("never", "disk: [{vdev: hda, target: /no/such}]")
    assert "/no/such" in here.run("create", missing, code=8)
    for verb in (["wiring"], ["dmesg"], ["doctor", "snapshot"], ["create", "--dry-run", missing]):
        assert f"xtool {verb[0]}" in (text := here.run(*verb, code=5)) and "needs Xen's own driver" in text
    assert here.names() == []
