"""What grants must do: in memory between two domains and within one, and, in dom0, for real: pages of dom0
that dom0 itself maps."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from xtool.abi.base import PAGE_SIZE
from xtool.abi.grant import GNTST_bad_copy_arg, GNTST_bad_domain, GNTST_bad_gntref, GNTST_general_error
from xtool.abi.linux import GNTALLOC, GNTDEV
from xtool.errors import GrantError, LocalProtocolError
from xtool.evtchn import EventChannels, EventDevice
from xtool.fake.machine import FakeMachine
from xtool.grant import (
    AllocDevice,
    Buffer,
    CopyBatch,
    CopySegment,
    Foreign,
    GrantAllocator,
    GrantDevice,
    Grants,
    PersistentGrants,
)

NO_REF = 0xFFFF_FFF0  # beyond any table


class Sides(NamedTuple):
    """``guest`` shares pages, ``host`` uses them; events of each side."""

    host: Grants
    guest: GrantAllocator
    host_domid: int
    guest_domid: int
    host_events: EventChannels
    guest_events: EventChannels


@pytest.fixture(params=["fake", "fake-alone", pytest.param("xen", marks=pytest.mark.xen)])
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    if request.param == "xen":
        for path in (GNTDEV, GNTALLOC):
            if not os.path.exists(path):
                pytest.skip(f"no {path} on this machine: run in the lab's dom0")
        with (
            EventDevice() as near,
            EventDevice() as far,
            AllocDevice() as alloc,
            GrantDevice() as grants,
        ):
            yield Sides(grants, alloc, 0, 0, near, far)
        return
    machine = FakeMachine()
    domid = 7 if request.param == "fake" else 0
    if domid:
        machine.add_domain(domid)
    with (
        machine.events(0) as near,
        machine.events(domid) as far,
        machine.allocator(domid) as alloc,
        machine.grants(0) as grants,
    ):
        yield Sides(grants, alloc, 0, domid, near, far)
    assert machine.frames_used == 0


def test_pages_are_shared_both_ways_and_contiguous(sides: Sides) -> None:
    with sides.guest.share(sides.host_domid, 3) as shared:
        assert len(set(shared.refs)) == 3 and not any(shared.view)
        first, second, third = shared.refs
        with sides.host.map(sides.guest_domid, [third, first, second]) as mapped:
            assert len(mapped.view) == 3 * PAGE_SIZE
            shared.view[:5] = b"first"
            mapped.view[2 * PAGE_SIZE : 2 * PAGE_SIZE + 6] = b"second"
            mapped.view[PAGE_SIZE - 1] = 3
            assert bytes(mapped.view[PAGE_SIZE : PAGE_SIZE + 5]) == b"first"
            assert bytes(shared.view[PAGE_SIZE : PAGE_SIZE + 6]) == b"second"
            assert shared.view[3 * PAGE_SIZE - 1] == 3
            words = mapped.view.cast("I")
            words[1024] = 0x01020304
            assert bytes(shared.view[:4]) == b"\4\3\2\1"
            words.release()


def test_a_view_keeps_the_memory(sides: Sides) -> None:
    with sides.guest.share(sides.host_domid, 1) as shared:
        mapped = sides.host.map(sides.guest_domid, shared.refs)
        slot = mapped.view[8:16]
        with pytest.raises(BufferError):
            mapped.close()
        slot[0] = 9
        assert shared.view[8] == 9
        slot.release()
        mapped.close()
        mapped.close()
        with pytest.raises(ValueError):
            bytes(mapped.view)


def test_read_only_pages(sides: Sides) -> None:
    with sides.guest.share(sides.host_domid, 2, writable=False) as shared:
        shared.view[0] = 7
        with sides.host.map(sides.guest_domid, shared.refs, writable=False) as mapped:
            assert mapped.view.readonly and mapped.view[0] == 7
        with pytest.raises(GrantError) as caught:
            sides.host.map(sides.guest_domid, shared.refs)
        error = caught.value
        assert (error.domid, error.ref, error.status) == (
            sides.guest_domid,
            shared.refs[0],
            GNTST_general_error,
        )
        with Buffer(PAGE_SIZE) as buffer:
            batch = CopyBatch(sides.host, sides.guest_domid)
            batch.read(shared.refs[0], 0, buffer.address, 16)
            batch.write(shared.refs[0], 0, buffer.address, 16)
            assert batch.run() == [0, GNTST_general_error]


def test_a_mapping_that_fails_names_the_grant_and_maps_nothing(sides: Sides) -> None:
    with sides.guest.share(sides.host_domid, 2) as shared:
        for bad, status in ((NO_REF, GNTST_bad_gntref), (1 << 40, GNTST_bad_gntref)):
            with pytest.raises(GrantError, match="GNTST_bad_gntref") as caught:
                sides.host.map(sides.guest_domid, [shared.refs[0], bad, shared.refs[1]])
            assert (caught.value.ref, caught.value.status) == (bad, status)
        with pytest.raises(GrantError) as caught:
            sides.host.map(32000, shared.refs)
        assert (caught.value.domid, caught.value.status) == (32000, GNTST_bad_domain)
        with pytest.raises(LocalProtocolError):
            sides.host.map(sides.guest_domid, [])
        with sides.host.map(sides.guest_domid, shared.refs) as mapped:
            assert len(mapped.view) == 2 * PAGE_SIZE


def test_copies_have_a_status_each(sides: Sides) -> None:
    with (
        sides.guest.share(sides.host_domid, 2) as shared,
        Buffer(4 * PAGE_SIZE) as buffer,
    ):
        batch = CopyBatch(sides.host, sides.guest_domid)
        one, two = shared.refs
        shared.view[:PAGE_SIZE] = os.urandom(PAGE_SIZE)
        buffer.view[PAGE_SIZE : 2 * PAGE_SIZE] = os.urandom(PAGE_SIZE)
        batch.read(one, 100, buffer.address + 2 * PAGE_SIZE - 50, 200)  # crosses a page of ours
        batch.read(NO_REF, 0, buffer.address, 8)
        batch.read(one, 4000, buffer.address, 97)  # crosses the granted page's end
        batch.read(-1, 0, buffer.address, 8)
        batch.read(1 << 32, 0, buffer.address, 8)
        batch.read(one, 0, buffer.address, -1)
        batch.write(two, 4096, buffer.address, 0)
        batch.write(two, 96, buffer.address + PAGE_SIZE, 4000)
        assert len(batch) == 8
        assert batch.run() == [
            0,
            GNTST_bad_gntref,
            GNTST_bad_copy_arg,
            GNTST_bad_gntref,
            GNTST_bad_gntref,
            GNTST_bad_copy_arg,
            0,
            0,
        ]
        assert buffer.view[2 * PAGE_SIZE - 50 : 2 * PAGE_SIZE + 150] == shared.view[100:300]
        assert shared.view[PAGE_SIZE + 96 : 2 * PAGE_SIZE - 50] == buffer.view[PAGE_SIZE : PAGE_SIZE + 3950]
        assert not any(shared.view[PAGE_SIZE : PAGE_SIZE + 96])
        assert len(batch) == 0 and batch.run() == []


def test_copies_between_two_grants(sides: Sides) -> None:
    domid = sides.guest_domid
    with sides.guest.share(sides.host_domid, 2) as shared:
        shared.view[:5] = b"hello"
        one, two = (Foreign(domid, ref, 0) for ref in shared.refs)
        segments = [CopySegment(one, two._replace(offset=10), 5), CopySegment(Foreign(32000, 1), two, 1)]
        assert sides.host.copy(segments) == [0, GNTST_bad_domain]
        assert bytes(shared.view[PAGE_SIZE + 10 : PAGE_SIZE + 15]) == b"hello"
        with pytest.raises(ValueError):
            sides.host.copy([CopySegment(4096, 8192, 1)])


def test_a_grant_that_is_over_cannot_be_used(sides: Sides) -> None:
    shared = sides.guest.share(sides.host_domid, 1)
    (ref,) = shared.refs
    shared.close()
    with pytest.raises(GrantError):
        sides.host.map(sides.guest_domid, [ref])
    with Buffer(PAGE_SIZE) as buffer:
        batch = CopyBatch(sides.host, sides.guest_domid)
        batch.read(ref, 0, buffer.address, 1)
        assert batch.run()[0] < 0


def test_what_is_mapped_outlives_the_sharing(sides: Sides) -> None:
    shared = sides.guest.share(sides.host_domid, 1)
    shared.view[0] = 5
    mapped = sides.host.map(sides.guest_domid, shared.refs)
    shared.close()
    assert mapped.view[0] == 5
    mapped.close()


@pytest.mark.parametrize("who", ["host", "guest"])
def test_unmap_notifications(sides: Sides, who: str) -> None:
    """Set twice: the last one counts. Each side tells the other that it is gone."""
    port = sides.host_events.bind_unbound(sides.guest_domid)
    other = sides.guest_events.bind_interdomain(sides.host_domid, port)
    for channels in (sides.host_events, sides.guest_events):
        while select.select([channels.fileno()], [], [], 0.05)[0]:
            channels.unmask(channels.pending())
    shared = sides.guest.share(sides.host_domid, 2)
    mapped = sides.host.map(sides.guest_domid, shared.refs)
    leaving, staying = (mapped, shared) if who == "host" else (shared, mapped)
    ours, theirs, channels = (
        (port, other, sides.guest_events) if who == "host" else (other, port, sides.host_events)
    )
    staying.view[PAGE_SIZE - 9] = staying.view[20] = 1
    with pytest.raises(GrantError):
        leaving.notify_on_unmap(PAGE_SIZE - 9, 4000)  # not a port of ours
    with pytest.raises(LocalProtocolError):
        leaving.notify_on_unmap(2 * PAGE_SIZE)
    leaving.notify_on_unmap(20, ours)
    leaving.notify_on_unmap(PAGE_SIZE - 9, ours)
    leaving.close()
    assert select.select([channels.fileno()], [], [], 5)[0]
    assert channels.pending() == [theirs]
    assert (staying.view[PAGE_SIZE - 9], staying.view[20]) == (0, 1)
    staying.close()


def test_a_bounded_cache_of_mappings(sides: Sides) -> None:
    domid = sides.guest_domid
    with sides.guest.share(sides.host_domid, 4) as shared:
        for number in range(4):
            shared.view[number * PAGE_SIZE] = number
        a, b, c, d = shared.refs
        with PersistentGrants(sides.host, 2) as cache:
            views = [cache.acquire(domid, ref) for ref in (a, b)]
            assert [view[0] for view in views if view is not None] == [0, 1]
            assert cache.acquire(domid, c) is None  # both in use
            cache.release(domid, b)
            cache.release(domid, a)
            assert cache.acquire(domid, a) is views[0]  # still mapped, and the most recent now
            cache.release(domid, a)
            assert cache.acquire(domid, c) is not None and (domid, b) not in cache and (domid, a) in cache
            assert not cache.forget(domid, c) and cache.forget(domid, a)
            with pytest.raises(GrantError):
                cache.acquire(domid, NO_REF)
            assert len(cache) == 1 and cache.acquire(domid, d) is not None
        assert len(cache) == 0


def test_closing_the_device_unmaps_everything(sides: Sides) -> None:
    shared = sides.guest.share(sides.host_domid, 2)
    first = sides.host.map(sides.guest_domid, shared.refs[:1])
    second = sides.host.map(sides.guest_domid, shared.refs)
    slot = first.view[:4]
    with pytest.raises(BufferError):
        sides.host.close()
    slot.release()
    sides.host.close()
    with pytest.raises(ValueError):
        bytes(second.view)
    sides.guest.close()
    with pytest.raises(ValueError):
        bytes(shared.view)


def test_too_many_pages(sides: Sides) -> None:
    with pytest.raises(GrantError, match="ENOSPC"):
        sides.guest.share(sides.host_domid, 100_000)
