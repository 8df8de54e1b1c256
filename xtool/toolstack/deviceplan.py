"""Disks and interfaces decided: from the configuration and what is known of the host. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from xtool.devicemodel.spec import NIC_MODELS, EmulatedDisk, EmulatedNic, emulated_place
from xtool.devices.backendkinds import TargetFacts, choose_backend, choose_vif_backend
from xtool.devices.consoles import Console
from xtool.devices.vbd import Vbd
from xtool.devices.vif import DEFAULT_BRIDGE, NAME_MAX, Vif, stable_mac
from xtool.errors import UsageError

if TYPE_CHECKING:
    from xtool.config import DiskConfig, DomainConfig, VifConfig
    from xtool.config.devices import Rate

#: What xl gives a guest that does not say (``model``).
DEFAULT_MODEL = "rtl8139"
_UNKNOWN = TargetFacts("missing")


def plan_disks(config: DomainConfig, targets: Mapping[str, TargetFacts]) -> tuple[Vbd, ...]:
    """The paravirtual disks. An HVM guest's CD drives are emulated only: its frontends ignore others.

    Raises as ``plan_disk``, and ``UsageError`` for limits on what is emulated only.
    """
    for disk in config.disks:
        emulated = config.type == "hvm" and (disk.cdrom or config.xen_platform_pci is False)
        if emulated and disk.only_xtool:
            raise UsageError(
                f"disk {disk.vdev}: {disk.only_xtool[0]} has no effect on a drive that QEMU emulates",
                hint=f"remove {disk.only_xtool[0]}",
            )
    if config.type == "hvm" and config.xen_platform_pci is False:
        return ()
    if config.type != "hvm":
        return tuple(plan_disk(disk, targets) for disk in config.disks)
    planned = [(disk, plan_disk(disk, targets)) for disk in config.disks if not disk.cdrom]
    for disk, vbd in planned:
        _one_reader(disk, vbd)
    return tuple(vbd for _, vbd in planned)


def _one_reader(disk: DiskConfig, vbd: Vbd) -> None:
    """Raw data may be an emulated disk's as well. Of other formats each reader has tables in memory."""
    if vbd.kind == "xtool" and (disk.format != "raw" or disk.remote) and emulated_place(disk.vdev):
        raise UsageError(
            f"disk {disk.vdev}: QEMU emulates it, and cannot share {disk.target} with backendtype: xtool",
            hint="use backendtype: qdisk, or a vdev that is not emulated, such as xvde",
        )


def plan_disk(disk: DiskConfig, targets: Mapping[str, TargetFacts]) -> Vbd:
    """Raises ``HostError`` and ``UsageError`` as ``choose_backend`` does."""
    _served_here("disk", disk.vdev, disk.backend)
    facts = targets.get(disk.target, _UNKNOWN) if disk.target else TargetFacts("none")
    choice = choose_backend(disk, facts)
    return Vbd(
        vdev=disk.vdev,
        devid=disk.number,
        target=disk.target,
        format=disk.format,
        kind=choice.kind.name,
        reason=choice.reason,
        readonly=disk.readonly,
        cdrom=disk.cdrom,
        discard=disk.discard,
        direct_io_safe=disk.direct_io_safe,
        trusted=disk.trusted,
        shared=disk.shared,
        script=disk.script,
        loop=choice.kind.server == "kernel" and facts.kind == "file" and not disk.script,
        bytes_per_second=disk.bytes_per_second,
        ops_per_second=disk.ops_per_second,
        persistent=disk.persistent,
    )


def plan_consoles(config: DomainConfig) -> tuple[Console, ...]:
    """The consoles we serve: 0 if we are asked to, and the channels, from 1 on."""
    first = (Console(0),) if config.console_backend == "xtool" else ()
    return first + tuple(
        Console(number, channel.name, channel.connection, channel.path)
        for number, channel in enumerate(config.channels, 1)
    )


def emulated_disks(config: DomainConfig) -> tuple[EmulatedDisk, ...]:
    """Where QEMU puts the disks: xvda and hda are the first IDE disk, sda the first SCSI disk.

    A disk beyond the emulated buses is paravirtual only. Raises ``UsageError`` for a CD drive there, and
    for any disk when the guest gets no paravirtual ones.
    """
    found = []
    for disk in config.disks:
        place = emulated_place(disk.vdev, config.hdtype)
        if place is None:
            if disk.cdrom or config.xen_platform_pci is False:
                raise UsageError(
                    f"disk {disk.vdev} has no place among the emulated disks",
                    hint="use hda to hdd (IDE) or sda to sdg (SCSI)",
                )
            continue
        if disk.script:
            continue  # what the script makes is not known before it runs
        if disk.remote:
            raise UsageError(
                f"disk {disk.vdev}: QEMU emulates disks of files and block devices, not of {disk.target}",
                hint="make it a file" if disk.cdrom else "use a vdev that is not emulated, such as xvde",
            )
        bus, index = place
        found.append(
            EmulatedDisk(
                index=index,
                path=disk.target,
                format=disk.format,
                cdrom=disk.cdrom,
                readonly=disk.readonly,
                bus=bus,
            )
        )
    return tuple(found)


def plan_vifs(config: DomainConfig, uuid: str) -> tuple[Vif, ...]:
    """The interfaces, each with its number and address; paravirtual, emulated, or both (HVM)."""
    taken = {vif.devid for vif in config.vifs if vif.devid is not None}
    planned: list[Vif] = []
    for vif in config.vifs:
        devid = vif.devid if vif.devid is not None else lowest_free(taken)
        taken.add(devid)
        planned.append(plan_vif(vif, uuid, devid, config.type, pv=config.xen_platform_pci is not False))
    macs = [vif.mac for vif in planned]
    for mac in macs:
        if macs.count(mac) > 1:
            raise UsageError(f"two interfaces have the MAC address {mac}", hint="give one of them a mac")
    return tuple(planned)


def plan_vif(
    vif: VifConfig, uuid: str, devid: int, guest: str, *, pv: bool = True, hotplug: bool = False
) -> Vif:
    """One interface. ``hotplug``: the guest runs, so nothing emulated can be added any more."""
    _served_here("vif", str(devid), vif.backend)
    emulated = guest == "hvm" and not hotplug and vif.network != "user"
    wanted = vif.type or ("ioemu" if emulated else "vif")
    if wanted == "ioemu" and (hotplug or guest != "hvm"):
        raise UsageError("an emulated network card can only be there when an hvm guest starts")
    if wanted == "vif" and not pv:
        raise UsageError(
            "type: vif is a paravirtual interface, which xen_platform_pci: false rules out",
            hint="remove one of them",
        )
    model = (vif.model or DEFAULT_MODEL) if wanted == "ioemu" else None
    if model is not None and model not in NIC_MODELS:
        raise UsageError(f"unknown network card {model}", hint="known: " + ", ".join(NIC_MODELS))
    if vif.vifname and len(vif.vifname.encode()) > NAME_MAX - (4 if model else 0):
        raise UsageError(f"vifname {vif.vifname} is too long", hint="Linux allows 15 bytes, 4 for -emu")
    if not vif.script:
        for key in ("ip", "gatewaydev", "vlan"):
            if getattr(vif, key):
                raise UsageError(
                    f"vif {devid}: {key} has no effect without a script",
                    hint=f"remove {key}, or set script: (such as vif-bridge or vif-route)",
                )
    choice = choose_vif_backend(vif)
    return Vif(
        devid=devid,
        mac=vif.mac or stable_mac(uuid, devid),
        bridge="" if vif.network == "user" else vif.bridge or DEFAULT_BRIDGE,
        kind=choice.kind.name,
        reason=choice.reason,
        mtu=vif.mtu,
        rate=credit(vif.rate_limit),
        name=vif.vifname,
        model=model,
        pv=pv,
        ip=vif.ip,
        gatewaydev=vif.gatewaydev,
        vlan=vif.vlan,
        script=vif.script,
        trusted=vif.trusted,
        network=vif.network,
        forwards=tuple((vif.forwards or "").split()),
        mac_filter=vif.mac_filter,
        queues=vif.queues or 1,
        rate_in=credit(vif.rate_in_limit),
    )


def credit(rate: Rate | None) -> tuple[int, int] | None:
    """Bytes credited each interval, and the interval in µs: what ``rate`` nodes hold."""
    return (rate.bytes * rate.interval // 1_000_000, rate.interval) if rate else None


def emulated_nics(vifs: Sequence[Vif], domid: int) -> tuple[EmulatedNic, ...]:
    """QEMU's cards; their tap devices are named after the domain."""
    return tuple(
        EmulatedNic(index=vif.devid, mac=vif.mac, tap=vif.tap(domid), model=vif.model)
        for vif in vifs
        if vif.model is not None
    )


def lowest_free(taken: Iterable[int | None]) -> int:
    used = set(taken)
    return next(number for number in range(len(used) + 1) if number not in used)


def _served_here(what: str, name: str, backend: str | None) -> None:
    if backend not in (None, "0", "Domain-0"):
        raise UsageError(
            f"{what} {name}: backends in other domains than 0 do not work yet (backend: {backend})",
            hint="leave backend out",
        )
