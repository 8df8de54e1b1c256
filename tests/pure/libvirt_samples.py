"""Domain files for tests of the libvirt driver, and the schema its XML must follow."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from xtool.config import DomainConfig
from xtool.drivers.libvirt.facts import Facts

QEMU = Facts("qemu", "libvirt's QEMU driver")
TCG = Facts("qemu", "libvirt's QEMU driver", "tcg", "/usr/bin/qemu-system-x86_64", True)
XEN = Facts("xen", "libvirt's Xen driver")
UUID = "0c0ffee0-1111-4222-8333-444455556666"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


@cache
def schema() -> Any:
    etree = pytest.importorskip("lxml.etree")
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not here (Debian: libvirt-daemon)")
    return etree.RelaxNG(etree.parse(str(SCHEMA)))


def assert_valid(xml: str) -> None:
    from lxml import etree

    rules = schema()
    document = etree.fromstring(xml)
    assert rules.validate(document), f"{rules.error_log}\n{xml}"


#: Markup, quotes and letters from elsewhere.
text = st.text(st.sampled_from("ab1 <>&\"'%;{}#äß字\\]"), min_size=1, max_size=20).filter(str.strip)
word = st.text(st.sampled_from("abz19<&>\"'ä"), min_size=1, max_size=10)
path = word.map(lambda name: f"/images/{name}")
mac = st.integers(0, 0xFFFFFF).map(lambda n: f"00:16:3e:{n >> 16:02x}:{n >> 8 & 255:02x}:{n & 255:02x}")


def optional(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


def _disk(vdev: str, xen: bool) -> st.SearchStrategy[dict[str, Any]]:
    """One that the driver can honour."""
    if vdev == "hdc":
        drive = st.fixed_dictionaries({"vdev": st.just(vdev), "devtype": st.just("cdrom")})
        return st.one_of(drive, drive.flatmap(lambda d: path.map(lambda p: {**d, "target": p})))
    targets = [path, word.map(lambda w: f"/dev/{w}")]
    formats = ["raw", "qcow", "qcow2", "qed", "vhd"]
    more: dict[str, st.SearchStrategy[Any]] = {"shared": st.booleans()}
    if xen:
        more["backend"] = word
    else:
        more |= {
            "discard": st.booleans(),
            "bytes-per-second": st.sampled_from(["64KiB", "20MiB"]),
            "ops-per-second": st.integers(1, 1000),
        }
    if vdev.startswith("xvd") or xen:
        more["access"] = st.sampled_from(["rw", "ro"])
    required = {"vdev": st.just(vdev), "target": st.one_of(targets), "format": st.sampled_from(formats)}
    local = st.fixed_dictionaries(required, optional=more)
    if xen:
        return local.map(lambda d: {**d, "format": "raw"} if d["target"].startswith("/dev/") else d)
    urls = ["nbd://host/a", "nbd://[::1]:99", "nbd+unix:///x?socket=/run/s"]
    return st.one_of(local, local.map(lambda d: {**d, "format": "raw"}).flatmap(
        lambda d: st.sampled_from(urls).map(lambda url: {**d, "target": url})
    ))  # fmt: skip


def _vif(xen: bool) -> st.SearchStrategy[dict[str, Any]]:
    more = {
        "mac": mac,
        "rate": st.sampled_from(["10Mb/s", "250KB/s", "1GB/s"]),
        "vifname": st.sampled_from(["tap0", "a.b"]),
    }
    more |= {"script": path, "backend": word} if xen else {"mtu": st.integers(68, 9000)}
    kinds = st.sampled_from([{}, {"type": "vif"}, {"type": "ioemu"}, {"model": "e1000"}])
    bridged = st.tuples(
        st.fixed_dictionaries({"bridge": st.sampled_from(["br0", "xen-br.1"])}, optional=more), kinds
    ).map(lambda pair: {**pair[0], **pair[1]})
    if xen:
        return bridged
    forwards = st.sampled_from(["tcp:2222:22", "udp:[::1]:53:53 tcp:80"])
    return st.one_of(bridged, optional(mac=mac, forwards=forwards).map(lambda v: {**v, "network": "user"}))


@st.composite
def configs(draw: st.DrawFn, xen: bool) -> DomainConfig:
    """HVM guests that the driver can honour, with much of what a file can say."""
    vdevs = draw(
        st.lists(st.sampled_from(["hda", "hdb", "hdc", "xvda", "xvdb", "xvdaa", "sda", "sdb"]), unique=True)
    )
    keys: dict[str, Any] = {
        "name": draw(text.map(lambda t: f"x{t}x".replace("/", ""))),
        "type": "hvm",
        "uuid": UUID,
        "memory": draw(st.integers(64, 4096)),
        "disk": [draw(_disk(vdev, xen)) for vdev in vdevs],
        "vif": draw(st.lists(_vif(xen), max_size=3, unique_by=lambda v: v.get("mac", id(v)))),
        **draw(
            optional(
                vcpus=st.integers(1, 8),
                acpi=st.booleans(),
                apic=st.booleans(),
                hpet=st.booleans(),
                localtime=st.booleans(),
                rtc_timeoffset=st.integers(-9999, 9999),
                on_crash=st.sampled_from(["destroy", "restart", "preserve"]),
                on_poweroff=st.sampled_from(["destroy", "restart"]),
                firmware=st.sampled_from(["bios", "uefi"]),
                cpus=st.sampled_from(["all", "0-3,^1", "2"]),
                device_model_args=st.lists(text, min_size=1, max_size=3),
                channel=st.lists(word.map(lambda w: {"name": w}), max_size=2),
            )
        ),
    }
    keys["maxmem"] = keys["memory"] + draw(st.sampled_from([0, 64]))
    keys["maxvcpus"] = keys.get("vcpus", 1) + draw(st.sampled_from([0, 1]))
    if draw(st.booleans()):
        keys |= {"kernel": draw(path), **draw(optional(ramdisk=path, cmdline=text))}
    else:
        keys |= draw(optional(boot=st.sampled_from(["c", "dc", "ncd"])))
    if draw(st.booleans()):
        keys |= {
            "vnc": True,
            **draw(optional(vncdisplay=st.integers(0, 99), vncpasswd=word.map(lambda w: w[:3]))),
        }
    keys |= draw(st.sampled_from([{}, {"vga": "none"}, {"vga": "stdvga", "videoram": 32}, {"vga": "cirrus"}]))
    keys |= draw(st.sampled_from([{}, {"usb": True, "usbdevice": ["tablet", "mouse"]}]))
    if xen:
        keys |= draw(
            optional(
                tsc_mode=st.sampled_from(["native", "always_emulate"]),
                nestedhvm=st.booleans(),
                pae=st.booleans(),
                max_grant_frames=st.integers(1, 99),
                serial=st.just("pty"),
            )
        )
    else:
        keys |= draw(
            optional(
                hdtype=st.sampled_from(["ide", "ahci"]),
                serial=st.lists(
                    st.sampled_from(["pty", "null", "file:/tmp/<a>", "unix:/s,server"]),
                    min_size=1,
                    max_size=3,
                ),
            )
        )
    if keys.get("on_poweroff") == "restart":
        keys["on_reboot"] = "restart"
    return DomainConfig.model_validate(keys, context={"base_dir": "/"})
