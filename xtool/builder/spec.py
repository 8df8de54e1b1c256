"""What the builder is told, and what it hands back. Sizes are bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from xtool.hypercall.port import Hypervisor

Kind = Literal["pv", "pvh", "hvm"]

#: The stages of every build, in order; ``--timings`` prints them.
STAGES = ("load_image", "create", "memory", "image", "boot_info", "tables", "vcpus", "seal")


@dataclass(frozen=True)
class RtdsSpec:
    """Microseconds; the same for every vCPU."""

    period: int
    budget: int
    extratime: bool = False


@dataclass(frozen=True)
class ScheduleSpec:
    """Where vCPUs run, in which CPU pool, and what its scheduler (None: the host's) is told.

    ``hard`` and ``soft`` are the affinity of each vCPU from 0 on; those beyond the end take the last one.
    Empty: anywhere.
    """

    pool: int = 0
    scheduler: int | None = None
    hard: tuple[frozenset[int], ...] = ()
    soft: tuple[frozenset[int], ...] = ()
    weight: int | None = None
    cap: int | None = None
    rtds: RtdsSpec | None = None


@dataclass(frozen=True)
class BuildSpec:
    """One domain, as the hypervisor will know it. Everything is decided; the builder only carries out."""

    kind: Kind
    #: The domain's uuid; it is also how a half-built domain is found again.
    handle: bytes
    #: What the guest gets at start, and the most it may ever have.
    memory: int
    max_memory: int
    max_vcpus: int = 1
    vcpus: int = 1
    #: The guest kernel; for HVM, hvmloader.
    kernel: str = ""
    ramdisk: str | None = None
    cmdline: str = ""
    #: HVM: the BIOS or UEFI image that hvmloader starts.
    firmware: str | None = None
    #: HVM: a kernel to boot directly, with ``ramdisk`` and ``cmdline``, after the firmware has run.
    direct_kernel: str | None = None
    firmware_is_bios: bool = True
    #: HVM: memory that the device model takes for the display out of ``memory``.
    video_memory: int = 0
    hap: bool = True
    nested: bool = False
    acpi: bool = True
    apic: bool = True
    pae: bool = True
    hpet: bool = True
    paging_pool: int | None = None
    max_event_channels: int = 1023
    max_grant_frames: int = -1
    max_maptrack_frames: int = -1
    grant_version: int = 2
    schedule: ScheduleSpec = ScheduleSpec()
    time_offset: int = 0
    tsc_mode: int = 0
    #: HVM_PARAM_TIMER_MODE and, for HVM, HVM_PARAM_VIRIDIAN.
    timer_mode: int = 1
    viridian: int = 0
    #: HVM: size of the hole below 4 GiB, None for the usual one.
    mmio_hole: int | None = None
    store_domid: int = 0
    console_domid: int = 0


@dataclass(frozen=True)
class Region:
    """A piece of the memory image: guest-physical address and size, where the guest first sees it."""

    name: str
    start: int
    size: int
    virtual: int | None = None
    note: str = ""


@dataclass(frozen=True)
class BuiltDomain:
    """A domain that exists, paused. Frames are machine frames for PV, guest frames otherwise."""

    domid: int
    store_gfn: int
    store_port: int
    console_gfn: int
    console_port: int
    entry: int
    regions: tuple[Region, ...]
    memory_map: tuple[tuple[int, int, int], ...]
    page_table_pages: int = 0


@dataclass
class StageTime:
    name: str
    start: float
    duration: float = 0.0
    hypercalls: int = 0


@dataclass
class Timeline:
    """When each stage began and how long it took, in seconds since the timeline was made."""

    hypervisor: Hypervisor
    origin: float = field(default_factory=monotonic)
    stages: list[StageTime] = field(default_factory=list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        began, count = monotonic(), self.hypervisor.count
        stage = StageTime(name, began - self.origin)
        self.stages.append(stage)
        try:
            yield
        finally:
            stage.duration = monotonic() - began
            stage.hypercalls = self.hypervisor.count - count
