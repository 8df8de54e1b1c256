"""What every domain uses at one moment: CPU time, memory, and the counters of whoever serves its devices.

Facts
-----
- Linux's blkback counts in ``/sys/bus/xen-backend/devices/vbd-<domid>-<devid>/statistics``: requests, and
  sectors of 512 bytes whatever the disk's own are. ``oo_req`` counts how often it had no request left.
- netback's counters are those of the interface ``vif<domid>.<devid>``, or of another name in
  ``/sys/bus/xen-backend/devices/vif-<domid>-<devid>/net``: what the host received, the guest sent.
- QEMU's disks have counters only behind QMP, which takes one client at a time: they are left alone here.
- Counters begin at 0 when a device is connected, so they go back when it is taken away and given again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtool.devices.xenbus import DeviceId
from xtool.toolstack import journal
from xtool.toolstack.devices import state_words
from xtool.toolstack.everydayrecords import DiskSample, DomainSample, HostSample, InterfaceSample
from xtool.toolstack.facts import start_times
from xtool.toolstack.live import Live, in_flight
from xtool.toolstack.names import named_domains
from xtool.toolstack.query import domain_info
from xtool.toolstack.wiring import Record, records

if TYPE_CHECKING:
    from xtool.toolstack.host import Host
    from xtool.toolstack.live import Ask

_PAGE = 4096
_SECTOR = 512
ROOT = Path("/")


def take(host: Host, *, root: Path | None = None, ask: Ask | None = None) -> HostSample:
    """Look at everything once. A device that goes meanwhile is left out.

    ``root`` is where ``/sys`` and ``/proc`` are; ``ask`` speaks to our backends (tests give their own).
    """
    root = root or (ROOT if host.real else Path("/nonexistent"))
    found = named_domains(host)
    entries = {entry.uuid: entry for entry in journal.entries()}
    starts = start_times(host, found)
    state = host.hv.host()
    domains = []
    for one, start in zip(found, starts, strict=True):
        info = domain_info(one, frozenset(entries))
        listed = records(host, info.domid, ("vbd", "vif")) if info.domid else []
        devices = [record.device for record in listed]
        live = _Told(host, info.domid, devices, ask)
        states = state_words(host, listed)
        domains.append(
            DomainSample(
                info.domid,
                info.name,
                info.uuid,
                info.type,
                info.state,
                info.managed,
                info.cpu_time,
                info.memory,
                info.maxmem,
                info.vcpus,
                start,
                keeper_lives(entries.get(info.uuid)),
                live.answers,
                tuple(_disk(r, states[r.device], live, root) for r in listed if r.device.kind == "vbd"),
                tuple(_interface(r, states[r.device], live, root) for r in listed if r.device.kind == "vif"),
            )
        )
    return HostSample(
        time.time(),
        time.monotonic(),
        host.hv.versions.xen,
        state.cpus,
        state.total_pages * _PAGE,
        max(0, state.free_pages - state.outstanding_pages) * _PAGE,
        state.scrub_pages * _PAGE,
        tuple(domains),
    )


def interfaces(host: Host, domid: int, root: Path | None = None) -> tuple[InterfaceSample, ...]:
    """The same of one domain's interfaces alone."""
    root = root or Path("/nonexistent")
    listed = records(host, domid, ("vif",))
    live = _Told(host, domid, [record.device for record in listed], None)
    states = state_words(host, listed)
    return tuple(_interface(record, states[record.device], live, root) for record in listed)


def keeper_lives(entry: journal.Entry | None) -> bool | None:
    """Whether the process lives that carries out the domain's actions; None for a domain that has none to
    have: not ours, or not started yet."""
    if entry is None or entry.state != "running":
        return None
    return entry.keeper > 0


class _Told:
    """What the domain's backend process says."""

    def __init__(self, host: Host, domid: int, devices: Iterable[DeviceId], ask: Ask | None) -> None:
        devices = list(devices)
        self._live = Live(host, domid, devices, ask)
        ours = [d for d in devices if d.folder.startswith("xtool-")]
        self.answers: bool | None = None
        if ours and (host.real or ask is not None):
            self.answers = any(self._live.told(device) for device in ours)

    def of(self, device: DeviceId) -> dict[str, Any]:
        return self._live.told(device)

    def problem(self, device: DeviceId, state: str) -> str:
        return self._live.problem(device, state)


def _disk(record: Record, state: str, live: _Told, root: Path) -> DiskSample:
    device, notes = record.device, record.notes
    kind = notes.get("xtool-kind") or notes.get("type", device.folder)
    vdev = notes.get("dev", str(device.devid))
    told = live.of(device)
    if counters := told.get("counters"):
        return DiskSample(
            vdev, device.devid, kind, state, counters["read_bytes"], counters["written_bytes"],
            counters["reads"], counters["writes"], counters["flushes"], counters["discards"],
            counters["errors"] + counters["bad"], None, in_flight(told), _block_stall(told),
        )  # fmt: skip
    if device.folder == "vbd":
        kept = _statistics(root / f"sys/bus/xen-backend/devices/vbd-{device.domid}-{device.devid}")
        if kept:
            return DiskSample(
                vdev, device.devid, kind, state, _times(kept.get("rd_sect"), _SECTOR),
                _times(kept.get("wr_sect"), _SECTOR), kept.get("rd_req"), kept.get("wr_req"),
                kept.get("f_req"), kept.get("ds_req"), None, kept.get("oo_req"),
            )  # fmt: skip
    return DiskSample(vdev, device.devid, kind, state, stalled=live.problem(device, state))


def _interface(record: Record, state: str, live: _Told, root: Path) -> InterfaceSample:
    device, notes = record.device, record.notes
    kind = notes.get("xtool-kind", device.folder)
    name = notes.get("vifname") or f"vif{device.domid}.{device.devid}"
    told = live.of(device)
    if counters := told.get("counters"):
        return InterfaceSample(
            name, device.devid, kind, state, counters["tx_bytes"], counters["rx_bytes"],
            counters["tx_frames"], counters["rx_frames"],
            counters["tx_refused"] + counters["tx_lost"] + counters["rx_dropped"],
            counters["tx_invalid"] + counters["rx_failed"], counters["stalls"], in_flight(told),
            _net_stall(told),
        )  # fmt: skip
    if device.folder == "vif":
        own = _link(root, device, name)
        kept = _statistics(root / "sys/class/net" / own) if own else {}
        if kept and own:
            return InterfaceSample(
                own, device.devid, kind, state, kept.get("rx_bytes"), kept.get("tx_bytes"),
                kept.get("rx_packets"), kept.get("tx_packets"),
                _sum(kept, "rx_dropped", "tx_dropped"), _sum(kept, "rx_errors", "tx_errors"),
            )  # fmt: skip
    return InterfaceSample(name, device.devid, kind, state, stalled=live.problem(device, state))


def _link(root: Path, device: DeviceId, name: str) -> str:
    """The host's end as the kernel calls it; "" if it has none."""
    try:
        [own] = os.listdir(root / f"sys/bus/xen-backend/devices/vif-{device.domid}-{device.devid}/net")
        return own
    except (OSError, ValueError):
        return name if "/" not in name and (root / "sys/class/net" / name).is_dir() else ""


def _statistics(folder: Path) -> dict[str, int]:
    found = {}
    try:
        for name in os.listdir(folder / "statistics"):
            try:
                found[name] = int((folder / "statistics" / name).read_text())
            except (OSError, ValueError):
                continue
    except OSError:
        pass
    return found


def _times(value: int | None, factor: int) -> int | None:
    return None if value is None else value * factor


def _sum(kept: dict[str, int], *names: str) -> int | None:
    return sum(kept[name] for name in names) if all(name in kept for name in names) else None


def _block_stall(told: dict[str, Any]) -> str:
    """Why its rings are not served, or nothing."""
    return next((str(queue["broken"]) for queue in told.get("queues", ()) if queue.get("broken")), "")


def _net_stall(told: dict[str, Any]) -> str:
    stalled = any(queue.get("rx", {}).get("stalled") for queue in told.get("queues", ()))
    return "the guest takes no frames" if stalled else ""
