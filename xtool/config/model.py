"""Every key of a domain file: its type, its default, the guests it is for, and what it means.

This is the one place a key is described. ``docs/configuration.md`` is generated from it, and the checks
of ``load.py`` read ``types`` and ``later`` from it. Names are xl.cfg's; sizes are bytes here, MiB in the
file. ``disk`` and ``vif`` are the attributes ``disks`` and ``vifs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic.fields import FieldInfo

from xtool.config.devices import ChannelConfig, DiskConfig, VifConfig
from xtool.config.field import ALL, HVM, PV, PVH, key
from xtool.config.hvmwords import TIMER_MODES, to_smbios, to_viridian
from xtool.config.ready import ReadyConfig, to_depends
from xtool.config.rules import broken_rules, refuse_all
from xtool.config.seed import CloudInitConfig
from xtool.config.units import (
    GIB,
    MAX_DISPLAY,
    MIB,
    TIB,
    Bool,
    Int,
    Path,
    Program,
    Size,
    Text,
    Words,
    between,
    refused,
    shown,
    split_listen,
    to_boot,
    to_choice,
    to_cpus,
    to_firmware,
    to_listen,
    to_name,
    to_word,
)

#: What can be done with a domain that ended. xl also has those in ``LATER_ACTIONS``.
ACTIONS = ("destroy", "restart", "rename-restart", "preserve", "coredump-destroy", "coredump-restart")
LATER_ACTIONS = ("soft-reset",)
DM_ACTIONS = ("preserve", "pause", "destroy", "restart")
FIRMWARES = ("bios", "seabios", "ovmf", "uefi")


def _to_uuid(value: Any) -> UUID:
    if isinstance(value, UUID):
        return value
    word = to_word(value).strip()
    try:
        return UUID(word)
    except ValueError:
        raise refused(f"{shown(word)} is not a uuid", "write it as 8-4-4-4-12 hexadecimal digits") from None


def _to_list(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise refused(f"a list is wanted, not {shown(value)}", "begin each entry with a dash: - vdev: xvda")
    return value


Uuid = Annotated[UUID, BeforeValidator(_to_uuid)]
Action = Annotated[str, BeforeValidator(to_choice(ACTIONS, later=LATER_ACTIONS))]
Memory = Annotated[Size, AfterValidator(between(MIB, 16 * TIB, MIB, " MiB"))]
VideoMemory = Annotated[Size, AfterValidator(between(0, GIB, MIB, " MiB"))]
Count = Annotated[Int, AfterValidator(between(1, 2**31 - 1))]
List = BeforeValidator(_to_list)


class FileReference(NamedTuple):
    """A file the domain needs: the key that names it (``disk[0].target``), its absolute path, and
    ``kernel``, ``ramdisk``, ``firmware``, ``disk`` or ``devicemodel``."""

    key: str
    path: str
    kind: str


class DomainConfig(BaseModel):
    """One domain as its file describes it. Frozen; made by ``load_config`` and ``parse_config``."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True)

    name: Annotated[str, BeforeValidator(to_name)] = key(
        "the domain's name, unique on its host", "text", ..., shown_default="required"
    )
    type: Annotated[str, BeforeValidator(to_choice(ALL))] = key(
        "the kind of guest: pv, pvh or hvm", "choice", ..., shown_default="required"
    )
    uuid: Uuid | None = key("the domain's uuid", "uuid", shown_default="made up")
    memory: Memory = key("memory the guest starts with", "size", ..., shown_default="required")
    maxmem: Memory = key("memory the guest may grow to", "size", 0, shown_default="memory")
    vcpus: Annotated[Int, AfterValidator(between(1, 512))] = key("vCPUs online at start", "number", 1)
    maxvcpus: Annotated[Int, AfterValidator(between(1, 512))] = key(
        "vCPUs the guest may bring online", "number", 0, shown_default="vcpus"
    )
    cpus: Annotated[str | tuple[str, ...], BeforeValidator(to_cpus)] | None = key(
        "CPUs the vCPUs may run on: 0-3,^1 or nodes:0 or all; a list has one entry per vCPU",
        "text or list",
        shown_default="all",
    )
    cpus_soft: Annotated[str | tuple[str, ...], BeforeValidator(to_cpus)] | None = key(
        "CPUs the vCPUs should run on, if they can; written as cpus",
        "text or list",
        shown_default="all",
    )
    pool: Text | None = key("the CPU pool it runs in: name or number", "text", shown_default="Pool-0")
    cpu_weight: Annotated[Int, AfterValidator(between(1, 65535))] | None = key(
        "share of CPU time against other domains", "number", shown_default="the scheduler's (256)"
    )
    cap: Annotated[Int, AfterValidator(between(0, 51200))] = key(
        "most CPU time it may take, percent of one CPU; 0 is no limit", "number", 0
    )
    period: Annotated[Int, AfterValidator(between(10, 2**32 - 1))] | None = key(
        "under rtds: each vCPU gets its budget once in so many microseconds", "number", shown_default="10000"
    )
    budget: Annotated[Int, AfterValidator(between(10, 2**32 - 1))] | None = key(
        "under rtds: microseconds of CPU time in each period", "number", shown_default="4000"
    )
    extratime: Bool | None = key(
        "under rtds: may the vCPUs use time that nobody wants?", "switch", shown_default="false"
    )

    kernel: Path | None = key("kernel to boot directly", "path", shown_default="required for pv, pvh")
    ramdisk: Path | None = key("initial ramdisk for the kernel", "path")
    cmdline: Text | None = key("the kernel's command line", "text")
    firmware: Annotated[str, BeforeValidator(to_firmware(FIRMWARES))] | None = key(
        "bios or seabios; uefi or ovmf; or a file to start in hvmloader's place",
        "choice or path",
        types=(HVM,),
        shown_default="bios",
    )
    firmware_override: Path | None = key(
        "hvmloader to use instead of the host's", "path", types=(HVM,), shown_default="the host's"
    )
    boot: Annotated[str, BeforeValidator(to_boot)] | None = key(
        "what to try in order: c disk, d CD, n network", "text", types=(HVM,), shown_default="cd"
    )

    disks: Annotated[tuple[DiskConfig, ...], List] = key("disks, see below", "list", (), alias="disk")
    vifs: Annotated[tuple[VifConfig, ...], List] = key(
        "network interfaces, see below", "list", (), alias="vif"
    )
    channels: Annotated[tuple[ChannelConfig, ...], List] = key(
        "consoles for programs, see below", "list", (), alias="channel"
    )
    cloud_init: CloudInitConfig | None = key(
        "a cloud-init seed made for the guest, see below", "map", shown_default="none"
    )
    depends_on: Annotated[tuple[str, ...], BeforeValidator(to_depends)] = key(
        "domains that apply starts before this one, and waits for until they are ready", "text or list", ()
    )
    ready: ReadyConfig | None = key(
        "how apply knows that the guest is ready, see below", "map", shown_default="none"
    )
    console_backend: Annotated[str, BeforeValidator(to_choice(("xenconsoled", "xtool")))] = key(
        "who serves the console: xenconsoled, or xtool, which keeps a log and takes several viewers",
        "choice",
        "xenconsoled",
    )
    hdtype: Annotated[str, BeforeValidator(to_choice(("ide", "ahci")))] = key(
        "the controller of the emulated disks and CD drives; firmware reads far faster from ahci",
        "choice",
        "ide",
        (HVM,),
    )
    serial: Words = key("serial ports, QEMU's notation; pty gives a console", "text or list", (), (HVM,))

    vnc: Bool = key("a VNC display", "switch", False, (HVM,))
    vnclisten: Annotated[str, BeforeValidator(to_listen)] = key(
        "address[:display] it listens on", "text", "127.0.0.1", (HVM,)
    )
    vncdisplay: Annotated[Int, AfterValidator(between(0, MAX_DISPLAY))] | None = key(
        "display number (port 5900 + it)", "number", None, (HVM,), shown_default="a free one"
    )
    vncunused: Bool | None = key(
        "take a free display number", "switch", None, (HVM,), shown_default="true without vncdisplay"
    )
    vncpasswd: Text | None = key("its password, 8 characters at most", "text", None, (HVM,), secret=True)
    keymap: Text | None = key("keyboard layout, such as de", "text", None, (HVM,))
    vga: Annotated[str, BeforeValidator(to_choice(("cirrus", "stdvga", "none"), later=("qxl",)))] = key(
        "graphics card: cirrus, stdvga, none", "choice", "cirrus", (HVM,)
    )
    videoram: VideoMemory | None = key(
        "the card's memory", "size", None, (HVM,), shown_default="8 MiB, stdvga 16 MiB"
    )
    usb: Bool = key("an emulated USB bus", "switch", False, (HVM,))
    usbversion: Annotated[Int, AfterValidator(between(1, 3))] | None = key(
        "the USB bus's controller: 1 UHCI, 2 EHCI, 3 xHCI", "number", None, (HVM,), shown_default="1"
    )
    usbdevice: Words = key("emulated USB devices, such as tablet", "text or list", (), (HVM,))
    device_model_override: Program | None = key(
        "QEMU to run", "path", None, (HVM,), shown_default="the host's"
    )
    device_model_args: Words = key("more arguments for QEMU", "text or list", (), (HVM,))
    device_model_args_hvm: Words = key("the same, for hvm guests", "text or list", (), (HVM,))
    device_model_args_pv: Words = key(
        "the same, for the QEMU that serves disks of pv and pvh guests", "text or list", (), (PV, PVH)
    )

    on_poweroff: Action = key("what to do when it powered off", "action", "destroy")
    on_reboot: Action = key("what to do when it asks for a reboot", "action", "restart")
    on_crash: Action = key("what to do when it crashed", "action", "destroy")
    on_watchdog: Action = key("what to do when its watchdog fired", "action", "destroy")
    on_soft_reset: Action = key("what to do when it asks for a soft reset", "action", "destroy")
    on_dm_exit: Annotated[str, BeforeValidator(to_choice(DM_ACTIONS))] = key(
        "what to do when its QEMU dies: preserve (it runs on without), pause, destroy or restart",
        "choice",
        "preserve",
    )

    acpi: Bool = key("ACPI tables", "switch", True, (PVH, HVM))
    acpi_s3: Bool = key("suspend to memory in its ACPI tables", "switch", True, (HVM,))
    acpi_s4: Bool = key("suspend to disk in its ACPI tables", "switch", True, (HVM,))
    apic: Bool = key("a local APIC", "switch", True, (PVH, HVM))
    pae: Bool = key("physical address extension", "switch", True, (HVM,))
    hpet: Bool = key("a high precision event timer", "switch", True, (HVM,))
    hap: Bool | None = key("nested paging", "switch", None, (PVH, HVM), shown_default="if the host has it")
    nestedhvm: Bool = key("hardware virtualisation inside the guest", "switch", False, (PVH, HVM))
    shadow_memory: Annotated[Size, AfterValidator(between(0, TIB, MIB, " MiB"))] | None = key(
        "memory for shadow or nested page tables", "size", None, (PVH, HVM), shown_default="by size"
    )
    xen_platform_pci: Bool | None = key(
        "the Xen platform PCI device; a Linux guest that sees it gives up its emulated disks",
        "switch",
        None,
        (HVM,),
        shown_default="with paravirtual devices only",
    )
    viridian: Annotated[tuple[str, ...], BeforeValidator(to_viridian)] = key(
        "enlightenments for Windows: true, or a list of groups",
        "switch or list",
        (),
        (HVM,),
        shown_default="false",
    )
    timer_mode: Annotated[str, BeforeValidator(to_choice(TIMER_MODES))] = key(
        "how ticks that came too late are given: " + ", ".join(TIMER_MODES),
        "choice",
        "no_delay_for_missed_ticks",
        (PVH, HVM),
    )
    ms_vm_genid: Annotated[str, BeforeValidator(to_choice(("generate", "none")))] = key(
        "Windows' VM generation id: generate one at each start, or none", "choice", "generate", (HVM,)
    )
    smbios: Annotated[tuple[str, ...], BeforeValidator(to_smbios)] = key(
        "SMBIOS strings: a map, or a list of name=value", "map or list", (), (HVM,)
    )
    mmio_hole: Annotated[Size, AfterValidator(between(256 * MIB, 3840 * MIB, MIB, " MiB"))] | None = key(
        "the hole in memory below 4 GiB, for PCI devices", "size", None, (HVM,), shown_default="256 MiB"
    )
    tsc_mode: Annotated[
        str, BeforeValidator(to_choice(("default", "always_emulate", "native", "native_paravirt")))
    ] = key("how the TSC reads: default, always_emulate, native, native_paravirt", "choice", "default")
    localtime: Bool = key("the guest's clock shows local time, not UTC", "switch", False)
    rtc_timeoffset: Annotated[Int, AfterValidator(between(-(2**31), 2**31 - 1))] = key(
        "seconds to add to the guest's clock", "seconds", 0
    )
    max_grant_frames: Count | None = key("grant table frames", "number", shown_default="64")
    max_grant_version: Annotated[Int, AfterValidator(between(1, 2))] | None = key(
        "grant table version", "number", shown_default="the host's"
    )
    max_maptrack_frames: Annotated[Int, AfterValidator(between(0, 2**31 - 1))] | None = key(
        "frames for tracking grants it maps", "number", shown_default="1024"
    )
    max_event_channels: Count | None = key("event channels", "number", shown_default="1023")

    @model_validator(mode="after")
    def _whole(self) -> DomainConfig:
        refuse_all(broken_rules(self))
        return self

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, data: Any) -> Any:
        """Defaults that are another key's value."""
        if isinstance(data, dict):
            data = {"maxmem": data.get("memory", 1), "maxvcpus": data.get("vcpus", 1), **data}
        return data

    @property
    def vnc_host(self) -> str:
        """The address of ``vnclisten``."""
        return split_listen(self.vnclisten)[0]

    @property
    def vnc_display(self) -> int | None:
        """The display number of ``vncdisplay`` or ``vnclisten``, None for a free one."""
        return self.vncdisplay if self.vncdisplay is not None else split_listen(self.vnclisten)[1]

    def file_references(self) -> list[FileReference]:
        """Every file this machine must have for the domain. A program without a slash is none."""
        found = [
            FileReference(name, path, kind)
            for name, path, kind in (
                ("kernel", self.kernel, "kernel"),
                ("ramdisk", self.ramdisk, "ramdisk"),
                ("firmware", self.firmware, "firmware"),
                ("firmware_override", self.firmware_override, "firmware"),
                ("device_model_override", self.device_model_override, "devicemodel"),
            )
            if path and path.startswith("/")
        ]
        for index, disk in enumerate(self.disks):
            if disk.target and not disk.script and not disk.remote:  # a script's target need not be a path
                found.append(FileReference(f"disk[{index}].target", disk.target, "disk"))
        return found

    def with_files(self, paths: Mapping[str, str]) -> DomainConfig:
        """The same domain with files elsewhere: old path -> new path; others stay."""
        names = ("kernel", "ramdisk", "firmware", "firmware_override", "device_model_override")
        update: dict[str, Any] = {n: paths.get(p, p) for n in names if (p := getattr(self, n))}
        update["disks"] = tuple(
            disk.model_copy(update={"target": paths.get(disk.target, disk.target)}) if disk.target else disk
            for disk in self.disks
        )
        return self.model_copy(update=update)

    def to_dict(self) -> dict[str, Any]:
        """The file's keys and plain values (sizes in MiB), what is default left out; JSON can hold it."""
        plain: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in KEY_OF:
                value = [device.to_dict() for device in value]
            elif name in SIZES and value is not None:
                value //= MIB
            elif isinstance(value, (CloudInitConfig, ReadyConfig)):
                value = value.to_dict()
            elif isinstance(value, UUID):
                value = str(value)
            elif isinstance(value, tuple):
                value = list(value)
            if name in ("name", "type", "memory") or getattr(self, name) != default_of(self, name):
                plain[KEY_OF.get(name, name)] = value
        return plain

    def to_yaml(self) -> str:
        """The same as YAML, which ``parse_config`` reads back to an equal config."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100))


SIZES = frozenset(("memory", "maxmem", "videoram", "shadow_memory", "mmio_hole"))
KEY_OF = {"disks": "disk", "vifs": "vif", "channels": "channel"}
FIELDS: dict[str, FieldInfo] = {KEY_OF.get(n, n): f for n, f in DomainConfig.model_fields.items()}
#: Keys that end up in ``cmdline``.
MERGED = {
    "root": "the kernel's root device: root=... at the front of cmdline",
    "extra": "more of the kernel's command line",
}


def default_of(config: DomainConfig, name: str) -> Any:
    if name == "maxmem":
        return config.memory
    if name == "maxvcpus":
        return config.vcpus
    return DomainConfig.model_fields[name].default


def guests_of(name: str, which: str = "types") -> list[str]:
    """The guest types key ``name`` is for; with ``which="later"`` those xtool does not act upon it for."""
    if name in MERGED:
        return list(ALL) if which == "types" else []
    return about(name, which).split()


def about(name: str, what: str) -> str:
    """``kind``, ``types``, ``later`` or ``default`` of key ``name``, as ``key()`` noted it."""
    extra = FIELDS[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra[what])
