"""Where vCPUs may run, and how many of them are online.

Facts: Xen keeps a hard affinity (where a vCPU may run) and a soft one (where it should). A hard affinity
without a CPU of the domain's pool is refused. How many vCPUs are online is the guest's doing: PV and PVH
guests watch ``cpu/N/availability``, an HVM guest sees ACPI events that QEMU makes when a CPU is plugged in.
Linux in an HVM guest does not look at the nodes, so that there a CPU cannot be taken away from outside.
"""

from __future__ import annotations

from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from xtool.errors import DeadlineError, DeviceModelError, DomainError, UsageError
from xtool.toolstack import journal
from xtool.toolstack.api import VcpuCount, VcpuInfo
from xtool.toolstack.names import Named, uuid_text
from xtool.toolstack.pools import chosen_cpus, pool_of, ranges
from xtool.toolstack.query import kind_of, vcpus
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host
    from xtool.xenstore.port import Transaction

#: How often a guest is looked at that was asked for something, seconds.
LOOK = 0.1
_LEAVE = "-"


def pin(
    host: Host, found: Named, vcpu: int | None, hard: str | None, soft: str | None, *, force: bool = False
) -> list[VcpuInfo]:
    """Hard and soft affinity of one vCPU or (None) of all; None or ``-`` leaves one as it is.

    Raises ``UsageError`` for lists and numbers that make no sense, ``DomainError`` for CPUs of another pool.
    """
    domid = found.state.domid
    count = found.state.max_vcpu_id + 1
    if vcpu is not None and not 0 <= vcpu < count:
        raise UsageError(f"{found.name} has no vCPU {vcpu}", hint=f"its vCPUs are 0 to {count - 1}, or all")
    if force and vcpu is None:
        raise UsageError("an override is undone for one vCPU, not for all", hint="name the vCPU")
    wanted = [None if text in (None, _LEAVE) else chosen_cpus(host, str(text)) for text in (hard, soft)]
    if wanted == [None, None] and not force:
        raise UsageError(
            "neither a hard nor a soft affinity is given", hint="as in: xtool vcpu-pin web 0 1-3"
        )
    pool, name = pool_of(host, found.state.cpupool)
    if wanted[0] is not None and not wanted[0] & pool.cpus:
        raise DomainError(
            f"{found.name} is in CPU pool {name}, which has the CPUs {ranges(pool.cpus)}, none of {hard}",
            hint=f"choose among those, or move it: xtool cpupool-migrate {found.name} POOL",
        )
    for number in range(count) if vcpu is None else [vcpu]:
        host.hv.set_affinity(domid, number, wanted[0], wanted[1], force=force)
    return [v for v in vcpus(host, str(domid)) if vcpu is None or v.vcpu == vcpu]


def set_online(
    host: Host, found: Named, count: int, *, ignore_host: bool = False, wait: float | None = None
) -> VcpuCount:
    """Ask the guest for ``count`` vCPUs online; with ``wait``, until it has them or as many seconds are over.

    Raises ``UsageError`` for a number that cannot be, ``DeadlineError``.
    """
    domid, most, now = found.state.domid, found.state.max_vcpu_id + 1, found.state.online_vcpus
    if not 1 <= count <= most:
        raise UsageError(
            f"{found.name} cannot have {count} vCPUs: it was made for at most {most}",
            hint=f"1 to {most} is possible; maxvcpus in its file says how many",
        )
    cpus = host.hv.host().cpus
    if count > max(cpus, now) and not ignore_host:
        raise UsageError(
            f"{count} vCPUs are more than this host's {cpus} CPUs", hint="--ignore-host does it all the same"
        )
    uuid = uuid_text(found.state.handle)
    with journal.locked(uuid):
        if domid and kind_of(found.state) == "hvm" and host.real:
            if count < now:
                raise DomainError(
                    f"vCPUs of an hvm guest can be added, not taken away: {found.name} has {now}",
                    hint="take them offline in the guest: echo 0 > /sys/devices/system/cpu/cpuN/online",
                )
            _plug(domid, count)
        root = paths.domain(domid)

        def write(tx: Transaction) -> None:
            for vcpu in range(most):
                tx.write(f"{root}/cpu/{vcpu}/availability", "online" if vcpu < count else "offline")

        host.store.atomically(write)
        journal.change_config(uuid, lambda config: {**config, "vcpus": count, "maxvcpus": most})
    if wait is not None:
        _wait(host, found, count, wait)
    state = host.hv.domain(domid)
    return VcpuCount(domid, found.name, state.online_vcpus if state else 0, count, most)


def _wait(host: Host, found: Named, count: int, seconds: float) -> None:
    until = monotonic() + seconds
    while (state := host.hv.domain(found.state.domid)) is not None and state.online_vcpus != count:
        if monotonic() >= until:
            raise DeadlineError(
                f"{found.name} has {state.online_vcpus} vCPUs online after {seconds:g} s, not {count}",
                hint="its kernel must be able to take CPUs online and offline (Linux: CONFIG_HOTPLUG_CPU)",
            )
        sleep(LOOK)  # Xen tells nobody when a vCPU goes up or down


# --- QEMU -------------------------------------------------------------------------------------------
def _plug(domid: int, count: int) -> None:
    from xtool.devicemodel.process import qmp_path
    from xtool.devicemodel.qmp import QmpClient

    ours, theirs = qmp_path(domid), Path(f"/run/xen/qmp-libxl-{domid}")
    with QmpClient(ours if ours.exists() else theirs) as qemu:
        for request in cpus_to_add(qemu.execute("query-hotpluggable-cpus"), count):
            qemu.execute("device_add", request)


def cpus_to_add(answer: object, count: int) -> list[dict[str, Any]]:
    """From ``query-hotpluggable-cpus``: the ``device_add`` arguments that make ``count`` CPUs, lowest first.

    Raises ``DeviceModelError`` for an answer of another shape.
    """
    slots = []
    for slot in answer if isinstance(answer, list) else [None]:
        props = slot.get("props") if isinstance(slot, dict) else None
        driver = slot.get("type") if isinstance(slot, dict) else None
        if not isinstance(props, dict) or not isinstance(driver, str):
            raise DeviceModelError("QEMU's answer to query-hotpluggable-cpus has not the expected shape")
        place = tuple(int(props.get(name, 0)) for name in _PLACE)
        slots.append((place, driver, bool(slot and "qom-path" in slot), props))
    slots.sort(key=lambda slot: slot[0])
    return [
        {"driver": driver, "id": f"cpu-{number}", **{name: props[name] for name in _PLACE if name in props}}
        for number, (_, driver, there, props) in enumerate(slots[:count])
        if not there
    ]


_PLACE = ("socket-id", "die-id", "core-id", "thread-id")
