"""The command line on the host in memory: real toolstack, no Xen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from image_samples import PV_NOTES, make_elf

from xtool.cli import app
from xtool.toolstack.api import Client
from xtool.toolstack.local import open_client


class Unclosed:
    """One host over several command lines: each closes its client, the host stays."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> object:
        return (lambda: None) if name == "close" else getattr(self._client, name)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unclosed]:
    monkeypatch.setenv("XTOOL_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    client = open_client("fake:")
    yield Unclosed(client)
    client.close()


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "kernel").write_bytes(make_elf(PV_NOTES))
    path = tmp_path / "guest.yaml"
    path.write_text("name: guest\ntype: pv\nmemory: 16\nkernel: kernel\n")
    return str(path)


def test_a_domain_from_create_to_destroy(
    host: Unclosed, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str) -> tuple[int, str, str]:
        code = app.main(argv, opener=lambda: host)  # type: ignore[arg-type, return-value]
        out, err = capsys.readouterr()
        return code, out, err

    code, out, err = run("create", config, "-p", "--set", "name=web", "--set", "memory=32MiB", "-o", "json")
    assert code == 0, err
    created = json.loads(out)
    assert (created["name"], created["type"]) == ("web", "pv")
    domid = str(created["domid"])
    assert {span["name"] for span in created["timings"]} >= {"load_image", "memory", "vcpus", "seal"}

    code, out, _ = run("list", "web", "-o", "json")
    (found,) = json.loads(out)
    assert (found["state"], found["managed"]) == ("paused", True) and found["maxmem"] >= 32 << 20
    assert run("unpause", domid)[0] == 0
    assert json.loads(run("list", created["uuid"], "-o", "json")[1])[0]["state"] != "paused"
    assert run("domid", "web")[1] == f"{domid}\n"
    assert len(json.loads(run("vcpu-list", "web", "-o", "json")[1])) == 1

    code, _, err = run("create", config, "--set", "name=web")
    assert code == 10 and "hint:" in err
    assert run("destroy", "web")[:2] == (0, f"web (domain {domid}): destroyed\n")
    assert run("destroy", "web")[0] == 9
    assert json.loads(run("list", "-o", "json")[1]) == []


def test_a_file_that_is_no_kernel(host: Unclosed, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = app.main(["create", config, "--set", f"kernel={config}"], opener=lambda: host)  # type: ignore[arg-type, return-value]
    assert code == 4
    assert capsys.readouterr().err.splitlines()[-1].startswith("hint: ")


def test_dry_run_shows_the_layout(host: Unclosed, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["create", config, "--dry-run", "--timings"]) == 0
    out = capsys.readouterr().out
    assert "guest: pv, 16 MiB, entry 0x" in out
    assert "Region" in out and "Memory map" in out and "Hypercalls" in out
    assert app.main(["create", config, "--dry-run", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == 16 << 20


def test_devices_from_attach_to_detach(
    host: Unclosed, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str) -> tuple[int, str, str]:
        code = app.main(argv, opener=lambda: host)  # type: ignore[arg-type, return-value]
        out, err = capsys.readouterr()
        return code, out, err

    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    assert run("create", config)[0] == 0
    assert run("block-attach", "guest", f"{image},raw,xvdb") == (
        0,
        "domain 1: disk xvdb (51728): attached\n",
        "",
    )
    code, out, _ = run("block-list", "guest")
    assert code == 0 and "xvdb" in out and "phy" in out and "loop device" in out
    [disk] = json.loads(run("block-list", "guest", "-o", "json")[1])
    assert (disk["target"], disk["state"], disk["readonly"]) == (str(image), "init-wait", False)
    assert run("network-attach", "guest", "mac=00:16:3e:00:00:09")[0] == 0
    assert "00:16:3e:00:00:09  vif" in run("network-list", "guest")[1]
    assert run("network-detach", "guest", "00:16:3e:00:00:09")[:2] == (
        0,
        "domain 1: interface vif1.0 (0): detached\n",
    )
    assert run("network-attach", "guest", "mac=00:16:3e:00:00:0a")[0] == 0
    assert run("network-limit", "guest", "0", "--rate", "10Mb/s")[:2] == (
        0,
        "domain 1: interface vif1.0 (0): limited\n",
    )
    assert "1250000B/s@50000us" in run("network-list", "guest")[1]
    assert run("network-limit", "guest", "0", "--rate", "none")[0] == 0
    assert "B/s@" not in run("network-list", "guest")[1]
    for words in (["--rate", "fast"], ["--rate-in", "1Mb/s"], []):
        assert run("network-limit", "guest", "0", *words)[0] == 2
    assert run("network-detach", "guest", "0")[0] == 0
    code, _, err = run("block-limit", "guest", "xvdb", "--ops-per-second", "5")
    assert code == 2 and "phy" in err and "backendtype=xtool" in err
    for words in (["--ops-per-second", "x"], ["--bytes-per-second", "1"], []):
        assert run("block-limit", "guest", "xvdb", *words)[0] == 2
    code, _, err = run("block-attach", "guest", f"{image},raw,xvdc")
    assert code == 15 and "has it open" in err and "hint:" in err
    assert run("block-attach", "guest", "xvdc")[0] == 2
    assert run("block-detach", "guest", "xvdb", "-f")[0] == 0
    assert run("block-detach", "guest", "xvdb")[0] == 15
    assert run("cd-eject", "guest", "hdc")[0] == 15


def test_everyday_verbs(host: Unclosed, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str) -> tuple[int, str, str]:
        code = app.main(argv, opener=lambda: host)  # type: ignore[arg-type, return-value]
        out, err = capsys.readouterr()
        return code, out, err

    assert run("create", config)[0] == 0
    assert run("create", config, "--set", "name=other")[0] == 0
    assert run("list", "-o", "names") == (0, "guest\nother\n", "")
    assert run("__complete", "domains") == (0, "guest\nother\n", "")
    found = json.loads(run("list", "-l", "-o", "json")[1])
    assert [one["config"]["name"] for one in found] == ["guest", "other"] and found[0]["managed"] is True
    assert run("list", "-o", "words")[0] == 2
    assert run("rename", "guest", "web")[1] == "web (domain 1): renamed from guest\n"
    code, _, err = run("rename", "web", "other")
    assert code == 10 and "already named" in err and "hint:" in err
    assert [row.split()[1:] for row in run("vm-list")[1].splitlines()] == [
        ["ID", "Name"],
        ["1", "web"],
        ["2", "other"],
    ]
    assert run("uptime", "-s", "web")[1].endswith(", web (1)\n") and "0:00:0" in run("uptime", "web")[1]
    out = run("set", "web", "on_crash=preserve", "cmdline=x y")[1]
    assert [row.split()[0] for row in out.splitlines()] == ["Key", "cmdline", "on_crash"]
    assert "next start" in out and "now" in out
    assert run("set", "web", "on_crash=preserve")[1] == "web: nothing changed, it is so already\n"
    code, _, err = run("set", "web", "memroy=1")
    assert code == 3 and "memroy" in err and "memory" in err
    shown = yaml.safe_load(run("config-show", "web")[1])
    assert (shown["name"], shown["on_crash"], shown["cmdline"]) == ("web", "preserve", "x y")
    assert json.loads(run("config-show", "-o", "json")[1])[1]["config"]["name"] == "other"
    assert json.loads(run("channel-list", "web", "-o", "json")[1]) == []
    assert run("pci-list", "web")[0] == 0 and run("pci-assignable-list")[0] == 0
    assert run("vncviewer", "web")[0] == 15
    assert run("destroy", "web", "other")[:2] == (
        0,
        "web (domain 1): destroyed\nother (domain 2): destroyed\n",
    )
