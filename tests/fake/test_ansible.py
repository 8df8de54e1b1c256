"""The Ansible collection, built and installed, run by ansible-core against a daemon on the host in memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from daemons import running
from docguests import GuestsInMemory

from xtool import paths
from xtool.config import DomainConfig
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host

pytest.importorskip("ansible")

from playbooks import Playbooks, Step


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
        ("disk", disk),
        ("disk", disk),
        ("network", vif),
        ("network", vif),
        ("network", {**vif, "rate": "10Mb/s"}),
        ("network", {**vif, "rate": "10Mb/s"}),
        ("disk", {**disk, "target": "/else"}),
        ("disk", {**gone, "vdev": "xvdb"}),
        ("guest_info", {"devices": True}),
    ]
    paths.run_dir().mkdir(exist_ok=True)
    with running(host, tmp_path) as daemon:
        daemon.client().create(config("pv", name="web"), CreateOptions())
        done = playbooks.play(f"unix:{daemon.path}", steps)
    assert [number for number, one in enumerate(done) if one["failed"]] == [8]
    assert [one["changed"] for one in done] == [
        *(False, True, True, False, True, False, True, False, False, True, False)
    ]
    assert done[0]["info"]["total_memory"] > 0
    assert done[1]["actions"] == done[2]["actions"] == ["attached"]  # check mode did nothing
    assert "is another one" in done[8]["msg"]
    [web] = done[10]["guests"]
    assert web["name"] == "web" and web["disks"] == [] and [one["mac"] for one in web["interfaces"]] == [mac]


def test_a_guest_as_it_is_described(
    host: Host, config: Callable[..., DomainConfig], tmp_path: Path, playbooks: Playbooks
) -> None:
    web = {
        "type": "pv",
        "kernel": str(config("pv").kernel),
        "memory": 16,
        "maxmem": 32,
        "on_reboot": "destroy",
    }
    more = {**web, "memory": 24}
    other = {**more, "cmdline": "other"}
    file = tmp_path / "db.yaml"
    file.write_text(f"name: db\ntype: pv\nkernel: {web['kernel']}\nmemory: 16\ncmdline: {{{{ words }}}}\n")
    gone = {"name": "web", "state": "absent", "force": True, "timeout": 0}
    check = {"check_mode": True, "diff": True}
    bad = {"name": "bad", "config": {**web, "kernel": "/no/such/kernel"}}
    steps: list[Step] = [
        ("guest", {"name": "web", "config": web}, check),
        ("guest", {"name": "web", "config": web}),
        ("guest", {"name": "web", "config": web}),
        ("guest", {"name": "web", "config": more}, {"diff": True}),
        ("guest", {"name": "web", "config": other}),
        ("guest", {"name": "web", "config": other, "recreate": True, "force": True, "timeout": 0}),
        ("guest", {"name": "web", "state": "paused"}),
        ("guest", {"name": "web", "state": "running", "config": other}),
        ("guest", gone),
        ("guest", gone),
        ("guest", bad),
        ("guest", {"name": "web", "config": {**web, "memroy": 3}}),
        ("guest", {"name": "web", "state": "running"}),
        ("guest", {"src": str(file), "vars": {"words": "one"}}),
        ("guest", {"name": "db", "src": str(file), "vars": {"words": "two"}}),
        ("guest", {"name": "db", "state": "restarted", "src": str(file), "vars": {"words": "two"}}),
        ("guest", {"name": "db", "src": str(file), "vars": {"words": "two"}}),
        ("guest", {"name": "db", "state": "stopped", "force": True, "timeout": 0}),
    ]
    paths.run_dir().mkdir(exist_ok=True)
    with running(host, tmp_path) as daemon, GuestsInMemory(host):
        done = playbooks.play(f"unix:{daemon.path}", steps)
        left = [one.name for one in daemon.client().list()]
    assert [(number, one["msg"]) for number, one in enumerate(done) if one["failed"]] == [
        (
            4,
            "web would have to be created anew, and what runs in it lost: cmdline (a reboot ends it: "
            "on_reboot is destroy). recreate: true does it.",
        ),
        (
            10,
            "cannot open the kernel /no/such/kernel: No such file or directory\n"
            "hint: check the kernel: line and the file's permissions",
        ),
        (11, 'config:9:2: unknown key memroy\n  9 |  "memroy": 3\n    |  ^\nhint: did you mean memory?'),
        (12, "there is no guest web, and without config or src it cannot be created"),
    ]
    created, updated, stopped = ["created"], ["updated"], ["stopped"]
    assert [one["actions"] for one in done] == [
        *(created, created, [], updated, [], ["recreated"], ["paused"], ["unpaused"]),
        *(stopped, [], [], [], [], created, updated, ["restarted"], [], stopped),
    ]
    assert all(one["changed"] == bool(one["actions"]) for one in done)
    first, grown, anew = done[1]["guest"], done[3]["guest"], done[5]["guest"]
    assert (first["name"], first["memory"]) == ("web", 16 << 20)
    assert grown["domid"] == first["domid"] and grown["maxmem"] > first["maxmem"]
    assert anew["uuid"] == first["uuid"] and anew["domid"] != first["domid"]
    assert done[3]["diff"] == {"before": {"memory": 16}, "after": {"memory": 24}}
    assert [change["when"] for change in done[4]["changes"]] == ["recreate"]
    # For the next reboot, which the guest in memory is seen to make; then nothing waits.
    assert [change["when"] for change in done[14]["changes"]] == ["reboot"]
    assert [one["waiting"] for one in done[14:17]] == [["cmdline"], [], []]
    uuids, domids = ([one["guest"][key] for one in done[13:17]] for key in ("uuid", "domid"))
    assert len(set(uuids)) == 1 and domids[0] == domids[1] != domids[2] == domids[3]
    assert left == []


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that has the test's folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_image_is_fetched_verified_converted_and_grown(
    tmp_path: Path, playbooks: Playbooks, served: str
) -> None:
    content = b"begin" + bytes(1 << 20) + b"the end"
    content += bytes(-len(content) % 512)
    raw = tmp_path / "source.img"
    raw.write_bytes(content)
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    (tmp_path / "images").mkdir()
    made, other = str(tmp_path / "images/web.qcow2"), str(tmp_path / "images/other.img")
    linked = tmp_path / "linked.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(raw), "-F", "raw", str(linked)]
    subprocess.run(command, check=True)
    fetched = {"path": made, "src": f"{served}/source.img", "checksum": checksum, "format": "qcow2"}
    local = {"path": other, "src": str(raw)}
    steps: list[Step] = [
        ("image", fetched, {"check_mode": True}),
        ("image", {**fetched, "size": "3M"}),
        ("image", {**fetched, "size": "3M"}),
        ("image", {**fetched, "size": "4M"}),
        ("image", {**local, "checksum": f"sha256:{'0' * 64}"}),
        ("image", {**local, "src": f"{served}/nothing.img"}),
        ("image", {**local, "src": str(linked)}),
        ("image", {**local, "src": f"file://{raw}"}),
        ("image", {"path": made, "state": "absent"}),
    ]
    done = playbooks.play("", steps)
    told = [one["msg"] for one in done if one["failed"]]
    assert [number for number, one in enumerate(done) if one["failed"]] == [4, 5, 6], told
    assert "has the sha256 " + checksum.partition(":")[2] in told[0]
    assert "nothing.img" in told[1] and "404" in told[1]
    assert "refers to another file" in told[2] and str(raw) in told[2]
    assert [one.get("actions") for one in done] == [
        *(["created"], ["created"], [], ["grown"]),
        *(None, None, None, ["created"], ["removed"]),
    ]
    assert [one["changed"] for one in done] == [bool(one.get("actions")) for one in done]
    assert [done[number]["virtual_size"] for number in (1, 2, 3)] == [3 << 20, 3 << 20, 4 << 20]
    assert Path(other).read_bytes() == content
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["other.img"]


def test_the_inventory_has_every_guest(
    host: Host, config: Callable[..., DomainConfig], tmp_path: Path, playbooks: Playbooks
) -> None:
    paths.run_dir().mkdir(exist_ok=True)
    source = {
        "plugin": "xtool.xen.guests",
        "executable": str(playbooks.xtool),
        "groups": {"fronts": "inventory_hostname is match('web')"},
    }
    file = tmp_path / "site.xtool.yml"
    with running(host, tmp_path) as daemon:
        vif = "[{script: vif-route, ip: 10.0.0.2/24}]"
        daemon.client().create(config("pv", name="web", vif=vif), CreateOptions())
        daemon.client().create(config("pvh", name="db"), CreateOptions())
        file.write_text(json.dumps({**source, "hosts": {"alpha": f"unix:{daemon.path}"}}))
        text = playbooks.ansible("ansible-inventory", "-i", str(file), "--list")
    # Texts that are no templates are shown as such.
    found = json.loads(text, object_hook=lambda one: one.get("__ansible_unsafe", one))
    members = {group: one["hosts"] for group, one in found.items() if one.get("hosts")}
    assert {group: sorted(names) for group, names in members.items()} == {
        "xtool": ["db", "web"],
        "xtool_host_alpha": ["db", "web"],
        "xtool_type_pv": ["web"],
        "xtool_type_pvh": ["db"],
        "xtool_state_blocked": ["db", "web"],
        "fronts": ["web"],
    }
    variables = found["_meta"]["hostvars"]
    assert variables["web"]["ansible_host"] == "10.0.0.2" and "ansible_host" not in variables["db"]
    assert variables["db"]["xtool_type"] == "pvh" and variables["db"]["xtool_vcpus"] == 1
    assert (variables["db"]["xtool_guest"], variables["db"]["xtool_target"]) == ("db", f"unix:{daemon.path}")


def test_ansible_reads_documentation_and_playbooks(playbooks: Playbooks) -> None:
    modules = [path.stem for path in (playbooks.installed / "plugins/modules").glob("*.py")]
    names = [f"xtool.xen.{name}" for name in modules]
    assert set(json.loads(playbooks.ansible("ansible-doc", "-j", *names))) == set(names)
    assert "xtool_addresses" in playbooks.ansible("ansible-doc", "-t", "inventory", "xtool.xen.guests")
    assert "ansible_password" in playbooks.ansible("ansible-doc", "-t", "connection", "xtool.xen.console")
    assert "xtool_host_source" in playbooks.ansible("ansible-doc", "-t", "role", "xtool.xen.host")
    plays = [str(path) for path in sorted((playbooks.installed / "playbooks").glob("*.yml"))]
    assert len(plays) == 4
    playbooks.ansible("ansible-playbook", "-i", "localhost,", "--syntax-check", *plays)
