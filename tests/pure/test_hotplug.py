"""The host side of devices: loop devices, links, scripts, and which data a path leads to."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from xtool.devices.hotplug import bridge, link, loop, scripts, sharing
from xtool.devices.hotplug.port import LinkPlan
from xtool.errors import DeadlineError, HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="loop devices need root"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(1 << 20))
    return path


@needs_loop
@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize("direct_io", [True, False])
def test_a_file_as_a_block_device(image: Path, readonly: bool, direct_io: bool) -> None:
    with_loop = loop.attach(str(image), readonly=readonly, direct_io=direct_io)
    try:
        assert with_loop.loop and with_loop.major == loop.LOOP_MAJOR
        assert Path(with_loop.path).read_bytes() == image.read_bytes()
        found = loop.status(with_loop.path)
        assert found is not None and (found.inode, found.readonly) == (image.stat().st_ino, readonly)
        assert sharing.users(str(image)) == [(f"{with_loop.path} on this host", not readonly)]
        assert sharing.identity(with_loop.path) & sharing.identity(str(image))
    finally:
        with_loop.close()
    with_loop.close()  # twice is no error
    assert loop.status(with_loop.path) is None and sharing.users(str(image)) == []


@needs_loop
def test_a_second_holder_keeps_it(image: Path) -> None:
    """As blkback does: what we let go of stays until the other has closed it, and then goes."""
    ours = loop.attach(str(image), readonly=True)
    theirs = loop.open_block(ours.path, readonly=True)
    ours.close()
    assert loop.status(ours.path) is not None
    theirs.close()
    assert loop.status(ours.path) is None


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        loop.attach(str(tmp_path / "none"), readonly=True)
    with pytest.raises(HostError, match="not a block device"):
        loop.open_block("/dev/null", readonly=True)


def test_what_a_path_leads_to(image: Path, tmp_path: Path) -> None:
    (tmp_path / "soft").symlink_to(image)
    (tmp_path / "hard").hardlink_to(image)
    (tmp_path / "copy").write_bytes(image.read_bytes())
    names = {name: sharing.identity(str(tmp_path / name)) for name in ("image", "soft", "hard", "copy")}
    assert names["image"] == names["soft"] == names["hard"] != names["copy"]
    assert sharing.identity(str(tmp_path / "none")) == frozenset()
    assert sharing.look_at(str(image)) == ("file", 1 << 20, "")
    assert sharing.look_at("/dev/null").kind == "other" and sharing.look_at(None).kind == "none"
    assert sharing.look_at(str(tmp_path / "none")).kind == "missing"


class TooLarge(Exception):
    code = errno.EINVAL


class Netlink:
    """Remembers what was asked of the kernel, in order. Takes no MTU above ``limit``, as netback."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []
        self.limit = 9000

    def link(self, _verb: str, **changes: object) -> None:
        if int(str(changes.get("mtu", 0))) > self.limit:
            raise TooLarge
        self.asked.append({name: value for name, value in changes.items() if name != "index"})


def test_an_interface_goes_on_its_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    links = {"br0": link.Link(5, 9000, True), "vif7.0": link.Link(9, 1500, False)}
    ip = Netlink()

    @contextmanager
    def netlink() -> Iterator[Any]:
        yield ip

    monkeypatch.setattr(link, "look", links.get)
    monkeypatch.setattr(link, "exists", links.__contains__)
    monkeypatch.setattr(link, "netlink", netlink)
    assert bridge.plug(LinkPlan("vif7.0", "br0", "lan")) == 9000
    assert ip.asked == [
        {"state": "down"},
        {"address": "fe:ff:ff:ff:ff:ff", "ifalias": "vif7.0", "ifname": "lan"},
        {"mtu": 9000},
        {"master": 5},
        {"state": "up"},
    ]
    assert bridge.plug(LinkPlan("vif7.0", "br0", mtu=1400)) == 1400
    ip.limit = 1500
    assert bridge.plug(LinkPlan("vif7.0", "br0")) == 1500
    with pytest.raises(TooLarge):
        ip.limit = 1000
        bridge.plug(LinkPlan("vif7.0", "br0", mtu=1400))
    for plan, message in (
        (LinkPlan("vif7.0", "br1"), "no bridge br1"),
        (LinkPlan("vif7.0", "vif7.0"), "but no bridge"),
        (LinkPlan("vif7.1", "br0"), "vif7.1 is not there"),
        (LinkPlan("vif7.0", "br0", "br0"), "exists already"),
    ):
        with pytest.raises(HostError, match=message):
            bridge.plug(plan)


def test_scripts_and_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "script"

    def script(text: str) -> str:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    seen = tmp_path / "seen"
    scripts.run(script(f'echo "$1 $XENBUS_PATH" > {seen}'), ["add"], {"XENBUS_PATH": "backend/vbd/1/2"}, 10)
    assert seen.read_text() == "add backend/vbd/1/2\n"
    with pytest.raises(HostError, match="status 3: the last word"):
        scripts.run(script("echo first; echo the last word >&2; exit 3"), [], {}, 10)
    with pytest.raises(DeadlineError, match=r"within 0.2 s"):
        scripts.run(script("sleep 100 & sleep 100"), [], {}, 0.2)
    with pytest.raises(HostError, match="missing"):
        scripts.run(str(tmp_path / "none"), [], {}, 1)
