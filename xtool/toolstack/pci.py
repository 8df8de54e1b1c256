"""PCI devices: those a domain has, and those that could be given to one. Looking only.

Facts
-----
- pciback (the module is ``xen-pciback``) holds devices that no driver of the host's may touch; it lists
  them in ``/sys/bus/pci/drivers/pciback`` by address.
- xl notes the driver a device had before in ``/libxl/pciback/<address>/driver_path``, dashes for the dots and
  colons.
- A domain's devices are one xenbus device 0 of kind ``pci``: ``backend/pci/<domid>/0`` has ``num_devs``
  and, for each, ``dev-N`` (address), ``vdevfn-N`` (where the guest sees it) and ``state-N``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from xtool.devices.xenbus import parse_state
from xtool.toolstack.everydayrecords import AssignablePciInfo, PciInfo
from xtool.toolstack.names import Named
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
ROOT = Path("/")
#: More than this is nobody's domain.
_MOST = 256


def of_domain(host: Host, found: Named, root: Path | None = None) -> list[PciInfo]:
    """The devices that were given to the domain, by their order."""
    domid = found.state.domid
    back = paths.backend(0, "pci", domid, 0)
    count = host.store.get(f"{back}/num_devs") or "0"
    numbers = range(min(int(count), _MOST) if count.isascii() and count.isdecimal() and len(count) < 5 else 0)
    names = ("dev", "vdevfn", "state")
    values = host.store.get_many([f"{back}/{name}-{n}" for n in numbers for name in names])
    devices = []
    for number in numbers:
        address, vdevfn, state = (values[f"{back}/{name}-{number}"] for name in names)
        if address:
            known = _looks(root or ROOT, address)
            words = f"{known[0]}:{known[1]} class {known[2]}" if known[0] else ""
            devices.append(PciInfo(domid, address, vdevfn or "", parse_state(state).word, words))
    return devices


def assignable(host: Host, root: Path | None = None) -> list[AssignablePciInfo]:
    """What pciback holds, and who has it."""
    root = root or (ROOT if host.real else None)
    if root is None:
        return []
    try:
        folder = sorted((root / "sys/bus/pci/drivers/pciback").iterdir())
    except OSError:
        return []
    addresses = [path.name for path in folder if ADDRESS.fullmatch(path.name)]
    owners = _owners(host)
    nodes = {address: f"/libxl/pciback/{re.sub('[:.]', '-', address)}/driver_path" for address in addresses}
    drivers = host.store.get_many(nodes.values())
    return [
        AssignablePciInfo(
            address,
            *_looks(root, address),
            (drivers[nodes[address]] or "").rpartition("/")[2],
            owners.get(address),
        )
        for address in addresses
    ]


def _owners(host: Host) -> dict[str, int]:
    root = f"{paths.domain(0)}/backend/pci"
    domids = [int(n) for n in host.store.list_many([root])[root] or () if n.isascii() and n.isdecimal()]
    lists = host.store.list_many([f"{root}/{domid}/0" for domid in domids])
    nodes = {
        f"{root}/{domid}/0/{name}": domid
        for domid in domids
        for name in lists[f"{root}/{domid}/0"] or ()
        if re.fullmatch(r"dev-\d{1,3}", name)
    }
    values = host.store.get_many(nodes)
    return {address: domid for node, domid in nodes.items() if (address := values[node])}


def _looks(root: Path, address: str) -> tuple[str, str, str, str]:
    """vendor, device, class (hexadecimal), IOMMU group; empty where sysfs does not say."""
    if not ADDRESS.fullmatch(address):
        return "", "", "", ""
    folder = root / "sys/bus/pci/devices" / address

    def read(name: str) -> str:
        try:
            return (folder / name).read_text().strip().removeprefix("0x")
        except OSError:
            return ""

    group = folder / "iommu_group"
    number = group.resolve().name if group.exists() else ""
    return read("vendor"), read("device"), read("class"), number
