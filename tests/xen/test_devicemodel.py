"""QEMU serving a real domain: how early it can start, what it needs, and that it goes without a trace."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from xtool.abi.domctl import XEN_X86_EMU_ALL, XEN_X86_EMU_VPCI
from xtool.devicemodel import pidfd
from xtool.devicemodel.process import MAXMEM_SLACK, find, qmp_path, spawn
from xtool.devicemodel.qmp import query
from xtool.devicemodel.spec import MIB, DeviceModelSpec, EmulatedDisk, VncSpec
from xtool.devices.declare import (
    DomainNodes,
    HvmNodes,
    device_model_nodes,
    domain_nodes,
    leaving_paths,
    write,
)
from xtool.errors import DeviceModelError
from xtool.hypercall.port import CreateSpec
from xtool.hypercall.xen import XenHypervisor
from xtool.xenstore import paths
from xtool.xenstore.client import StoreClient
from xtool.xenstore.transport import connect_default

pytestmark = [
    pytest.mark.xen,
    pytest.mark.skipif(not Path("/dev/xen/privcmd").exists(), reason="no Xen here: run in the lab's dom0"),
]

VIDEORAM = 16 * MIB
VCPUS = 2


@dataclasses.dataclass
class Shell:
    """A domain that is only a number, vCPUs and limits: no memory, no nodes."""

    hv: XenHypervisor
    store: StoreClient
    domid: int
    uuid: str

    @property
    def spec(self) -> DeviceModelSpec:
        return DeviceModelSpec(
            name=f"xtool-test-e-{self.domid}",
            uuid=self.uuid,
            memory=64 * MIB,
            videoram=VIDEORAM,
            vcpus=VCPUS,
            maxvcpus=VCPUS,
            serial=("pty",),
        )


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path))
    hv = XenHypervisor()
    store = StoreClient(connect_default)
    handle = uuid.uuid4()
    domid = hv.create_domain(
        CreateSpec(
            handle=handle.bytes,
            hvm=True,
            hap=True,
            max_vcpus=VCPUS,
            emulation_flags=XEN_X86_EMU_ALL & ~XEN_X86_EMU_VPCI,
        )
    )
    try:
        hv.set_max_vcpus(domid, VCPUS)
        hv.set_max_memory(domid, VIDEORAM + MAXMEM_SLACK)
        hv.set_paging_pool(domid, 4 * MIB)
        store.rm(paths.device_model(domid))
        yield Shell(hv, store, domid, str(handle))
        assert find(domid) is None
        assert not qmp_path(domid).exists()
    finally:
        left = find(domid)
        if left:
            left.stop(grace=0)
        for state in hv.domains():
            if state.domid == domid and not state.dying:
                hv.destroy_domain(domid)
        for path in leaving_paths(domid, str(handle)):
            store.rm(path)
        store.close()
        hv.close()


def listeners() -> set[str]:
    """Local addresses of listening TCP sockets, and bound UDP ones."""
    found = set()
    for table, states in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == states:
                found.add(f"{table} {words[1]}")
    return found


def test_starts_before_the_guest_has_any_memory(shell: Shell, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(MIB))
    disks = (
        EmulatedDisk(0, str(disk)),
        EmulatedDisk(2, str(disk), cdrom=True),
        EmulatedDisk(3, None, cdrom=True),
    )
    spec = dataclasses.replace(shell.spec, disks=disks[:1] + disks[2:])
    before = listeners()
    model = spawn(spec, shell.domid)
    try:
        ready = model.wait_ready(120)
        assert Path(ready.serial[0]).is_char_device() and ready.vnc is None
        assert shell.store.get(f"{paths.device_model(shell.domid)}/state") == "running"
        assert listeners() == before  # XSA-119
        state = shell.hv.domain(shell.domid)
        assert state and VIDEORAM <= state.pages * 4096 <= VIDEORAM + MAXMEM_SLACK
        blocks = {b["device"]: b for b in query(qmp_path(shell.domid), "query-block", deadline=60)}
        assert blocks["drive-ide0"]["inserted"]["drv"] == "raw"
        again = find(shell.domid, uuid=shell.uuid)
        assert again and again.pid == model.pid
        again.close()
    finally:
        model.stop()


def test_vnc_on_request(shell: Shell) -> None:
    model = spawn(dataclasses.replace(shell.spec, vnc=VncSpec()), shell.domid)
    try:
        ready = model.wait_ready(120)
        assert ready.vnc and ready.vnc.host == "127.0.0.1" and 5900 <= int(ready.vnc.port) < 6000
        with socket.create_connection((ready.vnc.host, int(ready.vnc.port)), timeout=60) as vnc:
            assert vnc.recv(12).startswith(b"RFB")
    finally:
        model.stop()


def test_vnc_password_is_nowhere_to_be_read(shell: Shell) -> None:
    model = spawn(dataclasses.replace(shell.spec, vnc=VncSpec(password=True)), shell.domid)
    try:
        words = Path(f"/proc/{model.pid}/cmdline").read_bytes()
        ready = model.wait_ready(120, vnc_password="secret")
        assert ready.vnc
        assert b"password=on" in words and b"secret" not in words
    except DeviceModelError as error:
        # Debian 12 builds its QEMU for Xen without the cipher that VNC passwords need.
        assert "does not support DES" in str(error)
    finally:
        model.stop()


@pytest.mark.parametrize("platform", [False, True], ids=["pc", "xenfv"])
def test_both_machines_and_every_card(shell: Shell, platform: bool) -> None:
    vga, videoram = ("cirrus", 8 * MIB) if platform else ("none", 0)
    spec = dataclasses.replace(
        shell.spec, xen_platform_pci=platform, vga=vga, videoram=videoram, acpi=platform
    )
    model = spawn(dataclasses.replace(spec, usb=True, usbdevices=("tablet",)), shell.domid)
    try:
        model.wait_ready(120)
        buses = query(qmp_path(shell.domid), "query-pci", deadline=60)
        devices = {(d["id"]["vendor"], d["id"]["device"]) for bus in buses for d in bus["devices"]}
        assert ((0x5853, 0x0001) in devices) == platform
    finally:
        model.stop()


@pytest.mark.leaves_things  # Xen's log has a line about it
def test_no_room_for_its_memory_is_a_clear_failure(shell: Shell) -> None:
    shell.hv.set_max_memory(shell.domid, 4 * MIB)
    model = spawn(shell.spec, shell.domid)
    with pytest.raises(DeviceModelError, match=r"as it started: .*populate"):
        model.wait_ready(120)
    model.stop()


def test_a_domain_that_does_not_exist(shell: Shell) -> None:
    model = spawn(shell.spec, 32000)
    with pytest.raises(DeviceModelError, match="as it started"):
        model.wait_ready(120)
    model.stop()


def test_killed_while_serving(shell: Shell) -> None:
    model = spawn(shell.spec, shell.domid)
    model.wait_ready(120)
    os.kill(model.pid, 9)
    assert pidfd.wait(model.fileno(), 60.0)  # the host's fixture may have reaped it by now: not waitid
    assert not model.alive() and find(shell.domid) is None
    model.stop()


@pytest.mark.skipif(not shutil.which("xl"), reason="xl is not installed")
def test_xl_lists_and_destroys_it(shell: Shell) -> None:
    model = spawn(shell.spec, shell.domid)
    ready = model.wait_ready(120)
    nodes = DomainNodes(
        domid=shell.domid,
        uuid=shell.uuid,
        name=shell.spec.name,
        type="hvm",
        memory=64 * MIB,
        maxmem=64 * MIB,
        vcpus=VCPUS,
        maxvcpus=VCPUS,
        store_port=1,
        store_gfn=0xFEFFC,
        console_port=2,
        console_gfn=0xFEFFF,
        start_time=0.0,
        videoram=VIDEORAM,
        hvm=HvmNodes(),
    )
    shell.store.atomically(lambda tx: write(tx, domain_nodes(nodes)))
    write(shell.store, device_model_nodes(shell.domid, model.pid, ttys=ready.serial))
    for node in domain_nodes(nodes):  # inherited permissions are as declared on the real daemon, too
        assert shell.store.get_perms(node.path) == node.perms, node.path

    listed = subprocess.run(["xl", "list"], capture_output=True, text=True, timeout=120, check=True).stdout
    assert shell.spec.name in listed
    subprocess.run(["xl", "destroy", shell.spec.name], timeout=120, check=True)
    assert pidfd.wait(model.fileno(), 60.0)  # the host's fixture may have reaped it by now: not waitid
    assert all(state.domid != shell.domid for state in shell.hv.domains())
    for path in leaving_paths(shell.domid, shell.uuid):
        assert shell.store.get(path) is None, path
    model.stop()
