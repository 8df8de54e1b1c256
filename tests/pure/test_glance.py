"""What Xen says of all domains, sorted."""

from __future__ import annotations

import pytest

from xtool.abi import domctl as d
from xtool.abi import sysctl as s
from xtool.hypercall import glance
from xtool.hypercall.glance import Census, Domains, domain_key, sort
from xtool.hypercall.port import Versions

RUNNING, BLOCKED = d.XEN_DOMINF_running, d.XEN_DOMINF_blocked
ENDED, DYING = d.XEN_DOMINF_shutdown, d.XEN_DOMINF_dying


def handle(domid: int) -> bytes:
    return domid.to_bytes(4, "big") * 4


def info(domid: int, flags: int) -> bytes:
    made = d.GetDomainInfo(domain=domid, flags=flags)
    made.handle[:] = list(handle(domid))
    return bytes(made)


def test_who_runs_who_has_ended_and_who_is_going() -> None:
    found = Domains(set(), set())
    crashed = ENDED | 3 << d.XEN_DOMINF_shutdownshift
    sort(info(0, RUNNING) + info(7, BLOCKED | d.XEN_DOMINF_paused) + info(300, crashed), found)
    sort(info(301, DYING | ENDED) + info(302, DYING) + info(303, ENDED), found)
    assert found.running == {domain_key(0, handle(0)), domain_key(7, handle(7))}
    assert found.ended == {domain_key(300, handle(300)), domain_key(303, handle(303))}
    # Neither the number nor the handle alone says who it is.
    assert domain_key(7, handle(8)) not in found.running and domain_key(8, handle(7)) not in found.running


class Device:
    """As many domains as Xen has, told as many at a time as fit."""

    bulk = 0

    def __init__(self, domids: list[int]) -> None:
        self.domids, self.calls = domids, 0

    def put(self, raw: bytes) -> int:
        self._wanted = s.GetDomainInfoList.from_buffer_copy(raw, s.HEADER_SIZE)
        return 0

    def call(self, name: str, op: int, *args: int) -> int:
        self.calls += 1
        there = [domid for domid in self.domids if domid >= self._wanted.first_domain]
        self._told = there[: self._wanted.max_domains]
        return 0

    def get(self, size: int) -> bytes:
        answer = s.GetDomainInfoList(num_domains=len(self._told))
        return bytes(s.HEADER_SIZE) + bytes(answer)

    def get_bulk(self, size: int) -> bytes:
        raw = b"".join(info(domid, BLOCKED) for domid in self._told)
        assert len(raw) == size
        return raw


@pytest.mark.parametrize("further", [-1, 0, 1])
def test_all_are_asked_for_however_many_there_are(further: int) -> None:
    most = glance._AT_ONCE
    domids = [0, *range(5, 5 + 3 * (2 * most + further - 1), 3)]
    census = Census.__new__(Census)
    census._device = device = Device(domids)  # type: ignore[assignment]
    census.versions = Versions("", 0, 0x15)
    found = census.domains()
    assert found.running == {domain_key(domid, handle(domid)) for domid in domids} and not found.ended
    assert len(domids) == 2 * most + further
    assert device.calls == (2 if further < 0 else 3)
