"""``xtool apply`` on real Xen: a domain made, changed while it runs, re-created, and ended by --prune."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from guests import GUESTS
from xtool.cli import app
from xtool.toolstack.local import LocalClient

NAME = "xtool-test-apply"


def test_a_domain_from_apply_to_prune(
    client: LocalClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    file = site / "a.yaml"

    def write(more: str = "") -> None:
        kernel = GUESTS / "tiny-pv.elf"
        file.write_text(f"name: {NAME}\ntype: pv\nmemory: 16\nmaxmem: 32\nkernel: {kernel}\n{more}")

    def run(code: int, *argv: str) -> dict[str, object]:
        assert app.main([*argv, "-o", "json"]) == code, capsys.readouterr().err
        found = json.loads(capsys.readouterr().out)
        return found["domains"][0] if found["domains"] else {}

    try:
        write()
        made = run(0, "apply", str(site))
        assert made["action"] == "create" and run(0, "plan", str(site))["action"] == "unchanged"
        write("cpu_weight: 512\n")
        assert run(20, "apply", str(site), "--detailed-exitcode")["result"] == "done"
        xl = subprocess.run(["xl", "sched-credit2", "-d", NAME], capture_output=True, text=True, check=True)
        assert xl.stdout.split()[-2] == "512"
        write("cpu_weight: 512\non_reboot: destroy\ncmdline: other\n")
        again = run(0, "apply", str(site), "--yes", "--force", "--deadline", "1")
        assert again["action"] == "recreate" and again["uuid"] == made["uuid"]
        assert again["domid"] != made["domid"]
        file.unlink()
        assert (
            run(0, "apply", str(site), "--prune", "--yes", "--force", "--deadline", "1")["result"] == "done"
        )
        assert NAME not in [one.name for one in client.list()]
    finally:
        for one in client.list():
            if one.name == NAME:
                client.destroy(NAME)
