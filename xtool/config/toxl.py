"""A domain file made an xl.cfg. Pure."""

from __future__ import annotations

import os
from typing import Any

from xtool.config.devices import ChannelConfig, DiskConfig, VifConfig
from xtool.config.fromxl import OWN
from xtool.config.model import DomainConfig

_VIF_OWN = ("network", "forwards", "mac-filter", "queues", "rate-in", "backendtype")
_FORMATS = ("raw", "qcow", "qcow2", "qed", "vhd")


def to_xl(config: DomainConfig, name: str = "a domain file") -> tuple[str, list[str]]:
    """The text, and a line for each thing that xl.cfg cannot say."""
    notes: list[str] = []
    lines: list[str] = []
    for key, value in config.to_dict().items():
        if key in OWN:
            notes.append(f"{key}: xl has no such key")
        elif key == "disk":
            lines.append(_line(key, [_disk(disk, notes) for disk in config.disks]))
        elif key == "vif":
            lines.append(_line(key, [_vif(index, vif, notes) for index, vif in enumerate(config.vifs)]))
        elif key == "channel":
            lines.append(_line(key, [_channel(channel, notes) for channel in config.channels]))
        else:
            lines.append(_line(key, value))
    if config.type == "hvm" and not config.vnc:
        lines.append(_line("vnc", False))  # xl's default is a display
    if config.type == "hvm" and config.vnc and config.vnc_display is not None and config.vncunused is None:
        lines.append(_line("vncunused", False))
    head = [f"# Made from {os.path.basename(name)}."]
    if notes:
        head += ["# Not carried over:", *(f"#   {note}" for note in notes)]
    return "\n".join(["".join(c for c in line if c.isprintable()) for line in head] + lines) + "\n", notes


def _line(key: str, value: Any) -> str:
    if isinstance(value, list):
        if not value:
            return f"{key} = [ ]"
        items = "".join(f"    {quote(str(item))},\n" for item in value)
        return f"{key} = [\n{items}]"
    if isinstance(value, bool):
        return f"{key} = {int(value)}"
    if isinstance(value, int) and value >= 0:
        return f"{key} = {value}"
    return f"{key} = {quote(str(value))}"


def quote(text: str) -> str:
    """As an xl.cfg string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _disk(disk: DiskConfig, notes: list[str]) -> str:
    what = f"disk {disk.vdev}"
    update: dict[str, Any] = {}
    for key, field in (("bytes-per-second", "bytes_per_second"), ("ops-per-second", "ops_per_second")):
        if getattr(disk, field) is not None:
            notes.append(f"{what}: xl has no {key}")
            update[field] = None
    if disk.persistent:
        notes.append(f"{what}: xl has no persistent")
        update["persistent"] = False
    if disk.shared:
        notes.append(f"{what}: xl has no shared")
        update["shared"] = False
    if disk.backendtype == "xtool":
        notes.append(f"{what}: xl has no backendtype xtool")
        update["backendtype"] = None
    if disk.format not in _FORMATS:
        notes.append(f"{what}: xl does not read {disk.format} images")
    if disk.remote:
        notes.append(f"{what}: xl takes no address as a target")
    return disk.model_copy(update=update).to_spec()


def _vif(index: int, vif: VifConfig, notes: list[str]) -> str:
    defaults = VifConfig.model_validate({})
    update: dict[str, Any] = {}
    for key in _VIF_OWN:
        field = key.replace("-", "_")
        default = getattr(defaults, field)
        if getattr(vif, field) != default:
            notes.append(f"vif {index}: xl has no {key}")
            update[field] = default
    if vif.vlan is not None and "," in vif.vlan:
        notes.append(f"vif {index}: xl takes no comma in vlan")
        update["vlan"] = None
    return vif.model_copy(update=update).to_spec()


def _channel(channel: ChannelConfig, notes: list[str]) -> str:
    if channel.path is not None and "," in channel.path:
        notes.append(f"channel {channel.name}: xl takes no comma in path")
    return ",".join(
        f"{key}={value}" for key, value in {"connection": channel.connection, **channel.to_dict()}.items()
    )
