"""Guests built by our builder, running on real Xen."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic, sleep
from zlib import adler32

import pytest

from guests import GUESTS, LINUX_READY, READY, Console, guest, linux, start
from xtool.errors import DomainNotFoundError, HostMemoryError, ImageError
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient
from xtool.toolstack.names import find

PAUSED = CreateOptions(paused=True)


def fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


@pytest.mark.parametrize("memory", [8, 64, 300])
def test_a_pv_guest_finds_what_it_was_promised(client: LocalClient, tmp_path: Path, memory: int) -> None:
    ramdisk = tmp_path / "ramdisk"
    ramdisk.write_bytes(os.urandom(70_001))
    config = guest("pv", "pv", memory=memory, vcpus=2, ramdisk=ramdisk, cmdline="hello pv")
    with start(client, config) as console:
        line = console.line(READY)
    got = fields(line)
    assert got["memory_kib"] == str(memory * 1024) and got["p2m"] == "ok"
    assert got["ramdisk"] == f"70001:{adler32(ramdisk.read_bytes()):08x}"
    assert "cmdline=hello pv" in line


@pytest.mark.parametrize(("memory", "vcpus"), [(8, 1), (200, 3), (64, 128)])
def test_a_pvh_guest_finds_what_it_was_promised(
    client: LocalClient, tmp_path: Path, memory: int, vcpus: int
) -> None:
    ramdisk = tmp_path / "ramdisk"
    ramdisk.write_bytes(os.urandom(70_001))
    config = guest("pvh", "pvh", memory=memory, vcpus=vcpus, ramdisk=ramdisk, cmdline="hello pvh")
    with start(client, config) as console:
        line = console.line(READY)
    got = fields(line)
    assert got["memory_kib"] == str(memory * 1024) and got["acpi"] == "ok" and got["lapics"] == str(vcpus)
    assert got["ramdisk"] == f"70001:{adler32(ramdisk.read_bytes()):08x}"
    assert "cmdline=hello pvh" in line


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_memory_beyond_4_gib(client: LocalClient, xen_host: Host, kind: str) -> None:
    host = xen_host.hv.host()
    if (host.free_pages + host.scrub_pages) >> 8 < 5000:
        pytest.fail("this host has not 5000 MiB free: give the lab --memory 8GiB")
    with start(client, guest(kind, "big", memory=4700)) as console:
        assert fields(console.line(READY))["memory_kib"] == str(4700 * 1024)
    state = client.list("xtool-test-big")[0]
    assert state.memory >> 20 >= 4700


def test_hvm_starts_its_firmware(client: LocalClient) -> None:
    """SeaBIOS, started by hvmloader, found the machine QEMU emulates; Xen's log has its own words."""
    client.dmesg(clear=True)
    client.create(guest("hvm", "hvm", memory=96), CreateOptions())
    domid = client.list("xtool-test-hvm")[0].domid
    until = monotonic() + 120
    while f"(d{domid}) Press ESC" not in client.dmesg():
        assert monotonic() < until, client.dmesg()[-2000:]
        sleep(0.5)
    log = client.dmesg()
    assert "HVM Loader" in log and "SeaBIOS" in log and "ATA controller 1" in log


@pytest.mark.parametrize(
    ("kind", "vcpus"), [("pv", 2), ("pvh", 2), pytest.param("pvh", 1, marks=pytest.mark.long)]
)
def test_debian_boots(client: LocalClient, kind: str, vcpus: int) -> None:
    config = linux(kind, f"linux-{kind}", vcpus=vcpus, maxvcpus=2 * vcpus - 1)
    with start(client, config) as console:
        console.wait_for(LINUX_READY, 300)
        console.send("echo COUNT=$(grep -c ^processor /proc/cpuinfo)=\n")
        console.wait_for(f"COUNT={vcpus}=", 60)
    assert client.shutdown(config.name, wait=True, deadline=120).action == "destroyed"
    with pytest.raises(DomainNotFoundError):
        find(client.host, config.name)


@pytest.mark.long
def test_debian_balloons_down_to_its_memory(client: LocalClient) -> None:
    """maxmem above memory: the guest sees 1 GiB, gets 256 MiB, and its balloon driver settles it there."""
    config = linux("pvh", "linux-pvh", maxmem=1024)
    with start(client, config) as console:
        console.wait_for(LINUX_READY, 280)
        until = monotonic() + 60
        while True:
            console.send("echo TO''TAL=$(sed -n 's/MemTotal: *//p' /proc/meminfo)=\n")
            total = int(console.line("TOTAL=", 30).split("TOTAL=")[1].split()[0])
            if total < 300 << 10:
                break
            assert monotonic() < until, f"{total} KiB"
            console.seen = b""
            sleep(1)
        state = client.list(config.name)[0]
        assert 256 <= state.memory >> 20 <= 260


def test_debian_boots_as_hvm(client: LocalClient) -> None:
    with start(client, linux("hvm", "linux-hvm"), "serial") as console:
        console.wait_for(LINUX_READY, 280)


@pytest.mark.skipif(not os.environ.get("XTOOL_UEFI"), reason="QEMU 7.2 as a host ends here: docs/lab.md")
def test_debian_boots_by_uefi(client: LocalClient) -> None:
    """OVMF takes kernel and ramdisk from QEMU. With a graphics card, on which it draws, it takes minutes."""
    config = linux("hvm", "uefi", firmware="uefi", vga="none")
    with start(client, config, "serial") as console:
        console.wait_for(LINUX_READY, 500)
    client.destroy(config.name)


@pytest.mark.long
@pytest.mark.timeout(1300)
@pytest.mark.parametrize(
    ("order", "disk"),
    [
        ("c", "disk.img, vdev: hda"),
        ("d", "cd.iso, vdev: hdc, devtype: cdrom"),
    ],
)
def test_hvm_boots_from_disk_and_cd_to_userland(client: LocalClient, order: str, disk: str) -> None:
    """By AHCI, whose DMA makes the BIOS's reads few."""
    disks = f"[{{target: {GUESTS}/{disk}}}]"
    config = guest("hvm", "media", memory=256, boot=order, disk=disks, hdtype="ahci")
    with start(client, config, "serial") as console:
        console.wait_for(LINUX_READY, 1200)
        if order == "d":
            client.cd_eject(config.name, "hdc")
            client.cd_insert(config.name, "hdc", f"{GUESTS}/cd.iso")


@pytest.mark.parametrize(
    ("order", "disk", "loader"),
    [("c", "disk.img, vdev: hda", "SYSLINUX"), ("d", "cd.iso, vdev: hdc, devtype: cdrom", "ISOLINUX")],
)
def test_hvm_boots_from_disk_and_cd(client: LocalClient, order: str, disk: str, loader: str) -> None:
    """The medium's boot loader speaks. (Its kernel then comes through the BIOS, minutes in emulation.)"""
    config = guest("hvm", "media", memory=128, boot=order, disk=f"[{{target: {GUESTS}/{disk}}}]")
    with start(client, config, "serial") as console:
        console.wait_for(loader, 200)


@pytest.mark.parametrize(
    ("key", "keys", "action"),
    [
        ("p", {}, "gone"),
        ("p", {"on_poweroff": "preserve"}, "kept"),
        ("r", {}, "again"),
        ("c", {}, "gone"),
        ("c", {"on_crash": "restart"}, "again"),
    ],
)
def test_the_keeper_does_what_the_file_says(
    client: LocalClient, key: str, keys: dict[str, str], action: str
) -> None:
    config = guest("pv", "keeper", **keys)
    with start(client, config) as console:
        console.line(READY)
        first = find(client.host, config.name).state.domid
        console.send(key)
    until = monotonic() + 60
    while True:
        domains = [d for d in client.list() if d.name == config.name]
        kept = bool(domains) and domains[0].domid == first and domains[0].reason != ""
        again = bool(domains) and domains[0].domid != first and domains[0].state == "blocked"
        gone = not domains
        if {"gone": gone, "kept": kept, "again": again}[action]:
            break
        assert monotonic() < until, domains
        sleep(0.2)
    if action == "again":
        with Console(client, config.name) as console:
            console.send("x")
            entry = journal.read(domains[0].uuid)
            assert entry is not None and entry.domid == domains[0].domid


def test_too_much_memory_is_said_in_mib(client: LocalClient) -> None:
    with pytest.raises(HostMemoryError, match=r"the domain needs 900000 MiB, the host has \d+ MiB free"):
        client.create(guest("pvh", "huge", memory=900_000), CreateOptions())


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_an_image_that_does_not_fit(client: LocalClient, tmp_path: Path, kind: str) -> None:
    big = tmp_path / "ramdisk"
    big.write_bytes(bytes(20 << 20))
    with pytest.raises(ImageError, match="memory is 16 MiB"):
        client.create(guest(kind, "small", ramdisk=big), CreateOptions())


def test_pausing_and_listing(client: LocalClient) -> None:
    config = guest("pvh", "list", vcpus=2, cpus="0")
    with start(client, config) as console:
        console.line(READY)
    client.pause(config.name)
    assert client.list(config.name)[0].state == "paused"
    client.unpause(config.name)
    info = client.list(config.name)[0]
    # The tiny guest brings up one of its two.
    assert (info.type, info.vcpus, info.managed) == ("pvh", 1, True)
    assert [v.hard_affinity for v in client.vcpu_list(config.name)] == ["0", "0"]


def test_the_host_says_what_it_is(client: LocalClient) -> None:
    info = client.info()
    assert info.xen_version.startswith("4.") and info.domctl_interface >= 0x15
    assert (info.vendor, info.hvm) in {("AMD", "SVM"), ("Intel", "VT-x"), ("Hygon", "SVM")}
    assert info.nested_paging and "hvm" in info.virt_caps and info.free_memory > 0


def test_xl_sees_and_ends_our_guests(client: LocalClient) -> None:
    import subprocess

    config = guest("pvh", "xl")
    with start(client, config) as console:
        console.line(READY)
    listed = subprocess.run(["xl", "list", config.name], capture_output=True, text=True, check=True)
    assert config.name in listed.stdout
    subprocess.run(["xl", "destroy", config.name], check=True)
    with pytest.raises(DomainNotFoundError):
        find(client.host, config.name)
    client.gc()
