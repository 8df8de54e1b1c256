"""Grant copies on the in-memory machine against a model, and grants that are taken back half-way."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.abi.base import PAGE_SIZE
from xtool.abi.grant import GNTST_bad_copy_arg, GNTST_bad_gntref, GNTST_general_error
from xtool.abi.linux import GntdevGrantCopySegment
from xtool.errors import GrantError
from xtool.fake.machine import FakeMachine
from xtool.grant import Buffer, CopyBatch, CopySegment, Entry, Foreign, PersistentGrants, read_table
from xtool.grant.copy import SEGMENT_SIZE
from xtool.grant.table import parse_v2

GUEST = 7
PAGES = 3
number = st.one_of(
    st.integers(-2, 2 * PAGE_SIZE), st.sampled_from([PAGE_SIZE - 1, PAGE_SIZE, 1 << 16, 1 << 32, -1])
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(-1, PAGES), number, st.integers(0, PAGES * PAGE_SIZE), number),
        max_size=12,
    )
)
def test_a_batch_copies_what_is_right_and_refuses_the_rest(
    segments: list[tuple[bool, int, int, int, int]],
) -> None:
    machine = FakeMachine()
    machine.add_domain(GUEST)
    with (
        machine.allocator(GUEST).share(0, PAGES) as shared,
        Buffer(2 * PAGES * PAGE_SIZE) as buffer,
    ):
        batch = CopyBatch(machine.grants(0), GUEST)
        shared.view[:] = bytes(i * 7 & 0xFF for i in range(len(shared.view)))
        buffer.view[:] = bytes(i * 13 + 5 & 0xFF for i in range(len(buffer.view)))
        theirs, ours = bytearray(shared.view), bytearray(buffer.view)
        expected = []
        for to_guest, page, offset, local, length in segments:
            ref = shared.refs[page] if 0 <= page < PAGES else page if page < 0 else 500
            (batch.write if to_guest else batch.read)(ref, offset, buffer.address + local, length)
            if ref < 0:
                expected.append(GNTST_bad_gntref)
            elif offset < 0 or length < 0 or offset + length > PAGE_SIZE:
                expected.append(GNTST_bad_copy_arg)
            elif page == PAGES:
                expected.append(GNTST_general_error if length else 0)  # nothing to copy: Xen is not asked
            else:
                expected.append(0)
                start = page * PAGE_SIZE + offset
                if to_guest:
                    theirs[start : start + length] = ours[local : local + length]
                else:
                    ours[local : local + length] = theirs[start : start + length]
        assert batch.run() == expected
        assert shared.view == theirs and buffer.view == ours


def test_the_packed_segments_are_those_of_the_header() -> None:
    class Recorder:
        def copy_block(self, address: int, count: int) -> None:
            self.seen = [
                GntdevGrantCopySegment.from_buffer_copy(
                    GntdevGrantCopySegment.from_address(address + n * SEGMENT_SIZE)
                )
                for n in range(count)
            ]

    recorder = Recorder()
    batch = CopyBatch(recorder, 0x7FEF)
    batch.read(0xFFFFFFFF, 4095, 0x7FFF_FFFF_F000, 1)
    batch.write(3, 0, 0x1000, 4096)
    batch.run()
    read, write = recorder.seen
    assert (read.source, read.dest) == (0x7FEF_0FFF_FFFF_FFFF, 0x7FFF_FFFF_F000)
    assert (read.len, read.flags, write.len, write.flags) == (1, 1, 4096, 2)
    assert (write.source, write.dest) == (0x1000, 0x7FEF_0000_0000_0003)


def test_a_grant_revoked_in_the_middle_fails_alone() -> None:
    """R4, HF11: the others are copied; what is mapped stays mapped and is given back once."""
    machine = FakeMachine()
    machine.add_domain(GUEST)
    grants = machine.grants(0)
    shared = machine.allocator(GUEST).share(0, 3)
    first, second, _ = shared.refs
    shared.view[0] = shared.view[PAGE_SIZE] = shared.view[2 * PAGE_SIZE] = 1
    kept = grants.map(GUEST, [second])

    def revoke(domid: int, ref: int) -> None:
        if ref == second:
            machine.revoke(domid, ref)

    machine.before_copy = revoke
    with Buffer(PAGE_SIZE) as buffer:
        segments = [
            CopySegment(Foreign(GUEST, ref), buffer.address + i, 1) for i, ref in enumerate(shared.refs)
        ]
        assert grants.copy(segments) == [0, GNTST_general_error, 0]
        assert bytes(buffer.view[:3]) == b"\1\0\1"
    with pytest.raises(GrantError) as caught:
        grants.map(GUEST, [first, second])
    assert (caught.value.domid, caught.value.ref) == (GUEST, second)
    assert kept.view[0] == 1
    kept.close()
    shared.close()
    assert machine.frames_used == 0 and not machine.guests[GUEST].grants


def test_a_dead_domain() -> None:
    """Its pages stay as long as they are mapped; everything is given back afterwards."""
    machine = FakeMachine()
    machine.add_domain(GUEST)
    shared = machine.allocator(GUEST).share(0, 2)
    shared.view[0] = 4
    cache = PersistentGrants(machine.grants(0), 8)
    view = cache.acquire(GUEST, shared.refs[0])
    machine.remove_domain(GUEST)
    assert view is not None and view[0] == 4
    with pytest.raises(GrantError, match="GNTST_bad_domain"):
        cache.acquire(GUEST, shared.refs[1])
    cache.close()
    shared.close()
    assert machine.frames_used == 0


def test_an_ioctl_that_fails_leaves_the_batch_usable() -> None:
    machine = FakeMachine()
    machine.add_domain(GUEST)
    grants = machine.grants(0)
    with (
        machine.allocator(GUEST).share(0, 1) as shared,
        Buffer(10) as buffer,
    ):
        batch = CopyBatch(grants, GUEST)
        assert buffer.size == PAGE_SIZE
        grants.fail = errno.EFAULT
        batch.read(shared.refs[0], 0, buffer.address, 1)
        with pytest.raises(GrantError, match="EFAULT"):
            batch.run()
        grants.fail = 0
        batch.read(shared.refs[0], 0, buffer.address, 1)
        assert batch.run() == [0]


def test_a_version_2_table() -> None:
    entry = [
        b"\x01\x00\x05\x00" + bytes(4) + (0x1_0000_0001).to_bytes(8, "little"),
        bytes(16),
        b"\x01\x01\x06\x00\x10\x00\x20\x00" + (9).to_bytes(8, "little"),
        b"\x19\x00\x06\x00" + bytes(12),  # the guest says it is mapped: not believed
    ]
    assert parse_v2(b"".join(entry), [0x10, 0, 8, 0]) == [
        Entry(0, 5, 0x1_0000_0001, 0x11),
        Entry(2, 6, 9, 0x109, 16, 32),
        Entry(3, 6, 0, 1),
    ]


def test_the_fake_hypervisor_shows_its_machines_grants() -> None:
    from xtool.fake.hypervisor import FakeHypervisor
    from xtool.hypercall.port import CreateSpec

    hv = FakeHypervisor()
    domid = hv.create_domain(CreateSpec(handle=bytes(16)))
    with hv.machine.allocator(domid).share(0, 600, writable=False) as shared:
        mapped = hv.machine.grants(0).map(domid, shared.refs[:1], writable=False)
        table = read_table(hv, domid)
        assert [entry.ref for entry in table] == list(shared.refs)
        assert [entry.mapped for entry in table[:2]] == [True, False] and table[0].readonly
        mapped.close()
    assert read_table(hv, domid) == []
    port = hv.alloc_unbound(domid, 0)
    with hv.machine.events(0) as events:
        ours = events.bind_interdomain(domid, port)
        state = hv.evtchn_status(domid, port)
        assert state is not None and (state.status, state.remote_domid, state.remote_port) == (
            "interdomain",
            0,
            ours,
        )
