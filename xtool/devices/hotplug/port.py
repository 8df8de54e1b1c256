"""The host side of devices, as the toolstack sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from xtool.devices.backendkinds import TargetFacts


class OpenDisk(Protocol):
    """A block device held open until its backend has it."""

    @property
    def path(self) -> str: ...
    @property
    def major(self) -> int: ...
    @property
    def minor(self) -> int: ...
    @property
    def loop(self) -> bool: ...

    def close(self) -> None: ...


class LinkPlan(NamedTuple):
    """What becomes of an interface: ``name`` may be new, ``mtu`` None is the bridge's."""

    interface: str
    bridge: str
    name: str | None = None
    mtu: int | None = None


class Hotplug(Protocol):
    """Raises ``HostError`` for what the host has not or refuses."""

    def look_at(self, target: str | None) -> TargetFacts: ...

    def identity(self, target: str) -> frozenset[str]:
        """Names that two paths share when they are the same data; empty for what cannot be looked at."""

    def users(self, target: str) -> list[tuple[str, bool]]:
        """Who on this host itself uses the same data: (a description, whether it may write)."""

    def open_disk(self, target: str, *, readonly: bool, direct_io: bool, loop: bool) -> OpenDisk: ...

    def disk_served(self, domid: int, devid: int) -> bool:
        """Whether the kernel's backend has opened its block device."""

    def has_link(self, name: str) -> bool: ...

    def check_bridge(self, name: str) -> None: ...

    def make_tap(self, name: str) -> None:
        """A tap device of this name, which stays until ``remove_tap``."""

    def remove_tap(self, name: str) -> None:
        """Remove a tap device, if there is one."""

    def plug(self, plan: LinkPlan) -> int:
        """Put an interface on its bridge and up; its MTU. Undoes nothing: the interface goes as a whole."""

    def run_script(
        self, script: str, arguments: list[str], environment: Mapping[str, str], deadline: float
    ) -> None: ...

    def in_kernel(self, domid: int) -> list[str]:
        """The kernel's backend devices for this domain: ``vbd-5-51712``, ``vif-5-0``."""
