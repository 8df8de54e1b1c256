"""``Hotplug`` on this machine's kernel.

Facts: the kernel's backends show up in ``/sys/bus/xen-backend/devices`` as ``vbd-<domid>-<devid>`` and
``vif-<domid>-<devid>``; blkback adds the attribute ``physical_device`` there once it has opened the disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from xtool.devices.backendkinds import TargetFacts
from xtool.devices.hotplug import bridge, link, loop, scripts, sharing, tap
from xtool.devices.hotplug.port import LinkPlan

_BACKENDS = "/sys/bus/xen-backend/devices"


class LinuxHotplug:
    def look_at(self, target: str | None) -> TargetFacts:
        return sharing.look_at(target)

    def identity(self, target: str) -> frozenset[str]:
        return sharing.identity(target)

    def users(self, target: str) -> list[tuple[str, bool]]:
        return sharing.users(target)

    def open_disk(self, target: str, *, readonly: bool, direct_io: bool, loop: bool) -> loop.BlockDevice:
        if loop:
            return _attach(target, readonly, direct_io)
        return _open_block(target, readonly)

    def disk_served(self, domid: int, devid: int) -> bool:
        return os.path.exists(f"{_BACKENDS}/vbd-{domid}-{devid}/physical_device")

    def has_link(self, name: str) -> bool:
        return link.exists(name)

    def check_bridge(self, name: str) -> None:
        bridge.check(name)

    def make_tap(self, name: str) -> None:
        tap.make(name)

    def remove_tap(self, name: str) -> None:
        tap.remove(name)

    def plug(self, plan: LinkPlan) -> int:
        return bridge.plug(plan)

    def run_script(
        self, script: str, arguments: list[str], environment: Mapping[str, str], deadline: float
    ) -> None:
        scripts.run(script, arguments, environment, deadline)

    def in_kernel(self, domid: int) -> list[str]:
        try:
            names = os.listdir(_BACKENDS)
        except FileNotFoundError:
            return []
        return sorted(name for name in names if name.startswith((f"vbd-{domid}-", f"vif-{domid}-")))


def _attach(target: str, readonly: bool, direct_io: bool) -> loop.BlockDevice:
    return loop.attach(target, readonly=readonly, direct_io=direct_io)


def _open_block(target: str, readonly: bool) -> loop.BlockDevice:
    return loop.open_block(target, readonly=readonly)
