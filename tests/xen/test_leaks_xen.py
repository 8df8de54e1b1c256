"""The leak oracle on real Xen: it sees what is left, and sees nothing when nothing is."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

from xtool.hypercall.port import CreateSpec
from xtool.toolstack import leaks
from xtool.toolstack.host import Host

PROBES_THAT_MUST_WORK = ("domains", "memory", "event channels", "grants", "xenstore", "processes", "files")


def create(host: Host) -> int:
    return host.hv.create_domain(CreateSpec(handle=uuid.uuid4().bytes, max_vcpus=1))


def test_every_probe_works_here(xen_host: Host) -> None:
    taken = leaks.snapshot(xen_host)
    assert {name: why for name, why in taken.missing.items() if name in PROBES_THAT_MUST_WORK} == {}
    assert taken.probes["domains"].keys() >= {"domain 0"}
    assert any(key.startswith("virq") for key in taken.probes["event channels"])
    assert "/local/domain/0" in taken.probes["xenstore"]
    assert any("xenstored" in key for key in taken.probes["daemon descriptors"])


def test_an_idle_host_does_not_change(xen_host: Host) -> None:
    before = leaks.snapshot(xen_host)
    assert leaks.diff(before, leaks.snapshot(xen_host)) == []


def test_domains_and_memory_are_seen_and_come_back_to_the_page(xen_host: Host) -> None:
    before = leaks.snapshot(xen_host)
    for _ in range(20):
        domid = create(xen_host)
        try:
            xen_host.hv.set_max_memory(domid, 8 << 20)
            assert len(xen_host.hv.populate(domid, range(1024))) == 1024
            port = xen_host.hv.alloc_unbound(domid, 0)
            found = {(leak.probe, leak.key) for leak in leaks.diff(before, leaks.snapshot(xen_host))}
            assert found >= {("domains", f"domain {domid}"), ("memory", f"domain {domid}")}
            assert port > 0
        finally:
            xen_host.hv.destroy_domain(domid)
    assert leaks.wait_clean(xen_host, before) == []


def test_a_claim_is_seen(xen_host: Host) -> None:
    before = leaks.snapshot(xen_host)
    domid = create(xen_host)
    try:
        xen_host.hv.set_max_memory(domid, 64 << 20)
        xen_host.hv.claim(domid, 1000)
        after = leaks.snapshot(xen_host)
        assert after.probes["memory"]["claimed"] == "1000"
    finally:
        xen_host.hv.destroy_domain(domid)
    assert leaks.wait_clean(xen_host, before) == []


def test_nodes_processes_files_and_loop_devices_are_seen(xen_host: Host) -> None:
    before = leaks.snapshot(xen_host)
    lock = Path("/var/lock/xenconsole.32000")
    with subprocess.Popen(["sleep", "1000"]) as child:
        try:
            xen_host.store.write("/tool/xtool-test/x", "1", perms=("n0", "r7"))
            lock.touch()
            found = {leak.probe for leak in leaks.diff(before, leaks.snapshot(xen_host))}
            assert found == {"xenstore", "processes", "files"}
        finally:
            child.kill()
            lock.unlink()
            xen_host.store.rm("/tool/xtool-test")
    assert leaks.wait_clean(xen_host, before) == []


def test_a_zombie_is_seen(xen_host: Host) -> None:
    """A domain whose page somebody maps stays dying after it was destroyed."""
    before = leaks.snapshot(xen_host)
    domid = create(xen_host)
    xen_host.hv.set_max_memory(domid, 1 << 20)
    [frame] = xen_host.hv.populate(domid, [0])
    with xen_host.hv.map_foreign(domid, [frame]):
        xen_host.hv.destroy_domain(domid)
        dying = leaks.snapshot(xen_host).probes["domains"].get(f"domain {domid}", "")
        assert dying.endswith(" dying")
    assert leaks.wait_clean(xen_host, before) == []
