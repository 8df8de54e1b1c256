"""Prometheus text (exposition format 0.0.4): ``render(host)`` is one scrape.

Names follow Prometheus' conventions: base units, ``_total`` for counters, ``_info`` with the facts as
labels. A label's value may be what a guest or a person chose: backslash, quote and line end are escaped.
Every sample of a domain carries its name and uuid: the id changes with each start, the uuid does not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from xtool.toolstack.everydayrecords import DomainSample, HostSample
from xtool.toolstack.samples import take

if TYPE_CHECKING:
    from xtool.toolstack.host import Host
    from xtool.toolstack.live import Ask

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("running", "blocked", "paused", "shutdown", "crashed", "dying")
Labels = Mapping[str, str]

#: Name -> (type, help). The order is that of the text.
FAMILIES = {
    "xtool_host_info": ("gauge", "The hypervisor's version."),
    "xtool_host_cpus": ("gauge", "CPUs Xen runs domains on."),
    "xtool_host_memory_bytes": ("gauge", "All memory Xen has."),
    "xtool_host_memory_free_bytes": ("gauge", "Memory a new domain could get."),
    "xtool_host_memory_scrub_bytes": ("gauge", "Memory that is being wiped before it is free."),
    "xtool_domains": ("gauge", "Domains, domain 0 included."),
    "xtool_domain_info": ("gauge", "What the domain is; always 1."),
    "xtool_domain_state": ("gauge", "1 for the state the domain is in, 0 for the others."),
    "xtool_domain_cpu_seconds_total": ("counter", "CPU time its vCPUs took."),
    "xtool_domain_memory_bytes": ("gauge", "Memory it has."),
    "xtool_domain_memory_max_bytes": ("gauge", "Memory Xen lets it have at most."),
    "xtool_domain_vcpus": ("gauge", "vCPUs that are online."),
    "xtool_domain_start_time_seconds": ("gauge", "When it was started, seconds since the epoch."),
    "xtool_domain_keeper_up": ("gauge", "Whether the process that carries out its on_... actions lives."),
    "xtool_domain_backend_up": ("gauge", "Whether xtool's backend process of the domain answers."),
    "xtool_block_read_bytes_total": ("counter", "Bytes the guest read."),
    "xtool_block_written_bytes_total": ("counter", "Bytes the guest wrote."),
    "xtool_block_reads_total": ("counter", "Read requests."),
    "xtool_block_writes_total": ("counter", "Write requests."),
    "xtool_block_flushes_total": ("counter", "Flush requests."),
    "xtool_block_discards_total": ("counter", "Discard requests."),
    "xtool_block_errors_total": ("counter", "Requests that failed or made no sense."),
    "xtool_block_out_of_requests_total": ("counter", "How often blkback had no request left."),
    "xtool_network_sent_bytes_total": ("counter", "Bytes the guest sent."),
    "xtool_network_received_bytes_total": ("counter", "Bytes the guest was sent."),
    "xtool_network_sent_packets_total": ("counter", "Packets the guest sent."),
    "xtool_network_received_packets_total": ("counter", "Packets the guest was sent."),
    "xtool_network_dropped_total": ("counter", "Packets that were dropped, both ways."),
    "xtool_network_errors_total": ("counter", "Packets that were wrong, both ways."),
    "xtool_network_stalls_total": ("counter", "How often the guest took no frames."),
    "xtool_ring_waiting": ("gauge", "Requests on the device's rings that are not answered."),
    "xtool_ring_stalled": ("gauge", "Whether a ring of the device is not served at the moment."),
    "xtool_device_connected": ("gauge", "Whether the device's backend is connected."),
    "xtool_scrape_duration_seconds": ("gauge", "How long this look at the host took."),
}


def render(host: Host, *, root: Path | None = None, ask: Ask | None = None) -> str:
    """One scrape. Raises what the hypervisor and xenstore raise."""
    began = time.monotonic()
    sample = take(host, root=root, ask=ask)
    return text(sample, time.monotonic() - began)


def text(sample: HostSample, duration: float = 0.0) -> str:
    """The exposition of a sample. Families without a value are left out."""
    page = _Page()
    page.add("xtool_host_info", 1, {"xen_version": sample.xen_version})
    page.add("xtool_host_cpus", sample.cpus)
    page.add("xtool_host_memory_bytes", sample.total_memory)
    page.add("xtool_host_memory_free_bytes", sample.free_memory)
    page.add("xtool_host_memory_scrub_bytes", sample.scrub_memory)
    page.add("xtool_domains", len(sample.domains))
    for domain in sample.domains:
        _domain(page, domain)
    page.add("xtool_scrape_duration_seconds", duration)
    return page.text()


def _domain(page: _Page, d: DomainSample) -> None:
    who = {"domain": d.name, "uuid": d.uuid}
    about = {"domid": str(d.domid), "type": d.type, "managed": "true" if d.managed else "false"}
    page.add("xtool_domain_info", 1, {**who, **about})
    for state in dict.fromkeys((*STATES, d.state)):
        page.add("xtool_domain_state", int(state == d.state), {**who, "state": state})
    page.add("xtool_domain_cpu_seconds_total", d.cpu_time, who)
    page.add("xtool_domain_memory_bytes", d.memory, who)
    page.add("xtool_domain_memory_max_bytes", d.maxmem, who)
    page.add("xtool_domain_vcpus", d.vcpus, who)
    page.add("xtool_domain_start_time_seconds", d.start_time, who)
    page.add("xtool_domain_keeper_up", d.keeper, who)
    page.add("xtool_domain_backend_up", d.backend_answers, who)
    for disk in d.disks:
        at = {**who, "device": disk.vdev, "backend": disk.backend}
        for name in ("read_bytes", "written_bytes", "reads", "writes", "flushes", "discards", "errors"):
            page.add(f"xtool_block_{name}_total", getattr(disk, name), at)
        page.add("xtool_block_out_of_requests_total", disk.out_of_requests, at)
        page.add("xtool_ring_waiting", disk.waiting, at)
        page.add("xtool_ring_stalled", bool(disk.stalled), at)
        page.add("xtool_device_connected", disk.state == "connected", at)
    for vif in d.interfaces:
        at = {**who, "device": vif.interface, "backend": vif.backend}
        for name in ("sent_bytes", "received_bytes", "sent_packets", "received_packets"):
            page.add(f"xtool_network_{name}_total", getattr(vif, name), at)
        for name in ("dropped", "errors", "stalls"):
            page.add(f"xtool_network_{name}_total", getattr(vif, name), at)
        page.add("xtool_ring_waiting", vif.waiting, at)
        page.add("xtool_ring_stalled", bool(vif.stalled), at)
        page.add("xtool_device_connected", vif.state == "connected", at)


class _Page:
    """Samples by family: the format wants each family's together."""

    def __init__(self) -> None:
        self._samples: dict[str, list[str]] = {name: [] for name in FAMILIES}

    def add(self, name: str, value: float | None, labels: Labels | None = None) -> None:
        """One sample; None is none."""
        if value is not None:
            self._samples[name].append(f"{name}{_labels(labels or {})} {_value(value)}")

    def text(self) -> str:
        lines: list[str] = []
        for name, samples in self._samples.items():
            if samples:
                kind, words = FAMILIES[name]
                lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}", *samples]
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    inside = ",".join(f'{name}="{escape(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def escape(value: str) -> str:
    """A label's value, as it stands between quotes."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _value(value: float) -> str:
    return str(int(value)) if isinstance(value, (bool, int)) else repr(float(value))
