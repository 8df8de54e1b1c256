"""``xtool doctor``: each check on hosts that are well, and on hosts that are not, each in one way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from xtool.cli import app
from xtool.config import DomainConfig
from xtool.errors import HostError, NoXenError
from xtool.fake.hypervisor import FakeHypervisor
from xtool.toolstack import fitness_checks as checks
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.everydayrecords import CheckResult
from xtool.toolstack.fitness import STATUSES, Check, Look, diagnose, worst
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

Config = Callable[..., DomainConfig]
Keeper = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def look(host: Host, tmp_path: Path) -> Look:
    """A host where all is well, so far as a folder can be one."""
    root = tmp_path / "root"
    files = {
        "sys/hypervisor/start_flags/initdomain": "1",
        "sys/hypervisor/type": "xen",
        "proc/sys/kernel/osrelease": "6.1.0",
        "proc/70/comm": "xenstored",
        "proc/71/comm": "xenconsoled",
        "lib/modules/6.1.0/modules.builtin": "kernel/drivers/block/loop.ko\nkernel/drivers/net/tun.ko\n",
        "sys/class/net/xenbr0/bridge/x": "",
        "sys/class/net/xenbr0/operstate": "up",
        "usr/bin/qemu-system-i386": "#!/bin/sh\necho 'Accelerators supported:\nxen\ntcg'\n",
        "run/x": "",
        "var/log/x": "",
    }
    for name in checks.MODULES:
        files[f"sys/module/{name.replace('-', '_')}/x"] = ""
    for node in checks.NODES:
        files[node] = ""
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o600)
    (root / "usr/bin/qemu-system-i386").chmod(0o755)
    host.hv.commandline = lambda: "console=com1 dom0_mem=2G,max:2G"  # type: ignore[method-assign]
    return Look(host, None, root)


def of(check: Check, look: Look) -> dict[str, CheckResult]:
    return {result.name: result for result in check(look)}


def test_a_host_that_is_well(look: Look) -> None:
    found = diagnose(look)
    # The host in memory has no IOMMU, and this machine may lack firmware, root, or room.
    here = ("IOMMU", "hvmloader", "SeaBIOS", "OVMF", "privilege", "open files", "locked memory", "clock")
    odd = [r for r in found if r.status not in ("ok", "skip") and r.name not in here]
    assert odd == [] and worst(r for r in found if r.name not in ("privilege",)) != "fail"
    assert all(r.why and r.do for r in found if r.status in ("warn", "fail"))
    assert len({r.name for r in found}) == len(found)


def test_no_xen(look: Look) -> None:
    broken = replace(look, host=None, trouble=NoXenError("no hypervisor", hint="boot one"))
    found = {r.name: r for r in diagnose(broken)}
    assert (found["xen"].status, found["xen"].found, found["xen"].do) == ("fail", "no hypervisor", "boot one")
    assert worst(found.values()) == "fail" and "free memory" not in found


def test_a_guest_is_no_control_domain(look: Look) -> None:
    assert of(checks.control_domain, look)["control domain"].found == "yes"
    look.at("/sys/hypervisor/start_flags/initdomain").write_text("0")
    assert of(checks.control_domain, look)["control domain"].found == "yes: Xen takes its orders"
    look.host = None
    assert of(checks.control_domain, look)["control domain"].status == "fail"
    look.at("/proc/xen").mkdir()
    look.at("/proc/xen/capabilities").write_text("control_d\n")
    assert of(checks.control_domain, look)["control domain"].status == "ok"


def test_device_nodes(look: Look) -> None:
    assert {r.status for r in checks.devices(look)} == {"ok"}
    look.at("/dev/xen/privcmd").unlink()
    look.at("/dev/xen/gntdev").unlink()
    look.at("/dev/xen/evtchn").chmod(0o666)
    found = of(checks.devices, look)
    assert (
        found["/dev/xen/privcmd"].status == "fail" and "modprobe xen-privcmd" in found["/dev/xen/privcmd"].do
    )
    assert found["/dev/xen/gntdev"].status == "warn" and found["/dev/xen/gntdev"].do == "modprobe xen-gntdev"
    assert found["/dev/xen/evtchn"].status == "fail" and "666" in found["/dev/xen/evtchn"].found


def test_modules_loaded_or_built_in(look: Look) -> None:
    import shutil

    for name in ("loop", "xen_netback"):
        shutil.rmtree(look.at(f"/sys/module/{name}"))
    found = of(checks.modules, look)
    assert found["module loop"].status == "ok"  # built in
    assert found["module xen-netback"].status == "warn"


def test_daemons(look: Look) -> None:
    assert of(checks.daemons, look)["xenstored"].found == "xenstored (C)"
    look.at("/proc/70/comm").write_text("oxenstored\n")
    assert of(checks.daemons, look)["xenstored"].found == "oxenstored (OCaml)"
    look.at("/proc/70/comm").write_text("bash")
    look.at("/proc/71/comm").write_text("bash")
    found = of(checks.daemons, look)
    assert found["xenstored"].status == "fail" and found["xenconsoled"].status == "warn"
    assert look.host is not None
    look.host.store.write("/tool/xenstored/domid", "3")
    assert of(checks.daemons, look)["xenstored"].found == "a domain of its own (3)"


def test_qemu(look: Look) -> None:
    qemu = look.at("/usr/bin/qemu-system-i386")
    assert of(checks.device_model, look)["QEMU"].status == "ok"
    qemu.write_text("#!/bin/sh\necho tcg\n")
    assert "without Xen" in of(checks.device_model, look)["QEMU"].found
    qemu.write_text("#!/bin/sh\nexit 1\n")
    assert "does not run" in of(checks.device_model, look)["QEMU"].found
    qemu.unlink()
    assert of(checks.device_model, look)["QEMU"].found == "none found"


def test_memory(look: Look) -> None:
    assert look.host is not None
    found = of(checks.memory, look)
    assert found["free memory"].status == "ok" and found["dom0_mem"].found == "2G,max:2G"
    for line, status in (
        ("", "warn"),
        ("dom0_mem=min:1G", "warn"),
        ("dom0_mem=4096M", "ok"),
        ("xdom0_mem=1G", "warn"),
        ("dom0_mem=1G,max:1G loglvl=all", "ok"),
    ):
        look.host.hv.commandline = lambda line=line: line  # type: ignore[misc, method-assign]
        assert of(checks.memory, look)["dom0_mem"].status == status, line
    look.host.hv.host = lambda: FakeHypervisor(32 << 20).host()  # type: ignore[method-assign]
    assert of(checks.memory, look)["free memory"].status == "fail"


def test_hardware(look: Look) -> None:
    assert look.host is not None
    found = of(checks.hardware, look)
    assert found["hardware virtualisation"].found == "SVM, nested paging" and found["IOMMU"].status == "warn"
    state = look.host.hv.host()
    look.host.hv.host = lambda: state._replace(capabilities=0b111)  # type: ignore[method-assign]
    assert of(checks.hardware, look)["IOMMU"].status == "ok"
    look.host.hv.host = lambda: state._replace(capabilities=0b10)  # type: ignore[method-assign]
    assert of(checks.hardware, look)["hardware virtualisation"].status == "warn"


def test_bridges(look: Look) -> None:
    assert of(checks.bridges, look)["bridge"].found == "xenbr0 (up); all: xenbr0"
    look.at("/sys/class/net/xenbr0").rename(look.at("/sys/class/net/br7"))
    assert of(checks.bridges, look)["bridge"].found == "no xenbr0; there are: br7"


def test_room(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1 << 20

    monkeypatch.setattr("xtool.toolstack.fitness_checks.shutil.disk_usage", lambda path: Usage)
    assert {r.status for r in checks.disk_space(look)} == {"warn"}


def test_limits_and_clock(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (16, 16))
    assert of(checks.limits, look)["open files"].status == "warn"
    monkeypatch.setattr("time.time", lambda: 1000.0)
    assert of(checks.clock, look)["clock"].status == "warn"


def test_leftovers_and_keepers(look: Look, config: Config, keeper: Keeper) -> None:
    assert look.host is not None
    done = LocalClient(look.host).create(config(), CreateOptions())
    assert of(checks.leftovers, look)["leftovers"].status == "ok"
    assert "missing for test" in of(checks.keepers, look)["keepers"].found
    with keeper(done.uuid):
        assert of(checks.keepers, look)["keepers"].status == "ok"
    look.host.store.write("/libxl/77/x", "")
    found = of(checks.leftovers, look)["leftovers"]
    assert found.status == "warn" and "/libxl/77" in found.found and "gc --yes" in found.do


def test_a_check_that_fails_stops_nothing(look: Look) -> None:
    def broken(_: Look) -> list[CheckResult]:
        raise HostError("no idea")

    first, second = diagnose(look, [("broken", broken), ("bridge", checks.bridges)])
    assert (first.name, first.status) == ("broken", "skip") and "no idea" in first.found
    assert second.status == "ok"
    assert worst([]) == "ok" and STATUSES[-1] == "fail"


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine, with a hypervisor in memory: something may be wrong with it, and it is said."""
    monkeypatch.setenv("XTOOL_CONNECT", "fake:")
    code = app.main(["doctor", "-o", "json"])
    found = json.loads(capsys.readouterr().out)
    assert code == int(any(r["status"] == "fail" for r in found))
    assert {"xen", "bridge", "dom0_mem", "leftovers"} <= {r["name"] for r in found}
    app.main(["doctor", "-q"])
    shown = capsys.readouterr().out
    assert "do: " in shown and "\nok " not in shown
    if not os.path.exists("/dev/xen/privcmd"):
        monkeypatch.delenv("XTOOL_CONNECT")
        assert app.main(["doctor"]) == 1
        assert capsys.readouterr().out.startswith("fail  xen ")
