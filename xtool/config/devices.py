"""``DiskConfig`` and ``VifConfig``: one entry of ``disk:`` and of ``vif:``.

Sources: xl-disk-configuration(5), xl-network-configuration(5), xen-vbd-interface(7).
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

from xtool.config.specs import DISK_FLAGS, VIF_FLAGS
from xtool.config.units import (
    Bool,
    ByteRate,
    Int,
    OpRate,
    Path,
    Text,
    between,
    refused,
    shown,
    to_bool,
    to_choice,
    to_path,
    to_word,
    to_words,
)
from xtool.config.vdev import vdev_number
from xtool.diskurl import is_url, parse_url

FORMATS = ("raw", "qcow", "qcow2", "qed", "vhd", "vhdx", "vmdk")
#: What an image on a web server may be: not those that name other files by themselves.
WEB_FORMATS = ("raw", "qcow2", "vhd", "vhdx")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_FORWARD = re.compile(r"(?:(tcp|udp):)?(?:(\[[0-9a-fA-F:.]+\]|[0-9.]+):)??(\d{1,5})(?::(\d{1,5}))?")
_RATE = re.compile(r"(\d{1,10})([GMK]?)([Bb])/s(?:@(\d{1,10})(ms|us|s))?")


def _to_vdev(value: Any) -> str:
    vdev = to_word(value).strip()
    if vdev_number(vdev) is None:
        raise refused(f"{shown(vdev)} is no virtual device", "use xvda, xvdb..., hda to hdd, or sda to sdp")
    return vdev


def _to_target(value: Any, info: ValidationInfo) -> str:
    word = to_word(value)
    if not is_url(word):
        return to_path(value, info)
    try:
        return parse_url(word).text
    except ValueError as error:
        raise refused(f"{shown(word)} is no address of a disk: {error}") from None


def _to_access(value: Any) -> str:
    word = to_choice(("rw", "ro", "w", "r"))(value)
    return {"w": "rw", "r": "ro"}.get(word, word)


def _to_mac(value: Any) -> str:
    mac = to_word(value).strip().lower()
    if not _MAC.fullmatch(mac):
        raise refused(f"{shown(mac)} is not a MAC address", "write it as 00:16:3e:12:34:56")
    if int(mac[:2], 16) & 1:
        raise refused(f"{mac} is a multicast address", "the first byte must be even")
    return mac


class Rate(NamedTuple):
    """A limit on what a guest sends: ``bytes`` (per second), credit given each ``interval`` (µs)."""

    bytes: int
    interval: int


def parse_rate(text: str) -> Rate | None:
    """``10Mb/s@50ms`` -> ``Rate``; None if it is no rate. Powers of ten, ``b`` bits, ``B`` bytes."""
    match = _RATE.fullmatch(text)
    if match is None:
        return None
    rate = int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]]
    rate = rate // 8 if match[3] == "b" else rate
    interval = int(match[4]) * {"us": 1, "ms": 1000, "s": 1_000_000}[match[5]] if match[4] else 50_000
    # netback's credit is a 32-bit count of bytes per interval.
    if rate == 0 or not 0 < interval < 1 << 32 or not 0 < rate * interval // 1_000_000 < 1 << 32:
        return None
    return Rate(rate, interval)


def _to_rate(value: Any) -> str:
    text = to_word(value).strip()
    if parse_rate(text) is None:
        raise refused(f"{shown(text)} is not a rate", "write 10Mb/s, 250KB/s or 1MB/s@20ms")
    return text


def _to_forwards(value: Any) -> str:
    """A list, or words with blanks between them -> ``tcp:ADDRESS:OUTER:INNER ...``."""
    words = to_words(value) if isinstance(value, (list, tuple)) else to_word(value).split()
    found = []
    for word in words:
        match = _FORWARD.fullmatch(str(word).strip())
        ports = [int(match[3]), int(match[4] or match[3])] if match else [0]
        if match is None or not all(0 < port < 65536 for port in ports):
            raise refused(f"{shown(word)} is no forward", "write tcp:2222:22, or udp:0.0.0.0:53:53")
        try:
            address = ip_address((match[2] or "127.0.0.1").strip("[]"))
        except ValueError:
            raise refused(f"{shown(match[2])} is no address", "write 127.0.0.1 or [::1]") from None
        where = f"[{address}]" if address.version == 6 else str(address)
        found.append(f"{match[1] or 'tcp'}:{where}:{ports[0]}:{ports[1]}")
    return " ".join(found)


def _not_auto(word: str) -> str | None:
    """``auto`` is what no ``backendtype`` means."""
    return None if word == "auto" else word


def _spec_word(value: Any) -> str:
    word = to_word(value)
    if "," in word or word != word.strip():
        raise refused(f"{shown(word)}: no comma, and no space at the ends, is possible here")
    return word


SpecWord = Annotated[str, BeforeValidator(_spec_word)]


class _Device(BaseModel):
    # Built when first used: most runs need only what DomainConfig has of it.
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, defer_build=True)

    def to_dict(self) -> dict[str, Any]:
        """xl's sub-keys and their values, what equals the default left out."""
        return self.model_dump(by_alias=True, exclude_defaults=True)

    def to_spec(self) -> str:
        """xl's spec string for the same device."""
        parts, target = [], None
        for key, value in self.to_dict().items():
            if key == "target":
                target = f"target={value}"
            elif isinstance(value, bool):
                parts.append(_FLAG_OF.get((key, value), f"{key}={int(value)}"))
            else:
                parts.append(f"{key}={value}")
        return ",".join([*parts, target] if target else parts)


_FLAG_OF = {
    ("direct-io-safe", True): "direct-io-safe",
    ("discard", True): "discard",
    ("discard", False): "no-discard",
    ("trusted", True): "trusted",
    ("trusted", False): "untrusted",
}


def _fold_flags(data: Any, flags: dict[str, tuple[str, str]]) -> Any:
    """In a map, ``no-discard: true`` is ``discard: false``: keep one of the two names."""
    if not isinstance(data, dict):
        return data
    folded = dict(data)
    for flag, (key, value) in flags.items():
        if flag not in folded or flag == key:
            continue
        if key in folded:
            raise refused(f"{flag} and {key} are both given", "remove one of them")
        on = to_bool(folded.pop(flag))
        if value in ("0", "1"):
            folded[key] = on == (value == "1")
        elif on:
            folded[key] = value
    return folded


class DiskConfig(_Device):
    """A virtual disk. ``target`` is an absolute path or a URL, None for a CD drive without a medium."""

    target: Annotated[str, BeforeValidator(_to_target)] | None = Field(
        None, description="image file, block device or URL (nbd, http, https); none for an empty CD drive"
    )
    format: Annotated[str, BeforeValidator(to_choice(FORMATS))] = Field("raw", description="image format")
    vdev: Annotated[str, BeforeValidator(_to_vdev)] = Field(
        description="the device the guest sees: xvda, hda, sda, d0p1..."
    )
    access: Annotated[Literal["rw", "ro"] | None, BeforeValidator(_to_access)] = Field(
        None, description="rw (or w), ro (or r); a cdrom is ro, anything else rw"
    )
    devtype: Annotated[str, BeforeValidator(to_choice(("disk", "cdrom")))] = Field(
        "disk", description="disk or cdrom (flag: cdrom)"
    )
    backend: SpecWord | None = Field(None, description="the domain that serves the disk")
    backendtype: (
        Annotated[
            str,
            BeforeValidator(to_choice(("auto", "phy", "qdisk", "xtool"), later=("tap", "standalone"))),
            AfterValidator(_not_auto),
        ]
        | None
    ) = Field(None, description="who serves it: phy (the kernel), qdisk (QEMU) or xtool; auto chooses")
    script: SpecWord | None = Field(None, description="hotplug script that makes target a block device")
    shared: Bool = Field(False, description="others may have it open as well (for cluster file systems)")
    direct_io_safe: Bool = Field(False, alias="direct-io-safe", description="O_DIRECT may be used")
    discard: Bool | None = Field(None, description="offer discard to the guest (flags: discard, no-discard)")
    trusted: Bool = Field(True, description="the guest may trust the backend (flags: trusted, untrusted)")
    specification: Annotated[str, BeforeValidator(to_choice(("xen",), later=("virtio",)))] = Field(
        "xen", description="the guest's protocol"
    )
    bytes_per_second: ByteRate = Field(
        None, alias="bytes-per-second", description="limit on reads and writes: 20MiB (xtool's backend)"
    )
    ops_per_second: OpRate = Field(
        None, alias="ops-per-second", description="limit on requests: 500 (xtool's backend)"
    )
    persistent: Bool = Field(
        False, description="offer to keep the guest's pages mapped (persistent grants; xtool's backend)"
    )

    @model_validator(mode="before")
    @classmethod
    def _flags(cls, data: Any) -> Any:
        return _fold_flags(data, DISK_FLAGS)

    @model_validator(mode="after")
    def _whole(self) -> DiskConfig:
        if self.devtype != "cdrom" and self.target is None:
            raise refused("target is missing: a disk needs a file or block device")
        if self.devtype == "cdrom" and self.access == "rw":
            raise refused("a cdrom cannot be written to", "remove access, or write access: ro")
        if self.remote:
            self._remote()
        if self.backendtype not in (None, "xtool") and (names := self.only_xtool):
            raise refused(
                f"{names[0]} has no effect for backendtype: {self.backendtype}",
                "xtool's own backend knows it: leave backendtype out, or write backendtype: xtool",
            )
        return self

    def _remote(self) -> None:
        web = parse_url(self.target or "").web
        if self.script:
            raise refused("a script takes a path, not a URL", "remove script")
        known = WEB_FORMATS if web else ("raw",)
        if self.format not in known:
            raise refused(f"{self.format} is not served from there", f"format can be {', '.join(known)}")
        if web and not self.readonly:
            raise refused("a file on a web server cannot be written to", "write access: ro")

    @property
    def remote(self) -> bool:
        """Another program or host has it."""
        return self.target is not None and is_url(self.target)

    @property
    def only_xtool(self) -> list[str]:
        """The sub-keys that are given and that only xtool's own backend acts upon."""
        given = {
            "bytes-per-second": self.bytes_per_second is not None,
            "ops-per-second": self.ops_per_second is not None,
            "persistent": self.persistent,
        }
        return [name for name, is_given in given.items() if is_given]

    @property
    def cdrom(self) -> bool:
        return self.devtype == "cdrom"

    @property
    def readonly(self) -> bool:
        return (self.access or ("ro" if self.cdrom else "rw")) == "ro"

    @property
    def number(self) -> int:
        """The device's number in xenstore."""
        number = vdev_number(self.vdev)
        assert number is not None  # checked when it was read
        return number


class VifConfig(_Device):
    """A network interface. ``mac`` None means one is made up."""

    mac: Annotated[str, BeforeValidator(_to_mac)] | None = Field(
        None, description="address in the guest; made up within 00:16:3e if not given"
    )
    bridge: SpecWord | None = Field(None, description="the host's bridge; the host's default if not given")
    gatewaydev: SpecWord | None = Field(None, description="host interface for routed set-ups")
    type: Annotated[str, BeforeValidator(to_choice(("vif", "ioemu")))] | None = Field(
        None, description="vif (paravirtualised alone) or ioemu (emulated too; hvm only)"
    )
    model: SpecWord | None = Field(None, description="emulated card, such as rtl8139 or e1000 (ioemu only)")
    vifname: SpecWord | None = Field(None, description="name of the host's end; vifDOMID.DEVID if not given")
    script: SpecWord | None = Field(None, description="hotplug script")
    ip: SpecWord | None = Field(None, description="address, or addresses, the script may use")
    backend: SpecWord | None = Field(None, description="the domain that serves the interface")
    backendtype: (
        Annotated[str, BeforeValidator(to_choice(("auto", "vif", "xtool"))), AfterValidator(_not_auto)] | None
    ) = Field(None, description="who serves it: vif (the kernel's netback) or xtool; auto chooses")
    rate: Annotated[str, BeforeValidator(_to_rate)] | None = Field(
        None, description="limit on what the guest sends: 10Mb/s, 250KB/s, 1MB/s@20ms"
    )
    devid: Annotated[Int, AfterValidator(between(0, 65535))] | None = Field(
        None, description="device number; the lowest free one if not given"
    )
    mtu: Annotated[Int, AfterValidator(between(68, 65535))] | None = Field(
        None, description="largest payload, bytes; the bridge's if not given"
    )
    vlan: Text | None = Field(None, description="VLAN to join, for the scripts that know VLANs")
    trusted: Bool = Field(True, description="the guest may trust the backend (flags: trusted, untrusted)")
    network: Annotated[str, BeforeValidator(to_choice(("bridge", "user")))] = Field(
        "bridge", description="bridge, or user: through passt, with nothing set up on the host"
    )
    forwards: Annotated[str, BeforeValidator(_to_forwards)] | None = Field(
        None, description="for network: user: what comes in, such as [tcp:2222:22] (on 127.0.0.1)"
    )
    mac_filter: Bool = Field(
        True, alias="mac-filter", description="the guest sends from its own address only (xtool's backend)"
    )
    queues: Annotated[Int, AfterValidator(between(1, 8))] | None = Field(
        None, description="pairs of rings the guest may use (xtool's backend)"
    )
    rate_in: Annotated[str, BeforeValidator(_to_rate)] | None = Field(
        None, alias="rate-in", description="limit on what the guest is sent (xtool's backend); as rate"
    )

    @model_validator(mode="before")
    @classmethod
    def _flags(cls, data: Any) -> Any:
        return _fold_flags(data, VIF_FLAGS)

    @model_validator(mode="after")
    def _whole(self) -> VifConfig:
        if self.model is not None and self.type == "vif":
            raise refused("model has no effect for type: vif", "remove it, or write type: ioemu")
        if self.network == "user":
            for name in ("bridge", "gatewaydev", "script", "vifname", "model", "vlan", "ip"):
                if getattr(self, name) is not None:
                    raise refused(f"{name} has no effect for network: user", f"remove {name}")
            if self.type == "ioemu" or self.backendtype == "vif":
                raise refused("network: user is for paravirtual interfaces that xtool serves")
        elif self.forwards is not None:
            raise refused("forwards has no effect without network: user")
        if self.backendtype != "xtool" and self.network != "user":
            for name in ("queues", "rate_in"):
                if getattr(self, name) is not None:
                    shown_name = name.replace("_", "-")
                    raise refused(f"{shown_name} needs backendtype: xtool")
        return self

    @property
    def rate_limit(self) -> Rate | None:
        return parse_rate(self.rate) if self.rate else None

    @property
    def rate_in_limit(self) -> Rate | None:
        return parse_rate(self.rate_in) if self.rate_in else None


class ChannelConfig(_Device):
    """A console beside the first one, for programs: ``name`` tells the guest what it is for."""

    name: SpecWord = Field(description="what it is for, such as org.example.agent")
    connection: Annotated[
        str, BeforeValidator(lambda v: to_choice(("pty", "socket"))(to_word(v).lower()))
    ] = Field("pty", description="how this host reaches it: pty or socket")
    path: Path | None = Field(None, description="where the socket is to be; in /run/xtool if not given")

    @model_validator(mode="after")
    def _whole(self) -> ChannelConfig:
        if self.path is not None and self.connection != "socket":
            raise refused("path has no effect for connection: pty", "remove it, or write connection: socket")
        return self
