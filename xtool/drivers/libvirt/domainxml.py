"""A domain file as libvirt's domain XML: values here, the XML itself in ``templates``. Pure.

Facts about libvirt's XML (9.0; drvqemu, drvlibxl and formatdomain of its documentation)

- A ``<serial>`` is COM1 and gets a ``<console>`` of its own; without one, a virtio console (``hvc0`` in the
  guest, as Xen's) stands in for the PV console.
- q35 has AHCI and no IDE; ``pc`` has IDE, and SATA only with another controller. A q35 machine takes a PCI
  device while it runs only where a root port is free.
- ``<controller type="usb" model="none">`` is needed to have no USB: else libvirt adds one.
- Text is escaped by jinja2. XML cannot carry control characters at all, and an attribute no line ends:
  ``honour`` refuses them before.
- ``<outbound average>`` is what the guest sends, KiB/s.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from xtool.config import DiskConfig, DomainConfig, VifConfig
from xtool.diskurl import parse_url
from xtool.drivers.libvirt.facts import Facts
from xtool.drivers.libvirt.honour import FORMATS, SERIAL
from xtool.drivers.libvirt.places import place
from xtool.toolstack.deviceplan import DEFAULT_MODEL

if TYPE_CHECKING:
    from jinja2 import Environment

#: Marks a domain as made by xtool.
METADATA = "urn:xtool:domain:1"
_BOOT = {"c": "hd", "d": "cdrom", "n": "network"}
TSC = {"always_emulate": "emulate", "native": "native", "native_paravirt": "paravirt"}
_OS = {"pv": ("xenpv", "linux"), "pvh": ("xenpvh", "xenpvh"), "hvm": ("xenfv", "hvm")}
ARGS = {
    "qemu": ("qemu", "http://libvirt.org/schemas/domain/qemu/1.0"),
    "xen": ("xen", "http://libvirt.org/schemas/domain/xen/1.0"),
}
_SPARE_ROOT_PORTS = 4
_DEFAULT_BRIDGE = "xenbr0"  # xl's


@cache
def environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("xtool.drivers.libvirt"), autoescape=True, undefined=StrictUndefined
    )


def render(config: DomainConfig, facts: Facts, uuid: str) -> str:
    """The whole domain. ``honour.check`` comes first."""
    return environment().get_template("domain.xml.j2").render(d=domain_values(config, facts, uuid))


def render_disk(disk: DiskConfig, facts: Facts, hdtype: str = "ide") -> str:
    return environment().get_template("devices.xml.j2").render(disk=disk_values(disk, facts, hdtype))


def render_interface(vif: VifConfig, facts: Facts, mac: str | None = None, hvm: bool = True) -> str:
    values = {**interface_values(vif, facts, hvm), **({"mac": mac} if mac else {})}
    return environment().get_template("devices.xml.j2").render(nic=values)


def domain_values(config: DomainConfig, facts: Facts, uuid: str) -> dict[str, Any]:
    """What ``domain.xml.j2`` is filled with."""
    xen, hvm = facts.kind == "xen", config.type == "hvm"
    q35 = config.hdtype == "ahci" and not xen
    args = [*config.device_model_args, *config.device_model_args_hvm]
    prefix, namespace = ARGS.get(facts.kind, ARGS["qemu"])
    pins = [_cpuset(each) or "" for each in config.cpus] if isinstance(config.cpus, tuple) else []
    return {
        "type": facts.domain_type,
        "name": config.name,
        "uuid": uuid,
        "metadata": METADATA,
        "maxmem": config.maxmem,
        "memory": config.memory,
        "vcpus": config.vcpus,
        "maxvcpus": config.maxvcpus,
        "cpuset": _cpuset(config.cpus) if isinstance(config.cpus, str) else None,
        "pins": pins,
        "arch": None if facts.kind == "test" else "x86_64",
        "machine": _OS[config.type][0] if xen else None if facts.kind == "test" else "q35" if q35 else "pc",
        "os_type": _OS[config.type][1] if xen else "hvm",
        "efi": config.firmware in ("ovmf", "uefi"),
        "loader": config.firmware_override
        or (config.firmware if config.firmware and config.firmware.startswith("/") else None),
        "kernel": config.kernel,
        "ramdisk": config.ramdisk,
        "cmdline": config.cmdline,
        "boot": [_BOOT[each] for each in config.boot or "cd"] if hvm else [],
        "features": _features(config),
        "cpu": _cpu(config, facts),
        "clock": _clock(config),
        "hpet": config.hpet or not hvm,
        "tsc": TSC.get(config.tsc_mode),
        "on_poweroff": config.on_poweroff,
        "on_reboot": config.on_reboot,
        "on_crash": config.on_crash,
        "emulator": config.device_model_override or facts.emulator,
        "disks": [disk_values(disk, facts, config.hdtype) for disk in config.disks],
        "controllers": _controllers(config, facts, q35),
        "nics": [interface_values(vif, facts, hvm) for vif in config.vifs],
        "serial": [_serial(word) for word in config.serial],
        "console": "xen" if xen else None if config.serial or facts.kind == "test" else "virtio",
        "channels": [
            {
                "type": "pty" if channel.connection == "pty" else "unix",
                "path": channel.path,
                "target": "xen" if xen else "virtio",
                "name": channel.name,
            }
            for channel in config.channels
        ],
        "inputs": list(config.usbdevice),
        "vnc": _vnc(config) if config.vnc else None,
        "video": _video(config),
        "vram": config.videoram // 1024 if config.videoram and config.vga != "none" else None,
        "balloon": None if xen else "virtio" if config.maxmem > config.memory else "none",
        "panic": "isa" if facts.kind == "qemu" else None,
        "args": args,
        "args_prefix": prefix,
        "args_namespace": namespace,
    }


def _cpuset(text: str | None) -> str | None:
    return None if text is None or text == "all" else text.replace(" ", "")


def _features(config: DomainConfig) -> list[str]:
    if config.type == "pv":
        return []
    names = ("acpi", "apic", "pae") if config.type == "hvm" else ("acpi", "apic")
    return [name for name in names if getattr(config, name)]


def _cpu(config: DomainConfig, facts: Facts) -> str | None:
    if facts.kind == "xen":
        return "host-passthrough" if config.nestedhvm else None
    # Not QEMU's default: today's distributions want more than its qemu64 has.
    return {"kvm": "host-passthrough", "tcg": "maximum"}.get(facts.accel)


def _clock(config: DomainConfig) -> list[tuple[str, object]]:
    basis = "localtime" if config.localtime else "utc"
    if config.rtc_timeoffset:
        return [("offset", "variable"), ("adjustment", config.rtc_timeoffset), ("basis", basis)]
    return [("offset", basis)]


def _controllers(config: DomainConfig, facts: Facts, q35: bool) -> list[list[tuple[str, object]]]:
    found: list[list[tuple[str, object]]] = []
    if facts.kind == "xen":
        limits = {"maxGrantFrames": config.max_grant_frames, "maxEventChannels": config.max_event_channels}
        given = [(name, value) for name, value in limits.items() if value is not None]
        return [[("type", "xenbus"), *given]] if given else []
    if facts.kind == "test":
        return []
    model = ("qemu-xhci" if q35 else "piix3-uhci") if config.usb else "none"
    found.append([("type", "usb"), ("index", 0), ("model", model)])
    if any(place(disk.vdev, config.hdtype, False)[:1] == ("scsi",) for disk in config.disks):  # type: ignore[index]
        found.append([("type", "scsi"), ("index", 0), ("model", "lsilogic")])
    if q35:
        found += [[("type", "pci"), ("model", "pcie-root-port")] for _ in range(_SPARE_ROOT_PORTS)]
    return found


def _serial(word: str) -> dict[str, Any]:
    match = SERIAL.fullmatch(word)
    assert match is not None  # honour has seen to it
    if match[1]:
        return {"type": "file", "path": match[1], "mode": None}
    if match[2]:
        return {"type": "unix", "path": match[2], "mode": "bind" if "server" in match[3] else "connect"}
    return {"type": word, "path": None, "mode": None}


def _vnc(config: DomainConfig) -> list[tuple[str, object]]:
    display = config.vnc_display
    port = [("port", 5900 + display), ("autoport", "no")] if display is not None else [("autoport", "yes")]
    more = {"passwd": config.vncpasswd, "keymap": config.keymap}
    return [*port, ("listen", config.vnc_host), *((name, value) for name, value in more.items() if value)]


def _video(config: DomainConfig) -> str | None:
    if config.type != "hvm" or (config.vga == "none" and not config.vnc):
        return None
    return {"stdvga": "vga"}.get(config.vga, config.vga)


def disk_values(disk: DiskConfig, facts: Facts, hdtype: str) -> dict[str, Any]:
    """What ``disk_xml`` is filled with."""
    xen = facts.kind == "xen"
    where = place(disk.vdev, hdtype, xen)
    assert where is not None  # honour has seen to it
    values: dict[str, Any] = {
        "type": "file",
        "device": disk.devtype,
        "driver": "qemu",
        "format": FORMATS[disk.format],
        "discard": None if disk.discard is None else "unmap" if disk.discard else "ignore",
        "source": [],
        "host": [],
        "backend": disk.backend,
        "dev": where.dev,
        "bus": where.bus,
        "limits": [],
        "readonly": disk.readonly,
        "shareable": disk.shared,
    }
    if disk.target is not None:
        values |= _source(disk.target)
    if xen and (disk.backendtype == "phy" or (disk.backendtype is None and values["type"] == "block")):
        values |= {"driver": "phy", "format": "raw"}
    limits = {"total_bytes_sec": disk.bytes_per_second, "total_iops_sec": disk.ops_per_second}
    values["limits"] = [(name, value) for name, value in limits.items() if value]
    return values


def _source(target: str) -> dict[str, Any]:
    if disk_is_remote(target):
        url = parse_url(target)
        if url.socket:
            host = [("transport", "unix"), ("socket", url.socket)]
            name = url.name
        else:
            host = [("name", url.host), ("port", str(url.port))]
            name = url.name.removeprefix("/") if url.web else url.name
        protocol = "nbd" if url.scheme.startswith("nbd") else url.scheme
        path, _, query = name.partition("?") if url.web else (name, "", "")
        source = [
            ("protocol", protocol),
            *([("name", path)] if path else []),
            *([("query", query)] if query else []),
        ]
        return {"type": "network", "source": source, "host": host}
    if target.startswith("/dev/"):
        return {"type": "block", "source": [("dev", target)]}
    return {"type": "file", "source": [("file", target)]}


def disk_is_remote(target: str) -> bool:
    from xtool.diskurl import is_url

    return is_url(target)


def interface_values(vif: VifConfig, facts: Facts, hvm: bool) -> dict[str, Any]:
    """What ``interface_xml`` is filled with."""
    xen, emulated = facts.kind == "xen", vif.type == "ioemu" or vif.model is not None
    if xen:
        model = (
            (vif.model or DEFAULT_MODEL) if emulated else "netfront" if vif.type == "vif" and hvm else None
        )
    else:
        model = (vif.model or DEFAULT_MODEL) if emulated else "virtio"
    limit = vif.rate_limit
    return {
        "type": "user" if vif.network == "user" else "bridge",
        "mac": vif.mac,
        "bridge": None if vif.network == "user" else vif.bridge or _DEFAULT_BRIDGE,
        "addresses": (vif.ip or "").split(),
        "script": vif.script,
        "backend": vif.backend,
        "target": vif.vifname,
        "model": model,
        "outbound": None if limit is None else max(-(-limit.bytes // 1024), 1),
        "mtu": vif.mtu,
        "forwards": [_forward(word) for word in (vif.forwards or "").split()],
    }


def _forward(word: str) -> dict[str, str]:
    """``tcp:127.0.0.1:2222:22``, as the model writes them all."""
    proto, _, rest = word.partition(":")
    address, outer, inner = rest.rsplit(":", 2)
    return {"proto": proto, "address": address.strip("[]"), "outer": outer, "inner": inner}
