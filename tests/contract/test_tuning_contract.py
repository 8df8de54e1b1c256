"""Schedulers, pools, affinity and what core dumps are made of: the same on the fake and on Xen.

Nothing here needs more than two CPUs. A scheduler that a Xen does not have is skipped.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from domains import MIB, make

from xtool.abi import domctl as d
from xtool.abi import hypfs as f
from xtool.abi.base import PAGE_SIZE
from xtool.abi.pv import VcpuGuestContext
from xtool.errors import HypercallError
from xtool.hypercall.port import Hypervisor
from xtool.hypercall.tuningport import PoolParams, RtdsParams

CREDITS = (d.XEN_SCHEDULER_CREDIT, d.XEN_SCHEDULER_CREDIT2)


class Refused:
    """``with Refused(errno.EINVAL): ...``"""

    def __init__(self, number: int) -> None:
        self.number = number
        self._raises = pytest.raises(HypercallError)

    def __enter__(self) -> None:
        self._caught = self._raises.__enter__()

    def __exit__(self, *error: object) -> bool:
        done = bool(self._raises.__exit__(*error))  # type: ignore[arg-type]
        assert self._caught.value.errno == self.number
        return done


@pytest.fixture
def spare(hv: Hypervisor, request: pytest.FixtureRequest) -> Iterator[int]:
    """A CPU that is in no pool. On Xen on request: in the emulated lab, the machine stood still twice after
    two dozen moves of a CPU in a row, for a reason that was not found."""
    if "xen" in request.node.name and not os.environ.get("XTOOL_LONG"):
        pytest.skip("XTOOL_LONG=1 moves CPUs between pools on Xen")
    cpu = max(hv.pools()[0].cpus)
    if cpu == 0:
        pytest.skip("one CPU alone cannot be moved")
    hv.remove_pool_cpu(0, cpu)
    yield cpu
    for pool in hv.pools():
        if pool.id and cpu in pool.cpus:
            for state in hv.domains():
                if state.cpupool == pool.id:
                    hv.move_to_pool(state.domid, 0)
            hv.remove_pool_cpu(pool.id, cpu)
    hv.add_pool_cpu(0, cpu)


def pool_with(hv: Hypervisor, scheduler: int, cpu: int) -> int:
    try:
        pool = hv.create_pool(scheduler)
    except HypercallError as error:
        if error.errno == errno.ENOENT:
            pytest.skip(f"this Xen has no scheduler {scheduler}")
        raise
    hv.add_pool_cpu(pool, cpu)
    return pool


# --- affinity ---------------------------------------------------------------------------------------
def test_hard_and_soft_affinity_are_set_apart(hv: Hypervisor) -> None:
    domid = make(hv)
    hv.set_affinity(domid, 0, [0])
    assert hv.affinity(domid, 0)[0] == {0}
    hv.set_affinity(domid, 0, soft=[1])
    assert hv.affinity(domid, 0)[0] == {0}
    assert hv.affinity(domid, 0)[1] == {1}
    hv.set_affinity(domid, 1, [0, 1], [0])
    assert hv.affinity(domid, 1) == ({0, 1}, {0})
    hv.set_affinity(domid, 0, [0], force=True)
    assert hv.affinity(domid, 0) == ({0}, {1})


def test_a_vcpu_is_online_when_it_has_something_to_run(hv: Hypervisor) -> None:
    domid = make(hv)
    state, vcpu = hv.domain(domid), hv.vcpu(domid, 0)
    assert state is not None and (state.online_vcpus, state.max_vcpu_id) == (0, 1)
    assert vcpu is not None and not vcpu.online


def test_affinities_xen_refuses(hv: Hypervisor) -> None:
    domid = make(hv)
    beyond = hv.host().max_cpu_id + 1
    for cpus in ([], [beyond]):
        with Refused(errno.EINVAL):
            hv.set_affinity(domid, 0, cpus)
    with Refused(errno.EINVAL):
        hv.set_affinity(domid, 2, [0])
    with Refused(errno.EINVAL):
        hv.affinity(domid, 2)
    with Refused(errno.EINVAL):
        hv.set_affinity(domid, 0)


# --- schedulers -------------------------------------------------------------------------------------
def test_credit_parameters(hv: Hypervisor) -> None:
    scheduler = hv.scheduler()
    if scheduler not in CREDITS:
        pytest.skip("the host's scheduler has no weights")
    domid = make(hv)
    assert hv.credit(domid, scheduler) == (256, 0)
    hv.set_credit(domid, weight=512)
    hv.set_credit(domid, cap=150, scheduler=scheduler)
    assert hv.credit(domid, scheduler) == (512, 150)
    hv.set_credit(domid, weight=0, cap=0)  # a weight of 0 changes nothing
    assert hv.credit(domid, scheduler) == (512, 0)


def test_another_scheduler_s_parameters_are_refused(hv: Hypervisor) -> None:
    domid = make(hv)
    other = next(s for s in CREDITS if s != hv.scheduler())
    with Refused(errno.EINVAL):
        hv.credit(domid, other)
    with Refused(errno.EINVAL):
        hv.rtds(domid, [0])
    with Refused(errno.EINVAL):
        hv.pool_params(0, other)
    with Refused(errno.ESRCH):
        hv.pool_params(77, other)


def test_caps(hv: Hypervisor, spare: int) -> None:
    """credit2 knows how many vCPUs a cap is for, credit does not look."""
    for scheduler in CREDITS:
        pool = pool_with(hv, scheduler, spare)
        domid = make(hv)
        hv.move_to_pool(domid, pool)
        hv.set_credit(domid, cap=200, scheduler=scheduler)
        if scheduler == d.XEN_SCHEDULER_CREDIT2:
            with Refused(errno.EINVAL):
                hv.set_credit(domid, cap=201, scheduler=scheduler)
        else:
            hv.set_credit(domid, cap=201, scheduler=scheduler)
        hv.destroy_domain(domid)
        if (left := hv.domain(domid)) is not None and left.dying:
            hv.move_to_pool(domid, 0)
        hv.remove_pool_cpu(pool, spare)
        hv.destroy_pool(pool)


def test_a_pool_s_parameters(hv: Hypervisor, spare: int) -> None:
    pool = pool_with(hv, d.XEN_SCHEDULER_CREDIT, spare)
    before = hv.pool_params(pool, d.XEN_SCHEDULER_CREDIT)
    assert before.tslice_ms == 30 and before.ratelimit_us == 1000
    hv.set_pool_params(pool, d.XEN_SCHEDULER_CREDIT, PoolParams(2000, 10, 50))
    assert hv.pool_params(pool, d.XEN_SCHEDULER_CREDIT) == (2000, 10, 50)
    for bad in (PoolParams(99, 30), PoolParams(500001, 1000), PoolParams(0, 0), PoolParams(0, 1001)):
        with Refused(errno.EINVAL):
            hv.set_pool_params(pool, d.XEN_SCHEDULER_CREDIT, bad)
    for bad in (PoolParams(2000, 1), PoolParams(0, 30, 100001)):
        with Refused(errno.EINVAL):
            hv.set_pool_params(pool, d.XEN_SCHEDULER_CREDIT, bad)
    hv.set_pool_params(pool, d.XEN_SCHEDULER_CREDIT, PoolParams(0, 30))
    assert hv.pool_params(pool, d.XEN_SCHEDULER_CREDIT).ratelimit_us == 0


def test_credit2_s_rate_limit(hv: Hypervisor, spare: int) -> None:
    two = d.XEN_SCHEDULER_CREDIT2
    pool = pool_with(hv, two, spare)
    hv.set_pool_params(pool, two, PoolParams(5000))
    assert hv.pool_params(pool, two).ratelimit_us == 5000
    with Refused(errno.EINVAL):
        hv.set_pool_params(pool, two, PoolParams(50))


def test_rtds(hv: Hypervisor, spare: int) -> None:
    pool = pool_with(hv, d.XEN_SCHEDULER_RTDS, spare)
    domid = make(hv)
    hv.move_to_pool(domid, pool)
    assert [(p.period, p.budget) for p in hv.rtds(domid, [0, 1])] == [(10000, 4000)] * 2
    hv.set_rtds(domid, [RtdsParams(1, 20000, 10000, True)])
    assert hv.rtds(domid, [1, 0])[0] == (1, 20000, 10000, True)
    for bad in (RtdsParams(0, 100, 101, False), RtdsParams(0, 100, 9, False), RtdsParams(2, 100, 50, False)):
        with Refused(errno.EINVAL):
            hv.set_rtds(domid, [bad])
    with Refused(errno.EINVAL):
        hv.credit(domid, d.XEN_SCHEDULER_CREDIT2)


def test_null_takes_no_parameters_and_says_nothing(hv: Hypervisor, spare: int) -> None:
    pool = pool_with(hv, d.XEN_SCHEDULER_NULL, spare)
    domid = make(hv)
    hv.move_to_pool(domid, pool)
    assert hv.credit(domid, d.XEN_SCHEDULER_NULL) == (0, 0)


# --- pools ------------------------------------------------------------------------------------------
def test_pools_are_made_filled_and_destroyed(hv: Hypervisor, spare: int) -> None:
    assert hv.free_cpus() == {spare}
    pool = hv.create_pool(d.XEN_SCHEDULER_CREDIT)
    assert pool > 0
    (made,) = [p for p in hv.pools() if p.id == pool]
    assert made == (pool, d.XEN_SCHEDULER_CREDIT, 0, frozenset())
    hv.add_pool_cpu(pool, spare)
    assert hv.free_cpus() == frozenset()
    (made,) = [p for p in hv.pools() if p.id == pool]
    assert made.cpus == {spare}
    with Refused(errno.EBUSY):
        hv.destroy_pool(pool)
    hv.remove_pool_cpu(pool, spare)
    hv.destroy_pool(pool)
    assert pool not in [p.id for p in hv.pools()]


def test_a_domain_moves_between_pools(hv: Hypervisor, spare: int) -> None:
    pool = pool_with(hv, hv.scheduler(), spare)
    domid = make(hv)
    state = hv.domain(domid)
    assert state is not None and state.cpupool == 0
    hv.set_affinity(domid, 0, [0])
    hv.move_to_pool(domid, pool)
    state = hv.domain(domid)
    assert state is not None and state.cpupool == pool
    assert spare in hv.affinity(domid, 0)[0], "it may run anywhere in the new pool"
    with Refused(errno.EINVAL):
        hv.set_affinity(domid, 0, [0])
    with Refused(errno.EBUSY):
        hv.remove_pool_cpu(pool, spare)
    assert [p.domains for p in hv.pools() if p.id == pool] == [1]
    hv.move_to_pool(domid, 0)
    assert [p.domains for p in hv.pools() if p.id == pool] == [0]


def test_a_domain_is_made_in_a_pool(hv: Hypervisor, spare: int) -> None:
    from domains import spec

    pool = pool_with(hv, d.XEN_SCHEDULER_CREDIT, spare)
    domid = hv.create_domain(spec()._replace(cpupool=pool))
    hv.set_max_vcpus(domid, 2)
    state = hv.domain(domid)
    assert state is not None and state.cpupool == pool
    assert hv.credit(domid, d.XEN_SCHEDULER_CREDIT).weight == 256


def test_pools_xen_refuses(hv: Hypervisor, spare: int) -> None:
    from domains import spec

    domid = make(hv)
    empty = hv.create_pool(d.XEN_SCHEDULER_CREDIT2)
    with Refused(errno.ENOENT):
        hv.move_to_pool(domid, empty)  # nothing to run on
    with Refused(errno.ENODEV):
        hv.create_domain(spec()._replace(cpupool=empty))
    with Refused(errno.ESRCH):
        hv.create_domain(spec()._replace(cpupool=777))
    with Refused(errno.ENODEV):
        hv.add_pool_cpu(empty, 0)  # it is in pool 0
    with Refused(errno.EINVAL):
        hv.add_pool_cpu(empty, hv.host().max_cpu_id + 4000)
    with Refused(errno.EINVAL):
        hv.remove_pool_cpu(0, 0)
    with Refused(errno.EADDRNOTAVAIL):
        hv.remove_pool_cpu(0, spare)
    for call in (lambda: hv.destroy_pool(77), lambda: hv.move_to_pool(domid, 77)):
        with Refused(errno.ENOENT):
            call()
    with Refused(errno.ENOENT):
        hv.create_pool(4)  # sedf, which no Xen has had for long


def test_every_cpu_has_its_place(hv: Hypervisor) -> None:
    places = hv.cpu_places()
    assert sum(place is not None for place in places) == hv.host().cpus
    assert all(place.node < hv.host().nodes for place in places if place)


# --- triggers, parameters ---------------------------------------------------------------------------
def test_triggers(hv: Hypervisor) -> None:
    pv, hvm = make(hv), make(hv, hvm=True)
    hv.send_trigger(hvm, d.XEN_DOMCTL_SENDTRIGGER_NMI, 1)
    hv.send_trigger(hvm, d.XEN_DOMCTL_SENDTRIGGER_POWER)
    for trigger in (d.XEN_DOMCTL_SENDTRIGGER_POWER, d.XEN_DOMCTL_SENDTRIGGER_SLEEP):
        with Refused(errno.EINVAL):
            hv.send_trigger(pv, trigger)
    for trigger in (d.XEN_DOMCTL_SENDTRIGGER_RESET, d.XEN_DOMCTL_SENDTRIGGER_INIT):
        with Refused(errno.ENOSYS):
            hv.send_trigger(hvm, trigger)
    with Refused(errno.ESRCH):
        hv.send_trigger(hvm, d.XEN_DOMCTL_SENDTRIGGER_NMI, 2)


def test_a_parameter_is_read_and_written(hv: Hypervisor) -> None:
    path = "/params/gnttab_max_frames"
    before = hv.parameter(path)
    assert before.type == f.XEN_HYPFS_TYPE_STRING and before.writable
    number = before.content.split(b"\0")[0]
    try:
        hv.set_parameter(path, b"65\0")
        assert hv.parameter(path).content.split(b"\0")[0] == b"65"
        with Refused(errno.EDOM):
            hv.set_parameter(path, b"66")  # without its end
        with Refused(errno.EINVAL):
            hv.set_parameter(path, b"many\0")
    finally:
        hv.set_parameter(path, number + b"\0")
    pages = hv.parameter("/params/global-pages")
    assert pages.type == f.XEN_HYPFS_TYPE_BOOL and len(pages.content) == 1
    with Refused(errno.EDOM):
        hv.set_parameter("/params/global-pages", b"\1\0")
    with Refused(errno.EACCES):
        hv.set_parameter("/buildinfo/changeset", b"none\0")
    with Refused(errno.ENOENT):
        hv.parameter("/params/no-such-thing")
    with Refused(errno.ENOENT):
        hv.set_parameter("/params/no-such-thing", b"1\0")


# --- what core dumps are made of --------------------------------------------------------------------
def test_a_pv_guest_s_frames_are_found_without_asking_it(hv: Hypervisor) -> None:
    domid = make(hv)
    (frame,) = hv.populate(domid, [5])
    assert hv.present(domid, [frame]) == [True]
    assert hv.ram_end() > frame
    assert len(hv.machine_to_phys(hv.ram_end() - 1, 1)) == 1
    (pfn,) = hv.machine_to_phys(frame, 1)
    assert pfn == 5
    around = hv.machine_to_phys(frame - 1, 3)
    assert len(around) == 3 and around[1] == 5
    other = make(hv)
    assert hv.present(other, [frame]) == [False]


def test_frames_of_a_translated_guest(hv: Hypervisor) -> None:
    domid = make(hv, hvm=True)
    hv.populate(domid, [3, 700])
    assert hv.present(domid, [2, 3, 4, 700]) == [False, True, False, True]
    assert hv.max_gpfn(domid) >= 700
    assert len(hv.present(domid, range(3000))) == 3000


def test_promised_memory_is_counted(hv: Hypervisor) -> None:
    domid = make(hv, True)
    hv.set_pod_target(domid, 600)
    hv.populate(domid, [0, 512], 9, on_demand=True)
    assert hv.pod_state(domid) == (600, 1024)
    hv.present(domid, [7])
    cache, entries = hv.pod_state(domid)
    assert cache < 600 and entries < 1024


def test_the_pool_of_promised_memory_is_adjusted(hv: Hypervisor) -> None:
    domid = make(hv, True)
    hv.populate(domid, range(16))
    hv.set_pod_target(domid, 64)  # nothing is promised: it stays as it is
    state = hv.domain(domid)
    assert state is not None and state.pages == 16


def test_pausing_is_counted(hv: Hypervisor) -> None:
    domid = make(hv)
    hv.pause_domain(domid)
    hv.unpause_domain(domid)
    state = hv.domain(domid)
    assert state is not None and state.paused
    hv.unpause_domain(domid)
    with Refused(errno.EINVAL):
        hv.unpause_domain(domid)


def test_a_context_is_read_back(hv: Hypervisor) -> None:
    domid = make(hv)
    assert hv.vcpu_context(domid, 0) is None
    assert hv.vcpu_context(domid, 9) is None


def test_the_version_in_full(hv: Hypervisor) -> None:
    version = hv.xen_version()
    assert (version.major, version.page_size) == (4, PAGE_SIZE)
    assert hv.versions.xen.startswith(f"{version.major}.{version.minor}")
    sizes = (version.extraversion, version.compile_info, version.capabilities, version.changeset)
    assert [len(text) for text in sizes] == [16, 144, 1024, 64]
    assert VcpuGuestContext.size() == 5168 and MIB
