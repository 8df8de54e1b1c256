"""xl.cfg to domain files and back: the grammar, the legacy forms, and that nothing gets lost unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.cli.app import main
from xtool.config import DomainConfig, parse_config
from xtool.config.fromxl import convert, convert_file
from xtool.config.load import load_config
from xtool.config.model import SIZES
from xtool.config.nodes import ListNode, ScalarNode, Source
from xtool.config.problems import problems_of
from xtool.config.toxl import to_xl
from xtool.config.xlcfg import parse_xlcfg, to_long
from xtool.config.xlkeys import UNSUPPORTED
from xtool.config.xlspecs import read_disk, read_vif
from xtool.errors import ConfigError

RELAXED = settings(deadline=None)
FILES = sorted((Path(__file__).parents[1] / "data" / "xl").glob("*.cfg"))
#: Files in which something every domain needs is missing for xtool.
NOT_WHOLE = {"pv-pygrub", "hvm-number-name"}
PV = 'name = "a"\nkernel = "/k"\n'
HVM = 'name = "a"\ntype = "hvm"\nmemory = 64\nvnc = 0\n'


def values(text: str) -> dict[str, object]:
    def plain(node: object) -> object:
        if isinstance(node, ListNode):
            return [plain(item) for item in node.items]
        assert isinstance(node, ScalarNode)
        return str(node.value)

    settings, errors = parse_xlcfg(Source("x.cfg", text), text)
    assert errors == []
    return {setting.name: plain(setting.value) for setting in settings}


def test_there_are_enough_files() -> None:
    assert len(FILES) >= 60


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_there_and_back(path: Path, tmp_path: Path) -> None:
    made = convert_file(str(path))
    assert (made.config is None) == (path.stem in NOT_WHOLE), made.notes
    if made.config is None:
        assert "It is not whole" in made.text
        return
    written = tmp_path / "made.yaml"
    written.write_text(made.text)
    assert load_config(written) == made.config
    text, notes = to_xl(made.config)
    assert notes == []
    again = convert(text, "again.cfg", "/")
    assert (again.config, again.notes) == (made.config, [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_setting_is_carried_over_or_told(path: Path) -> None:
    """A key that is neither in the domain file nor in a note would be the silence this is all against."""
    made = convert_file(str(path))
    text = path.read_text()
    settings, _ = parse_xlcfg(Source(path.name, text), text)
    carried = made.config.to_dict() if made.config else yaml.safe_load(made.text)
    said = "\n".join(made.notes)
    other = {
        "builder": "type",
        "bios": "firmware",
        "stdvga": "vga",
        "nographic": "vga",
        "root": "cmdline",
        "extra": "cmdline",
        "device_model_args": "device_model_args_pv",
    }
    silent = {"device_model_version": "qemu-xen"}
    for setting in settings:
        name = setting.name
        value = setting.value.data()
        if {name, other.get(name)} & carried.keys() or name in said or other.get(name, "?") in said:
            continue
        if silent.get(name) == value or value == []:
            continue
        if name in UNSUPPORTED:
            assert value == "" or to_long(str(value)) == 0, name
            continue
        # What is not there any more is what it would be without it.
        assert made.config is not None, name
        assert str(value) in _default(made.config, name), name


def _default(config: DomainConfig, name: str) -> list[str]:
    value = getattr(config, name)
    if name in SIZES:
        value >>= 20
    # vncunused = 0 beside a display number is None for us; an unsaid number is a choice's.
    return [str(value), str(int(value)) if isinstance(value, (bool, int)) else "0" if value is None else ""]


def test_the_grammar() -> None:
    assert values("a=1\nb = 'x' ; c = \"y\" ;; \n# comment\n\td\t=[1,'2',[ 3 , ],]") == {
        "a": "1",
        "b": "x",
        "c": "y",
        "d": ["1", "2", ["3"]],
    }
    assert values("l = [\n\n 'a' # one\n , # two\n 'b'\n]\n") == {"l": ["a", "b"]}
    assert values("s = 'it\\'s \\\\ \\t \"x\"'\n") == {"s": 'it\'s \\ \t "x"'}
    assert values("a.b_9 = 0x1f\na.b_9 = 'z'\n") == {"a.b_9": "z"}
    assert values("a = 'x'\na += 'y'\nl = ['1']\nl += ['2']\nn += ['3']\n") == {
        "a": "xy",
        "l": ["1", "2"],
        "n": ["3"],
    }
    assert values("") == values("# nothing") == values(";\n;") == {}


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("memory = 512M\n", 1, 13, "lower case"),
        ("a = b\n", 1, 5, "a value is wanted here, not 'b'"),
        ("a = \n", 1, 5, "a value is wanted here, not the end of the line"),
        ("a", 1, 2, "= is wanted after a"),
        ("a = 'x\n", 1, 5, "no end on its line"),
        ("a = [1\n2]\n", 2, 1, "a comma or ] is wanted"),
        ("a = [1,,2]\n", 1, 8, "a value is wanted"),
        ("a = [1", 1, 7, "a comma or ] is wanted here, not the end of the file"),
        ("a = 1 2\n", 1, 7, "the line should end here"),
        ("a = -1\n", 1, 5, "looks like Python"),
        ("a = 'x' + 'y'\n", 1, 9, "looks like Python"),
        ("a = 1\r\n", 1, 6, "carriage return"),
        ("A = 1\n", 1, 1, "lower case"),
        ("a = '\\x41'\n", 1, 5, "numeric escapes"),
        ("a = '\\q'\n", 1, 5, "is no escape"),
        ("a = 'x'\na += [1]\n", 2, 1, "cannot be added"),
        ("a = " + "[" * 20, 1, 13, "nested too deeply"),
        ("import os\n", 1, 8, "= is wanted after import"),
        ("a = $\n", 1, 5, "cannot stand here"),
    ],
)
def test_what_xl_does_not_read_is_pointed_at(text: str, line: int, column: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(text, "x.cfg", "/")
    (problem,) = [p for p in problems_of(caught.value) if message in p.message]
    assert (problem.line, problem.column) == (line, column)


def test_the_parser_goes_on_after_an_error() -> None:
    settings, errors = parse_xlcfg(Source("x", ""), "a = -\nb = 2\nC = 3\nd = 'x\ne = 5\n")
    assert [s.name for s in settings] == ["b", "e"] and [e.line for e in errors] == [1, 3, 4]


def test_truncated_files_are_a_config_or_a_config_error() -> None:
    text = (FILES[0].parent / "hvm-install.cfg").read_text()
    read = 0
    for end in range(len(text)):
        try:
            convert(text[:end], "x", "/")
            read += 1
        except ConfigError:
            pass
    assert 0 < read < len(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("010", 8), ("0x1F", 31), ("-5", -5), (" 7", 7), ("08", None), ("", None), ("1k", None)],
)
def test_numbers_are_cs(text: str, number: int | None) -> None:
    assert to_long(text) == number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("phy:/dev/vg/a,hda,w", {"target": "/dev/vg/a", "vdev": "hda", "access": "rw"}),
        ("file:/a.img,xvda,r", {"target": "/a.img", "vdev": "xvda", "access": "ro"}),
        ("tap:aio:/a,xvda,w", {"target": "/a", "vdev": "xvda", "access": "rw"}),
        ("tap2:vhd:/a,xvda,w", {"target": "/a", "format": "vhd", "vdev": "xvda", "access": "rw"}),
        ("qcow2:/a,xvda,w!", {"target": "/a", "format": "qcow2", "vdev": "xvda", "access": "rw"}),
        ("nbd:/x,xvda,w", {"target": "/x", "script": "block-nbd", "vdev": "xvda", "access": "rw"}),
        ("file:/a.iso,hdc:cdrom,r", {"target": "/a.iso", "vdev": "hdc", "devtype": "cdrom"}),
        (",hdc:cdrom,r", {"vdev": "hdc", "devtype": "cdrom"}),
        (",,hdc,cdrom", {"vdev": "hdc", "devtype": "cdrom"}),
        ("phy:/dev/a,ioemu:hda,w", {"target": "/dev/a", "vdev": "hda", "access": "rw"}),
        ("vg/a,raw,xvda", {"target": "/dev/vg/a", "vdev": "xvda"}),
        ("/a, qcow2 , xvda", {"target": "/a", "format": "qcow2", "vdev": "xvda"}),
        ("vdev=xvda,target=/a,b=c d", {"vdev": "xvda", "target": "/a,b=c d"}),
    ],
)
def test_disk_strings_of_all_ages(text: str, expected: dict[str, str]) -> None:
    assert read_disk(text).values == expected


def test_vif_strings() -> None:
    assert read_vif("mac=00:16:3e:00:00:01 , bridge=b,type=netfront").values == {
        "mac": "00:16:3e:00:00:01",
        "bridge": "b",
        "type": "vif",
    }
    assert read_vif("netdev=eth0").values == {"gatewaydev": "eth0", "script": "vif-bridge"}
    assert read_vif("").values == {}


def test_xls_defaults_are_written_out() -> None:
    pv = convert(PV, "x", "/").config
    assert pv is not None and (pv.type, pv.memory >> 20) == ("pv", 32)
    hvm = convert('name="a"\nbuilder="hvm"\nmaxmem=64\n', "x", "/").config
    assert hvm is not None and (hvm.type, hvm.memory >> 20, hvm.vnc) == ("hvm", 64, True)


def test_no_key_of_a_real_file_is_lost() -> None:
    made = convert_file(str(FILES[0].parent / "hvm-install.cfg")).config
    assert made is not None
    assert made.to_dict() == {
        "name": "winxp",
        "type": "hvm",
        "memory": 2048,
        "vcpus": 2,
        "boot": "dc",
        "disk": [
            {"target": "/dev/vg/win", "vdev": "hda", "access": "rw"},
            {"target": "/iso/win.iso", "vdev": "hdc", "devtype": "cdrom"},
        ],
        "vif": [{"bridge": "xenbr0", "type": "ioemu", "model": "e1000"}],
        "serial": ["pty"],
        "vnc": True,
        "vnclisten": "0.0.0.0",
        "vncdisplay": 3,
        "vncpasswd": "geheim",
        "vga": "stdvga",
        "videoram": 16,
        "usb": True,
        "usbdevice": ["tablet"],
        "on_crash": "restart",
        "localtime": True,
    }


def test_to_xl_tells_what_xl_has_not() -> None:
    text = (
        "name: a\ntype: pvh\nmemory: 64\nkernel: /k\ncloud_init: {}\nconsole_backend: xtool\n"
        "on_dm_exit: restart\npool: fast\nextratime: true\n"
        "disk: [{vdev: xvda, target: /a, backendtype: xtool, persistent: true, bytes-per-second: 1MiB}]\n"
        "vif: [{network: user, forwards: [tcp:2222:22]}]\n"
    )
    written, notes = to_xl(parse_config(text, "x", "/"))
    told = "\n".join(notes)
    own = ("cloud_init", "console_backend", "on_dm_exit", "persistent", "bytes-per-second")
    for word in (*own, "network", "forwards"):
        assert word in told
    again = convert(written, "x", "/")
    assert again.notes == [] and again.config is not None and len(again.config.disks) == 1
    assert (again.config.pool, again.config.extratime) == ("fast", True)
    shared = "name: a\ntype: pvh\nmemory: 64\nkernel: /k\ndisk: [{vdev: xvda, target: /a, shared: true}]\n"
    assert "shared" in "\n".join(to_xl(parse_config(shared, "x", "/"))[1])


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.cfg"
    file.write_text(PV + 'pci = [ "01:00.0" ]\n')
    assert main(["convert", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "name: a\n" in out and "#   line 3: xl's pci is not supported" in out
    assert err.startswith("line 3: xl's pci is not supported")
    assert main(["convert", "--strict", str(file)]) == 3
    (tmp_path / "a.yaml").write_text(out)
    capsys.readouterr()
    assert main(["convert", "--to", "xl", str(tmp_path / "a.yaml")]) == 0
    assert 'kernel = "/k"' in capsys.readouterr().out
    file.write_text("memory = 5M\n")
    assert main(["convert", str(file)]) == 3


_ATOMS = st.one_of(
    st.text(max_size=10), st.integers(0, 99).map(str), st.sampled_from(["pv", "hvm", "/k,raw,hda"])
)
_NAMES = [
    "name",
    "type",
    "builder",
    "memory",
    "disk",
    "vif",
    "kernel",
    "vnc",
    "cpus",
    "pool",
    "smbios",
    "foo",
]


@RELAXED
@given(st.text(max_size=80))
def test_no_text_escapes_as_another_error(text: str) -> None:
    for whole in (text, PV + text, HVM + "disk = [ '" + text):
        try:
            made = convert(whole, "x", "/")
        except ConfigError as error:
            assert error.line >= 1
        else:
            assert made.config is None or parse_config(made.text) == made.config


@RELAXED
@given(st.dictionaries(st.sampled_from(_NAMES), _ATOMS | st.lists(_ATOMS, max_size=3), max_size=6))
def test_no_values_escape_as_another_error(data: dict[str, object]) -> None:
    # JSON's texts and lists are xl's too, but for its \u.
    text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in data.items())
    try:
        made = convert(text, "x", "/")
    except ConfigError:
        return
    if made.config is not None:
        assert parse_config(made.text, "x", "/") == made.config
        again = convert(to_xl(made.config)[0], "x", "/")
        assert again.config == made.config


_WORD = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
_PATH = _WORD.map(lambda word: f"/srv/{word}")
_LINE = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=40)
_DISK = st.fixed_dictionaries(
    {
        "target": st.builds(
            lambda a, b: f"/{a}{b}".replace("\xa0", ""), _WORD, st.sampled_from(["", ",x", "=y z"])
        )
    },
    optional={
        "access": st.sampled_from(["ro", "rw"]),
        "format": st.sampled_from(["raw", "qcow2", "vhd"]),
        "discard": st.booleans(),
        "trusted": st.just(False),
        "direct-io-safe": st.just(True),
        "backendtype": st.sampled_from(["phy", "qdisk"]),
    },
)
_VIF = st.fixed_dictionaries(
    {},
    optional={
        "bridge": _WORD,
        "mtu": st.integers(68, 9000),
        "script": _WORD,
        "rate": st.sampled_from(["10Mb/s", "1MB/s@20ms"]),
        "trusted": st.just(False),
    },
)
_CONFIG = st.fixed_dictionaries(
    {"name": _WORD, "memory": st.integers(64, 1 << 20), "kernel": _PATH},
    optional={
        "vcpus": st.integers(1, 8),
        "cmdline": _LINE,
        "ramdisk": _PATH,
        "cpus": st.sampled_from(["0-3,^1", ["0"], "all"]),
        "cap": st.integers(0, 100),
        "disk": st.lists(_DISK, max_size=3),
        "vif": st.lists(_VIF, max_size=3),
        "on_crash": st.sampled_from(["preserve", "restart"]),
        "localtime": st.booleans(),
        "rtc_timeoffset": st.integers(-(2**31), 2**31 - 1),
        "max_grant_version": st.integers(1, 2),
        "uuid": st.uuids().map(str),
    },
)


@RELAXED
@given(_CONFIG, st.sampled_from(["pv", "pvh", "hvm"]))
def test_any_domain_survives_xl_cfg(data: dict[str, object], kind: str) -> None:
    disks = data.get("disk", [])
    assert isinstance(disks, list)
    for number, disk in enumerate(disks):
        disk["vdev"] = f"xvd{'abc'[number]}"
    config = parse_config(json.dumps({**data, "type": kind}), "x", "/")
    text, notes = to_xl(config)
    assert notes == []
    again = convert(text, "x", "/")
    assert (again.config, again.notes) == (config, [])
