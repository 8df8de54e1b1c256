"""xl's spec strings as xl reads them, deprecated forms too; for ``convert``. Pure.

``specs.py`` refuses what is deprecated, with what to write instead; here it is understood. Facts (xl's
``libxlu_disk_l.l``, xl-disk-configuration(5), xl-network-configuration(5)):

- A prefix (``phy:``, ``file:``, ``tap2:``, ``qcow2:``...) before a path takes the place of the format:
  target, vdev, access follow. ``nbd:``, ``iscsi:``, ``drbd:`` and ``enbd:`` name a hotplug script.
- ``hdc:cdrom`` is a vdev with its devtype. A target without a slash at its front is below ``/dev``.
- A vif's words are in any order; ``netdev`` is ``gatewaydev``; without a script it is ``vif-bridge``'s.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_PREFIX = re.compile(r"(tapdisk|tap2?|aio|ioemu|file|phy|raw|qcow2?|vhd|iscsi|e?nbd|drbd):")
_FORMATS = ("raw", "qcow", "qcow2", "vhd")
_SCRIPTS = ("iscsi", "nbd", "enbd", "drbd")
_POSITIONAL = ("target", "format", "vdev", "access")
_FLAGS = {
    "cdrom": ("devtype", "cdrom"),
    "direct-io-safe": ("direct-io-safe", "1"),
    "discard": ("discard", "1"),
    "no-discard": ("discard", "0"),
    "trusted": ("trusted", "1"),
    "untrusted": ("trusted", "0"),
    "colo": ("colo", "1"),
    "no-colo": ("no-colo", "1"),
}
_ACCESS = {"r": "ro", "ro": "ro", "w": "rw", "rw": "rw", "r!": "ro", "w!": "rw"}


class Spec(NamedTuple):
    """Sub-keys and values, and what had to be changed on the way."""

    values: dict[str, str]
    notes: list[str]


def read_disk(text: str) -> Spec:
    found: dict[str, str] = {}
    notes: list[str] = []
    given: set[str] = set()
    prefixed = False
    rest = text
    while rest:
        rest = rest.lstrip(" \t\n")
        prefix = _PREFIX.match(rest)
        if prefix and "target" not in given and rest[prefix.end() :].startswith(("/", *_CHAINED)):
            prefixed = True
            given.add("format")
            name, rest = prefix[1], rest[prefix.end() :]
            if name in _FORMATS:
                found["format"] = name
            elif name in _SCRIPTS:
                found["script"] = f"block-{name}"
            continue
        if rest.startswith("target="):
            found["target"] = rest[7:]
            break
        token, _, rest = rest.partition(",")
        token = token.rstrip(" \t\n")
        key, equals, value = token.partition("=")
        if equals and re.fullmatch(r"[a-z][-_a-z0-9]*", key):
            given.add(key)
            found[key] = value
        elif token in _FLAGS:
            found[_FLAGS[token][0]] = _FLAGS[token][1]
        else:
            _positional(token, found, given, notes)
    _settle_disk(found, notes, prefixed)
    return Spec({key: value for key, value in found.items() if value}, notes)


_CHAINED = tuple(f"{name}:" for name in ("aio", "raw", "qcow2", "qcow", "vhd", "file", "phy", "tapdisk"))


def _positional(token: str, found: dict[str, str], given: set[str], notes: list[str]) -> None:
    for key in _POSITIONAL:
        if key in given:
            continue
        name, colon, kind = token.rpartition(":")
        if key == "format" and colon and kind in ("cdrom", "disk") and not found.get("target"):
            given.add("format")  # an empty drive, written in the old order
            continue
        given.add(key)
        if key == "vdev":
            if colon and kind in ("cdrom", "disk"):
                token, found["devtype"] = name, kind
            token = token.removeprefix("ioemu:")
        if token:
            found[key] = token
        return
    notes.append(f"too many words in a disk: {token}")


def _settle_disk(found: dict[str, str], notes: list[str], prefixed: bool) -> None:
    access = found.pop("access", "")
    if access and found.get("devtype") != "cdrom":
        found["access"] = _ACCESS.get(access, access)
    if found.get("format") in ("empty", "raw"):
        del found["format"]
    target = found.get("target", "")
    if target and not target.startswith("/") and "script" not in found:
        found["target"] = f"/dev/{target}"
    if found.get("devtype") == "disk":
        del found["devtype"]
    kind = found.get("backendtype")
    if kind in ("tap", "standalone"):
        notes.append(f"backendtype={kind}: xtool chooses another backend")
        del found["backendtype"]
    if found.get("specification") == "xen":
        del found["specification"]


def read_vif(text: str) -> Spec:
    found: dict[str, str] = {}
    notes: list[str] = []
    for word in text.split(","):
        token = word.strip(" \t\n")
        key, equals, value = token.partition("=")
        key = {"netdev": "gatewaydev"}.get(key, key)
        if equals:
            found[key] = value
        elif token in ("trusted", "untrusted"):
            found["trusted"] = str(int(token == "trusted"))
        elif token:
            notes.append(f"{token} is no word of a vif")
    if found.get("type") == "netfront":
        found["type"] = "vif"
    if "script" not in found and {"ip", "gatewaydev", "vlan"} & found.keys():
        found["script"] = "vif-bridge"  # xl's default, which makes something of them
    return Spec({key: value for key, value in found.items() if value}, notes)


def read_channel(text: str) -> Spec:
    pairs = (word.strip(" \t\n").partition("=") for word in text.split(","))
    return Spec({key: value for key, equals, value in pairs if equals and value}, [])
