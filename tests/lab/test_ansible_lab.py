"""The Ansible collection on real Xen: three guests, described twice, looked at over a console, and ended; one
that is changed.

One lab of the test's own is both hosts. ``XTOOL_TEST_LABS`` names one or two that run: with room for 1.75 GiB
of guests, and without a db, an app or a web.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from xtool.lab.image import image_folder

pytest.importorskip("ansible")

from playbooks import Playbooks, Step

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(3600),
]
XTOOL = (sys.executable, "-m", "xtool.cli.app")
GIVEN = [name for name in os.environ.get("XTOOL_TEST_LABS", "").split(",") if name]
LABS = GIVEN or [f"test-ansible-{os.getpid()}"]
#: What the playbooks expect of the hosts: kernel, ramdisk, images; and a daemon.
PREPARE = """
set -e
mkdir -p /images
cp /opt/xtool/src/build/guest/vmlinuz /boot/vmlinuz
cp /opt/xtool/src/build/guest/initramfs.cpio.gz /boot/initrd.img
for name in db app web; do truncate -s 16M /images/$name.img; done
xtool daemon status || xtool daemon run -b
"""


class Site(NamedTuple):
    playbooks: Playbooks
    alpha: str
    beta: str

    def play(self, name: str) -> list[dict[str, Any]]:
        """What each task came to, loops taken apart."""
        file = self.playbooks.installed / "playbooks" / name
        done = self.playbooks.results(*("-e", f"alpha={self.alpha}", "-e", f"beta={self.beta}", str(file)))
        assert not any(one["failed"] for one in done), done
        return [each for one in done for each in one.get("results", [one])]


def ok(*words: str) -> str:
    done = subprocess.run([*XTOOL, *words], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not image_folder().is_dir():
        pytest.skip("the lab's image is not built: run scripts/setup")
    playbooks = Playbooks(tmp_path_factory.mktemp("ansible"), warm=False)
    try:
        for name in LABS:
            if name not in GIVEN:
                ok("lab", "up", name, "--memory", "4GiB")
            ok("lab", "exec", name, "--", "sh", "-c", PREPARE)
        yield Site(playbooks, f"lab:{LABS[0]}", f"lab:{LABS[-1]}")
    finally:
        for name in set(LABS) - set(GIVEN):
            subprocess.run([*XTOOL, "lab", "remove", name], check=False, timeout=300)
        playbooks.close()


def guests(host: str) -> set[str]:
    return {one["name"] for one in json.loads(ok("-H", host, "list", "-o", "json")) if one["domid"]}


def test_three_tiers_from_nothing_to_nothing(site: Site, tmp_path: Path) -> None:
    first = site.play("three_tier.yml")
    assert [(one["guest"]["name"], one["actions"]) for one in first] == [
        *(("db", ["created"]), ("app", ["created"]), ("web", ["created"]))
    ]
    again = site.play("three_tier.yml")
    assert [one["changed"] for one in again] == [False] * 3, again
    uuids = [[one["guest"]["uuid"] for one in run] for run in (first, again)]
    assert uuids[0] == uuids[1]
    assert guests(site.alpha) | guests(site.beta) == {"db", "app", "web"}

    look_inside(site, tmp_path)

    ended = site.play("end.yml")
    assert [one["changed"] for one in ended] == [True] * 3
    assert guests(site.alpha) | guests(site.beta) == set()
    assert [one["changed"] for one in site.play("end.yml")] == [False] * 3


def look_inside(site: Site, tmp_path: Path) -> None:
    """Over the guest's console, by the connection plugin and by the module: no network reaches it."""
    inventory = tmp_path / "site.xtool.yml"
    source = {"plugin": "xtool.xen.guests", "executable": str(site.playbooks.xtool)}
    inventory.write_text(json.dumps({**source, "hosts": {"alpha": site.alpha}}))
    (tmp_path / "script").write_text("#!/bin/sh\necho from $(hostname)\nexit 0\n")
    timeouts = {"timeout": 300, "command_timeout": 300}
    command = {"host": site.alpha, "executable": str(site.playbooks.xtool), "guest": "db", **timeouts}
    tasks = [
        {"ansible.builtin.raw": "cat /proc/cmdline; exit 3", "ignore_errors": True},
        {"ansible.builtin.script": {"cmd": str(tmp_path / "script"), "executable": "/bin/sh"}},
        {"xtool.xen.guest_command": {**command, "command": "cat"}, "delegate_to": "localhost"},
    ]
    tasks[2]["xtool.xen.guest_command"]["stdin"] = "typed"  # type: ignore[index]
    tasks[2]["vars"] = {"ansible_connection": "local"}
    play = {
        "hosts": "db",
        "connection": "xtool.xen.console",
        "vars": {
            "xtool_executable": str(site.playbooks.xtool),
            "xtool_console_timeout": 300,
            "ansible_remote_tmp": "/tmp/ansible",
        },
        "tasks": tasks,
    }
    raw, script, module = site.playbooks.run(play, str(inventory))
    assert raw["rc"] == 3 and "console=hvc0" in raw["stdout"]
    assert script["rc"] == 0 and "from guest" in script["stdout"], script
    assert module["stdout"] == "typed"


def test_a_change_each_way_and_a_failure_that_leaves_nothing(site: Site) -> None:
    web = {"type": "pv", "kernel": "/opt/xtool/src/build/guest/tiny-pv.elf", "memory": 16, "maxmem": 32}
    web["on_reboot"] = "destroy"
    more = {**web, "memory": 24}
    other = {**more, "cmdline": "other"}
    force = {"force": True, "timeout": 0}
    steps: list[Step] = [
        ("guest", {"name": "web", "config": {**web, "kernel": "/no/such/kernel"}}),
        ("guest", {"name": "web", "config": web}),
        ("guest", {"name": "web", "config": web}),
        ("guest", {"name": "web", "config": more}),
        ("guest", {"name": "web", "config": other}),
        ("guest", {"name": "web", "config": other, "recreate": True, **force}),
        ("guest", {"name": "web", "config": other}),
        ("guest", {"name": "web", "state": "absent", **force}),
    ]
    before = guests(site.alpha)
    done = site.playbooks.play(site.alpha, steps)
    assert [number for number, one in enumerate(done) if one["failed"]] == [0, 4], done
    assert "/no/such/kernel" in done[0]["msg"] and "recreate: true does it" in done[4]["msg"]
    actions = [one["actions"] for one in done]
    assert actions == [[], ["created"], [], ["updated"], [], ["recreated"], [], ["stopped"]]
    assert [one["changed"] for one in done] == [bool(each) for each in actions]
    domids = [one["guest"]["domid"] for one in (done[1], done[3], done[5], done[6])]
    assert domids[0] == domids[1] != domids[2] == domids[3]
    assert guests(site.alpha) == before
