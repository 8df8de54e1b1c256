"""The Ansible collection over a guest's console: a real shell behind the real ``xtool console``, through a
daemon on the host in memory."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import running
from guestconsoles import console_of

from xtool import paths
from xtool.config import DomainConfig
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host

pytest.importorskip("ansible")

from playbooks import Playbooks, Step

BUSYBOX = shutil.which("busybox") or pytest.skip("busybox is not installed", allow_module_level=True)
#: A guest's getty and login, for one user.
LOGIN = """
while printf 'web login: '; read -r user; do
    [ "$user" ] || continue
    printf 'Password: '; stty -echo; read -r word; stty echo; echo
    if [ "$user/$word" = ops/secret ]; then PS1='# ' busybox sh; else echo 'Login incorrect'; fi
done
"""


@pytest.fixture
def socket(
    host: Host, config: Callable[..., DomainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A daemon whose guest ``web`` has a login on its console."""
    monkeypatch.setattr("xtool.devices.console.LOCK_DIR", str(tmp_path))
    paths.run_dir().mkdir(exist_ok=True)
    with running(host, tmp_path) as daemon:
        made = daemon.client().create(config("pv", name="web"), CreateOptions())
        with console_of(host, made.domid, ["sh", "-c", LOGIN]):
            yield f"unix:{daemon.path}"


def test_commands_and_talks(socket: str, playbooks: Playbooks) -> None:
    login = {"guest": "web", "user": "ops", "password": "secret", "timeout": 30}
    steps: list[Step] = [
        ("guest_command", {**login, "command": "cat; echo err >&2", "stdin": "in"}, {"check_mode": True}),
        ("guest_command", {**login, "command": "cat; echo err >&2", "stdin": "in"}),
        ("guest_command", {**login, "command": "exit 5"}),
        ("guest_command", {**login, "password": "wrong", "command": "true"}),
        (
            "guest_command",
            {
                "guest": "web",
                "talk": [
                    {"send": ""},
                    {"expect": "web*login:", "send": "ops"},
                    {"expect": "Password:", "send": "secret"},
                    {"expect": "# ", "send": "echo $((6 * 7)); exit"},
                    {"expect": "42", "timeout": 30},
                ],
            },
        ),
        ("guest_command", {"guest": "web", "talk": [{"expect": "never", "timeout": 0.1}]}),
        ("guest_command", {"guest": "none", "command": "true"}),
    ]
    done = playbooks.play(socket, steps)
    assert "does not support check mode" in done[0]["msg"] and not done[0]["failed"]
    assert [number for number, one in enumerate(done) if one["failed"]] == [2, 3, 5, 6], done
    assert (done[1]["rc"], done[1]["stdout"], done[1]["stderr"]) == (0, "in", "err\n")
    assert done[1]["changed"] and (done[2]["rc"], done[2]["msg"]) == (5, "the command ended with status 5")
    assert "the login of ops was refused" in done[3]["msg"] and "secret" not in json.dumps(done[:4])
    assert done[4]["seen"][4].endswith("42")
    assert "it did not print 'never' in time" in done[5]["msg"]
    assert "there is no domain" in done[6]["msg"]


def test_tasks_in_a_guest_without_a_network(socket: str, playbooks: Playbooks, tmp_path: Path) -> None:
    """Modules, their payload by standard input, files both ways."""
    data = random.Random(5).randbytes(10_000)
    (tmp_path / "file").write_bytes(data)
    inventory = tmp_path / "site.xtool.yml"
    source = {"plugin": "xtool.xen.guests", "executable": str(playbooks.xtool), "hosts": {"alpha": socket}}
    inventory.write_text(json.dumps(source))
    there = tmp_path / "guest"
    play = {
        "hosts": "web",
        "connection": "xtool.xen.console",
        "vars": {
            "xtool_executable": str(playbooks.xtool),
            "ansible_user": "ops",
            "ansible_password": "secret",
            "ansible_remote_tmp": str(tmp_path / "tmp"),
        },
        "tasks": [
            {"ansible.builtin.raw": "echo out; echo err >&2; exit 3", "ignore_errors": True},
            {"ansible.builtin.file": {"path": str(there), "state": "directory"}},
            {"ansible.builtin.copy": {"src": str(tmp_path / "file"), "dest": f"{there}/copy"}},
            {"ansible.builtin.fetch": {"src": f"{there}/copy", "dest": f"{tmp_path}/back", "flat": True}},
        ],
    }
    raw, made, copied, fetched = playbooks.run(play, str(inventory))
    assert (raw["rc"], raw["stdout"], raw["stderr"]) == (3, "out\n", "err\n")
    assert made["changed"] and copied["changed"] and fetched["changed"]
    assert (there / "copy").read_bytes() == (tmp_path / "back").read_bytes() == data
