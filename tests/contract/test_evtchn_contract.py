"""What event channels must do: in memory between two domains and within one, and, in dom0, for real with both
ends in dom0."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from xtool.abi.linux import EVTCHN
from xtool.errors import EventChannelError
from xtool.evtchn import EventChannels, EventDevice
from xtool.fake.machine import FakeMachine

WAIT = 5.0


class Pair(NamedTuple):
    """Two open devices and the domains they are in."""

    near: EventChannels
    far: EventChannels
    near_domid: int
    far_domid: int

    def connected(self) -> tuple[int, int]:
        """A channel between them with nothing pending; the ports of near and far."""
        port = self.near.bind_unbound(self.far_domid)
        other = self.far.bind_interdomain(self.near_domid, port)
        settle(self.near)
        settle(self.far)
        return port, other


def wait(channels: EventChannels) -> list[int]:
    select.select([channels.fileno()], [], [], WAIT)
    return channels.pending()


def settle(channels: EventChannels) -> None:
    """Drop what binding left behind."""
    while select.select([channels.fileno()], [], [], 0.05)[0]:
        channels.unmask(channels.pending())


@pytest.fixture(params=["fake", "fake-alone", pytest.param("xen", marks=pytest.mark.xen)])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    if request.param == "xen":
        if not os.path.exists(EVTCHN):
            pytest.skip("no /dev/xen/evtchn on this machine: run in the lab's dom0")
        with EventDevice() as near, EventDevice() as far:
            yield Pair(near, far, 0, 0)
        return
    machine = FakeMachine()
    far_domid = 7 if request.param == "fake" else 0
    if far_domid:
        machine.add_domain(far_domid)
    with machine.events(0) as near, machine.events(far_domid) as far:
        yield Pair(near, far, 0, far_domid)


def test_events_go_both_ways(pair: Pair) -> None:
    port, other = pair.connected()
    pair.near.notify(port)
    assert wait(pair.far) == [other]
    pair.far.notify(other)
    assert wait(pair.near) == [port]
    assert pair.near.pending() == pair.far.pending() == []


def test_binding_makes_up_an_event(pair: Pair) -> None:
    """So that a notification from before is not lost; notifying an unbound port is no error."""
    port = pair.near.bind_unbound(pair.far_domid)
    pair.near.notify(port)
    other = pair.far.bind_interdomain(pair.near_domid, port)
    assert wait(pair.far) == [other]


def test_a_port_is_masked_until_it_is_unmasked_and_nothing_is_lost(pair: Pair) -> None:
    port, other = pair.connected()
    pair.near.notify(port)
    assert wait(pair.far) == [other]
    for _ in range(100):
        pair.near.notify(port)
    assert not select.select([pair.far.fileno()], [], [], 0.05)[0]
    pair.far.unmask([other, 4095])  # the other number is not ours
    assert wait(pair.far) == [other]
    pair.far.unmask([other])
    assert not select.select([pair.far.fileno()], [], [], 0.05)[0]


def test_many_ports_at_once(pair: Pair) -> None:
    ports = [pair.connected() for _ in range(70)]  # more than the kernel's first ring
    for near, _ in ports:
        pair.near.notify(near)
    wanted = {far for _, far in ports}
    found: list[int] = []
    end = time.monotonic() + WAIT
    while len(found) < len(wanted) and time.monotonic() < end:
        if select.select([pair.far.fileno()], [], [], WAIT)[0]:
            part = pair.far.pending(16)
            assert 0 < len(part) <= 16
            found += part
    assert set(found) == wanted and len(found) == len(wanted)
    pair.far.unmask(found)
    for near, _ in ports:
        pair.near.notify(near)
    assert set(wait(pair.far)) <= wanted


def test_a_closed_end_can_be_bound_again(pair: Pair) -> None:
    """What a restarted backend lives on: the frontend's port stays."""
    port, other = pair.connected()
    pair.far.unbind(other)
    pair.near.notify(port)  # goes nowhere
    again = pair.far.bind_interdomain(pair.near_domid, port)
    assert again in wait(pair.far)
    pair.far.unmask([again])
    settle(pair.near)
    pair.near.notify(port)
    assert wait(pair.far) == [again]
    pair.far.notify(again)
    assert wait(pair.near) == [port]


def test_refusals(pair: Pair) -> None:
    port, other = pair.connected()
    for call, name in (
        (lambda: pair.far.bind_interdomain(pair.near_domid, port), "EINVAL"),  # has its other end
        (lambda: pair.far.bind_interdomain(pair.near_domid, 4000), "EINVAL"),
        (lambda: pair.far.bind_interdomain(pair.near_domid, port + (1 << 32)), "EINVAL"),
        (lambda: pair.far.bind_interdomain(32000, 1), "ESRCH"),
        (lambda: pair.far.unbind(port if pair.far_domid == 0 else 99), "ENOTCONN"),
        (lambda: pair.near.notify(999), "ENOTCONN"),
    ):
        with pytest.raises(EventChannelError, match=name):
            call()
    foreign = pair.near.bind_unbound(32001)
    with pytest.raises(EventChannelError, match="EINVAL"):
        pair.far.bind_interdomain(pair.near_domid, foreign)
    pair.near.notify(port)
    assert wait(pair.far) == [other]


def test_a_restricted_device_keeps_what_it_has(pair: Pair) -> None:
    port, other = pair.connected()
    with pytest.raises(EventChannelError, match="EINVAL"):
        pair.far.restrict(0)
    pair.far.restrict(31000)
    for call in (
        lambda: pair.far.bind_unbound(31000),
        lambda: pair.far.bind_virq(2),
        lambda: pair.far.bind_interdomain(pair.near_domid, 1),
        lambda: pair.far.restrict(31000),
    ):
        with pytest.raises(EventChannelError, match="EACCES"):
            call()
    pair.far.notify(other)
    assert wait(pair.near) == [port]


def test_closing_the_device_closes_its_ports(pair: Pair) -> None:
    port, _ = pair.connected()
    pair.far.close()
    pair.far.close()
    pair.near.notify(port)
    assert pair.near.pending() == []
