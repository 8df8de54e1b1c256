"""Domains for the contract tests, as bare as Xen allows."""

from __future__ import annotations

from uuid import uuid4

from xtool.hypercall.port import CreateSpec, Hypervisor

MIB = 1 << 20


def spec(hvm: bool = False, vcpus: int = 2) -> CreateSpec:
    return CreateSpec(
        handle=uuid4().bytes,
        hvm=hvm,
        hap=hvm,
        max_vcpus=vcpus,
        grant_version=2,
        emulation_flags=1 if hvm else 0,
    )


def make(hv: Hypervisor, hvm: bool = False, memory: int = 8 * MIB) -> int:
    domid = hv.create_domain(spec(hvm))
    hv.set_max_vcpus(domid, 2)
    hv.set_max_memory(domid, memory)
    if hvm:
        hv.set_paging_pool(domid, 4 * MIB)
    return domid
