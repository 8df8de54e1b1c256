"""What pages of the documentation say of the code and of the command line is so."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from typing import Any

import pytest
from docblocks import ROOT
from image_samples import PV_NOTES, make_elf
from test_docs_blocks import parse

from xtool.cli import app
from xtool.config import parse_config
from xtool.errors import UsageError
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.local import LocalClient, open_client

#: Every subcommand of xl, Xen 4.17 to 4.22.
XL_VERBS = """
    block-attach block-detach block-list button-press cd-eject cd-insert channel-list claims
    config-update console cpupool-cpu-add cpupool-cpu-remove cpupool-create cpupool-destroy cpupool-list
    cpupool-migrate cpupool-numa-split cpupool-rename create debug-keys destroy devd dmesg domid domname
    dt-overlay dump-core getenforce info list loadpolicy mem-max mem-set migrate migrate-receive
    network-attach network-detach network-list pause pci-assignable-add pci-assignable-list
    pci-assignable-remove pci-attach pci-detach pci-list psr-cat-set psr-cat-show psr-cmt-attach
    psr-cmt-detach psr-cmt-show psr-hwinfo psr-mba-set psr-mba-show qemu-monitor-command reboot remus
    rename restore resume save sched-credit sched-credit2 sched-rtds set-parameters setenforce sharing
    shutdown suspend sysrq top trigger unpause uptime usb-list usbctrl-attach usbctrl-detach
    usbdev-attach usbdev-detach vcpu-list vcpu-pin vcpu-set vdispl-attach vdispl-detach vdispl-list
    vkb-attach vkb-detach vkb-list vm-list vncviewer vsnd-attach vsnd-detach vsnd-list vtpm-attach
    vtpm-detach vtpm-list xenstore-quota-get xenstore-quota-set
""".split()  # noqa: SIM905


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# --- coming from xl -----------------------------------------------------------------------------------
def rows(text: str) -> list[list[str]]:
    """The cells of a page's tables, without heads and rules."""
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    return [row for row in found if not set("".join(row)) <= {"-"} and row[0] not in ("xl", "")]


def test_every_verb_of_xl_has_a_row_and_every_verb_named_is_one() -> None:
    text = page("migrating-from-xl.md")
    table = rows(text[text.index("<!-- verbs: begin -->") : text.index("<!-- verbs: end -->")])
    assert sorted(row[0].strip("`") for row in table) == sorted(XL_VERBS)
    for xl, ours, note in table:
        named = re.findall(r"`([^`]+)`", ours)
        assert named or ours == "-", xl
        assert note, xl
        assert set(named) <= set(app.VERBS), xl
        # What has the same name is not hidden behind a dash.
        assert xl.strip("`") not in app.VERBS or xl.strip("`") in named, xl
        if note == "same":
            assert named == [xl.strip("`")]


def test_verbs_beyond_xls() -> None:
    text = page("migrating-from-xl.md")
    more = {
        name for row in rows(text[text.index("## What xl has no verb for") :]) for name in row[0].split(", ")
    }
    assert {name.strip("`") for name in more} <= set(app.VERBS) - set(XL_VERBS)


def test_a_domain_that_xtool_did_not_create(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page has it: what needs Xen and xenstore alone works, what needs its configuration does not."""
    monkeypatch.setenv("XTOOL_RUN_DIR", str(tmp_path / "run"))
    kernel = tmp_path / "kernel"
    kernel.write_bytes(make_elf(PV_NOTES))
    client = open_client("fake:")
    assert isinstance(client, LocalClient)
    made = client.create(
        parse_config(f"name: web\ntype: pv\nmemory: 16\nkernel: {kernel}\n"), CreateOptions(paused=True)
    )
    journal.remove(made.uuid)
    [web] = client.list("web")
    assert not web.managed
    client.unpause("web")
    client.pause("web")
    client.mem_set("web", 8 << 20)
    client.vcpu_pin("web", 0, "0")
    assert client.sample() and client.block_list("web") == []
    with pytest.raises(UsageError, match="was not created by xtool"):
        client.set_config("web", ["on_crash=preserve"])
    client.shutdown("web")
    client.destroy("web")
    assert client.list() == []
    client.close()


# --- the walk of a create -----------------------------------------------------------------------------
def resolve(name: str) -> Any:
    """A module, or what it has of that name. Raises ``ImportError`` or ``AttributeError``."""
    parts = name.split(".")
    for at in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:at]))
        except ModuleNotFoundError:
            continue
        for part in parts[at:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", ["walk-of-a-create.md", "python-api.md"])
def test_every_name_of_a_page_is_there(name: str) -> None:
    names = set(re.findall(r"`(xtool(?:\.\w+)+)`", page(name)))
    assert len(names) > 10
    for each in sorted(names):
        resolve(each)
    with pytest.raises((ImportError, AttributeError)):
        resolve("xtool.toolstack.create.creat")


def test_the_stages_are_told_in_their_order() -> None:
    from xtool.builder.spec import STAGES

    text = page("walk-of-a-create.md")
    at = [text.index(f"**{stage}**") for stage in STAGES]
    assert at == sorted(at)


# --- metrics ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["how-to/prometheus.md", "everyday.md"])
def test_metrics_that_are_named(name: str) -> None:
    from xtool.toolstack.metrics import FAMILIES

    found = set(re.findall(r"\bxtool_\w+", page(name)))
    assert found and found <= set(FAMILIES)


# --- units --------------------------------------------------------------------------------------------
def test_units_run_commands_that_are_there() -> None:
    found = []
    for unit in (ROOT / "xtool/daemon/files").glob("*.service"):
        for line in unit.read_text().splitlines():
            if match := re.fullmatch(r"Exec\w+=/usr/bin/env xtool (.*)", line):
                parse(shlex.split(match[1]))
                found.append(match[1].split()[0])
    assert found == ["apply", "shutdown"]
