"""Verbs for the devices of a running domain, carried out by libvirt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, SubElement

from xtool.config.devices import parse_rate
from xtool.config.problems import raise_problems
from xtool.config.vdev import vdev_number
from xtool.drivers.libvirt import domainxml, honour, readxml
from xtool.drivers.libvirt.facts import Facts
from xtool.drivers.libvirt.link import DomainFacts, Link, wait_until
from xtool.drivers.libvirt.readxml import DiskView, NicView
from xtool.drivers.libvirt.xmltext import attr, to_text
from xtool.errors import ConfigError, DeviceError, UnsupportedError, UsageError
from xtool.toolstack.api import BlockInfo, DeviceResult, Disks, NetworkInfo, Networks

if TYPE_CHECKING:
    from xtool.config import DiskConfig, VifConfig
    from xtool.config.rules import Broken


class DeviceVerbs:
    """What ``LibvirtClient`` does with disks and interfaces."""

    link: Link

    if TYPE_CHECKING:

        @property
        def facts(self) -> Facts: ...
        def find(self, text: str) -> DomainFacts: ...
        def xml(self, found: DomainFacts) -> Element: ...
        def unsupported(self, verb: str, why: str = "") -> UnsupportedError: ...

    # --- disks ------------------------------------------------------------------------------------
    def block_list(self, domain: str) -> Disks:
        found = self.find(domain)
        return [
            BlockInfo(
                domid=found.domid,
                devid=disk.number,
                vdev=disk.vdev,
                backend=disk.driver,
                backend_domid=0,
                state="connected",
                target=disk.target,
                format=disk.format,
                readonly=disk.readonly,
                cdrom=disk.cdrom,
                reason=f"libvirt's choice, on {disk.bus}",
                bytes_per_second=disk.bytes_per_second,
                ops_per_second=disk.ops_per_second,
            )
            for disk in readxml.disks(self.xml(found))
        ]

    def block_attach(self, domain: str, disk: DiskConfig, *, deadline: float = 40.0) -> DeviceResult:
        found = self.find(domain)
        root = self.xml(found)
        # A machine with AHCI has no IDE, and the other way round.
        hdtype = "ahci" if "q35" in attr(root, "os/type", "machine") else "ide"
        _refuse("disk", honour.disk_problems(disk, self.facts, hdtype))
        if any(view.number == disk.number for view in readxml.disks(root)):
            raise DeviceError(f"{found.name} has a disk {disk.vdev} already", hint="choose another vdev")
        self.link.device(found.uuid, "attach", domainxml.render_disk(disk, self.facts, hdtype))
        return DeviceResult(found.domid, "vbd", disk.number, disk.vdev, "attached")

    def block_detach(
        self, domain: str, disk: str, *, force: bool = False, deadline: float = 10.0
    ) -> DeviceResult:
        found = self.find(domain)
        view = self._disk(found, disk)
        self._detach(found, view.element, view.alias, f"disk {view.vdev}", force, deadline)
        return DeviceResult(found.domid, "vbd", view.number, view.vdev, "detached")

    def block_limit(
        self,
        domain: str,
        disk: str,
        *,
        bytes_per_second: int | None = None,
        ops_per_second: int | None = None,
    ) -> DeviceResult:
        found = self.find(domain)
        view = self._disk(found, disk)
        wanted = {"total_bytes_sec": bytes_per_second, "total_iops_sec": ops_per_second}
        self.link.limit_disk(found.uuid, view.dev, {k: v for k, v in wanted.items() if v is not None})
        return DeviceResult(found.domid, "vbd", view.number, view.vdev, "limited")

    def cd_insert(self, domain: str, drive: str, target: str) -> DeviceResult:
        if not target.startswith("/"):
            raise UsageError(f"the medium {target} must be an absolute path")
        return self._change(domain, drive, target)

    def cd_eject(self, domain: str, drive: str) -> DeviceResult:
        return self._change(domain, drive, None)

    def _change(self, domain: str, drive: str, target: str | None) -> DeviceResult:
        found = self.find(domain)
        view = self._disk(found, drive)
        if not view.cdrom:
            raise DeviceError(f"{view.vdev} of {found.name} is no CD drive")
        element = view.element
        for child in ("source", "backingStore"):
            for old in element.findall(child):
                element.remove(old)
        element.set("type", "file")
        if target is not None:
            block = target.startswith("/dev/")
            element.set("type", "block" if block else "file")
            SubElement(element, "source", {"dev" if block else "file": target})
            driver = element.find("driver")
            if driver is None:
                driver = SubElement(element, "driver", {"name": "qemu"})
            driver.set("type", "raw")  # a medium never chooses how it is read
        self.link.device(found.uuid, "update", to_text(element))
        action = "ejected" if target is None else "inserted"
        return DeviceResult(found.domid, "vbd", view.number, view.vdev, action)

    def _disk(self, found: DomainFacts, name: str) -> DiskView:
        number = vdev_number(name)
        for view in readxml.disks(self.xml(found)):
            if name in (view.vdev, view.dev) or (number is not None and view.number == number):
                return view
        raise DeviceError(f"{found.name} has no disk {name}", hint=f"xtool block-list {found.name}")

    # --- interfaces -------------------------------------------------------------------------------
    def network_list(self, domain: str) -> Networks:
        found = self.find(domain)
        return [
            NetworkInfo(
                domid=found.domid,
                devid=nic.devid,
                mac=nic.mac,
                backend=nic.model or "libvirt",
                backend_domid=0,
                state="connected",
                bridge=nic.bridge,
                interface=nic.interface,
                type=nic.type,
                reason="libvirt's choice",
                rate=nic.rate,
                rate_in=nic.rate_in,
            )
            for nic in readxml.interfaces(self.xml(found))
        ]

    def network_attach(self, domain: str, vif: VifConfig, *, deadline: float = 40.0) -> DeviceResult:
        found = self.find(domain)
        _refuse("vif", honour.vif_problems(vif, self.facts))
        before = {nic.mac for nic in readxml.interfaces(self.xml(found))}
        if vif.mac in before:
            raise DeviceError(f"{found.name} has an interface {vif.mac} already", hint="choose another mac")
        hvm = found.os_type == "hvm"
        self.link.device(found.uuid, "attach", domainxml.render_interface(vif, self.facts, hvm=hvm))
        made = [nic for nic in readxml.interfaces(self.xml(found)) if nic.mac not in before]
        if not made:
            raise DeviceError(f"the new interface of {found.name} is gone again")
        return DeviceResult(found.domid, "vif", made[-1].devid, made[-1].mac, "attached")

    def network_detach(
        self, domain: str, vif: str, *, force: bool = False, deadline: float = 10.0
    ) -> DeviceResult:
        found = self.find(domain)
        nic = self._nic(found, vif)
        self._detach(found, nic.element, nic.alias, f"interface {nic.mac}", force, deadline)
        return DeviceResult(found.domid, "vif", nic.devid, nic.mac, "detached")

    def network_limit(
        self, domain: str, vif: str, *, rate: str | None = None, rate_in: str | None = None
    ) -> DeviceResult:
        found = self.find(domain)
        nic = self._nic(found, vif)
        limits = {}
        for name, text in (("outbound.average", rate), ("inbound.average", rate_in)):
            if text is not None:
                limits[name] = _kib_per_second(text)
        self.link.limit_interface(found.uuid, nic.mac, limits)
        return DeviceResult(found.domid, "vif", nic.devid, nic.mac, "limited")

    def _nic(self, found: DomainFacts, name: str) -> NicView:
        for nic in readxml.interfaces(self.xml(found)):
            if name.lower() == nic.mac or name == str(nic.devid):
                return nic
        raise DeviceError(f"{found.name} has no interface {name}", hint=f"xtool network-list {found.name}")

    def _detach(
        self, found: DomainFacts, element: Element, alias: str, what: str, force: bool, deadline: float
    ) -> None:
        """The guest is asked; it is gone when libvirt no longer lists it."""
        if force:
            raise self.unsupported("detach --force", "QEMU gives a device up only when the guest does")
        self.link.device(found.uuid, "detach", to_text(element))

        def gone() -> bool:
            return all(
                attr(device, "alias", "name") != alias for device in self.xml(found).iterfind("devices/*")
            )

        if not wait_until(self.link, gone, deadline):
            raise DeviceError(
                f"{found.name} has not let go of its {what} within {deadline:.0f} s",
                hint="is its system up, and the device unused there?",
            )


def _kib_per_second(text: str) -> int:
    """``10Mb/s`` -> 1221; "" is no limit: 0. Raises ``UsageError``."""
    if not text:
        return 0
    rate = parse_rate(text)
    if rate is None or "@" in text:
        raise UsageError(f"{text!r} is not a rate libvirt knows", hint="write 10Mb/s or 250KB/s")
    return max(-(-rate.bytes // 1024), 1)


def _refuse(what: str, broken: list[Broken]) -> None:
    problems: list[Any] = [ConfigError(f"{what}: {b.message}", hint=b.hint, loc=b.loc) for b in broken]
    raise_problems(problems)
