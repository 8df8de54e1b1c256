"""The nodes of domain 0's own devices in benchmarks: there, and gone without a trace."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from benchmarks import dom0
from benchmarks.contest import BenchError
from xtool.devices.vbd import Vbd, vbd_nodes
from xtool.devices.vif import Vif, vif_nodes
from xtool.toolstack.host import Host


def tree(host: Host, path: str = "") -> set[str]:
    found = set()
    for name in host.store.list_many([path or "/"])[path or "/"] or ():
        found |= {f"{path}/{name}"} | tree(host, f"{path}/{name}")
    return found


@pytest.mark.parametrize("kind", ["xtool", "qdisk", "phy"])
def test_a_disk_leaves_nothing(host: Host, kind: str) -> None:
    before = tree(host)
    vbd = Vbd("xvda", 51712, "/nowhere.img", kind=kind)
    with ExitStack() as undo:
        dom0._declare(host, vbd.id(0), vbd_nodes(vbd, 0, "pvh"), undo)
        assert host.store.get(vbd.id(0).frontend + "/backend") == vbd.id(0).backend
        assert vbd.id(0).frontend == "/local/domain/0/device/vbd/51712"  # where the kernel looks
        with pytest.raises(BenchError, match="already"):
            dom0._declare(host, vbd.id(0), vbd_nodes(vbd, 0, "pvh"), undo)
    assert tree(host) - {"/local/domain/0/backend", "/local/domain/0/error"} == before


@pytest.mark.parametrize("kind", ["xtool", "vif"])
def test_an_interface_leaves_nothing(host: Host, kind: str) -> None:
    before = tree(host)
    vif = Vif(40, "00:16:3e:00:09:00", bridge="xtbench0", kind=kind)
    with ExitStack() as undo:
        dom0._declare(host, vif.id(0), vif_nodes(vif, 0), undo)
        assert vif.id(0).frontend == "/local/domain/0/device/vif/40"
    assert tree(host) - {"/local/domain/0/backend", "/local/domain/0/error"} == before


def test_what_never_comes_is_said_with_the_states(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    monkeypatch.setattr(dom0, "DEADLINE", 0.05)
    device = Vbd("xvda", 51712, None, kind="qdisk").id(0)
    with pytest.raises(BenchError, match=r"no /dev/xvda within 0.05 s \(.*state: None.*error: None\)"):
        dom0.until("no /dev/xvda", lambda: False, lambda: dom0._states(host, device))
    with pytest.raises(BenchError, match="false"):
        dom0.command("false")
