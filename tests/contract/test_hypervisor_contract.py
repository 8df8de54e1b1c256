"""What any hypervisor must do, ours in memory and the real one: the same tests on both."""

from __future__ import annotations

import pytest
from domains import MIB, make, spec

from xtool.abi.base import PAGE_SIZE
from xtool.abi.grant import GTF_readonly
from xtool.abi.memory import E820_RAM
from xtool.abi.xen import GrantEntryV1
from xtool.errors import HostMemoryError, HypercallError
from xtool.grant.table import read_table
from xtool.hypercall.port import E820Entry, Hypervisor


@pytest.mark.parametrize("hvm", [False, True])
def test_a_domain_is_made_seen_and_destroyed(hv: Hypervisor, hvm: bool) -> None:
    wanted = spec(hvm)
    domid = hv.create_domain(wanted)
    state = hv.domain(domid)
    assert state is not None and state.handle == wanted.handle
    assert state.hvm is hvm and state.paused and not state.shutdown and not state.dying
    assert domid in [other.domid for other in hv.domains()]
    hv.destroy_domain(domid)
    after = hv.domain(domid)
    assert after is None or after.dying


def test_unknown_domains(hv: Hypervisor) -> None:
    assert hv.domain(32000) is None
    with pytest.raises(HypercallError) as caught:
        hv.pause_domain(32000)
    assert caught.value.errno == 3
    with pytest.raises(HypercallError):
        hv.destroy_domain(32000)


def test_senseless_domains_are_refused(hv: Hypervisor) -> None:
    with pytest.raises(HypercallError) as caught:
        hv.create_domain(spec()._replace(hap=True))
    assert caught.value.errno == 22
    with pytest.raises(HypercallError):
        hv.create_domain(spec()._replace(max_vcpus=0))


@pytest.mark.parametrize("hvm", [False, True])
def test_memory_is_given_written_and_read_back(hv: Hypervisor, hvm: bool) -> None:
    domid = make(hv, hvm)
    given = hv.populate(domid, range(16))
    assert len(given) == 16
    if hvm:
        assert given == list(range(16))
    with hv.map_foreign(domid, given[2:4]) as mapping:
        mapping.view[0:5] = b"hello"
        mapping.view[PAGE_SIZE : PAGE_SIZE + 5] = b"world"
    with hv.map_foreign(domid, [given[3], given[2]]) as mapping:
        assert bytes(mapping.view[0:5]) == b"world"
        assert bytes(mapping.view[PAGE_SIZE : PAGE_SIZE + 5]) == b"hello"
    hv.clear_page(domid, given[2]) if not hvm else None
    if not hvm:
        with hv.map_foreign(domid, [given[2]]) as mapping:
            assert not any(mapping.view)
    state = hv.domain(domid)
    assert state is not None and state.pages == 16


def test_memory_on_demand_is_promised_then_given(hv: Hypervisor) -> None:
    domid = make(hv, True)
    hv.set_pod_target(domid, 600)
    assert len(hv.populate(domid, [0, 512], 9, on_demand=True)) == 2
    state = hv.domain(domid)
    assert state is not None and state.pages == 600
    with hv.map_foreign(domid, [3, 1023]) as mapping:
        mapping.view[0:5] = b"hello"
        mapping.view[PAGE_SIZE : PAGE_SIZE + 5] = b"world"
    with hv.map_foreign(domid, [1023]) as mapping:
        assert bytes(mapping.view[0:5]) == b"world"
    state = hv.domain(domid)
    assert state is not None and state.pages == 600


@pytest.mark.parametrize("hvm", [False, True])
def test_superpages_are_contiguous(hv: Hypervisor, hvm: bool) -> None:
    domid = make(hv, hvm)
    (frame,) = hv.populate(domid, [512], 9)
    with hv.map_foreign(domid, range(frame, frame + 512)) as mapping:
        mapping.view[511 * PAGE_SIZE] = 7
    with hv.map_foreign(domid, [frame + 511]) as mapping:
        assert mapping.view[0] == 7


def test_populating_stops_at_the_limit(hv: Hypervisor) -> None:
    domid = make(hv, memory=32 * PAGE_SIZE)
    assert len(hv.populate(domid, range(40))) == 32


def test_a_claim_larger_than_the_host_is_refused(hv: Hypervisor) -> None:
    host = hv.host()
    domid = make(hv, memory=(host.total_pages + 1024) * PAGE_SIZE)
    with pytest.raises(HostMemoryError):
        hv.claim(domid, host.free_pages + 512)


def test_a_claim_is_used_up_and_given_back(hv: Hypervisor) -> None:
    domid = make(hv)
    before = hv.host().outstanding_pages
    hv.claim(domid, 64)
    assert hv.host().outstanding_pages == before + 64
    hv.populate(domid, range(16))
    assert hv.host().outstanding_pages == before + 48
    hv.claim(domid, 0)
    assert hv.host().outstanding_pages == before


def test_frames_of_nobody_cannot_be_mapped(hv: Hypervisor) -> None:
    domid = make(hv, hvm=True)
    with pytest.raises(HypercallError):
        hv.map_foreign(domid, [0x12345])


def test_hvm_parameters(hv: Hypervisor) -> None:
    domid = make(hv, hvm=True)
    hv.set_hvm_param(domid, 1, 0xFEFFC)
    assert hv.hvm_param(domid, 1) == 0xFEFFC
    pv = make(hv)
    with pytest.raises(HypercallError):
        hv.set_hvm_param(pv, 1, 1)


def test_event_channels(hv: Hypervisor) -> None:
    domid = make(hv)
    ports = [hv.alloc_unbound(domid, 0) for _ in range(3)]
    assert len(set(ports)) == 3
    state = hv.evtchn_status(domid, ports[1])
    assert state is not None and state.status == "unbound" and state.remote_domid == 0


def test_vcpus_and_affinity(hv: Hypervisor) -> None:
    domid = make(hv)
    first = hv.vcpu(domid, 0)
    assert first is not None and first.vcpu == 0
    assert hv.vcpu(domid, 7) is None
    hv.set_affinity(domid, 0, [0])
    hard, soft = hv.affinity(domid, 0)
    assert hard == {0} and 0 in soft
    with pytest.raises(HypercallError):
        hv.set_max_vcpus(domid, 3)


def test_scheduling_parameters(hv: Hypervisor) -> None:
    hv.set_credit(make(hv), weight=512)


def test_policy_and_context(hv: Hypervisor) -> None:
    from xtool.abi.hvm import HVM_SAVE_CODE_HEADER, HVM_SAVE_CODE_MTRR
    from xtool.builder.cpuid import guest_policy
    from xtool.builder.vcpu import find_record, hvm_records

    for hvm in (False, True):
        domid = make(hv, hvm)
        hv.set_cpu_policy(domid, guest_policy(hv.default_cpu_policy(hvm=hvm), hvm=hvm))
    saved = hv.hvm_context(domid)
    assert find_record(saved, HVM_SAVE_CODE_HEADER) and find_record(saved, HVM_SAVE_CODE_MTRR)
    hv.set_hvm_context(domid, hvm_records(saved, entry=0x100000, start_info=0x200000, write_back_vcpus=2))


def test_memory_map_grants_and_time(hv: Hypervisor) -> None:
    domid = make(hv)
    hv.set_memory_map(domid, [E820Entry(0, 8 * MIB, E820_RAM)])
    with hv.map_grant_table(domid) as table:
        table.view[0:8] = b"\x01\0\0\0\x05\0\0\0"
    with hv.map_grant_table(domid) as table:
        assert table.view[0] == 1
    hv.set_time_offset(domid, 3600)


def test_shutdown_is_seen_with_its_reason(hv: Hypervisor) -> None:
    domid = make(hv)
    hv.shutdown_domain(domid, 3)
    state = hv.domain(domid)
    assert state is not None and state.shutdown and state.shutdown_reason == "crash"


def test_pausing(hv: Hypervisor) -> None:
    domid = make(hv)
    hv.unpause_domain(domid)
    state = hv.domain(domid)
    assert state is not None and not state.paused
    hv.pause_domain(domid)
    state = hv.domain(domid)
    assert state is not None and state.paused


def test_the_host_is_described(hv: Hypervisor) -> None:
    host = hv.host()
    assert host.cpus >= 1 and 0 < host.free_pages <= host.total_pages
    assert hv.capabilities() and hv.console_ring()
    assert hv.versions.domctl in (0x15, 0x16, 0x17, 0x18)


@pytest.mark.parametrize("hvm", [False, True])
def test_a_grant_table_is_read(hv: Hypervisor, hvm: bool) -> None:
    domid = make(hv, hvm)
    with hv.map_grant_table(domid) as table:
        table.view[8:24] = bytes(GrantEntryV1(flags=1, domid=0, frame=0x1234)) + bytes(
            GrantEntryV1(flags=1 | GTF_readonly, domid=77, frame=5)
        )
        table.view[32:40] = bytes(GrantEntryV1(flags=0, domid=9, frame=5))
    size = hv.grant_table_size(domid)
    assert size.version in (0, 1) and 1 <= size.frames <= size.max_frames
    first, second = read_table(hv, domid)
    assert (first.ref, first.domid, first.frame, first.kind) == (1, 0, 0x1234, "access")
    assert not first.readonly
    assert (second.ref, second.domid, second.readonly, second.mapped) == (2, 77, True, False)
    assert hv.grant_table_size(domid) == size
    with pytest.raises(HypercallError):
        hv.grant_table_size(32000)
