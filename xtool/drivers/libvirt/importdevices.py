"""The devices of a libvirt XML as those of a domain file."""

from __future__ import annotations

import re
from typing import Any
from xml.etree.ElementTree import Element

from xtool.config.vdev import vdev_number
from xtool.drivers.libvirt.honour import USB_DEVICES
from xtool.drivers.libvirt.places import letters, vdev_of
from xtool.drivers.libvirt.readxml import OUR_FORMAT, source_of
from xtool.drivers.libvirt.seen import Seen

#: Controllers that follow from the disks and channels there are.
_IMPLIED = ("pci", "ide", "sata", "virtio-serial", "fdc", "xenbus")
_USUAL_EMULATOR = re.compile(r"/usr/(s?bin|libexec|lib[^/]*/xen[^/]*/bin|local/[^ ]*)/(qemu-[^/]+|kvm)")
_XVD_MOST = 16


def devices(seen: Seen, root: Element, keys: dict[str, Any], notes: list[str], xen: bool) -> None:
    """Add ``disk``, ``vif`` and the like to ``keys``."""
    home = seen.child(root, "devices")
    if home is None:
        return
    hvm = keys["type"] == "hvm"
    order: list[tuple[int, str]] = []
    emulator = seen.text(home, "emulator")
    if emulator and hvm and not _USUAL_EMULATOR.fullmatch(emulator):
        keys["device_model_override"] = emulator
    elif emulator:
        notes.append(f"emulator {emulator}: the host's is used")
    buses = {target.get("bus") for target in home.iterfind("disk/target")}
    if "sata" in buses and hvm:
        keys["hdtype"] = "ahci"
    elif hvm and "ide" in buses:
        keys["hdtype"] = "ide"
    keys["disk"] = _disks(seen, home, notes, order, xen)
    keys["vif"] = _interfaces(seen, home, order, xen, hvm)
    if order and hvm and not keys.get("kernel") and not keys.get("boot"):
        keys["boot"] = "".join(dict.fromkeys(letter for _, letter in sorted(order)))
    keys["serial"] = [word for port in seen.children(home, "serial") if (word := _serial(seen, port)) and hvm]
    for console in seen.children(home, "console"):
        if console.get("type") == "pty" or seen.child(console, "target") is None:
            seen.whole(console)
        elif console.find("target") is not None and console.find("target").get("type") == "serial":  # type: ignore[union-attr]
            seen.whole(console)  # the first serial port again
        else:
            seen.drop(console)
    keys["channel"] = [c for element in seen.children(home, "channel") if (c := _channel(seen, element))]
    _controllers(seen, home, keys, xen, hvm)
    _inputs(seen, home, keys, hvm)
    _display(seen, home, keys, hvm)
    for element in home.iter():
        if element.tag in ("alias", "address", "backingStore") and not len(element):
            seen.whole(element)
    for name in ("memballoon", "panic"):
        for element in home.iterfind(name):
            seen.whole(element)
    for element in home.iterfind("audio"):
        if element.get("type") == "none":
            seen.whole(element)


def _disks(
    seen: Seen, home: Element, notes: list[str], order: list[tuple[int, str]], xen: bool
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    taken: set[int | None] = set()
    for element in seen.children(home, "disk"):
        kind, device = seen.attr(element, "type"), seen.attr(element, "device") or "disk"
        if kind not in ("file", "block", "network") or device not in ("disk", "cdrom"):
            seen.drop(element)
            continue
        disk = _disk(seen, element, kind, device, xen)
        target = seen.child(element, "target")
        dev, bus = seen.attr(target, "dev"), seen.attr(target, "bus")
        seen.attr(target, "tray")
        vdev = vdev_of(dev, bus)
        if vdev is None or vdev_number(vdev) in taken:
            free = (
                f"xvd{letters(n)}" for n in range(_XVD_MOST) if vdev_number(f"xvd{letters(n)}") not in taken
            )
            moved = next(free, None)
            if moved is None:
                seen.drop(element)
                continue
            notes.append(f"disk {dev} on {bus or 'an unnamed bus'}: it is {moved} now")
            vdev = moved
        taken.add(vdev_number(vdev))
        _order(seen, element, order, "d" if device == "cdrom" else "c")
        found.append({"vdev": vdev, **disk})
    return found


def _disk(seen: Seen, element: Element, kind: str, device: str, xen: bool) -> dict[str, Any]:
    disk: dict[str, Any] = {}
    source, driver = seen.child(element, "source"), seen.child(element, "driver")
    for name in ("file", "dev", "protocol", "name", "query", "index"):
        seen.attr(source, name)
    for host in seen.children(source, "host")[:1]:
        seen.whole(host)
    target = source_of(element)
    if target:
        disk["target"] = target
    if device == "cdrom":
        disk["devtype"] = "cdrom"
    form = seen.attr(driver, "type")
    disk["format"] = OUR_FORMAT.get(form, form or "raw")
    name = seen.attr(driver, "name")
    if xen and kind == "block" and name == "qemu":
        disk["backendtype"] = "qdisk"
    elif xen and kind == "file" and name == "phy":
        disk["backendtype"] = "phy"
    discard = seen.attr(driver, "discard")
    if discard:
        disk["discard"] = discard == "unmap"
    readonly = seen.child(element, "readonly") is not None
    if device != "cdrom" and readonly:
        disk["access"] = "ro"
    if seen.child(element, "shareable") is not None:
        disk["shared"] = True
    backend = seen.attr(seen.child(element, "backenddomain"), "name")
    if backend:
        disk["backend"] = backend
    limits = {"bytes-per-second": "total_bytes_sec", "ops-per-second": "total_iops_sec"}
    for ours, theirs in limits.items():
        text = seen.text(element, f"iotune/{theirs}")
        if text and text.strip("0"):
            disk[ours] = text
    return disk


def _order(seen: Seen, element: Element, order: list[tuple[int, str]], letter: str) -> None:
    boot = seen.child(element, "boot")
    text = seen.attr(boot, "order")
    if text.isascii() and text.isdigit():
        order.append((int(text[:9]), letter))


def _interfaces(
    seen: Seen, home: Element, order: list[tuple[int, str]], xen: bool, hvm: bool
) -> list[dict[str, Any]]:
    found = []
    for element in seen.children(home, "interface"):
        kind = seen.attr(element, "type")
        if kind not in ("bridge", "user", "network"):
            seen.drop(element)
            continue
        vif: dict[str, Any] = {"mac": seen.attr(seen.child(element, "mac"), "address") or None}
        source = seen.child(element, "source")
        if kind == "user":
            vif["network"] = "user"
        elif kind == "bridge" or (source is not None and source.get("bridge")):
            vif["bridge"] = seen.attr(source, "bridge") or None
        model = seen.attr(seen.child(element, "model"), "type")
        if model == "netfront":
            vif["type"] = "vif" if hvm else None
        elif model not in ("", "virtio", "virtio-transitional", "virtio-non-transitional") and kind != "user":
            vif |= {"type": "ioemu", "model": model}
        elif model not in ("", "virtio"):
            seen.drop(element.find("model"))  # type: ignore[arg-type]
        vif["ip"] = " ".join(seen.attr(ip, "address") for ip in seen.children(element, "ip")) or None
        for ip in element.iterfind("ip"):
            seen.attr(ip, "family")
        vif["script"] = seen.attr(seen.child(element, "script"), "path") or None
        vif["backend"] = seen.attr(seen.child(element, "backenddomain"), "name") or None
        name = seen.attr(seen.child(element, "target"), "dev")
        vif["vifname"] = (
            name if name and not re.fullmatch(r"(vnet|macvtap|vif)\d+(\.\d+)?(-emu)?", name) else None
        )
        rate = seen.attr(seen.child(element, "bandwidth/outbound"), "average")
        if rate.isascii() and rate.isdigit() and int(rate[:9]) > 0:
            vif["rate"] = f"{int(rate) * 8192}b/s"
        vif["mtu"] = seen.attr(seen.child(element, "mtu"), "size") or None
        vif["forwards"] = " ".join(_forwards(seen, element)) or None
        _order(seen, element, order, "n")
        found.append({key: value for key, value in vif.items() if value is not None})
    return found


def _forwards(seen: Seen, element: Element) -> list[str]:
    words = []
    if seen.attr(seen.child(element, "backend"), "type") != "passt":
        return []
    for forward in seen.children(element, "portForward"):
        proto, address = seen.attr(forward, "proto"), seen.attr(forward, "address")
        address = f"[{address}]" if ":" in address else address
        for each in seen.children(forward, "range"):
            start, end, to = (seen.attr(each, name) for name in ("start", "end", "to"))
            if end and end != start:
                seen.drop(each)
            else:
                words.append(f"{proto or 'tcp'}:{address + ':' if address else ''}{start}:{to or start}")
    return words


def _serial(seen: Seen, element: Element) -> str | None:
    kind = seen.attr(element, "type")
    source = seen.child(element, "source")
    path = source.get("path", "") if source is not None else ""
    seen.whole(element.find("target"))
    if kind == "pty":
        seen.whole(element)
        return "pty"
    if kind == "null":
        return "null"
    if kind == "file" and path:
        seen.attr(source, "path")
        return f"file:{path}"
    if kind == "unix" and path:
        seen.attr(source, "path")
        return f"unix:{path}{'' if seen.attr(source, 'mode') == 'connect' else ',server,nowait'}"
    seen.drop(element)
    return None


def _channel(seen: Seen, element: Element) -> dict[str, Any] | None:
    kind = element.get("type")
    target, source = element.find("target"), element.find("source")
    name = target.get("name", "") if target is not None else ""
    if (
        kind not in ("pty", "unix")
        or target is None
        or target.get("type") not in ("virtio", "xen")
        or not name
    ):
        seen.drop(element)
        return None
    seen.whole(element)
    channel = {"name": name, "connection": "pty" if kind == "pty" else "socket"}
    path = source.get("path", "") if source is not None else ""
    # libvirt makes up a path of its own for each run.
    if kind == "unix" and path and "/channel/target/" not in path:
        channel["path"] = path
    return channel


def _controllers(seen: Seen, home: Element, keys: dict[str, Any], xen: bool, hvm: bool) -> None:
    for element in seen.children(home, "controller"):
        kind, model = element.get("type"), element.get("model")
        if kind == "xenbus":
            for ours, theirs in (
                ("max_grant_frames", "maxGrantFrames"),
                ("max_event_channels", "maxEventChannels"),
            ):
                keys[ours] = seen.attr(element, theirs) or None
            seen.attr(element, "index")
            seen.attr(element, "type")
        elif kind == "usb" and hvm:
            if model != "none" and not xen:
                keys["usb"] = True
            seen.whole(element)
        elif kind in _IMPLIED or (kind == "scsi" and model in (None, "lsilogic", "auto")):
            seen.whole(element)
        else:
            seen.drop(element)


def _inputs(seen: Seen, home: Element, keys: dict[str, Any], hvm: bool) -> None:
    words = []
    for element in seen.children(home, "input"):
        kind, bus = element.get("type", ""), element.get("bus")
        if bus == "usb" and kind in USB_DEVICES and hvm:
            words.append(kind)
            seen.whole(element)
        elif bus in ("ps2", "xen"):
            seen.whole(element)  # every PC, and every PV framebuffer, has these
        else:
            seen.drop(element)
    if words:
        keys |= {"usb": True, "usbdevice": words}


def _display(seen: Seen, home: Element, keys: dict[str, Any], hvm: bool) -> None:
    for element in seen.children(home, "graphics"):
        if not hvm or seen.attr(element, "type") != "vnc" or "vnc" in keys:
            seen.drop(element)
            continue
        keys["vnc"] = True
        listen = seen.attr(element, "listen")
        for child in seen.children(element, "listen"):
            listen = listen or seen.attr(child, "address")
            seen.whole(child)
        keys["vnclisten"] = listen or None
        port = seen.attr(element, "port")
        if (
            seen.attr(element, "autoport") != "yes"
            and port.isascii()
            and port.isdigit()
            and int(port[:6]) >= 5900
        ):
            keys["vncdisplay"] = int(port[:6]) - 5900
        keys["vncpasswd"] = seen.attr(element, "passwd") or None
        keys["keymap"] = seen.attr(element, "keymap") or None
    if hvm:
        keys["vga"] = "none"
    for element in seen.children(home, "video"):
        model = element.find("model")
        kind = model.get("type", "") if model is not None else ""
        if not hvm or kind not in ("cirrus", "vga", "none"):
            seen.drop(element)
            continue
        seen.child(element, "model")
        keys["vga"] = {"vga": "stdvga"}.get(seen.attr(model, "type"), kind)
        vram = seen.attr(model, "vram")
        for name in ("heads", "primary"):
            seen.attr(model, name)
        if vram.isascii() and vram.isdigit() and kind != "none":
            keys["videoram"] = int(vram[:9]) >> 10
