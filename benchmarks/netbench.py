"""Interfaces: ours and the kernel's netback, each on a bridge of its own.

``net-guest``  a Linux guest with both interfaces
``net-dom0``   the kernel's frontend in domain 0, in a network namespace: no guest takes part. A veth
               pair in their place is the floor

TCP is measured where it arrives. "plain": neither end hands on segments larger than a frame. Small packets
are UDP, in frames of 60 bytes; those that arrive count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from benchmarks import cpu
from benchmarks.bench import Bench
from benchmarks.contest import OURS, BenchError, Contest, Race, Sample, sample
from benchmarks.cpu import Meter
from benchmarks.dom0 import bridge, kernel_vif, veth
from benchmarks.peers import Guest, Here, Peer
from xtool.devices.vif import Vif
from xtool.toolstack.backends import server_pid

RIVAL = "netback"
#: A pair of interfaces without a split driver between them: what can be reached at all.
FLOOR = "veth"
#: Side, what ``backendtype`` calls it, its number.
SIDES = ((OURS, "xtool", 0), (RIVAL, "vif", 1))
#: Payload of one TCP segment with timestamps, bytes: what an "operation" of TCP is here.
SEGMENT = 1448
_UDP_PAYLOAD = 18
_PINGS = 100


@dataclass(frozen=True)
class Case:
    """``kind``: tcp, udp or ping; ``down``: to the guest."""

    name: str
    kind: str
    unit: str
    down: bool = False
    gso: bool = True
    goals: Mapping[str, float] = field(default_factory=dict)
    quick: bool = True

    def contest(self, place: str) -> Contest:
        return Contest(f"{place} {self.name}", self.unit, self.kind != "ping", self.goals)


CASES = (
    Case("tcp-out-gso", "tcp", "Mb/s", goals={RIVAL: 0.6}),
    Case("tcp-in-gso", "tcp", "Mb/s", down=True, goals={RIVAL: 0.6}),
    Case("tcp-out-plain", "tcp", "Mb/s", gso=False, goals={RIVAL: 0.3}),
    Case("tcp-in-plain", "tcp", "Mb/s", down=True, gso=False, goals={RIVAL: 0.3}),
    Case("udp-64-out", "udp", "1/s", goals={RIVAL: 0.3}),
    Case("udp-64-in", "udp", "1/s", down=True, goals={RIVAL: 0.3}, quick=False),
    Case("ping", "ping", "µs", goals={RIVAL: 3.0}, quick=False),
)
PROFILED = "tcp-out-plain"

_ports = count(5201)


@dataclass
class End:
    """One interface: the peer behind it, its names at both ends, both addresses."""

    peer: Peer
    inner: str
    outer: str
    address: str
    host: str
    meter: Meter


def measure(end: End, case: Case, span: int) -> Sample:
    found, spent = end.meter.during(lambda: _run(end, case, span))
    # CPU time per GiB would say nothing of packets as small as the others'.
    found |= {"ops": found["bytes"] // SEGMENT} if case.kind == "tcp" else {"bytes": 0}
    return sample(found, case.unit, spent)


def _run(end: End, case: Case, span: int) -> dict[str, Any]:
    sender, receiver, to = (Here(), end.peer, end.address) if case.down else (end.peer, Here(), end.host)
    port = next(_ports)
    if case.kind == "ping":
        answering = receiver.listen("echo", to, port)
        return _both(answering, lambda: sender.run("ping", to, port, _UDP_PAYLOAD, _PINGS))[1]
    size = _UDP_PAYLOAD if case.kind == "udp" else 65536
    arrived = receiver.listen("sink", case.kind, to, port)
    return _both(arrived, lambda: sender.run("push", case.kind, to, port, size, span))[0]


def _both(
    listener: Callable[[], dict[str, Any]], sender: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the listener and the sender found. The listener is waited for in any case: it may hold a guest's
    shell."""
    try:
        sent = sender()
    except (BenchError, AssertionError):
        with suppress(BenchError, AssertionError):
            listener()
        raise
    return listener(), sent


def _segments(ends: Mapping[str, End], on: bool) -> None:
    """Whether both ends of every interface may hand on more than a frame at once."""
    for end in ends.values():
        state = "on" if on else "off"
        end.peer.run("offload", end.inner, state)
        Here().run("offload", end.outer, state)


def _races(place: str, ends: Mapping[str, End], bench: Bench) -> list[Race]:
    def take(end: End, case: Case) -> Sample:
        return measure(end, case, bench.span)

    return [
        Race(
            case.contest(place),
            {name: partial(take, end, case) for name, end in ends.items()},
            case.quick,
            partial(_segments, ends, case.gso),
        )
        for case in CASES
    ]


def _subnet(number: int) -> tuple[str, str]:
    """The host's address and the guest's."""
    return f"10.98.{number}.1", f"10.98.{number}.2"


def _mac(number: int) -> str:
    return f"00:16:3e:00:09:{number:02x}"


@contextmanager
def in_guest(bench: Bench) -> Iterator[list[Race]]:
    with ExitStack() as undo:
        vifs = []
        for _, kind, number in SIDES:
            name = undo.enter_context(bridge(f"xtbench{number}", _subnet(number)[0]))
            vifs.append(f"{{bridge: {name}, mac: '{_mac(number)}', backendtype: {kind}}}")
        config = bench.config("net", vif=f"[{', '.join(vifs)}]")
        console, domid = undo.enter_context(bench.guest(config))
        guest = Guest(console)
        listed = {info.devid: info.interface for info in bench.client.network_list(config.name)}
        ends = {}
        for name, _, number in SIDES:
            host, address = _subnet(number)
            inner = _interface(guest, _mac(number))
            guest.ask(f"ip addr add {address}/24 dev {inner} && ip link set {inner} up")
            guest.ask(f"ping -c 1 -W 10 {host}")
            meter = Meter(bench.host.hv, _pids(name, domid, number))
            ends[name] = End(guest, inner, listed[number], address, host, meter)
        yield _races("net-guest", ends, bench)


def _interface(guest: Guest, mac: str) -> str:
    said = guest.ask(f"echo IF=$(grep -l {mac} /sys/class/net/*/address)=")
    for line in said.splitlines():
        # The echo of the command line has it as well, with the $ in it.
        if line.startswith("IF=/sys/class/net/"):
            return line.split("/")[4]
    raise BenchError(f"the guest has no interface {mac}: {said[-2000:]!r}")


def _pids(name: str, domid: int, number: int) -> list[int]:
    if name == RIVAL:
        return cpu.netback_threads(cpu.names(), domid, number)
    pid = server_pid(domid)
    return [pid] if pid is not None else []


@contextmanager
def in_dom0(bench: Bench) -> Iterator[list[Race]]:
    with ExitStack() as undo:
        ends = {}
        for name, kind, number in SIDES:
            host, address = _subnet(number)
            above = undo.enter_context(bridge(f"xtbench{number}", host))
            vif = Vif(40 + number, _mac(number), bridge=above, kind=kind)
            namespace = f"xtbench{number}"
            inner = undo.enter_context(kernel_vif(bench.host, vif, namespace, address))
            meter = Meter(bench.host.hv, _pids(name, 0, vif.devid))
            peer = Here("ip", "netns", "exec", namespace)
            ends[name] = End(peer, inner, vif.interface(0), address, host, meter)
        host, address = _subnet(2)
        undo.enter_context(bridge("xtbench2", host))
        undo.enter_context(veth("xtbench2", "xtbench2", address))
        peer = Here("ip", "netns", "exec", "xtbench2")
        ends[FLOOR] = End(peer, "veth-in", "veth-out", address, host, Meter(bench.host.hv, []))
        yield _races("net-dom0", ends, bench)


PLACES = {"net-guest": in_guest, "net-dom0": in_dom0}
