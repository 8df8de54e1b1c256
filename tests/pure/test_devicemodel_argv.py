"""The QEMU command line: what it says for each kind of guest, and that nothing slips into an option."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtool.devicemodel.argv import build_argv, find_device_model, options
from xtool.devicemodel.spec import (
    MIB,
    DeviceModelSpec,
    EmulatedDisk,
    EmulatedNic,
    VncSpec,
    default_platform_pci,
    emulated_place,
)
from xtool.errors import DeviceModelError

UUID = "6b1c1b9e-7c3c-4f6a-9b55-0d4c5f1f2a10"
KERNEL = DeviceModelSpec(
    name="web",
    uuid=UUID,
    memory=512 * MIB,
    kernel="/boot/vmlinuz,1",
    ramdisk="/boot/initrd",
    cmdline="console=ttyS0,115200 root=/dev/sda",
    serial=("pty",),
)
EVERYTHING = dataclasses.replace(
    KERNEL,
    kernel=None,
    ramdisk=None,
    cmdline=None,
    boot="dc",
    vga="cirrus",
    videoram=8 * MIB,
    vcpus=2,
    maxvcpus=4,
    disks=(
        EmulatedDisk(0, "/images/a,b.img"),
        EmulatedDisk(1, "/images/c.qcow2", format="qcow2"),
        EmulatedDisk(2, "/images/cd.iso", cdrom=True),
        EmulatedDisk(3, None, cdrom=True),
        EmulatedDisk(0, "/dev/vg/x", readonly=True, bus="scsi"),
        EmulatedDisk(5, "/images/d.vhd", format="vhd", bus="ahci"),
    ),
    nics=(EmulatedNic(0, "00:16:3e:00:00:01", "vif7.0-emu"),),
    vnc=VncSpec("::1", 3, password=True),
    usb=True,
    usbdevices=("tablet",),
    keymap="de",
    acpi=False,
    xen_platform_pci=True,
    max_ram_below_4g=3 << 30,
    extra=("-global", "x.y=z"),
)


def argv(spec: DeviceModelSpec) -> list[str]:
    return build_argv(spec, 7, "/qemu", 3)


def after(words: list[str], flag: str) -> list[str]:
    return [value for word, value in itertools.pairwise(words) if word == flag]


def test_direct_kernel_boot_whole() -> None:
    assert argv(KERNEL) == [
        *("/qemu", "-xen-domid", "7", "-name", "guest=web", "-uuid", UUID),
        *("-no-shutdown", "-nodefaults", "-no-user-config"),
        *("-chardev", "socket,id=qmp,fd=3,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-display", "none"),
        *("-machine", "pc,accel=xen,suppress-vmdesc=on", "-m", "496", "-boot", "order=cda"),
        *("-kernel", "/boot/vmlinuz,1", "-initrd", "/boot/initrd"),
        *("-append", "console=ttyS0,115200 root=/dev/sda"),
        *("-device", "VGA,vgamem_mb=16", "-serial", "pty"),
    ]


def test_everything_whole() -> None:
    assert argv(EVERYTHING)[14:] == [
        *("-display", "none", "-vnc", "[::1]:3,password=on,to=99", "-k", "de"),
        *("-machine", "xenfv,suppress-vmdesc=on,acpi=off,max-ram-below-4g=3221225472"),
        *("-m", "504", "-smp", "2,maxcpus=4", "-boot", "order=dc"),
        *("-device", "cirrus-vga,vgamem_mb=8", "-serial", "pty", "-usb", "-device", "usb-tablet"),
        *("-device", "ahci,id=ahci", "-device", "lsi53c895a,id=scsi"),
        "-drive",
        "id=drive-ide0,if=none,format=raw,readonly=off,cache=writeback,file=/images/a,,b.img",
        *("-device", "ide-hd,id=ide0,drive=drive-ide0,bus=ide.0,unit=0"),
        "-drive",
        "id=drive-ide1,if=none,format=qcow2,readonly=off,cache=writeback,file=/images/c.qcow2",
        *("-device", "ide-hd,id=ide1,drive=drive-ide1,bus=ide.0,unit=1"),
        "-drive",
        "id=drive-ide2,if=none,format=raw,readonly=on,cache=writeback,file=/images/cd.iso",
        *("-device", "ide-cd,id=ide2,drive=drive-ide2,bus=ide.1,unit=0"),
        *("-drive", "id=drive-ide3,if=none,readonly=on"),
        *("-device", "ide-cd,id=ide3,drive=drive-ide3,bus=ide.1,unit=1"),
        "-drive",
        "id=drive-scsi0,if=none,format=raw,readonly=on,cache=writeback,file=/dev/vg/x",
        *("-device", "scsi-hd,id=scsi0,drive=drive-scsi0,bus=scsi.0,scsi-id=0"),
        "-drive",
        "id=drive-ahci5,if=none,format=vpc,readonly=off,cache=writeback,file=/images/d.vhd",
        *("-device", "ide-hd,id=ahci5,drive=drive-ahci5,bus=ahci.5,unit=0"),
        *("-netdev", "tap,id=net0,ifname=vif7.0-emu,script=no,downscript=no"),
        *("-device", "e1000,id=nic0,netdev=net0,mac=00:16:3e:00:00:01"),
        *("-global", "x.y=z"),
    ]


def test_xsa_119_no_listener_unless_asked() -> None:
    words = argv(KERNEL)
    assert "-nodefaults" in words and after(words, "-display") == ["none"] and "-vnc" not in words


def test_vnc_password_never_on_the_command_line() -> None:
    fields = {field.name for field in dataclasses.fields(VncSpec)}
    assert fields == {"listen", "display", "unused", "password"}
    assert VncSpec.__dataclass_fields__["password"].type == "bool"


def test_xsa_142_266_every_image_says_format_and_readonly() -> None:
    for drive in after(argv(EVERYTHING), "-drive"):
        assert re.search(r"\breadonly=(on|off)\b", drive)
        assert "file=" not in drive or "format=" in drive


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1))
def test_no_value_can_add_an_option(text: str) -> None:
    """Taken apart as QEMU does, an option string has the keys we wrote and the very value."""
    line = options("socket", path=text, id="last")
    assert parse(line) == {"": "socket", "path": text, "id": "last"}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))))
def test_names_and_paths_survive(text: str) -> None:
    spec = dataclasses.replace(KERNEL, name="x" + text, disks=(EmulatedDisk(0, "/" + text),))
    words = argv(spec)
    assert parse(after(words, "-name")[0])["guest"] == "x" + text
    assert parse(after(words, "-drive")[0])["file"] == "/" + text


def parse(line: str) -> dict[str, str]:
    """QEMU's option syntax: a comma separates, two in a row are one comma of the value."""
    values, at = [""], 0
    while at < len(line):
        if line.startswith(",,", at):
            values[-1] += ","
            at += 1
        elif line[at] == ",":
            values.append("")
        else:
            values[-1] += line[at]
        at += 1
    pairs = (value.partition("=") for value in values)
    return {key if equals else "": rest if equals else key for key, equals, rest in pairs}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory": 16 * MIB}, "leave none"),
        ({"videoram": 8 * MIB}, "at least 16 MiB"),
        ({"vga": "voodoo"}, "unknown video card"),
        ({"vcpus": 3}, "vCPUs"),
        ({"kernel": None}, "without a kernel"),
        ({"usbdevices": ("host:1.2",)}, "unknown USB device"),
        ({"disks": (EmulatedDisk(1, "/a"), EmulatedDisk(1, "/b"))}, "two disks"),
    ],
)
def test_machines_that_make_no_sense(change: dict[str, object], words: str) -> None:
    with pytest.raises(DeviceModelError, match=words):
        dataclasses.replace(KERNEL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        ({"index": 4, "path": "/a"}, "slots 0 to 3"),
        ({"index": 0, "path": None}, "no image"),
        ({"index": 0, "path": "nbd:host"}, "not an absolute path"),
        ({"index": 0, "path": "/a", "format": "magic"}, "unknown disk format"),
        ({"index": 0, "path": "/a", "readonly": True}, "cannot be read-only"),
        ({"index": 0, "path": "/a", "readonly": True, "bus": "ahci"}, "cannot be read-only"),
        ({"index": 0, "path": "/a", "cdrom": True, "bus": "scsi"}, "IDE or AHCI bus only"),
        ({"index": 0, "path": "/a", "bus": "usb"}, "unknown disk bus"),
    ],
)
def test_disks_that_make_no_sense(disk: dict[str, object], words: str) -> None:
    with pytest.raises(DeviceModelError, match=words):
        EmulatedDisk(**disk)  # type: ignore[arg-type]


def test_platform_device_only_with_paravirtual_devices() -> None:
    assert default_platform_pci(has_pv_devices=True)
    assert not default_platform_pci(has_pv_devices=False)


def test_device_model_asked_for_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):  # missing; a folder
        with pytest.raises(DeviceModelError, match="missing or not executable"):
            find_device_model(str(path))


def test_no_device_model_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("xtool.devicemodel.argv.BINARIES", (str(tmp_path / "xen-*" / "qemu"),))
    with pytest.raises(DeviceModelError, match="no QEMU for Xen") as caught:
        find_device_model()
    assert "qemu-system-xen" in (caught.value.hint or "")


def test_newest_release_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for release in ("4.14", "4.17"):
        (tmp_path / f"xen-{release}").mkdir()
        (tmp_path / f"xen-{release}" / "qemu").touch(0o755)
    monkeypatch.setattr("xtool.devicemodel.argv.BINARIES", (str(tmp_path / "xen-*" / "qemu"),))
    assert find_device_model() == str(tmp_path / "xen-4.17" / "qemu")


def installed() -> str | None:
    try:
        return find_device_model()
    except DeviceModelError:
        return None


@pytest.mark.skipif(installed() is None, reason="no QEMU for Xen on this machine")
@pytest.mark.parametrize("spec", [KERNEL, EVERYTHING], ids=["kernel", "everything"])
def test_real_qemu_understands_every_option(spec: DeviceModelSpec, tmp_path: Path) -> None:
    """Without a domain to serve, QEMU gets as far as attaching to it: its options were all in order."""
    binary = installed()
    assert binary
    disks = []
    for disk in spec.disks:
        path = tmp_path / f"{disk.id}, x"
        path.write_bytes(bytes(1 << 16))
        disks.append(dataclasses.replace(disk, path=disk.path and str(path), format="raw"))
    spec = dataclasses.replace(spec, disks=tuple(disks), extra=())
    words = build_argv(spec, 7777, binary, 0)
    words[words.index("-chardev") + 1] = f"socket,id=qmp,path={tmp_path}/qmp,server=on,wait=off"
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    complaints = done.stderr.replace(binary, "").splitlines()
    assert any("xen" in line for line in complaints), done.stderr
    assert not [line for line in complaints if re.search(r"option|parameter|invalid|-d(rive|evice)", line)]


@pytest.mark.parametrize(
    ("vdev", "place"),
    [
        *(("hda", ("ide", 0)), ("hdd", ("ide", 3)), ("xvdb", ("ide", 1)), ("sdc", ("scsi", 2))),
        *(("xvde", None), ("sdh", None), ("hda1", None), ("xvd", None), ("d0", None), ("", None)),
    ],
)
def test_emulated_place(vdev: str, place: tuple[str, int] | None) -> None:
    assert emulated_place(vdev) == place


def test_a_cd_drive_on_ahci() -> None:
    spec = dataclasses.replace(EVERYTHING, disks=(EmulatedDisk(2, None, cdrom=True, bus="ahci"),))
    assert "ide-cd,id=ahci2,drive=drive-ahci2,bus=ahci.2,unit=0" in after(argv(spec), "-device")


def test_emulated_place_on_ahci() -> None:
    """Six disks instead of four; SCSI names stay SCSI."""
    assert emulated_place("xvda", "ahci") == ("ahci", 0) and emulated_place("hdf", "ahci") == ("ahci", 5)
    assert emulated_place("sdb", "ahci") == ("scsi", 1) and emulated_place("hdg", "ahci") is None
