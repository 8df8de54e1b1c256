"""The role ``xtool.xen.host``, run by ansible-core into folders of the test's: what it installs, that a
second run changes nothing, that what failed is repeated. Packages and services are for real hosts alone."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ansible")

from playbooks import ROOT, Playbooks

#: XTOOL_LONG adds a third run, and has the role make the environment of Python itself: half a minute each.
LONG = bool(os.environ.get("XTOOL_LONG"))
ROLE = ROOT / "ansible/roles/host"
INFO = "xtool-0.1.0.dist-info"


def wheel_of_this_tree(folder: Path) -> Path:
    """What ``pip wheel --no-deps .`` makes, without its minutes."""
    files = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for path in (ROOT / "xtool").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    scripts = "[console_scripts]\nxtool = xtool.cli.entry:main\nxtoold = xtool.daemon.__main__:main\n"
    files[f"{INFO}/METADATA"] = b"Metadata-Version: 2.1\nName: xtool\nVersion: 0.1.0\n"
    files[f"{INFO}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{INFO}/entry_points.txt"] = scripts.encode()
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        record += f"{name},sha256={digest},{len(data)}\n"
    files[f"{INFO}/RECORD"] = f"{record}{INFO}/RECORD,,\n".encode()
    path = folder / "xtool-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def environment_in(folder: Path) -> None:
    """As ``python -m venv`` makes it, but with the pip of this machine."""
    command = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(folder)]
    subprocess.run(command, check=True)
    pip = folder / "bin/pip"
    pip.write_text(f'#!/bin/sh\nexec {folder}/bin/python -m pip "$@"\n')
    pip.chmod(0o755)


def test_a_host_twice_and_after_a_failure(playbooks: Playbooks, tmp_path: Path) -> None:
    etc, prefix, commands = tmp_path / "etc", tmp_path / "opt", tmp_path / "bin"
    for folder in (commands, etc / "modules-load.d", etc / "default/grub.d"):  # Debian has them
        folder.mkdir(parents=True)
    if not LONG:
        environment_in(prefix / "venv")
    variables: dict[str, Any] = {
        "xtool_host_source": str(wheel_of_this_tree(tmp_path)),
        "xtool_host_python": sys.executable,
        "xtool_host_pip_arguments": "--no-deps --no-index --no-compile",
        "xtool_host_packages": [],
        "xtool_host_groups": [],
        "xtool_host_services": False,
        "xtool_host_etc": str(etc),
        "xtool_host_prefix": str(prefix),
        "xtool_host_bin": str(commands),
        "xtool_host_defaults": {"on_crash": "preserve"},
        "xtool_host_xen_arguments": "dom0_mem=2G,max:2G",
    }

    def run(check: bool = False, **more: Any) -> list[str]:
        """Names of what was changed, or would be."""
        role = {"role": "xtool.xen.host", "vars": {**variables, **more}}
        play = {"hosts": "localhost", "connection": "local", "check_mode": check, "roles": [role]}
        play["environment"] = {"PYTHONPATH": ""}  # pip would find this tree's xtool installed
        done = playbooks.run(play, "localhost,")
        assert check or not any(one["failed"] for one in done), done
        return [str(one.get("dest", one.get("path", one.get("name", "")))) for one in done if one["changed"]]

    if LONG:
        assert run(check=True)
        assert list(etc.rglob("*.service")) == [] and not (prefix / "wanted").exists()
    assert run()
    files = ROOT / "xtool/daemon/files"
    units = etc / "systemd/system"
    for name in ("xtoold.socket", "xtoold.service", "xtool-guests.service"):
        assert (units / name).read_bytes() == (files / name).read_bytes()
    override = (units / "xtoold.service.d/prefix.conf").read_text()
    assert override == f"[Service]\nExecStart=\nExecStart={prefix}/venv/bin/xtoold\n"
    assert yaml.safe_load((etc / "xtool/defaults.yaml").read_text()) == {"on_crash": "preserve"}
    grub = (etc / "default/grub.d/00-xtool.cfg").read_text()
    assert 'GRUB_CMDLINE_XEN_DEFAULT="dom0_mem=2G,max:2G"' in grub and "OVERRIDE_GRUB_DEFAULT=1" in grub
    assert "xen-gntalloc" in (etc / "modules-load.d/xtool.conf").read_text().split()
    said = subprocess.run(
        [commands / "xtool", "--version"], cwd="/", env={}, capture_output=True, text=True, check=True
    )
    assert said.stdout == "xtool 0.1.0\n"
    assert run() == []
    if not LONG:
        return
    # An installation that was broken off is repeated, and a change of what is wanted is carried out.
    (prefix / "installed").unlink()
    assert run(xtool_host_defaults={"on_crash": "destroy"})
    assert (prefix / "installed").exists()


def test_defaults_are_those_of_the_documentation() -> None:
    spec = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    options = spec["options"]
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    assert {name: said["default"] for name, said in options.items() if "default" in said} == defaults
    assert [name for name, said in options.items() if said.get("required")] == ["xtool_host_source"]
    text = "".join(
        path.read_text() for path in ROLE.rglob("*") if path.is_file() and path.parent.name != "meta"
    )
    assert all(text.count(name) > 1 for name in options), "each is made use of"


def test_a_missing_source_is_told(playbooks: Playbooks) -> None:
    play = {"hosts": "localhost", "connection": "local", "roles": ["xtool.xen.host"]}
    with pytest.raises(AssertionError, match="missing required arguments: xtool_host_source"):
        playbooks.run(play, "localhost,")
