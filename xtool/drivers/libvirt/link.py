"""What is asked of libvirt: a handful of calls with plain values, so that they can cross a socket.

``DirectLink`` makes them in this process, ``HeldLink`` has another process make them. Domains are named by
uuid. Every call raises ``XtoolError``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

#: Lifecycle words in events, by libvirt's number (virDomainEventType).
LIFECYCLE = (
    *("defined", "undefined", "started", "suspended", "resumed", "stopped", "shutdown", "pmsuspended"),
    "crashed",
)


@dataclass(frozen=True)
class DomainFacts:
    """A running domain. ``state`` is libvirt's number; memory in bytes, ``cpu_time`` in seconds."""

    name: str
    uuid: str
    domid: int
    state: int
    os_type: str
    memory: int
    maxmem: int
    vcpus: int
    cpu_time: float
    managed: bool


@dataclass(frozen=True)
class Event:
    """Something that happened to a domain: a word of ``LIFECYCLE``, ``reboot``, ``device-removed`` or
    ``device-added``; ``detail`` is the device's alias. ``number`` counts from 1."""

    number: int
    uuid: str
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class VcpuFacts:
    """``cpu`` is None where the driver does not say; ``affinity`` has the CPUs it may use."""

    number: int
    state: int
    cpu_time: float
    cpu: int | None
    affinity: tuple[int, ...]


class Link(Protocol):
    def versions(self) -> dict[str, Any]:
        """``type``, ``hypervisor`` and ``libvirt`` as text, ``hostname``, ``node`` (virNodeGetInfo's list),
        ``free`` (bytes)."""

    def capabilities(self) -> str: ...

    def domain_capabilities(self) -> str:
        """For x86_64; "" where the driver has none."""

    def domains(self) -> list[DomainFacts]: ...

    def xml(self, uuid: str) -> str:
        """The running domain's."""

    def vcpus(self, uuid: str) -> list[VcpuFacts]: ...

    def create(self, xml: str, paused: bool) -> DomainFacts:
        """Start it, validated against libvirt's schema; gone when it ends."""

    def act(self, uuid: str, action: str) -> None:
        """``suspend``, ``resume``, ``destroy``; ``shutdown`` and ``reboot``, with ``-acpi`` or ``-pv``."""

    def device(self, uuid: str, action: str, xml: str) -> None:
        """``attach``, ``detach`` or ``update``, now and only now."""

    def limit_disk(self, uuid: str, dev: str, limits: dict[str, int]) -> None: ...

    def limit_interface(self, uuid: str, mac: str, limits: dict[str, int]) -> None: ...

    def mark(self) -> int:
        """The number of the last event."""

    def events(self, after: int, timeout: float) -> list[Event]:
        """Those after ``after``; waits for the first, ``timeout`` seconds at most."""

    def close(self) -> None: ...


def wait_until(link: Link, done: Callable[[], bool], deadline: float) -> bool:
    """Wait for events until ``done`` says so; false when ``deadline`` seconds are over.

    A driver without events is asked again each second.
    """
    end = time.monotonic() + deadline
    while True:
        mark = link.mark()
        if done():
            return True
        left = end - time.monotonic()
        if left <= 0:
            return False
        link.events(mark, min(left, 1.0))
