"""What the hypervisor in memory knows of one domain."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from xtool.errors import HostMemoryError, HypercallError
from xtool.hypercall.port import CreateSpec, E820Entry
from xtool.hypercall.tuningport import CreditParams, RtdsParams


def refuse(operation: str, number: int) -> HypercallError:
    kind = HostMemoryError if number == errno.ENOMEM else HypercallError
    return kind(operation, number)


@dataclass
class FakeDomain:
    domid: int
    spec: CreateSpec
    flags: int
    max_pages: int = 0
    pause_count: int = 1
    p2m: dict[int, int] = field(default_factory=dict)  # gfn (or pfn) -> mfn
    owned: set[int] = field(default_factory=set)
    promised: list[range] = field(default_factory=list)  # populated on demand, out of ``cache``
    cache: list[int] = field(default_factory=list)
    claimed: int = 0
    vcpus: int = 0
    online: set[int] = field(default_factory=set)  # vCPUs that have a state to run from
    contexts: dict[int, bytes] = field(default_factory=dict)
    hvm_records: list[bytes] = field(default_factory=list)
    params: dict[int, int] = field(default_factory=dict)
    memory_map: tuple[E820Entry, ...] = ()
    policy: bytes = b""
    pinned: list[int] = field(default_factory=list)
    hypercall_page: int | None = None
    paging_pool: int = 0
    #: Hard and soft, by vCPU.
    affinities: dict[int, tuple[frozenset[int], frozenset[int]]] = field(default_factory=dict)
    pool: int = 0
    credit: CreditParams = field(default_factory=lambda: CreditParams(256, 0))
    rtds: dict[int, RtdsParams] = field(default_factory=dict)
    shared_info: int = 0
    grant_table: int = 0
