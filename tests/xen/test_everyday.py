"""Everyday verbs on real Xen: what xl sees of them, what guests' devices count, and what crashed tools
leave."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from guests import GUESTS, READY, ask, boot, guest, linux, start, wait_state
from xtool import paths
from xtool.cli import app
from xtool.devices.hotplug import link, tap
from xtool.errors import DomainExistsError, DomainNotFoundError
from xtool.toolstack import tracing
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.fitness import Look, diagnose, worst
from xtool.toolstack.host import Host
from xtool.toolstack.leftovers import find_leftovers, remove_leftovers
from xtool.toolstack.local import LocalClient
from xtool.toolstack.rates import usage

PAUSED = CreateOptions(paused=True)
BRIDGE = "xtbr1"
HOST_IP, GUEST_IP = "10.98.0.1", "10.98.0.2"
SIZE = 4 << 20
#: A number no test's domain gets.
GONE, GONE_UUID = 31000, "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"


def xl(*words: str, check: bool = True) -> str:
    return subprocess.run(["xl", *words], capture_output=True, text=True, timeout=120, check=check).stdout


def until(done: Callable[[], bool], deadline: float = 60.0) -> None:
    end = monotonic() + deadline
    while not done():
        assert monotonic() < end
        sleep(0.1)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in ("a.img", "b.img")]
    for path in made:
        path.write_bytes(os.urandom(SIZE))
    return made


@pytest.fixture
def bridge(no_leaks: None) -> Iterator[str]:
    with link.netlink() as ip:
        ip.link("add", ifname=BRIDGE, kind="bridge")
        [number] = ip.link_lookup(ifname=BRIDGE)
        ip.link("set", index=number, state="up")
        ip.addr("add", index=number, address=HOST_IP, prefixlen=24)
        yield BRIDGE
        ip.link("del", index=number)


# --- names and settings ---------------------------------------------------------------------------------
@pytest.mark.skipif(not shutil.which("xl"), reason="xl is not installed")
def test_xl_sees_a_new_name(client: LocalClient) -> None:
    done = client.create(guest("pvh", "old"), PAUSED)
    client.rename("xtool-test-old", "xtool-test-new")
    assert xl("domid", "xtool-test-new").strip() == str(done.domid)
    assert "xtool-test-old" not in xl("list")
    with pytest.raises(DomainNotFoundError):
        client.list("xtool-test-old")
    client.destroy("xtool-test-new")


def test_of_several_processes_one_gets_the_name(client: LocalClient) -> None:
    """Each in a process of its own, let go at once."""
    names = [f"xtool-test-r{number}" for number in range(3)]
    for name in names:
        client.create(guest("pv", name.removeprefix("xtool-test-")), PAUSED)
    read, write = os.pipe()
    children = []
    for name in names:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 3
            try:
                os.close(write)
                os.read(read, 1)  # the end of the file lets all go
                from xtool.toolstack.local import open_client

                open_client().rename(name, "xtool-test-winner")
                code = 0
            except DomainExistsError:
                code = 1
            finally:
                os._exit(code)
        children.append(child)
    os.close(read)
    os.close(write)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 1, 1]
    assert [d.name for d in client.list()].count("xtool-test-winner") == 1
    for domain in client.list():
        if domain.domid:
            client.destroy(str(domain.domid))


def test_settings_reach_the_guest(client: LocalClient, xen_host: Host) -> None:
    config = linux("pvh", "set", memory=256, vcpus=1, maxvcpus=2)
    with boot(client, config) as console:
        changes = client.set_config(
            config.name, ["memory=200", "vcpus=2", "cpus=0", "cmdline=console=hvc0 x"]
        )
        assert {c.key: c.when for c in changes.changes} == {
            "memory": "now", "vcpus": "now", "cpus": "now", "cmdline": "next start",
        }  # fmt: skip
        until(lambda: client.list(config.name)[0].memory <= (216 << 20))
        domid = client.list(config.name)[0].domid
        assert xen_host.store.get(f"/local/domain/{domid}/cpu/1/availability") == "online"
        assert "END=0=" in ask(console, "true")
        assert [v.hard_affinity for v in client.vcpu_list(config.name)] == ["0", "0"] or (
            xen_host.hv.host().cpus == 1
        )
    client.destroy(config.name)


@pytest.mark.skipif(not shutil.which("xl"), reason="xl is not installed")
def test_uptime_is_xls(client: LocalClient) -> None:
    client.create(guest("pvh", "up"), PAUSED)
    [ours] = client.uptime(["xtool-test-up"])
    found = re.search(r"(\d+):(\d+):(\d+)", xl("uptime", "xtool-test-up"))
    assert found and ours.uptime is not None
    hours, minutes, seconds = map(int, found.groups())
    assert abs(hours * 3600 + minutes * 60 + seconds - ours.uptime) < 30
    client.destroy("xtool-test-up")


def test_a_guest_that_ignores_shutdown(client: LocalClient, capsys: pytest.CaptureFixture[str]) -> None:
    """Paused guests hear nothing: asked, waited for, and destroyed."""
    names = ["xtool-test-deaf1", "xtool-test-deaf2"]
    for name in names:
        client.create(guest("pv", name.removeprefix("xtool-test-")), PAUSED)
    assert app.main(["shutdown", "--force", "--timeout", "2", *names]) == 0
    out, err = capsys.readouterr()
    assert out.count("destroyed") == 2 and err.count("did not shut down within") == 2


def test_a_vnc_display_answers(client: LocalClient) -> None:
    client.create(guest("hvm", "vnc", vnc="true"), PAUSED)
    found = client.display("xtool-test-vnc")
    assert not found.protected
    with socket.create_connection((found.host, found.port), timeout=60) as connection:
        assert connection.recv(4) == b"RFB "
    client.destroy("xtool-test-vnc")


# --- top, metrics, doctor, trace ------------------------------------------------------------------------
def test_what_a_guest_does_is_counted(client: LocalClient, bridge: str, images: list[Path]) -> None:
    disks = f"['{images[0]},raw,xvda,backendtype=phy', '{images[1]},raw,xvdb,backendtype=xtool']"
    config = linux("pvh", "busy", disk=disks, vif=f"['bridge={bridge}']")
    with boot(client, config) as console:
        for vdev in ("xvda", "xvdb"):
            wait_state(client, config.name, vdev, "connected")
        before = client.sample()
        for vdev in ("xvda", "xvdb"):
            assert "END=0=" in ask(console, f"cat /dev/{vdev} > /dev/null")
        ask(console, f"ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up; ping -c 3 -W 5 {HOST_IP}")
        found = usage(before, client.sample())
        text = client.metrics()
    [busy] = [d for d in found.domains if d.name == config.name]
    assert busy.cpu > 0 and {d.backend for d in busy.disks} == {"phy", "xtool"}
    assert all(round((d.read or 0) * found.interval) >= SIZE for d in busy.disks), busy
    assert busy.sent > 0 and busy.received > 0 and busy.stalls == ()
    for device in ("xvda", "xvdb"):
        [value] = re.findall(rf'^xtool_block_read_bytes_total{{.*device="{device}".*}} (\d+)$', text, re.M)
        assert int(value) >= SIZE
    assert re.search(rf'^xtool_domain_backend_up{{domain="{config.name}",.*}} 1$', text, re.M)
    assert re.search(rf'^xtool_domain_keeper_up{{domain="{config.name}",.*}} 1$', text, re.M)
    client.destroy(config.name)


def test_the_lab_is_fit(xen_host: Host) -> None:
    found = {result.name: result for result in diagnose(Look(xen_host))}
    for name in ("xen", "control domain", "privilege", "/dev/xen/privcmd", "/dev/xen/evtchn", "xenstored"):
        assert found[name].status == "ok", found[name]
    for name in ("QEMU", "hvmloader", "xenconsoled", "free memory", "leftovers"):
        assert found[name].status == "ok", found[name]
    assert worst(found.values()) != "fail", [r for r in found.values() if r.status == "fail"]


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_a_trace_of_a_create(client: LocalClient, kind: str) -> None:
    done = client.create(guest(kind, "traced"), CreateOptions(trace=120.0))
    names = {(span.category, span.name) for span in done.trace}
    assert {
        ("guest", "first console byte"),
        ("hypercall", "create_domain"),
        ("xenstore", "introduce"),
    } <= names
    [first] = [span for span in done.trace if span.category == "guest"]
    [unpause] = [span for span in done.trace if span.name == "unpause_domain"]
    assert first.start + first.duration > unpause.start
    client.destroy("xtool-test-traced")


def test_a_trace_of_qemu(client: LocalClient) -> None:
    done = client.create(guest("hvm", "traced"), CreateOptions(trace=0.0))
    assert {"spawn", "wait until it answers"} == {s.name for s in done.trace if s.category == "qemu"}
    client.destroy("xtool-test-traced")


def test_the_first_packet_is_seen(client: LocalClient, xen_host: Host, bridge: str) -> None:
    config = linux("pvh", "packet", vif=f"['bridge={bridge}']")
    with boot(client, config) as console:
        console.send(
            f"sleep 2; ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up; ping -c 9 {HOST_IP}\n"
        )
        tracer = tracing.Tracer()
        tracing.first_signs(xen_host, client.list(config.name)[0].domid, tracer, 120.0)
        assert [span.name for span in tracer._spans] == ["first console byte", "first packet"]
    client.destroy(config.name)


# --- leftovers ------------------------------------------------------------------------------------------
@pytest.fixture
def planted(xen_host: Host, tmp_path: Path, no_leaks: None) -> Iterator[set[str]]:
    """Everything a crashed toolstack could have left of a domain; gone afterwards in any case."""
    store, zero = xen_host.store, "/local/domain/0"
    image = tmp_path / "dead.img"
    image.write_bytes(bytes(1 << 20))
    loop = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=True)
    device = loop.stdout.strip()
    nodes = {
        f"/local/domain/{GONE}", f"/libxl/{GONE}", f"/vm/{GONE_UUID}",
        f"{zero}/backend/vbd/{GONE}", f"{zero}/error/backend/vbd/{GONE}", f"{zero}/device-model/{GONE}",
    }  # fmt: skip
    for path in nodes:
        store.write(f"{path}/planted", "x")
    store.write(f"{zero}/backend/vbd/{GONE}/51712/physical-device", f"7:{int(device[9:]):x}")
    tap.make(f"vif{GONE}.0")
    files = [paths.run_dir() / f"qmp-{GONE}.sock", Path(f"/var/lib/xen/userdata-d.{GONE}.{GONE_UUID}.xl")]
    for path in files:
        path.write_text("x")
    argv = ["qemu-system-i386", "-c", "import time; time.sleep(3600)", "-xen-domid", str(GONE)]
    qemu = subprocess.Popen(argv, executable=sys.executable)
    until(lambda: b"-xen-domid" in Path(f"/proc/{qemu.pid}/cmdline").read_bytes())
    yield {*nodes, *map(str, files), f"{device} ({image})", f"vif{GONE}.0", f"QEMU, pid {qemu.pid}"}
    qemu.kill()
    qemu.wait()
    subprocess.run(["losetup", "-d", device], stderr=subprocess.DEVNULL, check=False)
    tap.remove(f"vif{GONE}.0")
    for path in nodes:
        store.rm(path)
    for file in files:
        file.unlink(missing_ok=True)


def test_planted_leftovers_go_and_a_running_guest_stays(
    client: LocalClient, xen_host: Host, planted: set[str], images: list[Path]
) -> None:
    disks = f"['{images[0]},raw,xvda,backendtype=phy', '{images[1]},raw,xvdb,backendtype=xtool']"
    config = linux("pvh", "alive", disk=disks)
    with boot(client, config) as console:
        wait_state(client, config.name, "xvdb", "connected")
        found = find_leftovers(xen_host)
        assert {item.what for item in found if item.certain} == planted
        done = remove_leftovers(xen_host)
        assert all(item.removed for item in done if item.certain), done
        assert not [item for item in find_leftovers(xen_host) if item.certain]
        for vdev in ("xvda", "xvdb"):
            assert "END=0=" in ask(console, f"cat /dev/{vdev} > /dev/null")
    client.destroy(config.name)


@pytest.mark.skipif(not shutil.which("xl"), reason="xl is not installed")
@pytest.mark.long
def test_what_a_killed_xl_create_leaves(client: LocalClient, xen_host: Host, tmp_path: Path) -> None:
    """xl is killed at some moment of a create, and its domain after it; then nothing may be left of either.

    ``no_leaks`` compares the whole host.
    """
    file = tmp_path / "xl.cfg"
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    kernel = GUESTS / "tiny-pvh.elf"
    file.write_text(
        f'name = "xtool-test-xl"\ntype = "pvh"\nmemory = 64\nkernel = "{kernel}"\n'
        f'disk = ["{tmp_path}/disk.img,raw,xvda,w"]\n'
    )
    whole = monotonic()
    xl("create", "-q", str(file))
    whole = monotonic() - whole
    xl("destroy", "xtool-test-xl")
    for _ in range(4):
        before = {state.domid for state in xen_host.hv.domains()}
        # A session of its own: its scripts are killed with it, as when a machine's user logs out.
        process = subprocess.Popen(["xl", "create", "-q", str(file)], start_new_session=True)
        sleep(random.uniform(0.1, 1.0) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _kill_daemons("xl create -q")
        half_built = [s for s in xen_host.hv.domains() if s.domid not in before and not s.dying]
        for state in half_built:
            certain = [i for i in find_leftovers(xen_host) if i.certain and i.domid == state.domid]
            assert certain == []  # it could be somebody's
            xen_host.hv.destroy_domain(state.domid)
        ended = [state.domid for state in half_built]
        until(lambda ended=ended: not any(xen_host.hv.domain(domid) for domid in ended))  # type: ignore[misc]
        remove_leftovers(xen_host)
        for item in find_leftovers(xen_host):  # a loop device that nothing tells about any more: only named
            assert (item.kind, item.certain) == ("loop", False) and "disk.img" in item.what
            subprocess.run(["losetup", "-d", f"/dev/{item.key}"], check=True)


def _kill_daemons(command: str) -> None:
    """xl leaves a process with each guest, in a session of its own."""
    for name in os.listdir("/proc"):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if name.isdecimal() and words.startswith(command):
            os.kill(int(name), signal.SIGKILL)


def test_console_of_a_renamed_guest(client: LocalClient) -> None:
    """What is attached stays attached: a rename touches neither the domain nor its console."""
    config = guest("pvh", "before")
    with start(client, config) as console:
        client.rename(config.name, "xtool-test-after")
        console.wait_for(READY)
    client.destroy("xtool-test-after")
