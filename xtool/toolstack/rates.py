"""What changed between two samples, per second. Pure.

A counter that went back belongs to a device that was given anew: its rate is counted from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xtool.toolstack.everydayrecords import DiskSample, DomainSample, HostSample, InterfaceSample


@dataclass(frozen=True)
class DiskRate:
    """Bytes and requests per second; None where there are no counters."""

    vdev: str
    backend: str
    read: float | None
    written: float | None
    requests: float | None
    waiting: int | None
    stalled: str


@dataclass(frozen=True)
class InterfaceRate:
    """Bytes and packets per second, as the guest sees them."""

    interface: str
    backend: str
    sent: float | None
    received: float | None
    packets: float | None
    waiting: int | None
    stalled: str


@dataclass(frozen=True)
class DomainRate:
    """``cpu`` in percent of one CPU. Sizes in bytes, sums over all devices per second; ``stalls`` are the
    devices whose rings stand still, with the reason."""

    domid: int
    name: str
    uuid: str
    type: str
    state: str
    cpu: float
    cpu_time: float
    memory: int
    maxmem: int
    vcpus: int
    read: float
    written: float
    sent: float
    received: float
    stalls: Sequence[str]
    disks: Sequence[DiskRate]
    interfaces: Sequence[InterfaceRate]


@dataclass(frozen=True)
class Usage:
    """``interval`` in seconds; ``cpu`` is all domains' together, in percent of one CPU."""

    time: float
    interval: float
    xen_version: str
    cpus: int
    cpu: float
    total_memory: int
    free_memory: int
    domains: Sequence[DomainRate]


def usage(before: HostSample, after: HostSample) -> Usage:
    """What every domain of ``after`` used since ``before``. A domain that is new counts from its start."""
    interval = max(after.clock - before.clock, 1e-6)
    known = {(domain.domid, domain.uuid): domain for domain in before.domains}
    domains = tuple(_domain(known.get((d.domid, d.uuid)), d, interval) for d in after.domains)
    return Usage(
        after.time,
        interval,
        after.xen_version,
        after.cpus,
        sum(domain.cpu for domain in domains),
        after.total_memory,
        after.free_memory,
        domains,
    )


def _domain(before: DomainSample | None, now: DomainSample, interval: float) -> DomainRate:
    spent = now.cpu_time - (before.cpu_time if before else 0.0)
    disks_before = {disk.devid: disk for disk in before.disks} if before else {}
    vifs_before = {vif.devid: vif for vif in before.interfaces} if before else {}
    disks = tuple(_disk(disks_before.get(disk.devid), disk, interval) for disk in now.disks)
    vifs = tuple(_vif(vifs_before.get(vif.devid), vif, interval) for vif in now.interfaces)
    stalls = tuple(f"{d.vdev}: {d.stalled}" for d in disks if d.stalled)
    stalls += tuple(f"{v.interface}: {v.stalled}" for v in vifs if v.stalled)
    return DomainRate(
        now.domid,
        now.name,
        now.uuid,
        now.type,
        now.state,
        100 * max(0.0, spent) / interval,
        now.cpu_time,
        now.memory,
        now.maxmem,
        now.vcpus,
        sum(disk.read or 0 for disk in disks),
        sum(disk.written or 0 for disk in disks),
        sum(vif.sent or 0 for vif in vifs),
        sum(vif.received or 0 for vif in vifs),
        stalls,
        disks,
        vifs,
    )


def _rate(before: int | None, now: int | None, interval: float) -> float | None:
    if now is None:
        return None
    return (now - before if before is not None and before <= now else now) / interval


def _disk(before: DiskSample | None, now: DiskSample, interval: float) -> DiskRate:
    requests = [
        _rate(getattr(before, name, None), getattr(now, name), interval) for name in ("reads", "writes")
    ]
    known = [rate for rate in requests if rate is not None]
    return DiskRate(
        now.vdev,
        now.backend,
        _rate(before.read_bytes if before else None, now.read_bytes, interval),
        _rate(before.written_bytes if before else None, now.written_bytes, interval),
        sum(known) if known else None,
        now.waiting,
        now.stalled or _stands_still(before, now),
    )


def _stands_still(before: DiskSample | None, now: DiskSample) -> str:
    """Requests wait and none was answered between the two looks."""
    if before is None or not before.waiting or not now.waiting:
        return ""
    names = ("reads", "writes", "flushes", "discards", "errors")
    moved = any(getattr(before, name) != getattr(now, name) for name in names)
    return "" if moved else f"{now.waiting} requests wait and none is answered"


def _vif(before: InterfaceSample | None, now: InterfaceSample, interval: float) -> InterfaceRate:
    packets = [
        _rate(getattr(before, name, None), getattr(now, name), interval)
        for name in ("sent_packets", "received_packets")
    ]
    known = [rate for rate in packets if rate is not None]
    return InterfaceRate(
        now.interface,
        now.backend,
        _rate(before.sent_bytes if before else None, now.sent_bytes, interval),
        _rate(before.received_bytes if before else None, now.received_bytes, interval),
        sum(known) if known else None,
        now.waiting,
        now.stalled,
    )
