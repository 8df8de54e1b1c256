"""``xtool wiring`` on the host in memory: a PV guest with console, disk and interface; guests that lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import pack_into
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtool.cli import app
from xtool.config import DomainConfig
from xtool.devices import wiringmodel as m
from xtool.devices.hotplug.fake import FakeKernel
from xtool.fake.grants import FakePages
from xtool.fake.hypervisor import FakeHypervisor
from xtool.proto.consolering import INDEXES_AT
from xtool.proto.shm import store32
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.create import create
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient
from xtool.toolstack.wiringsvg import clean, draw

Config = Callable[..., DomainConfig]


@dataclass
class Guest:
    """A running PV guest; its disk has 5 requests in flight, its interface 2 frames and 200 buffers."""

    host: Host
    client: LocalClient
    domid: int
    disk: FakePages
    front: str

    def view(self) -> m.WiringView:
        [view] = self.client.wiring("test")
        return view

    def device(self, kind: str) -> m.DeviceView:
        [device] = [d for d in self.view().devices if d.kind == kind]
        return device


@pytest.fixture
def guest(host: Host, config: Config, tmp_path: Path) -> Iterator[Guest]:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    wanted = config("pv", disk=f"['{image},raw,xvda']", vif="['bridge=xenbr0']")
    domid = create(host, wanted, CreateOptions(devices=0.3)).domid
    assert isinstance(host.hv, FakeHypervisor) and isinstance(host.hotplug, FakeKernel)
    machine = host.hv.machine
    allocator, inside, dom0 = machine.allocator(domid), machine.events(domid), machine.events(0)
    disk, tx, rx = allocator.share(0, 1), allocator.share(0, 1), allocator.share(0, 1)
    for pages, produced, answered in ((disk, 3, 0xFFFF_FFFE), (tx, 2, 0), (rx, 200, 0)):
        store32(pages.view, 0, produced)
        store32(pages.view, 8, answered)
    ports = [inside.bind_unbound(0) for _ in range(3)]
    for port in ports:
        dom0.bind_interdomain(domid, port)
    mapped = machine.grants(0).map(domid, disk.refs)
    front = f"/local/domain/{domid}/device"
    with host.store.batch() as batch:
        for path, value in (
            ("vbd/51712/ring-ref", disk.refs[0]),
            ("vbd/51712/event-channel", ports[0]),
            ("vif/0/tx-ring-ref", tx.refs[0]),
            ("vif/0/rx-ring-ref", rx.refs[0]),
            ("vif/0/event-channel-tx", ports[1]),
            ("vif/0/event-channel-rx", ports[2]),
        ):
            batch.write(f"{front}/{path}", str(value))
    host.hotplug.run_drivers(domid)
    yield Guest(host, LocalClient(host), domid, disk, front)
    mapped.close()


def test_a_pv_guest_with_console_disk_and_interface(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(guest.host.hv, FakeHypervisor)
    frame = int(guest.host.store.read_text(f"/local/domain/{guest.domid}/console/ring-ref"))
    with guest.host.hv.map_foreign(guest.domid, [frame]) as page:
        store32(page.view, INDEXES_AT + 12, 100)  # out_prod: nobody has read it yet
    view = guest.view()
    assert (view.name, view.type, [d.kind for d in view.devices]) == ("test", "pv", ["console", "vbd", "vif"])
    console, disk, vif = view.devices
    out, into = console.queues[0].rings
    assert (out.in_flight, out.slots, into.in_flight) == (100, 2048, 0)
    assert console.queues[0].channels[0].status == "unbound" and out.grants[0].frame == frame

    assert (disk.name, disk.backend_kind, disk.server) == ("xvda", "phy", "kernel")
    assert (disk.frontend.state, disk.backend.state, disk.problems) == ("connected", "connected", ())
    [ring], [channel] = disk.queues[0].rings, disk.queues[0].channels
    # Through the wrap of the indexes at 2^32.
    assert (ring.slots, ring.first, ring.in_flight) == (32, 30, 5)
    assert ring.grants[0].mapped and ring.grants[0].domid == 0 and ring.grants[0].ref == guest.disk.refs[0]
    assert (channel.status, channel.backend_domid, channel.backend_status) == (
        "interdomain",
        0,
        "interdomain",
    )
    guest_port = guest.host.hv.evtchn_status(0, channel.backend_port or 0)
    assert guest_port and guest_port.remote_port == channel.port

    tx, rx = vif.queues[0].rings
    assert (tx.role, tx.slots, tx.in_flight) == ("tx", 256, 2) and (rx.role, rx.in_flight) == ("rx", 200)
    assert not tx.grants[0].mapped and [c.role for c in vif.queues[0].channels] == ["tx", "rx"]

    # The verb prints it in every form, and has left nothing mapped.
    outputs = {}
    for form in ("table", "json", "yaml", "svg"):
        assert app.main(["wiring", "test", "-o", form], opener=lambda: guest.client) == 0
        outputs[form] = capsys.readouterr().out
    assert json.loads(outputs["json"])[0]["devices"][1]["queues"][0]["rings"][0]["in_flight"] == 5
    assert "5 of 32" in outputs["table"] and "connected / connected" in outputs["table"]
    assert guest.host.hv.mapped == 0
    root = ElementTree.fromstring(outputs["svg"])
    filled = [e for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("class") == "busy"]
    assert 5 + 1 + 50 <= len(filled) <= 70
    assert draw(guest.client.wiring("test")) == draw(guest.client.wiring()) == outputs["svg"].rstrip("\n")


@pytest.mark.parametrize(
    ("node", "value", "problem"),
    [
        ("vbd/51712/ring-ref", "4294967295", "no grant reference"),
        ("vbd/51712/ring-ref", "-1", "is not a number"),
        ("vbd/51712/ring-ref", "9" * 2000, "is not a number"),
        ("vbd/51712/ring-ref", "300", "not in the guest's grant table"),
        ("vbd/51712/event-channel", "4000", "is closed"),
        ("vbd/51712/multi-queue-num-queues", "65535", "65535 queues"),
        ("vif/0/tx-ring-ref", "\x1b[31m", "is not a number"),
        ("vif/0/multi-queue-num-queues", "0", "is not between"),
    ],
)
def test_hf8_hf9_nodes_that_lie_become_problems(guest: Guest, node: str, value: str, problem: str) -> None:
    guest.host.store.write(f"{guest.front}/{node}", value)
    device = guest.device(node[:3])
    assert any(problem in line for line in device.problems), device.problems
    assert len(device.queues) <= m.MAX_QUEUES
    draw([guest.view()])


def test_hf2_a_ring_that_lies_and_a_grant_of_somebody_elses_page(guest: Guest) -> None:
    store32(guest.disk.view, 0, 0x8000_0000)
    device = guest.device("vbd")
    assert device.queues[0].rings[0].in_flight == 0 and "in a ring of 32" in device.problems[0]
    # A grant entry that names a frame the guest does not own cannot be mapped; it is not shown as a ring.
    assert isinstance(guest.host.hv, FakeHypervisor)
    grant = guest.host.hv.machine.guests[guest.domid].grants[guest.disk.refs[0]]
    grant.domid = 5
    device = guest.device("vbd")
    assert device.queues[0].rings[0].indexes is None
    assert any("is for domain 5" in line for line in device.problems)


def test_hf30_a_guest_that_removes_its_nodes_hides_nothing(guest: Guest) -> None:
    guest.host.store.rm(guest.front)
    assert [d.kind for d in guest.view().devices] == ["console", "vbd", "vif"]
    assert guest.device("vbd").frontend.state == ""


TEXTS = st.text(st.characters(), max_size=80) | st.sampled_from(
    [
        "</text><script>alert(1)</script>",
        "]]>",
        "&#x0;",
        "\x00\x1b[2J",
        "\ud800",
        "\ufffe",
        "a" * 4096,
        "{{ 7*7 }}",
    ]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=TEXTS,
    device=TEXTS,
    path=TEXTS,
    problem=TEXTS,
    state=TEXTS,
    slots=st.integers(0, 4096),
    busy=st.integers(0, 5000),
)
def test_hf34_the_picture_is_well_formed_whatever_its_texts_are(
    name: str, device: str, path: str, problem: str, state: str, slots: int, busy: int
) -> None:
    ring = m.RingView(
        "x" * 50, (m.GrantView(8), m.GrantView(9, 5, 0, True, True)) * 3, slots, busy, min(busy, slots), {}
    )
    queue = m.QueueView(0, (m.ChannelView(device, 3, state),), (ring,))
    view = m.DeviceView(
        "vbd",
        1,
        device,
        name,
        "kernel",
        m.EndView(1, path, state),
        m.EndView(0, path, ""),
        (queue,) * 2,
        (problem,) * 6,
    )
    picture = draw([m.WiringView(1, name, "pv", (view,))])
    root = ElementTree.fromstring(picture.encode("utf-8"))
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= {
        *("svg", "title", "style", "rect", "circle", "line", "path", "text", "g")
    }
    shown = "".join(root.itertext())
    assert clean(name, 26) in shown and len(clean(name, 26)) <= 26
    assert draw([m.WiringView(1, name, "pv", (view,))]) == picture


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "ring-ref",
                "ring-ref0",
                "ring-page-order",
                "event-channel",
                "port",
                "tx-ring-ref",
                "rx-ring-ref",
                "multi-queue-num-queues",
                "queue-0/ring-ref",
                "queue-1/tx-ring-ref",
                "protocol",
            ]
        ),
        st.text(max_size=30) | st.integers(-5, 1 << 70).map(str),
    ),
    st.sampled_from(["vbd", "vif", "console", "?"]),
)
def test_any_nodes_can_be_looked_at(nodes: dict[str, str], kind: str) -> None:
    plans, problems = m.parse_frontend(kind, nodes)
    assert len(plans) <= m.MAX_QUEUES and len(problems) <= m.MAX_QUEUES + 2


@given(st.lists(st.integers(0, 0xFFFF_FFFF), min_size=8, max_size=8))
def test_any_page_can_be_looked_at(words: list[int]) -> None:
    page = bytearray(4096)
    pack_into("<4I", page, 0, *words[:4])
    pack_into("<4I", page, INDEXES_AT, *words[4:])
    plan = m.RingPlan("", (8,), 112)
    ring, _ = m.shared_ring(plan, [], bytes(page))
    assert 0 <= ring.in_flight <= ring.slots
    for found in m.console_rings([], bytes(page))[0]:
        assert 0 <= found.in_flight <= found.slots
