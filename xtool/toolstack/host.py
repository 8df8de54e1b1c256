"""The host the verbs work on: its ports, bundled, and what is worth knowing about it before planning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xtool.abi import sysctl as s
from xtool.devices.backendkinds import TargetFacts
from xtool.devices.hotplug.linux import LinuxHotplug
from xtool.devices.hotplug.port import Hotplug
from xtool.errors import UsageError
from xtool.hypercall.port import Hypervisor
from xtool.paths import firmware_dir
from xtool.toolstack.scheduleplan import PoolFacts, ScheduleFacts, wants_facts
from xtool.xenstore.port import Store

if TYPE_CHECKING:
    from xtool.config import DomainConfig
    from xtool.toolstack.tracing import Tracer

#: Where distributions put what an HVM guest is started with, best first.
_HVMLOADER = (
    "/usr/lib/xen-{version}/boot/hvmloader",
    "/usr/lib/xen/boot/hvmloader",
    "/usr/libexec/xen/boot/hvmloader",
    "/usr/local/lib/xen/boot/hvmloader",
)
_FIRMWARE = {
    "seabios": (
        "/usr/share/seabios/bios-256k.bin",
        "/usr/lib/xen/boot/seabios.bin",
        "/usr/share/qemu/bios-256k.bin",
    ),
    "ovmf": ("/usr/share/ovmf/OVMF.fd", "/usr/lib/xen/boot/ovmf.bin", "/usr/share/OVMF/OVMF.fd"),
}


@dataclass(frozen=True)
class HostFacts:
    """What ``plan`` needs to know. ``firmware`` maps seabios/ovmf to a file, or to None if there is none;
    ``targets`` says what the disks' targets are."""

    xen_version: str
    pv: bool
    hvm: bool
    hap: bool
    grant_v2: bool
    cpus: int
    hvmloader: str | None
    firmware: Mapping[str, str | None]
    targets: Mapping[str, TargetFacts] = field(default_factory=dict)
    #: None where the domain does not want to know.
    schedule: ScheduleFacts | None = None


@dataclass
class Host:
    """Everything a verb may touch. ``real`` is false for the in-memory fake."""

    hv: Hypervisor
    store: Store
    real: bool = True
    hotplug: Hotplug = field(default_factory=LinuxHotplug)
    #: Set while a create is traced (``toolstack.tracing``).
    tracer: Tracer | None = None

    def span(self, name: str, category: str) -> AbstractContextManager[object]:
        """Around what is no call of a port's, for a trace if there is one."""
        return self.tracer.span(name, category) if self.tracer else nullcontext()

    def facts(self, config: DomainConfig | None = None) -> HostFacts:
        """About the host, and about the files that ``config`` names as disks."""
        state = self.hv.host()
        version = self.hv.versions.xen
        short = ".".join(version.split(".")[:2])
        loaders = [path.format(version=short) for path in _HVMLOADER]
        firmware = {name: list(places) for name, places in _FIRMWARE.items()}
        if not self.real:
            loaders.append(str(firmware_dir() / "hvmloader"))
            firmware["seabios"].append(str(firmware_dir() / "bios-256k.bin"))
        return HostFacts(
            xen_version=version,
            pv="xen-3.0-x86_64" in self.hv.capabilities(),
            hvm=bool(state.capabilities & s.XEN_SYSCTL_PHYSCAP_hvm),
            hap=bool(state.capabilities & s.XEN_SYSCTL_PHYSCAP_hap),
            grant_v2=bool(state.capabilities & s.XEN_SYSCTL_PHYSCAP_gnttab_v2),
            cpus=state.cpus,
            hvmloader=_first_file(loaders),
            firmware={name: _first_file(places) for name, places in firmware.items()},
            targets=self.targets(disk.target for disk in config.disks) if config else {},
            schedule=self.schedule() if config and wants_facts(config) else None,
        )

    def schedule(self) -> ScheduleFacts:
        from xtool.toolstack.pools import host_cpus, host_nodes, pool_names, scheduler_name

        pools = self.hv.pools()
        names = pool_names(self, pools)
        return ScheduleFacts(
            tuple(
                PoolFacts(p.id, names[p.id], scheduler_name(p.scheduler), p.scheduler, p.cpus) for p in pools
            ),
            {node: tuple(cpus) for node, cpus in host_nodes(host_cpus(self)).items()},
        )

    def targets(self, paths: Iterable[str | None]) -> dict[str, TargetFacts]:
        return {path: self.hotplug.look_at(path) for path in paths if path is not None}

    def close(self) -> None:
        self.store.close()
        self.hv.close()


def _first_file(candidates: list[str]) -> str | None:
    return next((path for path in candidates if os.path.isfile(path)), None)


def open_host(uri: str = "xen:") -> Host:
    """``xen:`` is this machine's hypervisor, ``fake:`` one in memory.

    Raises ``NoXenError``, ``PrivilegeError``, ``UnknownInterfaceError``, ``StoreGoneError``.
    """
    if uri == "fake:":
        from xtool.devices.hotplug.fake import FakeKernel
        from xtool.fake.hypervisor import FakeHypervisor
        from xtool.fake.store import FakeStoreDaemon
        from xtool.xenstore.client import StoreClient

        daemon = FakeStoreDaemon()
        fake = FakeHypervisor()
        fake.gone = daemon.domain_gone
        return Host(fake, StoreClient(daemon.connect), real=False, hotplug=FakeKernel(daemon))
    if uri != "xen:":
        raise UsageError(f"unknown host {uri!r}", hint="xen: or fake:")
    from xtool.hypercall.xen import XenHypervisor
    from xtool.xenstore.client import open_store

    hv = XenHypervisor()
    try:
        return Host(hv, open_store())
    except BaseException:
        hv.close()
        raise
