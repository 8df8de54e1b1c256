"""``plan`` and ``apply`` through the command line, on the host in memory."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from xtool.backends.consolelog import ConsoleLog, log_path
from xtool.cli import app
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

TINY = Path(__file__).resolve().parents[2] / "build" / "guest" / "tiny-pv.elf"


class _Open(LocalClient):
    def close(self) -> None:
        pass


class Cli:
    def __init__(self, host: Host, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.host, self.folder, self._capsys = host, folder, capsys

    def write(self, file: str, *domains: str) -> str:
        path = self.folder / file
        head = f"type: pv\nkernel: {TINY}\n"
        path.write_text("---\n".join(f"{head}{domain}\n" for domain in domains))
        return str(path)

    def run(self, *argv: str) -> tuple[int, str, str]:
        code = app.main(argv, opener=lambda: _Open(self.host))
        out, err = self._capsys.readouterr()
        return code, out, err

    def json(self, code: int, *argv: str) -> Any:
        got, out, err = self.run(*argv, "-o", "json")
        assert got == code, err
        return json.loads(out)


@pytest.fixture
def cli(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    (tmp_path / "site").mkdir()
    return Cli(host, tmp_path / "site", capsys)


def test_create_change_and_nothing_to_do(cli: Cli) -> None:
    file = cli.write("a.yaml", "name: web\nmemory: 16\ndepends_on: db", "name: db\nmemory: 16\nmaxmem: 32")
    found = cli.json(20, "plan", file)
    assert [(d["name"], d["action"]) for d in found["domains"]] == [("db", "create"), ("web", "create")]
    done = cli.json(0, "apply", file)
    assert [d["result"] for d in done["domains"]] == ["done", "done"] and done["changed"]
    assert cli.json(0, "plan", file)["changed"] is False
    assert cli.json(0, "apply", file, "--detailed-exitcode")["changed"] is False

    cli.write(
        "a.yaml",
        "name: web\nmemory: 16\ndepends_on: db\ncmdline: other",
        "name: db\nmemory: 24\nmaxmem: 32\ncpu_weight: 512\non_crash: preserve",
    )
    db, web = cli.json(20, "plan", file)["domains"]
    assert {c["key"]: (c["before"], c["after"], c["when"]) for c in db["changes"]} == {
        "memory": (16, 24, "live"),
        "cpu_weight": (256, 512, "live"),
        "on_crash": ("destroy", "preserve", "live"),
    }
    assert [(c["key"], c["when"]) for c in web["changes"]] == [("cmdline", "reboot")]
    assert cli.run("apply", file, "--detailed-exitcode")[0] == 20
    [target] = LocalClient(cli.host).targets("db")
    assert (target.memory, target.weight) == (24 << 20, 512)
    after = cli.json(0, "plan", file)
    assert [d["waiting"] for d in after["domains"]] == [[], ["cmdline"]]
    # The reboot takes it up, and nothing waits any more.
    client = LocalClient(cli.host)
    cli.host.hv.shutdown_domain(web["domid"], 1)
    settled = client.settle(web["domid"], web["uuid"])
    assert settled is not None and settled.action == "restarted"
    [web] = [d for d in cli.json(0, "plan", file)["domains"] if d["name"] == "web"]
    assert web["waiting"] == []


def test_recreation_wants_a_yes(cli: Cli) -> None:
    file = cli.write("a.yaml", "name: web\nmemory: 16\non_reboot: destroy")
    [before] = cli.json(0, "apply", file)["domains"]
    cli.write("a.yaml", "name: web\nmemory: 16\non_reboot: destroy\ncmdline: other")
    code, _, err = cli.run("apply", file)
    assert code == 2 and "--yes" in err
    [same] = LocalClient(cli.host).list("web")
    assert same.domid == before["domid"]
    # The guest in memory hears nothing: only --force ends it.
    assert cli.run("apply", file, "--yes", "--deadline", "0")[0] == 13
    [after] = cli.json(0, "apply", file, "--yes", "--deadline", "0", "--force")["domains"]
    assert after["result"] == "done" and after["uuid"] == before["uuid"]
    assert after["domid"] != before["domid"]
    assert cli.json(0, "plan", file)["changed"] is False


def test_prune_ends_what_apply_made_and_nothing_else(cli: Cli) -> None:
    one = cli.write("one.yaml", "name: one\nmemory: 16")
    two = cli.write("two.yaml", "name: two\nmemory: 16")
    other = cli.write("other.yaml", "name: other\nmemory: 16")
    assert cli.run("apply", one, two)[0] == 0
    assert cli.run("create", other)[0] == 0
    for path in (two, other):
        Path(path).unlink()
    assert cli.json(0, "plan", one, "--prune")["changed"] is False
    found = cli.json(20, "plan", str(cli.folder), "--prune")
    assert found["summary"] == {"unchanged": 1, "destroy": 1}
    assert cli.run("apply", str(cli.folder), "--prune", "-y", "--force", "--deadline", "0")[0] == 0
    assert {d.name for d in LocalClient(cli.host).list()} - {"Domain-0"} == {"one", "other"}


def test_prune_destroys_one_that_has_ended_at_once(cli: Cli) -> None:
    """Nobody would answer a request to shut down."""
    one = cli.write("one.yaml", "name: one\nmemory: 16")
    two = cli.write("two.yaml", "name: two\nmemory: 16\non_crash: preserve")
    assert cli.run("apply", one, two)[0] == 0
    [ended] = LocalClient(cli.host).list("two")
    cli.host.hv.shutdown_domain(ended.domid, 3)
    settled = LocalClient(cli.host).settle(ended.domid, ended.uuid)
    assert settled is not None and settled.action == "preserved"
    Path(two).unlink()
    done = cli.json(0, "apply", str(cli.folder), "--prune", "-y", "--deadline", "0")
    assert [(d["name"], d["result"]) for d in done["domains"] if d["action"] == "destroy"] == [
        ("two", "done")
    ]
    assert {d.name for d in LocalClient(cli.host).list()} - {"Domain-0"} == {"one"}


def test_a_failure_skips_what_depends_on_it(cli: Cli) -> None:
    file = cli.write(
        "a.yaml",
        "name: db\nmemory: 16\nramdisk: /no/such/file",
        "name: web\nmemory: 16\ndepends_on: [db]",
        "name: alone\nmemory: 16",
    )
    code, out, _ = cli.run("apply", file, "-o", "json")
    results = {d["name"]: d["result"] for d in json.loads(out)["domains"]}
    assert code != 0 and results == {"db": "failed", "web": "skipped", "alone": "done"}
    cli.write("a.yaml", "name: db\nmemory: 16", "name: web\nmemory: 16\ndepends_on: [db]")
    assert cli.run("apply", file)[0] == 0


def test_a_circle_has_a_place(cli: Cli) -> None:
    file = cli.write("a.yaml", "name: a\nmemory: 16\ndepends_on: b", "name: b\nmemory: 16\ndepends_on: a")
    code, _, err = cli.run("plan", file)
    assert code == 3 and "wait for each other" in err and f"{file}:5:13" in err


def test_a_dependent_waits_until_the_other_is_ready(cli: Cli) -> None:
    ready = "ready: {xenstore: data/ready=1, timeout: 200ms}"
    file = cli.write("a.yaml", f"name: db\nmemory: 16\n{ready}", "name: web\nmemory: 16\ndepends_on: db")
    code, out, _ = cli.run("apply", file, "-o", "json")
    db, web = json.loads(out)["domains"]
    assert (code, db["result"], web["result"]) == (13, "failed", "skipped")
    assert "data/ready=1" in db["error"]["message"]
    [found] = LocalClient(cli.host).list("db")
    cli.host.store.write(f"/local/domain/{found.domid}/data/ready", "1")
    done = cli.json(0, "apply", file, "--wait", "healthy")
    assert [d["result"] for d in done["domains"]] == ["unchanged", "done"]


def test_a_disk_comes_and_goes_and_diff_says_so(cli: Cli, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    file = cli.write("a.yaml", "name: web\nmemory: 16")
    assert cli.run("apply", file)[0] == 0
    assert cli.run("diff", "web")[0] == 0
    cli.write("a.yaml", f"name: web\nmemory: 16\ndisk: ['{image},raw,xvdb']\nvif: [mac=00:16:3e:00:00:09]")
    [web] = cli.json(20, "diff", "web", file)["domains"]
    assert [(c["key"], c["when"]) for c in web["changes"]] == [("disk[xvdb]", "live"), ("vif[0]", "live")]
    assert cli.run("apply", file)[0] == 0
    client = LocalClient(cli.host)
    assert [d.vdev for d in client.block_list("web")] == ["xvdb"]
    assert [v.mac for v in client.network_list("web")] == ["00:16:3e:00:00:09"]
    assert cli.run("plan", file)[0] == 0


def test_what_another_toolstack_made_is_left_alone(cli: Cli) -> None:
    from xtool.toolstack import journal

    file = cli.write("a.yaml", "name: web\nmemory: 16")
    [web] = cli.json(0, "apply", file)["domains"]
    journal.remove(web["uuid"])
    [found] = cli.json(20, "plan", file)["domains"]
    assert found["action"] == "conflict"
    assert cli.run("apply", file, "--yes", "--force")[0] == 8
    assert LocalClient(cli.host).list("web")[0].domid == web["domid"]


def test_a_dependent_waits_for_a_tcp_port(cli: Cli) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # taken, and nobody listens yet
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        ready = f"ready: {{tcp: '{place}', timeout: 200ms}}"
        file = cli.write("a.yaml", f"name: db\nmemory: 16\n{ready}", "name: web\nmemory: 16\ndepends_on: db")
        code, out, _ = cli.run("apply", file, "-o", "json")
        db, web = json.loads(out)["domains"]
        assert (code, db["result"], web["result"]) == (13, "failed", "skipped")
        assert place in db["error"]["message"]
        listener.listen()
        done = cli.json(0, "apply", file)
    assert [d["result"] for d in done["domains"]] == ["unchanged", "done"]


def test_the_medium_of_a_drive_changes_live(cli: Cli, tmp_path: Path) -> None:
    media = [tmp_path / name for name in ("one.iso", "two.iso")]
    for path in media:
        path.write_bytes(bytes(4096))
    drive = "name: web\nmemory: 16\ndisk: ['vdev=xvdc,cdrom{}']"
    file = cli.write("a.yaml", drive.format(""))
    assert cli.run("apply", file)[0] == 0
    for path in (*media, None):
        cli.write("a.yaml", drive.format(f",target={path}" if path else ""))
        [web] = cli.json(20, "plan", file)["domains"]
        assert [(c["key"], c["when"]) for c in web["changes"]] == [("disk[xvdc].target", "live")]
        assert cli.run("apply", file)[0] == 0
        [found] = LocalClient(cli.host).block_list("web")
        assert found.target == (str(path) if path else "") and found.cdrom
        assert cli.run("plan", file)[0] == 0


def test_a_dependent_waits_for_a_line_on_the_console(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))
    ready = "console_backend: xtool\nready: {console: 'login:', timeout: 200ms}"
    file = cli.write("a.yaml", f"name: db\nmemory: 16\n{ready}", "name: web\nmemory: 16\ndepends_on: db")
    code, out, _ = cli.run("apply", file, "-o", "json")
    db, web = json.loads(out)["domains"]
    assert (code, db["result"], web["result"]) == (13, "failed", "skipped")
    assert "did not print 'login:'" in db["error"]["message"]
    log = ConsoleLog(log_path(db["uuid"]))
    log.add(b"starting\r\ndb login: ", 21)
    log.close()
    done = cli.json(0, "apply", file)
    assert [d["result"] for d in done["domains"]] == ["unchanged", "done"]


def test_what_the_file_no_longer_has_is_detached(cli: Cli, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    head = "name: web\nmemory: 16"
    file = cli.write("a.yaml", f"{head}\ndisk: ['{image},raw,xvdb']\nvif: [mac=00:16:3e:00:00:09]")
    assert cli.run("apply", file)[0] == 0
    cli.write("a.yaml", head)
    [web] = cli.json(20, "plan", file)["domains"]
    assert [(c["key"], c["after"], c["when"]) for c in web["changes"]] == [
        ("disk[xvdb]", None, "live"),
        ("vif[0]", None, "live"),
    ]
    # As the guest's drivers do when they are asked to let go.
    for kind in ("vbd", "vif"):
        for device in cli.host.store.list(f"/local/domain/{web['domid']}/device/{kind}"):
            cli.host.store.write(f"/local/domain/{web['domid']}/device/{kind}/{device}/state", "6")
    assert cli.run("apply", file)[0] == 0
    client = LocalClient(cli.host)
    assert list(client.block_list("web")) == [] and list(client.network_list("web")) == []
    assert cli.run("plan", file)[0] == 0
