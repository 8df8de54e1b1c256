"""What ``top`` and ``metrics`` show: our backends' counters, the kernel's; the Prometheus text read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from xtool.cli import top
from xtool.config import DomainConfig
from xtool.errors import DeadlineError
from xtool.toolstack import journal, metrics, samples
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.everydayrecords import DiskSample, DomainSample, HostSample, InterfaceSample
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient
from xtool.toolstack.rates import usage

Config = Callable[..., DomainConfig]
Keeper = Callable[[str], AbstractContextManager[None]]
RUN = CreateOptions(devices=0.3)

BLOCK = {"reads": 3, "writes": 4, "flushes": 1, "discards": 0, "read_bytes": 4096, "written_bytes": 8192}
NET = dict.fromkeys(
    ("tx_frames", "tx_bytes", "tx_invalid", "tx_refused", "tx_lost", "rx_frames", "rx_bytes", "rx_dropped"), 5
)


@pytest.fixture
def client(host: Host) -> LocalClient:
    return LocalClient(host)


def parsed(text: str) -> dict[str, list[Any]]:
    """Family -> samples, by the official parser."""
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


def value(text: str, name: str, **labels: str) -> float:
    found = [
        sample.value
        for listed in parsed(text).values()
        for sample in listed
        if sample.name == name and all(sample.labels.get(k) == v for k, v in labels.items())
    ]
    assert len(found) == 1, (name, labels, found)
    return float(found[0])


def answers(domid: int) -> list[dict[str, Any]]:
    disk = {"folder": "xtool-vbd", "devid": 51712, "counters": {**BLOCK, "bad": 1, "errors": 2}}
    vif = {"folder": "xtool-vif", "devid": 0, "counters": {**NET, "rx_failed": 1, "stalls": 2}}
    queue = {"unanswered": 2, "pending": 3, "broken": "an index out of range"}
    return [
        {**disk, "queues": [queue]},
        {**vif, "queues": [{"tx": {"in_flight": 1}, "rx": {"stalled": True}}]},
    ]


def kernel(root: Path, domid: int) -> None:
    """sysfs of a blkback disk and a netback interface."""
    disk = root / f"sys/bus/xen-backend/devices/vbd-{domid}-51728/statistics"
    disk.mkdir(parents=True)
    for name, number in {
        "rd_sect": 16,
        "wr_sect": 8,
        "rd_req": 2,
        "wr_req": 1,
        "f_req": 0,
        "oo_req": 7,
    }.items():
        (disk / name).write_text(f"{number}\n")
    (disk / "other").write_text("no number")
    (root / f"sys/bus/xen-backend/devices/vif-{domid}-1/net/renamed").mkdir(parents=True)
    link = root / "sys/class/net/renamed/statistics"
    link.mkdir(parents=True)
    for name in ("rx_bytes", "rx_packets", "rx_dropped", "rx_errors"):
        (link / name).write_text("100")
    for name in ("tx_bytes", "tx_packets", "tx_dropped", "tx_errors"):
        (link / name).write_text("7")


@pytest.fixture
def guest(client: LocalClient, config: Config, tmp_path: Path) -> int:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(4096))
    disks = f"['{tmp_path}/a,raw,xvda,backendtype=xtool', '{tmp_path}/b,raw,xvdb']"
    vifs = "['bridge=xenbr0,backendtype=xtool', 'bridge=xenbr0']"
    return client.create(config("pvh", disk=disks, vif=vifs), RUN).domid


def test_the_text_is_what_was_counted(host: Host, guest: int, tmp_path: Path) -> None:
    kernel(tmp_path, guest)
    text = metrics.render(host, root=tmp_path, ask=answers)
    assert value(text, "xtool_domains") == 1 and value(text, "xtool_host_cpus") == 4
    assert value(text, "xtool_domain_state", domain="test", state="blocked") == 1
    assert value(text, "xtool_domain_info", domid=str(guest), type="pvh", managed="true") == 1
    assert value(text, "xtool_domain_backend_up") == 1
    ours, theirs = {"device": "xvda", "backend": "xtool"}, {"device": "xvdb", "backend": "phy"}
    assert value(text, "xtool_block_read_bytes_total", **ours) == 4096
    assert value(text, "xtool_block_read_bytes_total", **theirs) == 16 * 512
    assert value(text, "xtool_block_errors_total", **ours) == 3
    assert value(text, "xtool_block_out_of_requests_total", **theirs) == 7
    assert value(text, "xtool_ring_waiting", **ours) == 5 and value(text, "xtool_ring_stalled", **ours) == 1
    assert value(text, "xtool_ring_stalled", **theirs) == 0
    # What the host received the guest sent.
    assert value(text, "xtool_network_sent_bytes_total", device="renamed", backend="vif") == 100
    assert value(text, "xtool_network_received_packets_total", device="renamed") == 7
    assert value(text, "xtool_network_sent_bytes_total", backend="xtool") == 5
    assert value(text, "xtool_network_stalls_total", backend="xtool") == 2
    assert value(text, "xtool_ring_stalled", backend="xtool", device=f"vif{guest}.0") == 1


def test_every_family_follows_the_conventions(host: Host, guest: int, tmp_path: Path) -> None:
    text = metrics.render(host, root=tmp_path, ask=answers)
    for family in text_string_to_metric_families(text):
        kind, words = metrics.FAMILIES.get(family.name) or metrics.FAMILIES[f"{family.name}_total"]
        assert (family.type, family.documentation) == (kind, words)
    assert all(name.endswith("_total") == (kind == "counter") for name, (kind, _) in metrics.FAMILIES.items())
    assert text.endswith("\n") and "\n\n" not in text


def test_a_backend_that_does_not_answer(host: Host, guest: int) -> None:
    def silent(domid: int) -> list[dict[str, Any]]:
        raise DeadlineError("the backends of domain 1 did not answer within 1 s")

    text = metrics.render(host, ask=silent)
    assert value(text, "xtool_domain_backend_up") == 0
    assert value(text, "xtool_ring_stalled", device="xvda") == 1
    assert not any(s.labels["device"] == "xvda" for s in parsed(text).get("xtool_block_read_bytes", []))


def test_keepers(host: Host, guest: int, tmp_path: Path, keeper: Keeper) -> None:
    [entry] = journal.entries()
    assert value(metrics.render(host, root=tmp_path), "xtool_domain_keeper_up") == 0
    with keeper(entry.uuid):
        assert value(metrics.render(host, root=tmp_path), "xtool_domain_keeper_up") == 1
    journal.remove(entry.uuid)  # somebody else's domain has no keeper of ours
    assert "xtool_domain_keeper_up" not in metrics.render(host, root=tmp_path)


@given(name=st.text(max_size=30))
def test_any_name_is_read_back(name: str) -> None:
    domain = DomainSample(1, name, "u", "pv", "running", True, 1.5, 2, 3, 1, None, None, None)
    text = metrics.text(HostSample(0.0, 0.0, "4.17", 1, 1, 1, 0, (domain,)))
    lines = text.split("\n")
    assert all(line.startswith(("#", "xtool_")) for line in lines[:-1]) and lines[-1] == ""
    if "\r" not in name and len(name.splitlines()) < 2:  # the parser itself splits at those
        labels = {s.labels["domain"] for s in parsed(text)["xtool_domain_cpu_seconds"]}
        assert labels == {name}


# --- rates ----------------------------------------------------------------------------------------------
DISK = DiskSample("xvda", 51712, "xtool", "connected", 100, 50, 4, 2, 0, 0, 0, None, 0)
VIF = InterfaceSample("vif1.0", 0, "vif", "connected", 1000, 500, 10, 5)
DOMAIN = DomainSample(
    1, "web", "u", "pv", "running", True, 10.0, 1 << 20, 1 << 20, 1, None, None, None, (DISK,), (VIF,)
)
BEFORE = HostSample(100.0, 50.0, "4.17", 2, 8 << 20, 4 << 20, 0, (DOMAIN,))


def later(**domain: Any) -> HostSample:
    return replace(BEFORE, clock=52.0, domains=(replace(DOMAIN, **domain),))


def test_rates_are_per_second() -> None:
    disk, vif = replace(DISK, read_bytes=300, writes=6), replace(VIF, sent_bytes=3000, received_packets=9)
    found = usage(BEFORE, later(cpu_time=11.0, disks=(disk,), interfaces=(vif,)))
    [web] = found.domains
    assert (found.interval, found.cpu, web.cpu) == (2.0, 50.0, 50.0)
    assert (web.read, web.written, web.sent, web.received) == (100.0, 0.0, 1000.0, 0.0)
    assert web.disks[0].requests == 2.0 and web.interfaces[0].packets == 2.0 and web.stalls == ()


def test_a_device_that_was_given_anew_counts_from_nothing() -> None:
    [web] = usage(BEFORE, later(disks=(replace(DISK, read_bytes=60),))).domains
    assert web.read == 30.0
    [web] = usage(BEFORE, later(uuid="another")).domains  # the number belongs to another domain now
    assert web.cpu == 500.0 and web.read == 50.0
    [web] = usage(BEFORE, later(disks=(DiskSample("xvda", 51712, "qdisk", "connected"),))).domains
    assert web.disks[0].read is None and web.read == 0


def test_a_ring_that_stands_still() -> None:
    stuck = replace(BEFORE, domains=(replace(DOMAIN, disks=(replace(DISK, waiting=3),)),))
    [web] = usage(stuck, later(disks=(replace(DISK, waiting=4),))).domains
    assert web.stalls == ("xvda: 4 requests wait and none is answered",)
    [web] = usage(stuck, later(disks=(replace(DISK, waiting=4, writes=3),))).domains
    assert web.stalls == ()


# --- the command line -----------------------------------------------------------------------------------
@pytest.fixture
def run(client: LocalClient, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    from xtool.cli import app

    def go(*argv: str) -> tuple[int, str]:
        client.close = lambda: None  # type: ignore[method-assign]
        code = app.main(argv, opener=lambda: client)
        return code, capsys.readouterr().out

    return go


def test_top_as_lines_and_as_a_page(run: Callable[..., tuple[int, str]], guest: int) -> None:
    code, out = run("top", "-o", "json", "--count", "2", "--interval", "0.05")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(lines) == 2 and lines[1]["domains"][0]["name"] == "test"
    assert json.loads(run("top", "-o", "json", "-i", "0.05")[1])["domains"][0]["domid"] == guest
    code, out = run("top", "-d", "-i", "0.05")
    assert code == 0 and "CPU%" in out and "  xvdb " in out and f"  vif{guest}.1" in out
    assert run("top", "-s", "beauty")[0] == 2 and run("top", "-n", "0")[0] == 2


def test_metrics_on_the_command_line(run: Callable[..., tuple[int, str]], guest: int) -> None:
    code, out = run("metrics")
    assert code == 0 and value(out, "xtool_domain_vcpus", domain="test") == 1


def test_top_escapes_names() -> None:
    evil = replace(DOMAIN, name="e\x1b[2Jvil")
    shown = usage(
        BEFORE, replace(BEFORE, clock=51.0, domains=(evil, replace(DOMAIN, name="b", cpu_time=99.0)))
    )
    assert "\x1b" not in top.page(shown, "cpu", True)
    assert [row[0] for row in top.rows(shown, "cpu", False)] == ["b", "e\\x1b[2Jvil"]
    assert [row[0] for row in top.rows(shown, "name", False)] == ["b", "e\\x1b[2Jvil"]


def test_the_live_view(host: Host, guest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal: it draws, and Ctrl-C ends it in good order."""
    import os
    import pty
    import select
    import signal
    import subprocess
    import sys

    script = (
        "import sys; from xtool.cli import app; from xtool.toolstack.local import open_client;"
        "sys.exit(app.main(['top', '-i', '0.1'], opener=lambda: open_client('fake:')))"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        seen = b""
        while b"CPU%" not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        try:
            while os.read(ours, 65536):
                pass
        except OSError:
            pass
        assert process.wait(60) == 0
    os.close(ours)
    assert b"Xen 4.17.0-fake" in seen


def test_keeper_of_a_half_built_domain(host: Host) -> None:
    assert samples.keeper_lives(journal.Entry("u", "x", "pv", "creating")) is None
