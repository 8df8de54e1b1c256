"""What must hold between keys. Each broken rule names the key to blame, so that its line can be shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pydantic_core import PydanticCustomError

from xtool.config.units import MIB, split_listen
from xtool.config.vdev import vdev_number

if TYPE_CHECKING:
    from xtool.config.model import DomainConfig

MAX_HVM_VCPUS = 128
_VGA_MIN = {"cirrus": 8 * MIB, "stdvga": 16 * MIB, "none": 0}


class Broken(NamedTuple):
    """``loc`` leads to the value in the file: ``("disk", 1, "vdev")``."""

    loc: tuple[str | int, ...]
    message: str
    hint: str | None = None


def refuse_all(broken: Sequence[Broken]) -> None:
    """Raise them as one error that ``load.py`` takes apart again."""
    if broken:
        text = "; ".join(rule.message for rule in broken)
        raise PydanticCustomError("broken_rules", "{message}", {"message": text, "broken": tuple(broken)})


def broken_rules(config: DomainConfig) -> list[Broken]:
    return [*_sizes(config), *_kernel(config), *_display(config), *_devices(config), *_ready(config)]


def _sizes(config: DomainConfig) -> Iterator[Broken]:
    if config.maxmem < config.memory:
        yield Broken(("maxmem",), "maxmem is less than memory", "raise maxmem, or remove it")
    if config.maxvcpus < config.vcpus:
        yield Broken(("maxvcpus",), "maxvcpus is less than vcpus", "raise maxvcpus, or remove it")
    if config.type != "pv" and config.maxvcpus > MAX_HVM_VCPUS:
        loc = "vcpus" if config.vcpus > MAX_HVM_VCPUS else "maxvcpus"
        yield Broken((loc,), f"a {config.type} guest has {MAX_HVM_VCPUS} vCPUs at most")
    if config.cap > 100 * config.maxvcpus:
        yield Broken(
            ("cap",), f"cap is more than {config.maxvcpus} vCPUs can use", "use 100 per vCPU at most"
        )
    for key, cpus in (("cpus", config.cpus), ("cpus_soft", config.cpus_soft)):
        if isinstance(cpus, tuple) and len(cpus) > config.maxvcpus:
            yield Broken(
                (key, config.maxvcpus),
                f"{key} has {len(cpus)} entries for {config.maxvcpus} vCPUs",
                "write one entry per vCPU, or one text for all",
            )
    if config.period is not None and config.budget is not None and config.budget > config.period:
        yield Broken(("budget",), "budget is more than period", "lower budget, or raise period")


def _kernel(config: DomainConfig) -> Iterator[Broken]:
    if config.kernel is not None:
        if config.type == "hvm" and config.boot is not None:
            yield Broken(("boot",), "boot has no effect when kernel is given", "remove one of them")
        return
    if config.type != "hvm":
        yield Broken(("kernel",), f"kernel is missing: a {config.type} guest boots a kernel directly")
        return
    for name in ("ramdisk", "cmdline"):
        if getattr(config, name) is not None:
            yield Broken((name,), f"{name} has no effect without kernel", f"add kernel, or remove {name}")


def _display(config: DomainConfig) -> Iterator[Broken]:
    if config.type != "hvm":
        return
    if not config.vnc:
        for name in ("vnclisten", "vncdisplay", "vncunused", "vncpasswd"):
            if name in config.model_fields_set:
                yield Broken(
                    (name,), f"{name} has no effect without vnc: true", f"add vnc: true, or remove {name}"
                )
    if config.vncdisplay is not None and split_listen(config.vnclisten)[1] is not None:
        yield Broken(("vncdisplay",), "vnclisten has a display number too", "remove one of them")
    if config.vnc_display is not None and config.vncunused:
        yield Broken(
            ("vncunused",), "vncunused and a display number exclude each other", "remove one of them"
        )
    if config.vncpasswd is not None and len(config.vncpasswd.encode()) > 8:
        yield Broken(("vncpasswd",), "a VNC password has 8 characters at most")
    least = _VGA_MIN[config.vga]
    if config.videoram is not None and config.videoram < least:
        yield Broken(("videoram",), f"vga: {config.vga} needs {least // MIB} MiB of videoram at least")
    if config.videoram is not None and config.videoram >= config.memory:
        yield Broken(("videoram",), "videoram is taken from memory, and leaves nothing of it")
    if config.usbversion is not None and not config.usb:
        yield Broken(("usbversion",), "usbversion has no effect without usb: true", "add usb: true")
    if config.usbdevice and not config.usb:
        yield Broken(("usbdevice",), "usbdevice has no effect without usb: true", "add usb: true")
    if len(config.serial) > 4:
        yield Broken(("serial", 4), "a guest has 4 serial ports at most")


def _devices(config: DomainConfig) -> Iterator[Broken]:
    numbers: set[int] = set()
    for index, disk in enumerate(config.disks):
        if disk.number in numbers:  # xvda and d0 are the same device
            yield Broken(
                ("disk", index, "vdev"), f"the vdev {disk.vdev} is used twice", "give each disk its own"
            )
        numbers.add(disk.number)
    if config.cloud_init and config.cloud_init.vdev and vdev_number(config.cloud_init.vdev) in numbers:
        message = f"the vdev {config.cloud_init.vdev} is used twice"
        yield Broken(("cloud_init", "vdev"), message, "leave it out: a free one is taken")
    ids: set[int] = set()
    macs: set[str] = set()
    for index, vif in enumerate(config.vifs):
        if vif.devid is not None and vif.devid in ids:
            yield Broken(("vif", index, "devid"), f"the devid {vif.devid} is used twice")
        if vif.mac is not None and vif.mac in macs:
            yield Broken(("vif", index, "mac"), f"the MAC address {vif.mac} is used twice")
        ids |= {vif.devid} if vif.devid is not None else set()
        macs |= {vif.mac} if vif.mac is not None else set()
        if config.type != "hvm" and (vif.type == "ioemu" or vif.model is not None):
            name = "type" if vif.type == "ioemu" else "model"
            yield Broken(("vif", index, name), f"an emulated card has no effect for type: {config.type}")


def _ready(config: DomainConfig) -> Iterator[Broken]:
    if config.name in config.depends_on:
        index = config.depends_on.index(config.name)
        yield Broken(("depends_on", index), "a domain cannot depend on itself", f"remove {config.name}")
    ready = config.ready
    if ready is None:
        return
    if ready.console is not None and config.console_backend != "xtool":
        yield Broken(
            ("ready", "console"),
            "ready.console has no effect for console_backend: xenconsoled, which keeps no log of ours",
            "write console_backend: xtool",
        )
    if ready.tcp is not None and tcp_place(config) is None:
        yield Broken(
            ("ready", "tcp"),
            f"no address is known for the TCP port {ready.tcp}",
            f"write it: tcp: 10.0.0.5:{ready.tcp}, or give the first vif an ip",
        )


def tcp_place(config: DomainConfig) -> tuple[str, int] | None:
    """Where ``ready.tcp`` is reached from the host: address and port; None if nothing says so. A port alone
    is that of the first interface with an ``ip``, or of one that forwards to it (``network: user``)."""
    from xtool.config.ready import split_tcp

    if config.ready is None or config.ready.tcp is None:
        return None
    address, port = split_tcp(config.ready.tcp)
    if address:
        return address, port
    for vif in config.vifs:
        for forward in (vif.forwards or "").split():
            kind, rest = forward.split(":", 1)
            where, outer, inner = rest.rsplit(":", 2)
            if kind == "tcp" and int(inner) == port:
                return where.strip("[]"), int(outer)
        if vif.ip and vif.network != "user":
            return vif.ip.split()[0].split("/")[0], port
    return None
