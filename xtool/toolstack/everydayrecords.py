"""Records of the everyday verbs: plain values, as those in ``api``. Sizes are bytes, times seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TraceSpan:
    """Something a create did: ``category`` is ``stage``, ``hypercall``, ``xenstore``, ``hotplug``,
    ``qemu`` or ``guest``; ``start`` in seconds since the create began. ``detail`` are plain values."""

    name: str
    category: str
    start: float
    duration: float
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UptimeInfo:
    """``uptime`` is None for a domain whose maker did not note when it was started."""

    domid: int
    name: str
    start_time: float | None
    uptime: float | None


@dataclass(frozen=True)
class DomainConfigInfo:
    """What a domain was created with and what was changed since, as its file's keys. ``config`` is None for a
    domain xtool did not create. ``hidden``: keys whose values are secrets and were taken out. ``waiting``:
    keys whose value counts at its next start. ``source``: where an ``xtool apply`` that made it found it
    described (``machine:path``)."""

    domid: int
    name: str
    uuid: str
    config: dict[str, Any] | None
    hidden: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class SettingChange:
    """One key that was changed. ``when`` is ``now``, or ``next start``: kept until the domain is started
    again; ``why`` says why not now."""

    key: str
    before: Any
    after: Any
    when: str
    why: str = ""


@dataclass(frozen=True)
class SettingResult:
    domid: int
    name: str
    changes: tuple[SettingChange, ...]


@dataclass(frozen=True)
class ChannelInfo:
    """A console for programs. ``path`` is where the host's end is: a socket, or a pty."""

    domid: int
    devid: int
    name: str
    connection: str
    backend: str
    backend_domid: int
    state: str
    path: str


@dataclass(frozen=True)
class DisplayInfo:
    """Where a domain's VNC display is. ``password`` is empty unless it was asked for and is known;
    ``protected``: the display has one."""

    domid: int
    name: str
    host: str
    port: int
    protected: bool
    password: str = ""


@dataclass(frozen=True)
class PciInfo:
    """A PCI device of a domain. ``vdevfn`` is where the guest sees it, empty where nobody said."""

    domid: int
    address: str
    vdevfn: str
    state: str
    description: str


@dataclass(frozen=True)
class AssignablePciInfo:
    """A PCI device that pciback holds. ``assigned``: the domain that has it, None if it is free."""

    address: str
    vendor: str
    device: str
    device_class: str
    iommu_group: str
    original_driver: str
    assigned: int | None


@dataclass(frozen=True)
class DiskSample:
    """Counters since the disk was connected; None where its backend keeps none. ``out_of_requests``: how
    often blkback had none left. ``waiting``: requests on the ring that are not answered; ``stalled``: why
    the ring is not served, or empty."""

    vdev: str
    devid: int
    backend: str
    state: str
    read_bytes: int | None = None
    written_bytes: int | None = None
    reads: int | None = None
    writes: int | None = None
    flushes: int | None = None
    discards: int | None = None
    errors: int | None = None
    out_of_requests: int | None = None
    waiting: int | None = None
    stalled: str = ""


@dataclass(frozen=True)
class InterfaceSample:
    """The same for an interface, as its guest sees it: ``sent`` is what the guest sent. ``stalls``: how
    often it took no frames."""

    interface: str
    devid: int
    backend: str
    state: str
    sent_bytes: int | None = None
    received_bytes: int | None = None
    sent_packets: int | None = None
    received_packets: int | None = None
    dropped: int | None = None
    errors: int | None = None
    stalls: int | None = None
    waiting: int | None = None
    stalled: str = ""


@dataclass(frozen=True)
class DomainSample:
    """``keeper``: whether the process that carries out its on_... actions lives; None where there is none to
    be. ``backend_answers``: the same of our backend process."""

    domid: int
    name: str
    uuid: str
    type: str
    state: str
    managed: bool
    cpu_time: float
    memory: int
    maxmem: int
    vcpus: int
    start_time: float | None
    keeper: bool | None
    backend_answers: bool | None
    disks: Sequence[DiskSample] = ()
    interfaces: Sequence[InterfaceSample] = ()


@dataclass(frozen=True)
class HostSample:
    """Everything ``top`` and ``metrics`` show, taken at one moment (``time``, seconds since the epoch;
    ``clock``, of a clock that never jumps)."""

    time: float
    clock: float
    xen_version: str
    cpus: int
    total_memory: int
    free_memory: int
    scrub_memory: int
    domains: Sequence[DomainSample]


@dataclass(frozen=True)
class CheckResult:
    """One thing ``doctor`` looked at. ``status`` is ``ok``, ``warn``, ``fail`` or ``skip`` (it could not be
    looked at); ``why`` it matters and what to ``do`` are empty where all is well."""

    name: str
    status: str
    found: str
    why: str = ""
    do: str = ""


@dataclass(frozen=True)
class Leftover:
    """Something that belongs to no domain any more. ``kind`` is ``domain``, ``device``, ``xenstore``,
    ``loop``, ``interface``, ``file`` or ``process``; ``certain``: it is dead, and ``gc --yes`` removes it.
    ``removed`` is set by who removed it, ``problem`` by who could not. ``key`` names it for removal."""

    kind: str
    what: str
    why: str
    certain: bool
    key: str
    domid: int | None = None
    removed: bool = False
    problem: str = ""
