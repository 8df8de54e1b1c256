"""Domain files: what is taken, what is refused and where the refusal points."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.config import ConfigErrors, DomainConfig, load_config, parse_config
from xtool.config.problems import problems_of
from xtool.config.reference import rewrite
from xtool.errors import ConfigError

MIB = 1 << 20
RELAXED = settings(deadline=None)  # a busy machine is no failure
ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PV = "name: web\ntype: pv\nmemory: 64\nkernel: vmlinuz\n"
HVM = "name: web\ntype: hvm\nmemory: 64\n"


def parse(text: str, *overrides: str) -> DomainConfig:
    return parse_config(text, "web.yaml", "/dir", overrides)


def problems(text: str, *overrides: str) -> list[ConfigError]:
    with pytest.raises(ConfigError) as caught:
        parse(text, *overrides)
    return list(problems_of(caught.value))


def test_defaults_are_xls() -> None:
    config = parse(PV)
    assert (config.name, config.type, config.memory, config.maxmem) == ("web", "pv", 64 * MIB, 64 * MIB)
    assert (config.vcpus, config.maxvcpus, config.cap) == (1, 1, 0)
    assert (config.on_poweroff, config.on_reboot, config.on_crash) == ("destroy", "restart", "destroy")
    assert config.kernel == "/dir/vmlinuz"
    assert config.disks == () and config.vifs == () and config.serial == ()
    assert config.uuid is None and config.cmdline is None and config.hap is None
    assert config.vnc is False


def test_everything_of_an_hvm_guest() -> None:
    text = """
name: win
uuid: 8d2a5d4e-3c6f-4a52-9b3e-2f7f8f0b1c2d
type: hvm
memory: 2GiB
maxmem: 4096
vcpus: 2
maxvcpus: 0x4
cpus: [0-3, ^1, "nodes:0"]
cpu_weight: 512
cap: 150
firmware: ovmf
firmware_override: fw/hvmloader
boot: dc
disk:
  - {vdev: hda, target: a.qcow2, format: qcow2, access: w}
  - /b.iso,,hdc,cdrom
  - nbd://example.org/disk,raw,xvde
serial: [pty, "file:/tmp/x"]
vnc: 1
vnclisten: 0.0.0.0:3
vncpasswd: secret
vga: stdvga
videoram: 32
usb: yes
usbdevice: tablet
device_model_override: ./qemu
device_model_args: [-d, trace]
hpet: off
on_crash: preserve
rtc_timeoffset: -3600
"""
    config = parse(text)
    assert config.uuid == UUID("8d2a5d4e-3c6f-4a52-9b3e-2f7f8f0b1c2d")
    assert (config.memory, config.maxmem) == (2048 * MIB, 4096 * MIB)
    assert (config.vcpus, config.maxvcpus, config.cpu_weight, config.cap) == (2, 4, 512, 150)
    assert config.cpus == ("0-3", "^1", "nodes:0")
    first, second, third = config.disks
    assert (third.target, third.remote, second.remote) == ("nbd://example.org/disk", True, False)
    assert (first.target, first.format, first.readonly, first.cdrom) == (
        "/dir/a.qcow2",
        "qcow2",
        False,
        False,
    )
    assert (second.target, second.format, second.readonly, second.cdrom) == ("/b.iso", "raw", True, True)
    assert (first.number, second.number) == (3 << 8, 22 << 8)
    assert config.serial == ("pty", "file:/tmp/x")
    assert (config.vnc, config.vnc_host, config.vnc_display) == (True, "0.0.0.0", 3)
    assert config.videoram == 32 * MIB
    assert (config.usb, config.usbdevice, config.hpet) == (True, ("tablet",), False)
    assert config.device_model_override == "/dir/qemu"
    assert config.device_model_args == ("-d", "trace")
    assert (config.on_crash, config.rtc_timeoffset) == ("preserve", -3600)
    assert parse(config.to_yaml()) == config
    assert parse(json.dumps(config.to_dict())) == config
    assert [(r.key, r.path, r.kind) for r in config.file_references()] == [
        ("firmware_override", "/dir/fw/hvmloader", "firmware"),
        ("device_model_override", "/dir/qemu", "devicemodel"),
        ("disk[0].target", "/dir/a.qcow2", "disk"),
        ("disk[1].target", "/b.iso", "disk"),
    ]
    moved = config.with_files({"/dir/a.qcow2": "/cache/1", "/dir/qemu": "/cache/2", "/other": "/x"})
    assert (moved.disks[0].target, moved.disks[1].target) == ("/cache/1", "/b.iso")
    assert moved.device_model_override == "/cache/2"
    assert moved.firmware_override == config.firmware_override
    assert parse(moved.to_yaml()) == moved


@pytest.mark.parametrize(
    ("written", "size"),
    [("64", 64), ("64MiB", 64), ("64 MiB", 64), ('"64M"', 64), ("1g", 1024), ("1GiB", 1024), ("2048K", 2)],
)
def test_sizes(written: str, size: int) -> None:
    assert parse(PV.replace("64", written)).memory == size * MIB


@pytest.mark.parametrize(
    ("root", "extra", "cmdline"),
    [
        ("/dev/xvda", "quiet", "root=/dev/xvda quiet"),
        ("/dev/xvda", "", "root=/dev/xvda"),
        ("", "quiet", "quiet"),
    ],
)
def test_root_and_extra_become_cmdline(root: str, extra: str, cmdline: str) -> None:
    lines = (f"root: {root}\n" if root else "") + (f"extra: {extra}\n" if extra else "")
    assert parse(PV + lines).cmdline == cmdline


# Each: the text, the line and column it is refused at, a part of the message, a part of the hint.
REFUSED = [
    ("nmae: x\n" + PV, 1, 1, "unknown key nmae", "did you mean name?"),
    (PV + "memroy: 5\n", 5, 1, "unknown key memroy", "did you mean memory?"),
    (PV + "memory: 5\n", 5, 1, "memory is given twice", "line 3"),
    (PV + "nomigrate: x\n", 5, 1, "xl's nomigrate is not supported by xtool: there", "remove nomigrate"),
    (PV + "sdl: 1\n", 5, 1, "xl's sdl is not supported", "vnc"),
    (PV + "vnc: 1\n", 5, 1, "vnc has no effect for type: pv", "hvm"),
    (PV + "ramdisk:\n", 5, 1, "ramdisk has no value", "remove"),
    (PV + "vcpus: two\n", 5, 8, "vcpus: a number is wanted, not 'two'", ""),
    (PV + 'vcpus: "2"\n', 5, 8, "vcpus: a number is wanted, not the text '2'", "quotes"),
    (PV + "vcpus: [2]\n", 5, 8, "vcpus: a number is wanted, not a list", ""),
    (PV + "vcpus: 0\n", 5, 8, "vcpus: 0 is out of range", "1 to 512"),
    (PV + "vcpus: 513\n", 5, 8, "vcpus: 513 is out of range", ""),
    (PV + "vcpus: 4\nmaxvcpus: 2\n", 6, 11, "maxvcpus is less than vcpus", ""),
    (PV + "maxmem: 63\n", 5, 9, "maxmem is less than memory", ""),
    (PV.replace("64", "2Q"), 3, 9, "unknown unit: Q", "KiB"),
    (PV.replace("64", "64MB"), 3, 9, "unknown unit: MB", "write MiB"),
    (PV.replace("64", "lots"), 3, 9, "'lots' is not a size", "256MiB"),
    (PV.replace("64", "-1"), 3, 9, "'-1' is not a size", ""),
    (PV.replace("64", "0"), 3, 9, "0 MiB is out of range", ""),
    (PV.replace("64", "1025K"), 3, 9, "whole number of MiB", ""),
    (PV.replace("64", "{a: 1}"), 3, 9, "a size is wanted, not a map", ""),
    (PV.replace("pv", "h"), 2, 7, "'h' is not one of pv, pvh, hvm", "pv"),
    (PV.replace("type: pv", "type: pvh").replace("kernel: vmlinuz\n", ""), 1, 1, "kernel is missing", ""),
    (PV.replace("name: web\n", ""), 1, 1, "name is missing", "name"),
    (PV.replace("web", "12"), 1, 7, "is a number", "domain id"),
    (PV.replace("web", "a/b"), 1, 7, "has a slash", ""),
    (PV.replace("web", '"a\\eb"'), 1, 7, "'\\x1b' is not allowed", ""),
    (PV.replace("web", '" a"'), 1, 7, "begins or ends with a space", ""),
    (PV.replace("web", "x" * 256), 1, 7, "longer than 255 bytes", ""),
    (PV.replace("web", "8d2a5d4e-3c6f-4a52-9b3e-2f7f8f0b1c2d"), 1, 7, "looks like a uuid", ""),
    (PV.replace("web", "[a]"), 1, 7, "name: text is wanted, not a list", ""),
    (PV + "uuid: 8d2a\n", 5, 7, "'8d2a' is not a uuid", ""),
    (PV + "acpi: 1\n", 5, 1, "acpi has no effect for type: pv", "pvh or hvm"),
    (PV + "localtime: 2\n", 5, 12, "true or false is wanted, not '2'", ""),
    (PV + "localtime: 'true'\n", 5, 12, "not the text 'true'", "quotes"),
    (PV + "on_crash: destory\n", 5, 11, "'destory' is not one of", "did you mean destroy?"),
    (PV + "on_crash: soft-reset\n", 5, 11, "xl's soft-reset is not supported", ""),
    (PV + "root: a\ncmdline: b\n", 5, 1, "root has no effect when cmdline is given", ""),
    (PV + "cpus: 0-x\n", 5, 7, "is not a list of CPUs", "0-3"),
    (PV + "cpus: [0, 1]\n", 5, 11, "cpus has 2 entries for 1 vCPUs", ""),
    (PV + "cap: 101\n", 5, 6, "cap is more than", ""),
    (PV + "disk: ['a,,xvda,backendtype=tap']\n", 5, 29, "xl's tap is not supported", ""),
    (HVM + "ramdisk: r\n", 4, 10, "ramdisk has no effect without kernel", ""),
    (HVM + "vncdisplay: 3\n", 4, 13, "no effect without vnc: true", ""),
    (HVM + "vnc: 1\nvnclisten: nowhere\n", 5, 12, "no address to listen on", ""),
    (HVM + "vnc: 1\nvnclisten: 0.0.0.0:1\nvncdisplay: 1\n", 6, 13, "vnclisten has a display number", ""),
    (HVM + "vnc: 1\nvncpasswd: ninechars\n", 5, 12, "8 characters at most", ""),
    (HVM + "vga: stdvga\nvideoram: 8\n", 5, 11, "needs 16 MiB", ""),
    (HVM + "vga: qxl\n", 4, 6, "xl's qxl is not supported", ""),
    (HVM + "videoram: 64\n", 4, 11, "leaves nothing", ""),
    (HVM + "usbdevice: tablet\n", 4, 12, "usb: true", ""),
    (HVM + "boot: cc\n", 4, 7, "no boot order", ""),
    (HVM + "firmware: rombios\n", 4, 11, "xl's rombios is not supported", ""),
    (HVM + "serial: [a, b, c, d, e]\n", 4, 22, "4 serial ports at most", ""),
    (HVM + "vcpus: 129\n", 4, 8, "128 vCPUs at most", ""),
    (HVM + "disk: a.img,raw,hda\n", 4, 7, "disk: a list is wanted", "dash"),
    (HVM + "disk: [['a']]\n", 4, 8, "disk[0]: a map of keys is wanted", ""),
    (HVM + "disk:\n  - vdev: hda\n    fromat: raw\n    target: a\n", 6, 5, "sub-key fromat", "format"),
    (HVM + "disk:\n  - vdev: hda\n", 5, 5, "target is missing", ""),
    (HVM + "disk:\n  - target: a\n", 5, 5, "vdev is missing", ""),
    (HVM + "disk:\n  - {vdev: hde, target: a}\n", 5, 12, "'hde' is no virtual device", ""),
    (HVM + "disk:\n  - 'a,raw,xvda,rx'\n", 5, 17, "'rx' is not one of", ""),
    (HVM + "disk: ['a,raw,xvda', 'b,raw,d0']\n", 4, 29, "the vdev d0 is used twice", ""),
    (HVM + "disk:\n  - {vdev: hdc, cdrom: 1, access: rw}\n", 5, 5, "cannot be written", ""),
    (HVM + "disk:\n  - {vdev: hda, target: a, discard: 1, no-discard: 1}\n", 5, 5, "both given", ""),
    (PV + "\tvcpus: 1\n", 5, 1, "not valid YAML", "tabs"),
    ("name: a: b\n", 1, 8, "not valid YAML", "quotes"),
    ("name: &a b\nmemory: *a\n", 1, 7, "anchors and aliases", ""),
    ("name: !!python/object:os.system x\n", 1, 7, "tags are not allowed", ""),
    ("- a\n", 1, 1, "a map of keys", ""),
    ("", 1, 1, "name is missing", ""),
    (PV + "---\n" + PV, 6, 1, "one document", ""),
    (PV + "extra: \x07\n", 5, 8, "U+0007 is not allowed", ""),
    (PV + "? [a]\n: b\n", 5, 3, "a key must be a word", ""),
    ("a: " + "[" * 5000, 1, 19, "nested too deeply", ""),
    (PV + 'extra: "\\ud800"\n', 5, 8, "'\\ud800' is not allowed", ""),
    (PV + "trailing garbage\n", 5, 1, "not valid YAML", "key: value"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "column", "message", "hint"), REFUSED)
def test_refusals_point_at_the_place(text: str, line: int, column: int, message: str, hint: str) -> None:
    found = [p for p in problems(text) if message in p.message]
    assert found, [p.message for p in problems(text)]
    assert (found[0].file, found[0].line, found[0].column) == ("web.yaml", line, column)
    assert found[0].source == text.split("\n")[line - 1]
    assert hint in (found[0].hint or "")


def test_all_problems_are_told_at_once_in_file_order() -> None:
    with pytest.raises(ConfigErrors) as caught:
        parse("nmae: web\ntype: hvm\nmemory: lots\nfoo: 1\ndisk:\n  - a,raw,hda,rx\n  - b,raw,hdb,rx\n")
    found = [(p.line, p.message.split(":")[0]) for p in caught.value.problems]
    assert found == [
        (1, "unknown key nmae"),
        (3, "memory"),
        (4, "unknown key foo"),
        (6, "disk[0].access"),
        (7, "disk[1].access"),
    ]
    assert caught.value.message == "unknown key nmae" and caught.value.exit_code == 3


def test_overrides_replace_add_and_reach_inside() -> None:
    text = HVM + "disk:\n  - a.img,raw,hda\n"
    config = parse(
        text,
        "memory=2GiB",
        "disk[0].target=b.img",
        "disk[1]={vdev: hdc, devtype: cdrom}",
        "serial=[pty, pty]",
        "on_crash= preserve",
        'name="new"',
    )
    assert (config.name, config.memory, config.on_crash) == ("new", 2048 * MIB, "preserve")
    assert [(d.target, d.vdev) for d in config.disks] == [("/dir/b.img", "hda"), (None, "hdc")]
    assert config.serial == ("pty", "pty")


def test_an_override_is_taken_as_it_stands() -> None:
    assert parse(PV, "cmdline=console=hvc0 a: b # c").cmdline == "console=hvc0 a: b # c"


@pytest.mark.parametrize(
    ("override", "column", "message"),
    [
        ("memory", 1, "wants key=value"),
        ("memory=lots", 8, "is not a size"),
        ("memroy=1", 1, "unknown key memroy"),
        ("a b=1", 1, "is no key"),
        ("disk[x].vdev=hda", 5, "is no key"),
        ("disk[1].vdev=hda", 1, "no entry [1]"),
        ("name.x.y[0]=1", 6, "name: text is wanted"),
        ("serial=[a", 10, "not valid YAML"),
        ("name='a", 6, "not valid YAML"),
        ("memory=", 1, "has no value"),
    ],
)
def test_a_wrong_override_is_pointed_at(override: str, column: int, message: str) -> None:
    found = [p for p in problems(HVM, override) if message in p.message]
    assert found, [p.message for p in problems(HVM, override)]
    assert (found[0].file, found[0].line, found[0].source) == ("--set", 1, override)
    assert message == "name: text is wanted" or found[0].column == column


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_examples_load_and_round_trip(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert parse_config(config.to_yaml()) == config
    assert all(
        reference.path.startswith(str(ROOT / "build" / "guest")) for reference in config.file_references()
    )


def test_there_is_an_example_of_each_type() -> None:
    assert {load_config(path).type for path in CONFIGS} == {"pv", "pvh", "hvm"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"name: a\nextra: \xff\n")
    with pytest.raises(ConfigError, match="0xff is not UTF-8") as caught:
        load_config(bad)
    assert (caught.value.line, caught.value.column) == (2, 8)
    bad.write_bytes(b"# " + b"x" * (1 << 20))
    with pytest.raises(ConfigError, match="too large"):
        load_config(bad)


def test_relative_paths_are_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "web.yaml").write_text(PV)
    monkeypatch.chdir(tmp_path)
    assert load_config("d/web.yaml").kernel == str(tmp_path / "d" / "vmlinuz")
    assert load_config("d/web.yaml", ["kernel=../k"]).kernel == str(tmp_path / "k")


def test_every_cut_of_a_file_is_a_config_or_a_config_error() -> None:
    text = (ROOT / "configs" / "hvm-cd.yaml").read_text()
    taken = 0
    for end in range(len(text)):
        try:
            parse(text[:end])
            taken += 1
        except ConfigError:
            pass
    assert 0 < taken < len(text)


_KEYS = ["name", "type", "memory", "disk", "vif", "cpus", "serial", "uuid", "vnc", "kernel", "foo", "pool"]
_PLAIN = st.one_of(
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(["pv", "hvm", "64", "a,raw,hda"]),
)
_NESTED = st.recursive(
    _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)


@RELAXED
@given(st.text(st.characters(), max_size=60))
def test_no_text_escapes_as_another_error(text: str) -> None:
    for whole in (text, PV + text, HVM + "disk:\n  - " + text):
        try:
            parse(whole)
        except ConfigError as error:
            assert error.line >= 1


@RELAXED
@given(st.text(st.sampled_from(list("[]{}:,-?!&*#|>'\"%@`\\ \n\tax0~.uU")), max_size=30))
def test_no_yaml_soup_escapes_as_another_error(text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        assert error.line >= 1


@RELAXED
@given(st.dictionaries(st.sampled_from(_KEYS), _NESTED, max_size=6), st.text(max_size=20))
def test_no_structure_escapes_as_another_error(data: dict[str, object], override: str) -> None:
    try:
        config = parse(json.dumps(data), f"{override}=1")
        assert parse(config.to_yaml()) == config
    except ConfigError as error:
        assert error.line >= 1


@RELAXED
@given(st.text(st.characters(exclude_categories=("C",)), max_size=200), st.integers(1, 9999))
def test_text_survives_json_and_yaml(text: str, memory: int) -> None:
    data = {
        "name": f"w{text[:40]}w".replace("/", ""),
        "type": "pvh",
        "memory": memory,
        "kernel": "k",
        "cmdline": text,
    }
    config = parse(json.dumps(data))
    assert (config.cmdline, config.memory) == (text, memory * MIB)
    assert parse(config.to_yaml()) == parse(json.dumps(config.to_dict())) == config


def test_the_reference_page_is_made_from_the_model() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert rewrite(page) == page, "run python -m xtool.config.reference docs/configuration.md"


def test_importing_the_package_is_light() -> None:
    code = "import sys, xtool.config; print([m for m in ('yaml', 'pydantic', 'difflib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
