"""An interface put on a bridge, as Xen's ``vif-bridge`` script does it, without a script."""

from __future__ import annotations

import os

from xtool.devices.hotplug import link
from xtool.devices.hotplug.port import LinkPlan
from xtool.errors import HostError


def check(name: str) -> link.Link:
    """The bridge, or ``HostError`` with those there are."""
    found = link.look(name)
    if found is None:
        others = ", ".join(bridges()) or "none"
        raise HostError(
            f"this host has no bridge {name} (it has: {others})",
            hint=f"make one (ip link add {name} type bridge; ip link set {name} up), or set bridge:",
        )
    if not found.bridge:
        raise HostError(f"{name} is an interface, but no bridge", hint="set bridge: to a bridge's name")
    return found


def bridges() -> list[str]:
    try:
        names = os.listdir("/sys/class/net")
    except OSError:
        return []
    return sorted(name for name in names if os.path.isdir(f"/sys/class/net/{name}/bridge"))


def plug(plan: LinkPlan, alias: str = "") -> int:
    """Put the interface on the bridge and up; its MTU. Raises ``HostError``."""
    bridge = check(plan.bridge)
    found = link.look(plan.interface)
    if found is None:
        raise HostError(f"the interface {plan.interface} is not there", hint="dmesg may say why")
    if plan.name and plan.name != plan.interface and link.exists(plan.name):
        raise HostError(
            f"an interface named {plan.name} exists already", hint="choose another vifname, or leave it out"
        )
    mtu = plan.mtu or bridge.mtu
    with link.netlink() as ip:
        return link.prepare(
            ip, found, name=plan.name, mtu=mtu, master=bridge.number, alias=alias or plan.interface
        )
