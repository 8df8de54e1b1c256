"""The libvirt client's edges: which driver is named, and that no verb is left out in silence."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from xtool.cli import app
from xtool.drivers.libvirt.accel import kvm_works
from xtool.drivers.libvirt.binding import binding
from xtool.drivers.libvirt.client import LibvirtClient
from xtool.drivers.libvirt.link import Link
from xtool.drivers.libvirt.uri import MAX_ROOT, is_libvirt, parse_target
from xtool.errors import HostError, UnsupportedError, UsageError
from xtool.toolstack.api import Client

VERBS = [name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")]
UNSUPPORTED = {"dry_run", "dmesg", "console_log", "block_serve", "wiring"}


def client() -> Any:
    link: Link = object()  # type: ignore[assignment] (nothing is asked of it)
    return LibvirtClient(link, parse_target("qemu:"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_there_or_refused_by_name(verb: str) -> None:
    if hasattr(LibvirtClient, verb):
        ours = inspect.signature(getattr(LibvirtClient, verb)).parameters
        assert list(ours) == list(inspect.signature(getattr(Client, verb)).parameters)
        return
    with pytest.raises(UnsupportedError) as caught:
        getattr(client(), verb)("web")
    name = verb.replace("_", "-")
    assert caught.value.message.startswith(f"xtool {name} needs Xen's own driver: libvirt's QEMU driver")


def test_what_is_refused_today() -> None:
    assert {verb for verb in VERBS if not hasattr(LibvirtClient, verb)} >= UNSUPPORTED
    assert not hasattr(client(), "no_such_verb")


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/tmp/s")
    root = "/var/tmp/s/xtool/libvirt"
    for text in ("qemu:", "qemu:///embed"):
        target = parse_target(text)
        assert (target.kind, target.root, target.uri) == ("qemu", root, f"qemu:///embed?root={root}")
    target = parse_target("qemu:///embed?root=/a%20b/../c&accel=tcg")
    assert (target.root, target.uri, target.accel) == ("/c", "qemu:///embed?root=/c", "tcg")
    for text in ("qemu:///system", "qemu:///session", "xen:///system", "test:///default"):
        target = parse_target(text)
        assert target.uri == text and not target.root and not target.remote
    far = parse_target("qemu+ssh://root@host/system?accel=kvm&no_verify=1")
    assert far.remote and far.uri == "qemu+ssh://root@host/system?no_verify=1" and far.accel == "kvm"


@pytest.mark.parametrize(
    "text",
    [
        *("xen:", "fake:", "lab", "ssh://host", "qemu", "xen:///embed", "qemu+ssh://host/embed"),
        *("qemu:///embed?root=relative", "qemu:///embed?root=/a&x=1", "qemu:///system?accel=x"),
        *("xen:///system?accel=kvm", "qemu:///embed?root=/" + "a" * MAX_ROOT),
    ],
)
def test_no_targets(text: str) -> None:
    with pytest.raises(UsageError):
        parse_target(text)


def test_our_own_driver_is_not_libvirts() -> None:
    assert not is_libvirt("xen:") and not is_libvirt("lab:x") and is_libvirt("xen:///system")


def test_kvm_has_to_work(tmp_path: Any) -> None:
    device = tmp_path / "kvm"
    assert not kvm_works("/bin/true", str(device))
    device.write_text("")
    assert kvm_works("/bin/true", str(device))
    assert not kvm_works("/bin/false", str(device))
    assert not kvm_works("/no/such/qemu", str(device))


def test_doctor_and_unknown_drivers(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["-H", "qemu:", "doctor", "snapshot"]) == 5
    assert "xtool doctor needs Xen's own driver" in capsys.readouterr().err
    assert app.main(["-H", "qemu:///embed?root=x", "list"]) == 2


def test_a_missing_binding_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import sys

    from xtool import systempython

    for name in ("libvirt", "libvirtmod"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(systempython, "DEBIAN", "/nowhere")
    real = builtins.__import__

    def no_libvirt(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("libvirt"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_libvirt)
    monkeypatch.setattr(systempython, "import_module", no_libvirt)
    with pytest.raises(HostError) as caught:
        binding()
    assert "python3-libvirt" in (caught.value.hint or "") and "xtool[libvirt]" in (caught.value.hint or "")
