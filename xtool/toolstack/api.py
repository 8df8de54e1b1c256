"""What the toolstack offers: one interface, and the plain records that cross it.

``LocalClient`` (``toolstack/local.py``) carries the verbs out in this process. A client that speaks to a
daemon over a socket implements the same ``Client`` later; the command line knows only this module.
Every record is made of plain values, so ``dataclasses.asdict`` gives what ``-o json`` prints.
Sizes are bytes, times are seconds unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from xtool.devices.wiringmodel import WiringView
from xtool.progress import SILENT, Progress

if TYPE_CHECKING:
    from xtool.config.devices import DiskConfig, VifConfig
    from xtool.config.model import DomainConfig


@dataclass(frozen=True)
class Span:
    """One stage of a create: when it began (s since the create began), how long it took, what it cost."""

    name: str
    start: float
    duration: float
    hypercalls: int = 0


@dataclass(frozen=True)
class CreateOptions:
    paused: bool = False
    #: How long a device model may take to come up.
    deadline: float = 120.0
    #: How long its backends may take, all together.
    devices: float = 40.0


@dataclass(frozen=True)
class CreateResult:
    name: str
    domid: int
    uuid: str
    type: str
    build_time: float
    timings: tuple[Span, ...] = ()


@dataclass(frozen=True)
class DomainInfo:
    """One running domain. ``state`` is ``running``, ``blocked``, ``paused``, ``shutdown``, ``crashed`` or
    ``dying``; ``reason`` is why it shut down (``poweroff``, ``reboot``, ``suspend``, ``crash``,
    ``watchdog``, ``soft-reset``) or empty. ``managed`` is false for domains xtool did not create."""

    domid: int
    name: str
    uuid: str
    type: str
    state: str
    reason: str
    memory: int
    maxmem: int
    vcpus: int
    cpu_time: float
    managed: bool


@dataclass(frozen=True)
class VcpuInfo:
    domain: str
    domid: int
    vcpu: int
    cpu: int | None
    state: str
    cpu_time: float
    hard_affinity: str
    soft_affinity: str


@dataclass(frozen=True)
class HostInfo:
    """``vendor`` is ``AMD``, ``Intel`` or the CPUID string; ``hvm`` is ``SVM``, ``VT-x`` or empty."""

    xen_version: str
    xen_caps: tuple[str, ...]
    xen_commandline: str
    domctl_interface: int
    sysctl_interface: int
    vendor: str
    cpu_model: str
    hvm: str
    nested_paging: bool
    #: None where Xen's boot log, the only place that says, is gone.
    asid: bool | None
    iommu: bool
    virt_caps: tuple[str, ...]
    cpus: int
    threads_per_core: int
    cores_per_socket: int
    nodes: int
    cpu_khz: int
    total_memory: int
    free_memory: int
    scrub_memory: int
    scheduler: str
    domains: int


@dataclass(frozen=True)
class ConsoleTarget:
    """A console to attach to: a tty on this host, or a socket, which takes several viewers. ``kind`` is
    ``pv`` or ``serial``; ``number`` is 0 but for channels. ``feed``: the socket for viewers that come back
    (``backends.consolefeed``)."""

    domid: int
    name: str
    kind: str
    tty: str
    socket: str = ""
    number: int = 0
    feed: str = ""
    #: The socket of the daemon it is reached through, where those paths are another host's.
    via: str = ""


@dataclass(frozen=True)
class ConsoleRecord:
    """Something a console printed: seconds since the epoch, and the bytes as text, where those that are not
    UTF-8 show as backslash escapes. ``boot``: the console was connected; ``skipped`` bytes are missing."""

    time: float
    text: str
    boot: bool = False
    skipped: int = 0


@dataclass(frozen=True)
class LayoutRegion:
    """A piece of a guest's memory image: guest-physical range, and what lies there."""

    name: str
    start: int
    size: int
    virtual: int | None = None
    note: str = ""


@dataclass(frozen=True)
class DryRun:
    """What ``create --dry-run`` built against the in-memory fake."""

    name: str
    type: str
    memory: int
    entry: int
    regions: tuple[LayoutRegion, ...]
    e820: tuple[tuple[int, int, str], ...]
    page_table_pages: int
    pages_populated: int
    timings: tuple[Span, ...] = ()
    devicemodel_argv: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LifecycleResult:
    """What became of a domain. ``action`` is what was carried out: ``destroyed``, ``restarted``,
    ``preserved``, ``requested`` (asked, not waited for) ... ; ``new_domid`` after a restart."""

    domid: int
    name: str
    action: str
    new_domid: int | None = None


@dataclass(frozen=True)
class BlockInfo:
    """A disk of a running domain. ``backend`` is the kind that serves it (``emulated``: QEMU alone),
    ``reason`` why that one; ``state`` is the backend's (``init-wait``, ``connected``, ...), empty where there
    is none. ``target`` is empty for a drive without a medium. ``problem`` says why it is not served.

    ``live`` is what our own backend says of it: queues, what is in flight, counters (bytes, requests)."""

    domid: int
    devid: int
    vdev: str
    backend: str
    backend_domid: int
    state: str
    target: str
    format: str
    readonly: bool
    cdrom: bool
    reason: str
    bytes_per_second: int | None = None
    ops_per_second: int | None = None
    problem: str = ""
    live: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NetworkInfo:
    """An interface of a running domain; ``interface`` is the host's end; the rest as for ``BlockInfo``."""

    domid: int
    devid: int
    mac: str
    backend: str
    backend_domid: int
    state: str
    bridge: str
    interface: str
    type: str
    reason: str
    rate: str = ""
    rate_in: str = ""
    problem: str = ""
    live: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceResult:
    """What became of a device: ``attached``, ``detached``, ``inserted``, ``ejected``, ``limited``."""

    domid: int
    kind: str
    devid: int
    name: str
    action: str


@dataclass(frozen=True)
class ServeOptions:
    """Which disk is to be served: ``disk``, or ``vdev`` of a running domain. ``socket`` empty: a place of our
    own. ``force_share``: read-only, although somebody else may write to the image."""

    disk: DiskConfig | None = None
    domain: str = ""
    vdev: str = ""
    socket: str = ""
    readonly: bool = False
    force_share: bool = False


@dataclass(frozen=True)
class ServedDisk:
    """A disk that is served over NBD. ``size`` in bytes."""

    url: str
    socket: str
    target: str
    size: int
    readonly: bool


# ``Client.list`` hides the builtin within the class.
Vcpus = list[VcpuInfo]
Results = list[LifecycleResult]
Disks = list[BlockInfo]
Networks = list[NetworkInfo]
Wirings = list[WiringView]


class Client(Protocol):
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
