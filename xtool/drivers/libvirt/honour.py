"""What a domain file asks for and libvirt's driver cannot give: refused key by key, never left out. Pure.

``problems`` gives ``ConfigError``s with a ``loc``; the command line adds file, line and column. A key that is
written with the value it has anyway is no problem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from xtool.config.devices import DiskConfig, VifConfig
from xtool.config.model import DomainConfig
from xtool.config.problems import ConfigErrors
from xtool.config.rules import Broken
from xtool.drivers.libvirt.facts import Facts
from xtool.drivers.libvirt.places import place
from xtool.errors import ConfigError

#: Image formats QEMU serves through libvirt, and libvirt's names.
FORMATS = {"raw": "raw", "qcow": "qcow", "qcow2": "qcow2", "qed": "qed", "vhd": "vpc", "vmdk": "vmdk"}
USB_DEVICES = ("tablet", "mouse", "keyboard")
SERIAL = re.compile(r"pty|null|file:(/.+)|unix:(/[^,]+)((?:,(?:server|server=on|nowait|wait=off))*)")
#: Cards libvirt's schema takes by pattern; these are QEMU's.
_MODEL = re.compile(r"[a-zA-Z0-9_-]{1,32}")
#: In attributes, tabs and line ends would come back as blanks.
_UNWRITABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff\\ufffe\\uffff]")
_INTERFACE = re.compile(r"[a-zA-Z0-9_.:-]+")
_CPUSET = re.compile(r"\^?\d+(-\d+)?(,\^?\d+(-\d+)?)*")

#: Keys of which another value than the default has no effect there.
_NOT_QEMU = {
    "firmware_override": "there is no hvmloader",
    "hap": "libvirt leaves it to KVM",
    "pae": "QEMU's processors have it",
    "nestedhvm": "libvirt leaves it to the CPU model",
    "shadow_memory": "there is no shadow pool",
    "xen_platform_pci": "there is no Xen",
    "tsc_mode": "the clock is KVM's or QEMU's",
    "max_grant_frames": "there are no grants",
    "max_event_channels": "there are no event channels",
    "on_dm_exit": "the guest ends with its QEMU",
}
_UNWRITTEN = "xtool does not write it as domain XML yet"
_NOWHERE = {
    "cpu_weight": "libvirt's weights are of another kind",
    "cap": "libvirt's limits are of another kind",
    "cpus_soft": "libvirt has no soft affinity",
    "pool": "libvirt has no CPU pools",
    "period": "libvirt's periods are of another kind",
    "budget": "libvirt's quotas are of another kind",
    "extratime": "libvirt has no such setting",
    "max_maptrack_frames": "libvirt has no such setting",
    "on_watchdog": "libvirt's watchdogs are devices",
    "on_dm_exit": "libvirt decides what becomes of a guest without its device model",
    "on_soft_reset": "libvirt has no such event",
    "cloud_init": "the seed is made by Xen's own driver",
    "depends_on": "xtool apply needs Xen's own driver",
    "ready": "xtool apply needs Xen's own driver",
    "usbversion": "the kind of machine says which controller it is",
    "device_model_args_pv": "libvirt hands arguments to an hvm guest's QEMU only",
    "acpi_s3": _UNWRITTEN,
    "acpi_s4": _UNWRITTEN,
    "viridian": _UNWRITTEN,
    "smbios": _UNWRITTEN,
    "timer_mode": "libvirt has no such setting",
    "mmio_hole": "libvirt has no such setting",
    "max_grant_version": "libvirt has no such setting",
}
_NOT_XEN = {
    "shadow_memory": "libvirt has no such setting",
    "hap": "libvirt has no such setting",
    "on_dm_exit": "libvirt has no such setting",
}
#: ``none`` is what libvirt does unasked; ``generate``, which is the default, stands in every file.
_ALL_THE_SAME = ("ms_vm_genid",)
#: What libvirt's files can say of a domain's end, and what of a crash alone.
_ENDS = ("destroy", "restart", "rename-restart", "preserve")
_CORE_DUMPS = ("coredump-destroy", "coredump-restart")


def check(config: DomainConfig, facts: Facts) -> None:
    """Raises ``ConfigError`` or ``ConfigErrors``."""
    found = problems(config, facts)
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigErrors(found)


def problems(config: DomainConfig, facts: Facts) -> list[ConfigError]:
    broken = [*_text(config), *_keys(config, facts), *_machine(config, facts), *_actions(config, facts)]
    for index, disk in enumerate(config.disks):
        broken += [at("disk", index, b) for b in disk_problems(disk, facts, config.hdtype)]
    for index, vif in enumerate(config.vifs):
        broken += [at("vif", index, b) for b in vif_problems(vif, facts)]
    return [ConfigError(f"{_named(b.loc)}{b.message}", hint=b.hint, loc=b.loc) for b in dict.fromkeys(broken)]


def _named(loc: tuple[str | int, ...]) -> str:
    return f"{loc[0]}[{loc[1]}]: " if len(loc) > 1 else ""


def at(key: str, index: int, broken: Broken) -> Broken:
    return broken._replace(loc=(key, index, *broken.loc))


def refuse(key: str, facts: Facts, why: str = "") -> Broken:
    reason = f": {why}" if why else ""
    return Broken(
        (key,), f"{key} has no effect with {facts.name}{reason}", f"remove {key}, or use Xen's own driver"
    )


def _text(config: DomainConfig) -> Iterator[Broken]:
    """XML has no way to write control characters, and none that QEMU or libvirt would want is lost."""

    def walk(loc: tuple[str | int, ...], value: Any) -> Iterator[Broken]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk((*loc, key), item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from walk((*loc, index), item)
        elif isinstance(value, str) and _UNWRITABLE.search(value):
            yield Broken(loc, f"{loc[-1]} has a character that XML cannot carry", "remove it")

    keys = config.to_dict()
    keys.pop("cloud_init", None)  # refused as a whole
    yield from walk((), keys)


def _keys(config: DomainConfig, facts: Facts) -> Iterator[Broken]:
    xen = facts.kind == "xen"
    if config.type != "hvm" and not xen:
        yield Broken(
            ("type",), f"type: {config.type} needs Xen: {facts.name} runs hvm guests only", "write type: hvm"
        )
    for name, why in {**_NOWHERE, **(_NOT_XEN if xen else _NOT_QEMU)}.items():
        value = getattr(config, name)
        if name == "xen_platform_pci" and value is False:
            continue
        if value != DomainConfig.model_fields[name].default:
            yield refuse(name, facts, why)
    if xen and config.xen_platform_pci is not None:
        yield refuse("xen_platform_pci", facts)
    if config.console_backend != "xenconsoled":
        yield refuse(
            "console_backend", facts, "consoles are served by QEMU" if not xen else "libxl starts it"
        )
    for index, text in enumerate(config.cpus if isinstance(config.cpus, tuple) else [config.cpus]):
        if text and text != "all" and not _CPUSET.fullmatch(text.replace(" ", "")):
            loc = ("cpus", index) if isinstance(config.cpus, tuple) else ("cpus",)
            yield Broken(loc, f"libvirt knows no such list of CPUs: {text}", "write numbers: 0-3,^1")


def _machine(config: DomainConfig, facts: Facts) -> Iterator[Broken]:
    xen = facts.kind == "xen"
    if config.firmware and config.firmware.startswith("/") and not xen:
        yield refuse("firmware", facts, "a file in hvmloader's place is Xen's")
    for index, word in enumerate(config.serial):
        if not SERIAL.fullmatch(word):
            yield Broken(
                ("serial", index) if len(config.serial) > 1 else ("serial",),
                f"{facts.name} has no serial port {word}",
                "write pty, null, file:/path or unix:/path,server",
            )
    if xen and len(config.serial) > 1:
        yield Broken(("serial", 1), f"{facts.name} has one serial port", "remove the others")
    for index, word in enumerate(config.usbdevice):
        if word not in USB_DEVICES:
            yield Broken(
                ("usbdevice", index) if len(config.usbdevice) > 1 else ("usbdevice",),
                f"{facts.name} has no USB device {word}",
                f"it is {', '.join(USB_DEVICES)}",
            )
    if config.keymap and not config.vnc:
        yield Broken(("keymap",), f"keymap has no effect with {facts.name} without vnc", "add vnc: true")
    if xen and config.usb and not config.usbdevice:
        yield refuse("usb", facts, "it has USB for usbdevice only")


def _actions(config: DomainConfig, facts: Facts) -> Iterator[Broken]:
    known: dict[str, tuple[str, ...]]
    if facts.kind == "xen":
        known = {"on_poweroff": _ENDS, "on_reboot": _ENDS, "on_crash": (*_ENDS, *_CORE_DUMPS)}
    else:
        known = {
            "on_poweroff": ("destroy", "restart"),
            "on_reboot": ("restart", "destroy"),
            "on_crash": ("destroy", "restart", "preserve", *_CORE_DUMPS),
        }
    for name, actions in known.items():
        value = getattr(config, name)
        if value not in actions:
            yield Broken(
                (name,),
                f"{name}: {value} is not possible with {facts.name}",
                f"it can be {' or '.join(actions)}",
            )
    if facts.kind != "xen" and config.on_poweroff == "restart" and config.on_reboot == "destroy":
        yield Broken(
            ("on_reboot",), "QEMU cannot restart on poweroff and end on reboot", "change one of them"
        )


def disk_problems(disk: DiskConfig, facts: Facts, hdtype: str = "ide") -> list[Broken]:
    """``loc`` is within the disk."""
    return list(_disk(disk, facts, hdtype))


def _disk(disk: DiskConfig, facts: Facts, hdtype: str) -> Iterator[Broken]:
    xen = facts.kind == "xen"
    where = place(disk.vdev, hdtype, xen)
    if where is None:
        yield Broken(
            ("vdev",), f"{facts.name} has no place for {disk.vdev}", "use hda to hdd, sda to sdg, or xvda..."
        )
    elif disk.cdrom and where.bus == "virtio":
        yield Broken(("vdev",), "there are no virtio CD drives", "write vdev: hdc")
    elif disk.readonly and not disk.cdrom and where.bus in ("ide", "sata") and not xen:
        yield Broken(
            ("access",),
            f"an emulated {where.bus.upper()} disk cannot be read-only",
            "give it as a CD (devtype: cdrom), or as xvda or sda",
        )
    if disk.format not in FORMATS or (xen and disk.format == "vmdk"):
        yield Broken(
            ("format",), f"{facts.name} has no image format {disk.format}", "convert it to qcow2 or raw"
        )
    if disk.remote and xen:
        yield Broken(("target",), f"{facts.name} takes files and block devices only", "use Xen's own driver")
    allowed = ("qdisk", "phy") if xen else ("qdisk",)
    if disk.backendtype is not None and disk.backendtype not in allowed:
        yield Broken(
            ("backendtype",), f"{facts.name} has no backendtype: {disk.backendtype}", "remove backendtype"
        )
    never = ["script", "trusted", "persistent", *([] if xen else ["backend"])]
    limits = ["bytes_per_second", "ops_per_second"] if xen else []
    yield from _others(disk, facts, [*never, *limits, *(["discard"] if xen else [])])


def vif_problems(vif: VifConfig, facts: Facts) -> list[Broken]:
    """``loc`` is within the interface."""
    return list(_vif(vif, facts))


def _vif(vif: VifConfig, facts: Facts) -> Iterator[Broken]:
    xen = facts.kind == "xen"
    if vif.network == "user" and xen:
        yield Broken(("network",), f"{facts.name} has no network: user", "write bridge: ...")
    if vif.network == "bridge" and vif.bridge is None and not xen:
        yield Broken(
            ("bridge",), f"{facts.name} knows no bridge of its own", "write bridge: virbr0, or network: user"
        )
    if vif.network == "user" and vif.rate:
        yield Broken(("rate",), f"{facts.name} limits interfaces on bridges only", "remove rate")
    if vif.rate and "@" in vif.rate:
        yield Broken(
            ("rate",), f"{facts.name} has no interval of its own for rates", "remove @ and what follows"
        )
    if vif.model is not None and not _MODEL.fullmatch(vif.model):
        yield Broken(("model",), f"no emulated card is called {vif.model}", "such as e1000 or rtl8139")
    if vif.backendtype is not None and not (xen and vif.backendtype == "vif"):
        yield Broken(
            ("backendtype",), f"{facts.name} has no backendtype: {vif.backendtype}", "remove backendtype"
        )
    for name in ("bridge", "vifname"):
        if (value := getattr(vif, name)) is not None and not _INTERFACE.fullmatch(value):
            yield Broken(
                (name,), f"libvirt takes no interface called {value}", "letters, digits, _ . - : only"
            )
    never = ["gatewaydev", "devid", "vlan", "trusted", "queues", "rate_in"]
    yield from _others(vif, facts, [*never, *(["mtu"] if xen else ["script", "ip", "backend"])])


def _others(device: DiskConfig | VifConfig, facts: Facts, names: list[str]) -> Iterator[Broken]:
    fields: Any = type(device).model_fields
    for name in names:
        if getattr(device, name) != fields[name].default:
            key = fields[name].alias or name
            yield refuse(key, facts)
