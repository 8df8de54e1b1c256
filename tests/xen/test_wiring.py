"""``xtool wiring`` on real Xen: what it shows of a Linux guest is what Xen, xenstore and the kernel say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from xml.etree import ElementTree

import pytest

from guests import boot, linux
from xtool.devices.hotplug import link
from xtool.devices.wiringmodel import DeviceView
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient
from xtool.toolstack.wiringsvg import draw

BRIDGE = "xtbr1"


@pytest.fixture
def bridge(no_leaks: None) -> Iterator[str]:
    with link.netlink() as ip:
        ip.link("add", ifname=BRIDGE, kind="bridge")
        [number] = ip.link_lookup(ifname=BRIDGE)
        ip.link("set", index=number, state="up")
        yield BRIDGE
        ip.link("del", index=number)


@pytest.mark.parametrize(("kind", "backend"), [("pv", "phy"), ("pvh", "qdisk")])
def test_a_linux_guest(
    client: LocalClient, xen_host: Host, tmp_path: Path, bridge: str, kind: str, backend: str
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8 << 20))
    config = linux(
        kind,
        "wiring",
        disk=f"['{image},raw,xvda,backendtype={backend}']",
        vif=f"['bridge={bridge}']",
    )
    with boot(client, config):
        domid = client.list(config.name)[0].domid
        until = monotonic() + 60
        while True:
            [view] = client.wiring(config.name)
            devices = {device.kind: device for device in view.devices}
            if all(devices[kind].backend.state == "connected" for kind in ("vbd", "vif")):
                break
            assert monotonic() < until, view
            sleep(0.2)
        assert set(devices) == {"console", "vbd", "vif"}
        for device in devices.values():
            assert device.problems == (), device
            check(xen_host, domid, device)
        # The guest has posted buffers to netback, and nothing is in flight on an idle disk.
        rx = [ring for queue in devices["vif"].queues for ring in queue.rings if ring.role == "rx"]
        assert all(ring.in_flight > 0 for ring in rx)
        until = monotonic() + 30
        while any(
            ring.in_flight
            for queue in client.wiring(config.name)[0].devices[1].queues
            for ring in queue.rings
        ):
            assert monotonic() < until
            sleep(0.2)
        ElementTree.fromstring(draw(client.wiring()).encode())
        mapped = maps_of_this_process()
        client.wiring()
        assert maps_of_this_process() == mapped
    client.destroy(config.name)


def check(host: Host, domid: int, device: DeviceView) -> None:
    assert device.queues, device
    for queue in device.queues:
        for channel in queue.channels:
            assert (channel.status, channel.backend_domid, channel.backend_status) == (
                "interdomain",
                0,
                "interdomain",
            )
            far = host.hv.evtchn_status(0, channel.backend_port or 0)
            assert far and (far.remote_domid, far.remote_port) == (domid, channel.port)
        for ring in queue.rings:
            assert ring.indexes is not None and ring.slots and ring.grants
            assert all(grant.frame is not None and grant.domid == 0 for grant in ring.grants)
            if device.kind != "console":  # xenconsoled may map console 0 as a foreign frame
                assert all(grant.mapped for grant in ring.grants)


def maps_of_this_process() -> int:
    """How many pieces of privcmd this process has mapped."""
    return sum("privcmd" in line for line in Path("/proc/self/maps").read_text().splitlines())
