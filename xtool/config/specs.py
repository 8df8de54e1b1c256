"""xl's spec strings for disks and network interfaces: text to sub-keys, pure.

Written from xl-disk-configuration(5) and xl-network-configuration(5). Where those pages call a form
deprecated (``phy:``, ``tap2:``, ``hdc:cdrom``...), it is refused with the form to write instead. Where xl
goes on after a misspelt word, this is refused too.
"""

from __future__ import annotations

from typing import NamedTuple

from xtool.config.problems import did_you_mean

POSITIONAL = ("target", "format", "vdev", "access")
DISK_KEYS = (
    *POSITIONAL,
    *("devtype", "backend", "backendtype", "script", "shared", "specification"),
    *("bytes-per-second", "ops-per-second", "persistent"),  # xtool's own
)
#: Flag -> the sub-key and value it stands for.
DISK_FLAGS = {
    "cdrom": ("devtype", "cdrom"),
    "direct-io-safe": ("direct-io-safe", "1"),
    "discard": ("discard", "1"),
    "no-discard": ("discard", "0"),
    "trusted": ("trusted", "1"),
    "untrusted": ("trusted", "0"),
}
DISK_LATER = frozenset(
    "colo no-colo colo-host colo-port colo-export active-disk hidden-disk transport grant_usage".split()  # noqa: SIM905
)
VIF_KEYS = (
    *("mac", "bridge", "gatewaydev", "type", "model", "vifname", "script", "ip", "backend"),
    *("backendtype", "rate", "devid", "mtu", "vlan"),
    *("network", "forwards", "mac-filter", "queues", "rate-in"),  # xtool's own
)
VIF_FLAGS = {"trusted": ("trusted", "1"), "untrusted": ("trusted", "0")}

_PREFIXES = {
    "phy": "write the path alone: /dev/...,raw,xvda",
    "file": "write the path alone: /path/image,raw,xvda",
    "raw": "write the format second: /path/image,raw,xvda",
    "qcow": "write the format second: /path/image,qcow,xvda",
    "qcow2": "write the format second: /path/image,qcow2,xvda",
    "vhd": "write the format second: /path/image,vhd,xvda",
    "iscsi": "use script=block-iscsi",
    "nbd": "use script=block-nbd",
    "enbd": "use script=block-enbd",
    "drbd": "use script=block-drbd",
}


class SpecItem(NamedTuple):
    """One sub-key of a spec string; ``offset`` is where its value begins, in characters."""

    key: str
    value: str
    offset: int


class SpecError(Exception):
    """The string is no spec; ``offset`` is where, in characters from its start."""

    def __init__(self, message: str, offset: int, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset
        self.hint = hint


class _Items:
    """Collects items, refusing the second of two equal sub-keys. Empty values mean "not given"."""

    def __init__(self) -> None:
        self.items: dict[str, SpecItem] = {}

    def add(self, key: str, value: str, offset: int) -> None:
        before = self.items.get(key)
        if before and (before.value or key != "target"):
            raise SpecError(f"{key} is given twice", offset)
        self.items[key] = SpecItem(key, value, offset)

    def result(self) -> list[SpecItem]:
        return [item for item in self.items.values() if item.value]


def _unknown(what: str, key: str, known: tuple[str, ...], offset: int) -> SpecError:
    return SpecError(f"{key} is not a sub-key of {what}", offset, did_you_mean(key, known))


def parse_disk_spec(text: str) -> list[SpecItem]:
    """The sub-keys of a disk spec, canonical (flags as ``devtype``, ``discard``, ``trusted``).

    ``target=`` takes the whole rest of the string, commas included. Raises ``SpecError``.
    """
    found = _Items()
    at = 0
    while at < len(text):
        while at < len(text) and text[at] in " \t":
            at += 1
        if text.startswith("target=", at):
            found.add("target", text[at + 7 :], at + 7)
            break
        end = text.find(",", at)
        end = len(text) if end < 0 else end
        token = text[at:end]
        key, equals, value = token.partition("=")
        if equals and "://" not in key:  # a URL may have one as well
            _named_disk_key(found, key, value, at)
        elif token in DISK_FLAGS:
            found.add(*DISK_FLAGS[token], at)
        elif token in DISK_LATER:
            raise SpecError(f"xl's {token} is not supported by xtool yet", at)
        else:
            _positional(found, token, at)
        at = end + 1
    return found.result()


def _named_disk_key(found: _Items, key: str, value: str, at: int) -> None:
    if key in DISK_LATER:
        raise SpecError(f"xl's {key} is not supported by xtool yet", at)
    if key not in DISK_KEYS:
        raise _unknown("disk", key, (*DISK_KEYS, *DISK_FLAGS), at)
    found.add(key, value, at + len(key) + 1)


def _positional(found: _Items, token: str, at: int) -> None:
    prefix, colon, rest = token.partition(":")
    path = rest.startswith("/") and not rest.startswith("//")
    if colon and path and prefix.isalnum() and "target" not in found.items:
        hint = _PREFIXES.get(prefix, "write the path alone")
        raise SpecError(f"the prefix {prefix}: is deprecated and not taken here", at, hint)
    if colon and rest in ("cdrom", "disk"):
        raise SpecError(f":{rest} after a vdev is deprecated", at, f"write {prefix},devtype={rest}")
    for key in POSITIONAL:
        if key not in found.items:
            found.add(key, token, at)
            return
    raise SpecError(
        f"too many positional parameters: {token}",
        at,
        did_you_mean(token, DISK_FLAGS) or "they are target, format, vdev, access",
    )


def parse_vif_spec(text: str) -> list[SpecItem]:
    """The sub-keys of a vif spec. Raises ``SpecError``."""
    found = _Items()
    at = 0
    while at < len(text):
        while at < len(text) and text[at] in " \t":
            at += 1
        end = text.find(",", at)
        end = len(text) if end < 0 else end
        token = text[at:end]
        key, equals, value = token.partition("=")
        if equals and key == "netdev":
            raise SpecError("netdev is deprecated", at, "use gatewaydev")
        if equals and (key.startswith("colo") or key == "forwarddev"):
            raise SpecError(f"xl's {key} is not supported by xtool yet", at)
        if equals and key in VIF_KEYS:
            found.add(key, value, at + len(key) + 1)
        elif not equals and token in VIF_FLAGS:
            found.add(*VIF_FLAGS[token], at)
        elif token:
            raise _unknown("vif", key, (*VIF_KEYS, *VIF_FLAGS), at)
        at = end + 1
    return found.result()


CHANNEL_KEYS = ("name", "connection", "path")


def parse_channel_spec(text: str) -> list[SpecItem]:
    """The sub-keys of a channel spec. Raises ``SpecError``."""
    found = _Items()
    at = 0
    for token in text.split(","):
        begin = at + len(token) - len(token.lstrip())
        key, equals, value = token.strip().partition("=")
        if equals and key in CHANNEL_KEYS:
            found.add(key, value, begin + len(key) + 1)
        elif key:
            raise _unknown("channel", key, CHANNEL_KEYS, begin)
        at += len(token) + 1
    return found.result()
