"""The Ansible collection, built and installed, run by ansible-core against a daemon on the host in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import running

from xtool import paths
from xtool.config import DomainConfig
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host

pytest.importorskip("ansible")

from playbooks import Playbooks, Step  # noqa: E402


@pytest.fixture(scope="module")
def playbooks(tmp_path_factory: pytest.TempPathFactory) -> Playbooks:
    return Playbooks(tmp_path_factory.mktemp("ansible"))


def test_disks_and_interfaces_live(
    host: Host, config: Callable[..., DomainConfig], tmp_path: Path, playbooks: Playbooks
) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(4096))
    mac = "00:16:3e:00:00:01"
    disk = {"guest": "web", "vdev": "xvdb", "target": str(image)}
    vif = {"guest": "web", "mac": mac, "bridge": "xenbr0"}
    gone = {"guest": "web", "state": "absent", "force": True, "timeout": 0.2}
    steps: list[Step] = [
        ("host_info", {}),
        ("disk", disk, {"check_mode": True}),
        ("guest_info", {"devices": True}),
        ("disk", disk),
        ("disk", disk),
        ("network", vif),
        ("network", vif),
        ("network", {**vif, "rate": "10Mb/s"}),
        ("network", {**vif, "rate": "10Mb/s"}),
        ("disk", {**disk, "target": "/else"}),
        ("disk", {**gone, "vdev": "xvdb"}),
        ("disk", {**gone, "vdev": "xvdb"}),
        ("guest_info", {"devices": True}),
    ]
    paths.run_dir().mkdir(exist_ok=True)
    with running(host, tmp_path) as daemon:
        daemon.client().create(config("pv", name="web"), CreateOptions())
        done = playbooks.play(f"unix:{daemon.path}", steps)
    assert [number for number, one in enumerate(done) if one["failed"]] == [9]
    assert [one["changed"] for one in done] == [
        *(False, True, False, True, False, True, False, True, False, False, True, False, False)
    ]
    assert done[0]["info"]["total_memory"] > 0
    assert done[2]["guests"][0]["disks"] == []  # check mode did nothing
    assert "is another one" in done[9]["msg"]
    [web] = done[12]["guests"]
    assert web["name"] == "web" and web["disks"] == [] and [one["mac"] for one in web["interfaces"]] == [mac]
