"""Domain files as libvirt's XML: valid by libvirt's own schema, whatever the names; and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from libvirt_samples import QEMU, TCG, UUID, XEN, assert_valid, configs

from xtool.cli import app
from xtool.config import DomainConfig, parse_config
from xtool.config.load import load_placed
from xtool.config.problems import problems_of
from xtool.drivers.libvirt import domainxml, honour
from xtool.drivers.libvirt.facts import Facts
from xtool.drivers.libvirt.importxml import import_xml
from xtool.drivers.libvirt.places import decoded, place, vdev_of
from xtool.drivers.libvirt.xmltext import parse_xml
from xtool.errors import ConfigError
from xtool.toolstack.records import CreateResult

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def hvm(more: str = "") -> DomainConfig:
    return parse_config(f"name: t\ntype: hvm\nmemory: 64\n{more}", base_dir="/images")


def round_trip(config: DomainConfig, facts: Facts) -> None:
    honour.check(config, facts)
    xml = domainxml.render(config, facts, UUID)
    assert_valid(xml)
    imported = import_xml(xml)
    # The emulator is the host's, and the one thing said of a file we wrote ourselves.
    assert [line for line in imported.left_out if not line.startswith("emulator ")] == []
    assert domainxml.render(imported.config, facts, UUID) == xml
    for name in ("name", "memory", "maxmem", "vcpus", "maxvcpus", "kernel", "ramdisk", "cmdline", "on_crash"):
        assert getattr(imported.config, name) == getattr(config, name)
    assert [(d.vdev, d.target, d.format, d.readonly) for d in imported.config.disks] == [
        (d.vdev, d.target, d.format, d.readonly) for d in config.disks
    ]


@settings(max_examples=30)
@given(configs(xen=False))
def test_for_qemu_valid_and_back(config: DomainConfig) -> None:
    round_trip(config, TCG)


@settings(max_examples=30)
@given(configs(xen=True))
def test_for_xen_valid_and_back(config: DomainConfig) -> None:
    round_trip(config, XEN)


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_pv_and_pvh_for_xen(kind: str) -> None:
    lines = f"name: t\ntype: {kind}\nmemory: 64\nmaxmem: 128\nkernel: /k\ncmdline: a<b\nvcpus: 2"
    lines += "\ncpus: ['0', '1']"
    config = parse_config(f"{lines}\ndisk: [{{vdev: xvda1, target: /a}}]\nvif: [{{bridge: b, ip: 10.0.0.1}}]")
    round_trip(config, XEN)
    xml = domainxml.render(config, XEN, UUID)
    os_type = parse_xml(xml).find("os/type")
    assert (
        os_type is not None
        and (os_type.text, os_type.get("machine"))
        == {
            "pv": ("linux", "xenpv"),
            "pvh": ("xenpvh", "xenpvh"),
        }[kind]
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_the_examples(path: Path) -> None:
    config, _ = load_placed(path)
    round_trip(config, XEN)
    if config.type == "hvm":
        round_trip(config, QEMU)


def test_markup_stays_text() -> None:
    evil = "</name><devices><disk/></devices>&lt;"
    config = parse_config(
        f"name: '{evil.replace('/', '|')}'\ntype: hvm\nmemory: 64\nkernel: /k\ncmdline: '{evil}'"
    )
    root = parse_xml(domainxml.render(config, QEMU, UUID))
    assert root.findtext("name") == evil.replace("/", "|") and root.findtext("os/cmdline") == evil
    assert len(root.findall("devices")) == 1 and root.find("devices/disk") is None


def test_what_xml_cannot_carry_is_refused() -> None:
    (problem,) = honour.problems(hvm('kernel: /k\ncmdline: "a\\uFFFEb"'), QEMU)
    assert problem.loc == ("cmdline",) and "XML cannot carry" in problem.message


REFUSED_BY_QEMU = {
    "cpu_weight: 512": ("cpu_weight",),
    "cap: 50": ("cap",),
    "shadow_memory: 8": ("shadow_memory",),
    "xen_platform_pci: true": ("xen_platform_pci",),
    "nestedhvm: true": ("nestedhvm",),
    "pae: false": ("pae",),
    "hap: true": ("hap",),
    "tsc_mode: native": ("tsc_mode",),
    "max_grant_frames: 3": ("max_grant_frames",),
    "max_event_channels: 3": ("max_event_channels",),
    "max_maptrack_frames: 3": ("max_maptrack_frames",),
    "console_backend: xtool": ("console_backend",),
    "firmware: /boot/x": ("firmware",),
    "firmware_override: /boot/x": ("firmware_override",),
    "on_watchdog: restart": ("on_watchdog",),
    "on_soft_reset: restart": ("on_soft_reset",),
    "on_poweroff: preserve": ("on_poweroff",),
    "on_reboot: preserve": ("on_reboot",),
    "on_crash: rename-restart": ("on_crash",),
    "on_poweroff: coredump-destroy": ("on_poweroff",),
    "on_dm_exit: restart": ("on_dm_exit",),
    "cloud_init: {user_data: {packages: [nginx]}}": ("cloud_init",),
    "usb: true\nusbversion: 3": ("usbversion",),
    "acpi_s3: false": ("acpi_s3",),
    "acpi_s4: false": ("acpi_s4",),
    "viridian: true": ("viridian",),
    "smbios: {system_manufacturer: us}": ("smbios",),
    "timer_mode: one_missed_tick_pending": ("timer_mode",),
    "mmio_hole: 1024": ("mmio_hole",),
    "max_grant_version: 1": ("max_grant_version",),
    "on_poweroff: restart\non_reboot: destroy": ("on_reboot",),
    "cpus: nodes:0": ("cpus",),
    "maxvcpus: 2\ncpus: ['0', 'nodes:0']": ("cpus", 1),
    "serial: [pty, 'tcp:1.2.3.4:5']": ("serial", 1),
    "serial: stdio": ("serial",),
    "keymap: de": ("keymap",),
    "usb: true\nusbdevice: host:1": ("usbdevice",),
    "disk: [{vdev: hda, target: /a, access: ro}]": ("disk", 0, "access"),
    "disk: [{vdev: sdh, target: /a}]": ("disk", 0, "vdev"),
    "disk: [{vdev: xvda1, target: /a}]": ("disk", 0, "vdev"),
    "disk: [{vdev: xvdc, devtype: cdrom}]": ("disk", 0, "vdev"),
    "disk: [{vdev: hda, target: /a, format: vhdx}]": ("disk", 0, "format"),
    "disk: [{vdev: hda, target: /a, backendtype: xtool}]": ("disk", 0, "backendtype"),
    "disk: [{vdev: hda, target: /a, backend: d}]": ("disk", 0, "backend"),
    "disk: [{vdev: hda, target: /a, script: s}]": ("disk", 0, "script"),
    "disk: [{vdev: hda, target: /a, persistent: true}]": ("disk", 0, "persistent"),
    "disk: [{vdev: hda, target: /a, untrusted: true}]": ("disk", 0, "trusted"),
    "vif: [{}]": ("vif", 0, "bridge"),
    "vif: [{bridge: 'b<r'}]": ("vif", 0, "bridge"),
    "vif: [{bridge: b, vifname: 'v\"f'}]": ("vif", 0, "vifname"),
    "vif: [{bridge: b, backendtype: vif}]": ("vif", 0, "backendtype"),
    "vif: [{bridge: b, script: s}]": ("vif", 0, "script"),
    "vif: [{bridge: b, ip: 10.0.0.1}]": ("vif", 0, "ip"),
    "vif: [{bridge: b, backend: d}]": ("vif", 0, "backend"),
    "vif: [{bridge: b, devid: 3}]": ("vif", 0, "devid"),
    "vif: [{bridge: b, vlan: '3'}]": ("vif", 0, "vlan"),
    "vif: [{bridge: b, gatewaydev: eth0}]": ("vif", 0, "gatewaydev"),
    "vif: [{bridge: b, untrusted: true}]": ("vif", 0, "trusted"),
    "vif: [{bridge: b, rate: 1MB/s@20ms}]": ("vif", 0, "rate"),
    "vif: [{network: user, rate: 1MB/s}]": ("vif", 0, "rate"),
    "vif: [{bridge: b, model: '<e1000>'}]": ("vif", 0, "model"),
}


@pytest.mark.parametrize("lines", REFUSED_BY_QEMU)
def test_keys_qemu_cannot_honour(lines: str) -> None:
    assert [problem.loc for problem in honour.problems(hvm(lines), QEMU)] == [REFUSED_BY_QEMU[lines]]


@pytest.mark.parametrize(
    ("lines", "loc"),
    {
        "xen_platform_pci: false": ("xen_platform_pci",),
        "on_reboot: coredump-restart": ("on_reboot",),
        "on_dm_exit: pause": ("on_dm_exit",),
        "serial: [pty, pty]": ("serial", 1),
        "usb: true": ("usb",),
        "disk: [{vdev: xvda, target: 'nbd://h/x'}]": ("disk", 0, "target"),
        "disk: [{vdev: xvda, target: /a, bytes-per-second: 20MiB}]": ("disk", 0, "bytes-per-second"),
        "disk: [{vdev: xvda, target: /a, discard: true}]": ("disk", 0, "discard"),
        "disk: [{vdev: xvda, target: /a, format: vmdk}]": ("disk", 0, "format"),
        "vif: [{network: user}]": ("vif", 0, "network"),
        "vif: [{bridge: b, mtu: 1400}]": ("vif", 0, "mtu"),
        "vif: [{bridge: b, backendtype: xtool}]": ("vif", 0, "backendtype"),
    }.items(),
)
def test_keys_libvirts_xen_cannot_honour(lines: str, loc: tuple[Any, ...]) -> None:
    assert [problem.loc for problem in honour.problems(hvm(lines), XEN)] == [loc]


def test_every_key_is_rendered_or_refused() -> None:
    """A key that is added to the model must be thought of here: rendered, or refused."""
    import inspect

    source = inspect.getsource(domainxml) + inspect.getsource(honour)
    said = {"device_model_args_hvm", "vnclisten", "vncdisplay", "vncunused"}  # by properties of the model
    missing = [
        n
        for n in DomainConfig.model_fields
        if n not in said and f".{n}" not in source and f'"{n}"' not in source
    ]
    assert missing == []


def test_refusals_show_their_place(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(
        "name: web\ntype: hvm\nmemory: 64\ndisk:\n  - vdev: hda\n    target: a\n    format: vhdx\ncap: 5\n"
    )
    config, put = load_placed(file)
    with pytest.raises(ConfigError) as caught:
        honour.check(config, QEMU)
    first, second = problems_of(put(caught.value))
    assert (first.line, first.column, first.file) == (7, 13, str(file)) and "vhdx" in first.message
    assert (second.line, second.column) == (8, 6) and "cap has no effect" in second.message


TWO = "name: a\ntype: hvm\nmemory: 64\ncap: 5\n---\nname: b\ntype: hvm\nmemory: 64\nhap: true\n"


@pytest.mark.parametrize("verb", ["check", "create"])
def test_refusals_of_several_documents_are_told_at_once(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before the first of them is started: nothing is opened."""
    monkeypatch.setattr("xtool.drivers.libvirt.open_libvirt", lambda uri: pytest.fail(f"opened {uri}"))
    file = tmp_path / "two.yaml"
    file.write_text(TWO)
    assert app.main(["-H", "qemu:", verb, str(file)]) == 3
    said = capsys.readouterr().err
    assert f"{file}:4:6: cap has no effect" in said and f"{file}:9:6: hap has no effect" in said
    assert app.main(["-H", "qemu:", verb, str(file), "--only", "b"]) == 3
    said = capsys.readouterr().err
    assert "cap" not in said and f"{file}:9:6: hap has no effect" in said


def test_editors_get_them_with_their_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(TWO)
    assert app.main(["-H", "qemu:", "check", str(file), "-o", "json"]) == 3
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [(each["key"], each["line"], each["column"]) for each in problems] == [
        ("cap", 4, 6),
        ("hap", 9, 6),
    ]


def test_what_the_driver_refuses_later_has_its_place_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as what only shows when the driver is asked: here of the second document."""

    class Driver:
        def create(self, config: DomainConfig, *_: object) -> CreateResult:
            if config.name == "b":
                raise ConfigError("not here", loc=("hap",))
            return CreateResult(config.name, 1, UUID, config.type, 0.1)

        def close(self) -> None:
            pass

    file = tmp_path / "two.yaml"
    file.write_text(TWO)
    assert app.main(["create", str(file), "-o", "json"], opener=Driver) == 3  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert f"{file}:9:6: not here" in err
    assert [each["name"] for each in json.loads(out)] == ["a"]  # it was started, and that is told


@pytest.mark.parametrize("form", ["yaml", "libvirt-xml"])
def test_export_takes_one_of_several(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, values = tmp_path / "two.yaml", tmp_path / "values.yaml"
    file.write_text("name: a\ntype: hvm\nmemory: 64\n---\nname: b\ntype: hvm\nmemory: {{ size }}\n")
    values.write_text("size: 96\n")
    argv = ["config", "export", "--format", form, str(file), "--vars-file", str(values)]
    assert app.main(argv) == 3
    assert "--only" in capsys.readouterr().err
    assert app.main([*argv, "--only", "b"]) == 0
    out = capsys.readouterr().out
    assert "name: b\n" in out and "memory: 96" in out if form == "yaml" else "<name>b</name>" in out


@pytest.mark.parametrize(
    ("vdev", "hdtype", "where"),
    [
        ("hda", "ide", ("ide", "hda")),
        ("hdd", "ahci", ("sata", "hdd")),
        ("sda", "ide", ("scsi", "sda")),
        ("xvda", "ide", ("virtio", "vda")),
        ("d26", "ide", ("virtio", "vdaa")),
        ("51728", "ide", ("virtio", "vdb")),
        ("5632", "ide", ("ide", "hdc")),
        ("hda1", "ide", None),
    ],
)
def test_places(vdev: str, hdtype: str, where: tuple[str, str] | None) -> None:
    found = place(vdev, hdtype, xen=False)
    assert found == where
    if found is not None:
        back = vdev_of(found.dev, found.bus)
        assert back is not None and decoded(back) == decoded(vdev)
