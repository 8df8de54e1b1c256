"""Records of the verbs that tune a running domain or the host; ``toolstack/api.py`` hands them on. As there:
sizes are bytes, times seconds unless a name says otherwise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VcpuCount:
    """``wanted`` vCPUs of at most ``most``; ``online`` is what the guest has done about it so far."""

    domid: int
    name: str
    online: int
    wanted: int
    most: int


@dataclass(frozen=True)
class MemoryInfo:
    """``target`` is what the guest is asked to have, ``current`` what it has, ``maximum`` the most it may be
    asked for, ``limit`` the most Xen lets it have now."""

    domid: int
    name: str
    target: int
    current: int
    maximum: int
    limit: int


@dataclass(frozen=True)
class CreditInfo:
    """Under credit and credit2. ``cap`` is per cent of one CPU, 0 is none."""

    domid: int
    name: str
    pool: str
    weight: int
    cap: int


@dataclass(frozen=True)
class RtdsInfo:
    """One vCPU under rtds: ``budget`` microseconds in each ``period``."""

    domid: int
    name: str
    pool: str
    vcpu: int
    period: int
    budget: int
    extratime: bool


@dataclass(frozen=True)
class PoolScheduler:
    """What a pool's scheduler goes by. The two of credit alone are None elsewhere; rtds has none at all."""

    pool: str
    scheduler: str
    ratelimit_us: int | None = None
    tslice_ms: int | None = None
    migration_delay_us: int | None = None


@dataclass(frozen=True)
class PoolInfo:
    id: int
    name: str
    scheduler: str
    cpus: tuple[int, ...]
    domains: int


@dataclass(frozen=True)
class PoolRequest:
    """A pool to make. ``cpus`` and ``nodes`` are lists as ``vcpu-pin`` takes them; with neither, it gets one
    free CPU. No ``scheduler`` means the host's."""

    name: str
    scheduler: str = ""
    cpus: str = ""
    nodes: str = ""


@dataclass(frozen=True)
class ParameterChange:
    """A run-time parameter of Xen, as text."""

    name: str
    before: str
    value: str


@dataclass(frozen=True)
class CoreDump:
    """A core file. ``action`` is what became of the domain: ``running``, ``crashed``, ``reset`` (destroyed
    and started again) or ``unchanged``. ``missing`` pages went away while a live domain was dumped."""

    domid: int
    name: str
    path: str
    size: int
    pages: int
    vcpus: int
    missing: int = 0
    action: str = "unchanged"
