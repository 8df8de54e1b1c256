"""Devices of domain 0 for the kernel's own frontends: a disk as /dev/xvdX, an interface in a namespace of its
own. So every backend can be measured without a guest.

Facts
-----
* The kernel's frontends look below ``/local/domain/0/device``; that both ends are in one domain is nothing to
  them. QEMU serves domain 0 as any other with ``-xen-domid 0``.
* netfront's interface is in the first namespace until it is moved, and comes back there when its namespace
  goes: the namespace is removed before the device.
"""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from benchmarks.contest import BenchError
from xtool.config import DiskConfig
from xtool.devicemodel.process import spawn
from xtool.devicemodel.qdisk import QdiskSpec
from xtool.devices import xenbus
from xtool.devices.backendkinds import PATIENT
from xtool.devices.declare import Node, write
from xtool.devices.hotplug import bridge as bridges
from xtool.devices.hotplug import link
from xtool.devices.hotplug.port import LinkPlan
from xtool.devices.vbd import PhysicalDevice, vbd_nodes
from xtool.devices.vif import Vif, vif_nodes
from xtool.devices.xenbus import DeviceId
from xtool.errors import DeadlineError
from xtool.toolstack.backends import start_backends, stop_backends
from xtool.toolstack.deviceplan import plan_disk
from xtool.toolstack.host import Host
from xtool.xenstore.paths import parent

DEADLINE = 60.0


def until(what: str, ready: Callable[[], object], tell: Callable[[], object] = str) -> None:
    """Raises ``BenchError`` with ``what`` and what ``tell`` gives when it takes too long."""
    end = time.monotonic() + DEADLINE
    while not ready():
        if time.monotonic() > end:
            raise BenchError(f"{what} within {DEADLINE:g} s {tell()}")
        time.sleep(0.02)


def command(*argv: str) -> None:
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE)
    if done.returncode:
        raise BenchError(f"{' '.join(argv)}: {done.stdout.strip()[-500:]}")


@contextmanager
def kernel_disk(host: Host, disk: DiskConfig) -> Iterator[tuple[str, list[int]]]:
    """The disk by the kernel's frontend: its path, and the process that serves it if it is QEMU."""
    vbd = plan_disk(disk, host.targets([disk.target]))
    device, path, server = vbd.id(0), f"/dev/{vbd.vdev}", vbd.backend_kind.server
    if os.path.exists(path):
        raise BenchError(f"domain 0 has a disk {path} already")
    command("modprobe", "xen-blkfront")
    physical = None
    pids: list[int] = []
    with ExitStack() as undo:
        if server == "kernel":
            held = host.hotplug.open_disk(vbd.target or "", readonly=False, direct_io=False, loop=vbd.loop)
            undo.callback(held.close)
            physical = PhysicalDevice(held.path, held.major, held.minor, held.loop)
        elif server == "qemu":
            model = spawn(QdiskSpec("xtool-bench", str(uuid.uuid4())), 0)
            undo.callback(model.stop)
            model.wait_ready(DEADLINE)
            pids.append(model.pid)
        _declare(host, device, vbd_nodes(vbd, 0, "pvh", physical), undo)
        until(f"no {path}", lambda: os.path.exists(path), lambda: _states(host, device))
        until(f"{path} is not connected", lambda: _connected(host, device), lambda: _states(host, device))
        yield path, pids


def _declare(host: Host, device: DeviceId, nodes: list[Node], undo: ExitStack) -> None:
    if host.store.exists(device.backend) or host.store.exists(device.frontend):
        raise BenchError(f"there is a {device} already")
    if device.folder.startswith("xtool-"):
        undo.callback(stop_backends, host, 0)
    undo.callback(_forget, host, device)
    host.store.atomically(lambda tx: write(tx, nodes))
    start_backends(host, 0, [device])


def _forget(host: Host, device: DeviceId) -> None:
    with suppress(DeadlineError):  # then it loses its nodes
        xenbus.close(host.store, [device], 20.0, patient=PATIENT)
    for path in xenbus.removal_paths(device):
        host.store.rm(path)
        # Folders that are nobody's any more: domain 0 never ends.
        while _ours(path := parent(path)) and host.store.list_many([path])[path] == ():
            host.store.rm(path)


def _ours(folder: str) -> bool:
    """Whether it was made for a device: not ``backend`` and ``error``, which the kernel's drivers watch."""
    return folder.startswith("/libxl/0") or folder.count("/") > 4 or folder.endswith("/0/device")


def _connected(host: Host, device: DeviceId) -> bool:
    ends = (f"{device.backend}/state", f"{device.frontend}/state")
    return set(host.store.get_many(ends).values()) == {"4"}


def _states(host: Host, device: DeviceId) -> str:
    ends = (f"{device.backend}/state", f"{device.frontend}/state", f"{device.error}/error")
    return f"({', '.join(f'{path}: {value}' for path, value in host.store.get_many(ends).items())})"


@contextmanager
def bridge(name: str, address: str) -> Iterator[str]:
    """A bridge of our own with that address."""
    with link.netlink() as ip:
        ip.link("add", ifname=name, kind="bridge")
        [number] = ip.link_lookup(ifname=name)
        try:
            ip.link("set", index=number, state="up")
            ip.addr("add", index=number, address=address, prefixlen=24)
            yield name
        finally:
            ip.link("del", index=number)


@contextmanager
def kernel_vif(host: Host, vif: Vif, namespace: str, address: str) -> Iterator[str]:
    """An interface by the kernel's frontend, in a namespace made for it: its name there."""
    command("modprobe", "xen-netfront")
    device, outer = vif.id(0), vif.interface(0)
    with ExitStack() as undo:
        if vif.own_tap:
            host.hotplug.make_tap(outer)
            undo.callback(host.hotplug.remove_tap, outer)
            bridges.plug(LinkPlan(outer, vif.bridge))
        _declare(host, device, vif_nodes(vif, 0), undo)
        if not vif.own_tap:
            until(f"netback made no {outer}", lambda: link.exists(outer), lambda: _states(host, device))
            bridges.plug(LinkPlan(outer, vif.bridge))
            host.store.write(f"{device.backend}/hotplug-status", "connected")
        until("no interface of netfront", lambda: by_address(vif.mac), lambda: _states(host, device))
        inner = by_address(vif.mac) or ""
        command("ip", "netns", "add", namespace)
        undo.callback(command, "ip", "netns", "del", namespace)
        command("ip", "link", "set", "dev", inner, "netns", namespace)
        command("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", inner)
        command("ip", "-n", namespace, "link", "set", "dev", inner, "up")
        until(f"{inner} is not connected", lambda: _connected(host, device), lambda: _states(host, device))
        yield inner


@contextmanager
def veth(bridge: str, namespace: str, address: str) -> Iterator[None]:
    """A pair of interfaces, ``veth-out`` on the bridge and ``veth-in`` in a namespace made for it."""
    with ExitStack() as undo:
        command("ip", "netns", "add", namespace)
        undo.callback(command, "ip", "netns", "del", namespace)  # and the pair with it
        command(
            "ip", "link", "add", "veth-out", "type", "veth", "peer", "name", "veth-in", "netns", namespace
        )
        command("ip", "link", "set", "dev", "veth-out", "master", bridge, "up")
        command("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "veth-in")
        command("ip", "-n", namespace, "link", "set", "dev", "veth-in", "up")
        yield


def by_address(mac: str) -> str | None:
    """The interface of this namespace with that address."""
    for name in os.listdir("/sys/class/net"):
        try:
            with open(f"/sys/class/net/{name}/address") as file:
                if file.read().strip() == mac:
                    return name
        except OSError:
            pass  # it went, or is no interface
    return None
