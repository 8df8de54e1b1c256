"""From a configuration and what is known of the host to a decided plan. Pure.

Every default and every refusal is here, before the first hypercall.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import localtime, time
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from xtool.builder.spec import BuildSpec, Kind
from xtool.devicemodel.qdisk import QdiskSpec
from xtool.devicemodel.spec import DeviceModelSpec, VncSpec, default_platform_pci, default_videoram
from xtool.devices.backendkinds import TargetFacts
from xtool.devices.consoles import Console
from xtool.devices.declare import HvmNodes
from xtool.devices.vbd import Vbd
from xtool.devices.vif import Vif
from xtool.devices.xenbus import DeviceId
from xtool.errors import HostError, UsageError
from xtool.toolstack import deviceplan
from xtool.toolstack.host import HostFacts
from xtool.toolstack.scheduleplan import plan_schedule
from xtool.toolstack.seed import Seed, with_seed

if TYPE_CHECKING:
    from xtool.config import DomainConfig

_TSC_MODES = {"default": 0, "always_emulate": 1, "native": 2}
_DEFAULT_EVENT_CHANNELS = 1023


@dataclass(frozen=True)
class DomainPlan:
    """One domain, decided. ``build`` is for the builder, ``devicemodel`` for QEMU (HVM, and disks that QEMU
    serves), ``hvm`` for what hvmloader reads in xenstore. ``disks`` are the paravirtual ones."""

    name: str
    uuid: str
    kind: Kind
    build: BuildSpec
    devicemodel: DeviceModelSpec | QdiskSpec | None
    devicemodel_binary: str | None
    hvm: HvmNodes | None
    vnc_password: str | None
    disks: tuple[Vbd, ...] = ()
    vifs: tuple[Vif, ...] = ()
    #: The consoles we serve ourselves.
    consoles: tuple[Console, ...] = ()
    #: The cloud-init seed, which ``disks`` or the device model has as one of its drives.
    seed: Seed | None = None

    def devices(self, domid: int) -> list[DeviceId]:
        """Its paravirtual devices, as those of domain ``domid``."""
        found = [disk.id(domid) for disk in self.disks] + [vif.id(domid) for vif in self.vifs if vif.pv]
        return found + [console.id(domid) for console in self.consoles]


def plan(config: DomainConfig, facts: HostFacts, uuid: UUID) -> DomainPlan:
    """Decide everything. Raises ``HostError`` for what this host cannot do, ``UsageError`` for what no
    host could do with this configuration."""
    kind: Kind = config.type  # type: ignore[assignment]
    _host_can(kind, facts)
    config, seed = with_seed(config, uuid)
    targets = {**facts.targets, seed.path: TargetFacts("file")} if seed else facts.targets
    disks = deviceplan.plan_disks(config, targets)
    vifs = deviceplan.plan_vifs(config, str(uuid))
    devicemodel: DeviceModelSpec | QdiskSpec | None = None
    nodes: HvmNodes | None = None
    if kind == "hvm":
        build, devicemodel, nodes = _hvm(config, facts, uuid, disks, vifs)
    else:
        build = _direct(config)
        if any(disk.backend_kind.server == "qemu" for disk in disks):
            devicemodel = QdiskSpec(config.name, str(uuid), extra=config.device_model_args_pv)
        elif config.device_model_args_pv:
            raise UsageError(
                "device_model_args_pv has no effect: QEMU serves none of this guest's disks",
                hint="remove it, or give a disk backendtype: qdisk",
            )
    return DomainPlan(
        name=config.name,
        uuid=str(uuid),
        kind=kind,
        build=_with_common(build, config, facts, uuid),
        devicemodel=devicemodel,
        devicemodel_binary=config.device_model_override,
        hvm=nodes,
        vnc_password=config.vncpasswd if config.vnc else None,
        disks=disks,
        vifs=vifs,
        consoles=deviceplan.plan_consoles(config),
        seed=seed,
    )


def _host_can(kind: Kind, facts: HostFacts) -> None:
    if kind == "pv" and not facts.pv:
        raise HostError(
            f"Xen {facts.xen_version} on this host does not run 64-bit PV guests",
            hint="use type: pvh or type: hvm",
        )
    if kind != "pv" and not facts.hvm:
        raise HostError(
            f"this host cannot run {kind} guests: Xen found no hardware virtualisation (VT-x or SVM)",
            hint="enable it in the firmware set-up, or use type: pv",
        )


def _direct(config: DomainConfig) -> BuildSpec:
    """PV and PVH: the guest's own kernel."""
    return BuildSpec(
        kind=config.type,  # type: ignore[arg-type]
        handle=b"",
        memory=config.memory,
        max_memory=config.maxmem,
        kernel=config.kernel or "",
        ramdisk=config.ramdisk,
        cmdline=config.cmdline or "",
        acpi=config.type == "pvh" and config.acpi,
    )


def _hvm(
    config: DomainConfig, facts: HostFacts, uuid: UUID, disks: tuple[Vbd, ...], vifs: tuple[Vif, ...]
) -> tuple[BuildSpec, DeviceModelSpec, HvmNodes]:
    """HVM: hvmloader, a firmware, and QEMU for everything else."""
    from xtool.config.hvmwords import smbios_nodes, viridian_mask

    videoram = config.videoram if config.videoram is not None else default_videoram(config.vga)
    if config.vga == "none":
        videoram = 0
    loader, firmware, bios = _firmware(config, facts)
    build = BuildSpec(
        kind="hvm",
        handle=b"",
        memory=config.memory,
        max_memory=config.maxmem,
        kernel=loader,
        firmware=firmware,
        firmware_is_bios=bios == "seabios",
        direct_kernel=config.kernel,
        ramdisk=config.ramdisk if config.kernel else None,
        cmdline=config.cmdline or "",
        video_memory=videoram,
        acpi=config.acpi,
        apic=config.apic,
        pae=config.pae,
        hpet=config.hpet,
        viridian=viridian_mask(config.viridian),
        mmio_hole=config.mmio_hole,
    )
    devicemodel = DeviceModelSpec(
        name=config.name,
        uuid=str(uuid),
        memory=config.maxmem,
        videoram=videoram,
        vga=config.vga,
        vcpus=config.vcpus,
        maxvcpus=config.maxvcpus,
        kernel=config.kernel,
        ramdisk=config.ramdisk,
        cmdline=config.cmdline if config.kernel else None,
        boot=config.boot or "cd",
        disks=deviceplan.emulated_disks(config),
        # Their tap devices get the domain's number when it has one.
        nics=deviceplan.emulated_nics(vifs, 1),
        serial=config.serial,
        vnc=_vnc(config),
        usb=config.usb or bool(config.usbdevice),
        usbdevices=config.usbdevice,
        usb_version=config.usbversion,
        keymap=config.keymap,
        acpi=config.acpi,
        xen_platform_pci=default_platform_pci(has_pv_devices=bool(disks) or any(vif.pv for vif in vifs))
        if config.xen_platform_pci is None
        else config.xen_platform_pci,
        max_ram_below_4g=None if config.mmio_hole is None else (1 << 32) - config.mmio_hole,
        extra=(*config.device_model_args, *config.device_model_args_hvm),
    )
    nodes = HvmNodes(
        firmware=bios,
        acpi=config.acpi,
        acpi_s3=config.acpi_s3,
        acpi_s4=config.acpi_s4,
        mmio_hole=config.mmio_hole,
        # A new one each time: what the guest derived from the old one must not be used twice.
        generation_id=uuid4().int if config.ms_vm_genid == "generate" else None,
        bios_strings=smbios_nodes(config.smbios),
    )
    return build, devicemodel, nodes


def _firmware(config: DomainConfig, facts: HostFacts) -> tuple[str, str | None, str]:
    """``(what Xen starts, the firmware it installs, its name)``."""
    wanted = config.firmware or "seabios"
    if wanted.startswith("/"):
        return wanted, None, "seabios"
    loader = config.firmware_override or facts.hvmloader
    if loader is None:
        raise HostError(
            "hvmloader is missing on this host; HVM guests start with it",
            hint="install it (Debian: xen-utils), or say where it is with firmware_override:",
        )
    bios = {"bios": "seabios", "uefi": "ovmf"}.get(wanted, wanted)
    path = facts.firmware.get(bios)
    if path is None:
        package = {"seabios": "seabios", "ovmf": "ovmf"}.get(bios, bios)
        raise HostError(
            f"the firmware {bios} is missing on this host", hint=f"install it (Debian: {package})"
        )
    return loader, path, bios


def _vnc(config: DomainConfig) -> VncSpec | None:
    if not config.vnc:
        return None
    display = config.vnc_display
    unused = config.vncunused if config.vncunused is not None else display is None
    return VncSpec(config.vnc_host, display or 0, unused, bool(config.vncpasswd))


def _with_common(build: BuildSpec, config: DomainConfig, facts: HostFacts, uuid: UUID) -> BuildSpec:
    from dataclasses import replace

    from xtool.config.hvmwords import TIMER_MODES

    if build.kind != "pv" and config.maxvcpus > 128:
        raise UsageError(f"a {build.kind} guest can have 128 vCPUs, not {config.maxvcpus}")
    if config.hap and not facts.hap:
        raise HostError("hap: this host's CPUs have no nested paging", hint="leave hap out")
    offset = config.rtc_timeoffset
    if config.localtime:
        offset += localtime(time()).tm_gmtoff
    return replace(
        build,
        handle=uuid.bytes,
        vcpus=config.vcpus,
        max_vcpus=config.maxvcpus,
        hap=facts.hap if config.hap is None else config.hap,
        nested=config.nestedhvm,
        paging_pool=config.shadow_memory,
        max_event_channels=config.max_event_channels or _DEFAULT_EVENT_CHANNELS,
        max_grant_frames=-1 if config.max_grant_frames is None else config.max_grant_frames,
        max_maptrack_frames=-1 if config.max_maptrack_frames is None else config.max_maptrack_frames,
        grant_version=min(config.max_grant_version or 2, 2 if facts.grant_v2 else 1),
        timer_mode=TIMER_MODES.index(config.timer_mode),
        schedule=plan_schedule(config, facts.schedule),
        time_offset=offset,
        tsc_mode=_tsc_mode(config),
    )


def _tsc_mode(config: DomainConfig) -> int:
    if config.tsc_mode not in _TSC_MODES:
        raise UsageError(f"Xen no longer has tsc_mode: {config.tsc_mode}", hint="use default")
    return _TSC_MODES[config.tsc_mode]
