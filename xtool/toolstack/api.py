"""What the toolstack offers: one interface, and the plain records that cross it (``toolstack/records.py``).

``LocalClient`` (``toolstack/local.py``) carries the verbs out in this process. A client that speaks to a
daemon over a socket implements the same ``Client`` later; the command line knows only this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from xtool.devices.wiringmodel import WiringView
from xtool.progress import SILENT, Progress
from xtool.toolstack.definitions import Definitions, DomainTargets, Readiness
from xtool.toolstack.everyday import Everyday
from xtool.toolstack.records import (
    BlockInfo,
    ConsoleRecord,
    ConsoleTarget,
    CreateOptions,
    CreateResult,
    DeviceResult,
    DomainInfo,
    DryRun,
    HostInfo,
    LayoutRegion,
    LifecycleResult,
    NetworkInfo,
    ServedDisk,
    ServeOptions,
    Span,
    VcpuInfo,
)
from xtool.toolstack.tuningapi import TuningVerbs
from xtool.toolstack.tuningrecords import (
    CoreDump,
    CreditInfo,
    MemoryInfo,
    ParameterChange,
    PoolInfo,
    PoolRequest,
    PoolScheduler,
    RtdsInfo,
    VcpuCount,
)

if TYPE_CHECKING:
    from xtool.config.devices import DiskConfig, VifConfig
    from xtool.config.model import DomainConfig

__all__ = [  # noqa: RUF022 (in blocks)
    "BlockInfo",
    "Client",
    "ConsoleRecord",
    "ConsoleTarget",
    "CreateOptions",
    "CreateResult",
    "DeviceResult",
    "DomainInfo",
    "DomainTargets",
    "DryRun",
    "HostInfo",
    "LayoutRegion",
    "LifecycleResult",
    "NetworkInfo",
    "Readiness",
    "ServeOptions",
    "ServedDisk",
    "Span",
    "VcpuInfo",
    "WiringView",
    # tuning
    "CoreDump",
    "CreditInfo",
    "MemoryInfo",
    "ParameterChange",
    "PoolInfo",
    "PoolRequest",
    "PoolScheduler",
    "RtdsInfo",
    "VcpuCount",
]

# ``Client.list`` hides the builtin within the class.
Vcpus = list[VcpuInfo]
Results = list[LifecycleResult]
Disks = list[BlockInfo]
Networks = list[NetworkInfo]
Wirings = list[WiringView]


class Client(Everyday, Definitions, TuningVerbs, Protocol):
    """The verbs. ``domain`` arguments take a name, a domain id or a uuid as text.

    Raises ``DomainNotFoundError`` for an unknown domain, and any other ``XtoolError``.
    """

    def create(
        self, config: DomainConfig, options: CreateOptions, progress: Progress = SILENT
    ) -> CreateResult: ...

    def dry_run(self, config: DomainConfig) -> DryRun: ...

    def list(self, domain: str | None = None) -> list[DomainInfo]: ...

    def info(self) -> HostInfo: ...

    def dmesg(self, *, clear: bool = False) -> str: ...

    def vcpu_list(self, domain: str | None = None) -> Vcpus: ...

    def console(
        self, domain: str, kind: str | None = None, *, number: int = 0, deadline: float = 10.0
    ) -> ConsoleTarget: ...

    def console_log(self, domain: str, number: int = 0, since: float = 0.0) -> Iterator[ConsoleRecord]:
        """What a console of ours printed since then (seconds since the epoch), oldest first. A uuid finds the
        log of a domain that is gone."""

    def pause(self, domain: str) -> LifecycleResult: ...

    def unpause(self, domain: str) -> LifecycleResult: ...

    def shutdown(
        self, domain: str, *, wait: bool = False, acpi_fallback: bool = False, deadline: float = 600.0
    ) -> LifecycleResult: ...

    def reboot(
        self, domain: str, *, wait: bool = False, acpi_fallback: bool = False, deadline: float = 600.0
    ) -> LifecycleResult: ...

    def destroy(self, domain: str) -> LifecycleResult: ...

    def block_list(self, domain: str) -> Disks: ...

    def block_attach(self, domain: str, disk: DiskConfig, *, deadline: float = 40.0) -> DeviceResult:
        """Give a running domain a disk."""

    def block_detach(
        self, domain: str, disk: str, *, force: bool = False, deadline: float = 10.0
    ) -> DeviceResult:
        """Take a disk (its vdev or number) away. ``force``: also when the guest holds on to it."""

    def block_limit(
        self,
        domain: str,
        disk: str,
        *,
        bytes_per_second: int | None = None,
        ops_per_second: int | None = None,
    ) -> DeviceResult:
        """Limit a disk of our backend's, now and after a restart; None leaves as it is, 0 is no limit."""

    def block_serve(self, options: ServeOptions, ready: Callable[[ServedDisk], None]) -> None:
        """Serve a disk over NBD until an exception ends it (Ctrl-C); ``ready`` is called when it is there."""

    def network_list(self, domain: str) -> Networks: ...

    def network_attach(self, domain: str, vif: VifConfig, *, deadline: float = 40.0) -> DeviceResult: ...

    def network_detach(
        self, domain: str, vif: str, *, force: bool = False, deadline: float = 10.0
    ) -> DeviceResult:
        """Take an interface (its number or MAC address) away."""

    def network_limit(
        self, domain: str, vif: str, *, rate: str | None = None, rate_in: str | None = None
    ) -> DeviceResult:
        """Limit what an interface's guest sends and is sent (``10Mb/s``); None leaves as it is, "" is no
        limit."""

    def cd_insert(self, domain: str, drive: str, target: str) -> DeviceResult: ...

    def cd_eject(self, domain: str, drive: str) -> DeviceResult: ...

    def wiring(self, domain: str | None = None) -> Wirings:
        """The split drivers of one domain, or of all but domain 0."""

    def settle(self, domid: int, uuid: str, progress: Progress = SILENT) -> LifecycleResult | None:
        """If this domain has shut down, carry out its on_poweroff/on_reboot/on_crash action now."""

    def gc(self) -> Results:
        """Roll back what creations left behind that were killed; one result for each."""

    def close(self) -> None: ...
