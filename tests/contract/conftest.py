"""A hypervisor, ours in memory and the real one: each test that asks for ``hv`` runs on both."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from xtool.hypercall.port import Hypervisor

HAVE_XEN = os.path.exists("/dev/xen/privcmd")


@pytest.fixture(
    params=[
        "fake",
        pytest.param(
            "xen", marks=[pytest.mark.xen, pytest.mark.skipif(not HAVE_XEN, reason="no Xen on this machine")]
        ),
    ]
)
def hv(request: pytest.FixtureRequest) -> Iterator[Hypervisor]:
    if request.param == "fake":
        from xtool.fake.hypervisor import FakeHypervisor

        yield FakeHypervisor()
        return
    from xtool.hypercall.xen import XenHypervisor

    real = XenHypervisor()
    before = {state.domid for state in real.domains()}
    pools = {pool.id for pool in real.pools()}
    yield real
    for state in real.domains():
        if state.domid not in before and not state.dying:
            real.destroy_domain(state.domid)
    for pool in real.pools():
        if pool.id not in pools:
            for cpu in pool.cpus:
                real.remove_pool_cpu(pool.id, cpu)
            real.destroy_pool(pool.id)
    for cpu in real.free_cpus():
        real.add_pool_cpu(0, cpu)
    real.close()
