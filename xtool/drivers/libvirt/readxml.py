"""libvirt's XML of a running domain: its disks, interfaces and consoles. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote
from xml.etree.ElementTree import Element

from xtool.config.vdev import vdev_number
from xtool.drivers.libvirt.honour import FORMATS
from xtool.drivers.libvirt.places import vdev_of
from xtool.drivers.libvirt.xmltext import attr

_PORTS = {"nbd": "10809", "http": "80", "https": "443"}
OUR_FORMAT = {theirs: ours for ours, theirs in FORMATS.items()}


@dataclass(frozen=True)
class DiskView:
    """``vdev`` is libvirt's own name where ours has none."""

    element: Element
    vdev: str
    number: int
    dev: str
    bus: str
    target: str
    format: str
    readonly: bool
    cdrom: bool
    driver: str
    alias: str
    bytes_per_second: int | None
    ops_per_second: int | None


@dataclass(frozen=True)
class NicView:
    element: Element
    devid: int
    mac: str
    bridge: str
    interface: str
    type: str
    model: str
    alias: str
    rate: str
    rate_in: str


@dataclass(frozen=True)
class PortView:
    """``tty`` or ``socket`` is set, or neither."""

    tty: str = ""
    socket: str = ""
    type: str = ""


def disks(root: Element) -> list[DiskView]:
    return [_disk(element, index) for index, element in enumerate(root.iterfind("devices/disk"))]


def _disk(element: Element, index: int) -> DiskView:
    dev, bus = attr(element, "target", "dev"), attr(element, "target", "bus")
    vdev = vdev_of(dev, bus) or dev
    kind = attr(element, "driver", "type")
    cdrom = element.get("device") == "cdrom"
    number = vdev_number(vdev)
    return DiskView(
        element=element,
        vdev=vdev,
        number=index if number is None else number,
        dev=dev,
        bus=bus,
        target=source_of(element),
        format=OUR_FORMAT.get(kind, kind or "raw"),
        readonly=cdrom or element.find("readonly") is not None,
        cdrom=cdrom,
        driver=attr(element, "driver", "name") or "qemu",
        alias=attr(element, "alias", "name"),
        bytes_per_second=_number(element, "iotune/total_bytes_sec"),
        ops_per_second=_number(element, "iotune/total_iops_sec"),
    )


def source_of(disk: Element) -> str:
    """A path, a URL, or "" for none."""
    source = disk.find("source")
    if source is None:
        return ""
    kind = disk.get("type", "file")
    if kind != "network":
        return source.get("file") or source.get("dev") or source.get("dir") or ""
    protocol, name = source.get("protocol", ""), quote(source.get("name", ""))
    socket = attr(source, "host", "socket")
    if socket:
        return f"{protocol}+unix:///{name}?socket={quote(socket)}"
    host, port = attr(source, "host", "name"), attr(source, "host", "port")
    host = f"[{host}]" if ":" in host else host
    port = f":{port}" if port and port != _PORTS.get(protocol) else ""
    query = f"?{source.get('query')}" if source.get("query") else ""
    return f"{protocol}://{host}{port}{'/' + name if name else ''}{query}"


def _number(element: Element, path: str) -> int | None:
    text = (element.findtext(path) or "").strip()
    return int(text) or None if text.isascii() and text.isdigit() else None


def interfaces(root: Element) -> list[NicView]:
    return [_nic(element, index) for index, element in enumerate(root.iterfind("devices/interface"))]


def _nic(element: Element, index: int) -> NicView:
    alias = attr(element, "alias", "name")
    digits = alias.removeprefix("net")
    return NicView(
        element=element,
        devid=int(digits) if digits.isascii() and digits.isdigit() else index,
        mac=attr(element, "mac", "address"),
        bridge=attr(element, "source", "bridge") or attr(element, "source", "network"),
        interface=attr(element, "target", "dev"),
        type=element.get("type", ""),
        model=attr(element, "model", "type"),
        alias=alias,
        rate=_rate(element, "outbound"),
        rate_in=_rate(element, "inbound"),
    )


def _rate(element: Element, way: str) -> str:
    """KiB/s as ours: whole KB/s, or bits where that is exact."""
    text = attr(element, f"bandwidth/{way}", "average")
    return f"{int(text) * 1024 * 8}b/s" if text.isascii() and text.isdigit() and text.strip("0") else ""


def serials(root: Element) -> list[PortView]:
    return [_port(element) for element in root.iterfind("devices/serial")]


def pv_consoles(root: Element) -> list[PortView]:
    """Paravirtual ones: Xen's or virtio's."""
    return [
        _port(element)
        for element in root.iterfind("devices/console")
        if attr(element, "target", "type") in ("xen", "virtio")
    ]


def channels(root: Element) -> list[PortView]:
    return [_port(element) for element in root.iterfind("devices/channel")]


def _port(element: Element) -> PortView:
    kind = element.get("type", "")
    path = attr(element, "source", "path")
    if kind == "pty":
        return PortView(tty=path or element.get("tty", ""), type=kind)
    if kind == "unix" and attr(element, "source", "mode") != "connect":
        return PortView(socket=path, type=kind)
    return PortView(type=kind)
