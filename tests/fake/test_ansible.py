"""The Ansible collection, built and installed, run by ansible-core against a daemon on the host in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemons import running

from xtool import paths
from xtool.config import DomainConfig
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytest.importorskip("ansible")


def ansible(folder: Path, program: str, *words: str) -> str:
    env = {**os.environ, "HOME": str(folder), "ANSIBLE_COLLECTIONS_PATH": str(folder / "c")}
    env |= {"PYTHONPATH": str(ROOT), "ANSIBLE_STDOUT_CALLBACK": "json", "ANSIBLE_LOCALHOST_WARNING": "0"}
    argv = [str(BIN / program), *words]
    done = subprocess.run(argv, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_disks_and_interfaces_live(
    host: Host, config: Callable[..., DomainConfig], tmp_path: Path
) -> None:
    ansible(tmp_path, "ansible-galaxy", "collection", "build", str(ROOT / "ansible"), "--output-path", "b")
    [built] = (tmp_path / "b").glob("*.tar.gz")
    ansible(tmp_path, "ansible-galaxy", "collection", "install", str(built), "-p", "c", "--offline")
    for name in ("disk", "network", "guest_info", "host_info"):
        assert "EXAMPLES" in ansible(tmp_path, "ansible-doc", f"xtool.xen.{name}")
    image = tmp_path / "a.img"
    image.write_bytes(bytes(4096))
    mac = "00:16:3e:00:00:01"
    disk = {"guest": "web", "vdev": "xvdb", "target": str(image)}
    vif = {"guest": "web", "mac": mac, "bridge": "xenbr0"}
    gone = {"guest": "web", "state": "absent", "force": True, "timeout": 0.2}
    steps: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("host_info", {}, {}),
        ("disk", disk, {"check_mode": True}),
        ("guest_info", {"devices": True}, {}),
        ("disk", disk, {}),
        ("disk", disk, {}),
        ("network", vif, {}),
        ("network", vif, {}),
        ("network", {**vif, "rate": "10Mb/s"}, {}),
        ("network", {**vif, "rate": "10Mb/s"}, {}),
        ("disk", {**disk, "target": "/else"}, {"ignore_errors": True}),
        ("disk", {**gone, "vdev": "xvdb"}, {}),
        ("disk", {**gone, "vdev": "xvdb"}, {}),
        ("guest_info", {"devices": True}, {}),
    ]
    paths.run_dir().mkdir(exist_ok=True)
    with running(host, tmp_path) as daemon:
        daemon.client().create(config("pv", name="web"), CreateOptions())
        script = tmp_path / "xtool"
        script.write_text(f"#!/bin/sh\nXTOOL_WARM=0 PYTHONPATH={ROOT} exec {sys.executable} -m xtool.cli.app \"$@\"\n")
        script.chmod(0o755)
        shared = {"host": f"unix:{daemon.path}", "executable": str(script)}
        tasks = [{f"xtool.xen.{name}": {**shared, **words}, **more} for name, words, more in steps]
        where = {"ansible_python_interpreter": sys.executable}
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": where, "tasks": tasks}
        (tmp_path / "play.yml").write_text(json.dumps([play]))
        out = ansible(tmp_path, "ansible-playbook", "-i", "localhost,", "play.yml")
    done = [task["hosts"]["localhost"] for task in json.loads(out[out.index("{") :])["plays"][0]["tasks"]]
    assert [one["changed"] for one in done] == [
        *(False, True, False, True, False, True, False, True, False, False, True, False, False)
    ]
    assert done[0]["info"]["total_memory"] > 0
    assert done[2]["guests"][0]["disks"] == []  # check mode did nothing
    assert done[9]["failed"] and "is another one" in done[9]["msg"]
    [web] = done[12]["guests"]
    assert web["name"] == "web" and web["disks"] == [] and [one["mac"] for one in web["interfaces"]] == [mac]
