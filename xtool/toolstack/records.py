"""The plain records that cross the client interface (``toolstack/api.py``, which hands all of them on).

Every record is made of plain values, so ``dataclasses.asdict`` gives what ``-o json`` prints.
Sizes are bytes, times are seconds unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xtool.toolstack.everydayrecords import TraceSpan

if TYPE_CHECKING:
    from xtool.config.devices import DiskConfig


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
    #: Note every hypercall, xenstore request and the like (``CreateResult.trace``), and wait so many seconds
    #: for the guest's first byte and packet; None: no trace.
    trace: float | None = None
    #: Where it is described (``machine:path``), of a domain that ``xtool apply`` makes.
    source: str = ""


@dataclass(frozen=True)
class CreateResult:
    name: str
    domid: int
    uuid: str
    type: str
    build_time: float
    timings: tuple[Span, ...] = ()
    trace: tuple[TraceSpan, ...] = ()


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
    #: What is there in Xen's place: hypervisor and libvirt's version and URI. Empty on Xen's own driver.
    driver: str = ""


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
