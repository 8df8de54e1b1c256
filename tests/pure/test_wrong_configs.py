"""The corpus of wrong files: each is refused at the right place, and the page tells what xtool says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import yaml

from xtool.config.fromxl import convert_file
from xtool.config.load import load_all
from xtool.config.problems import problems_of
from xtool.config.schema import domain_schema, schema_text
from xtool.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator
#: What a schema cannot see: relations between values, and what YAML itself refuses.
BEYOND_SCHEMA = frozenset(
    """
    boot-order cap-high cdrom-writable cpus-backwards cpus-garbage cpus-many-entries disk-access disk-format
    disk-no-target disk-no-vdev disk-too-many disk-vdev disk-vdev-twice key-twice maxmem-less maxvcpus-less
    name-number name-slash open-list open-quote ramdisk-alone root-and-cmdline serial-five
    unknown-escape vif-mac vif-mac-multicast vif-mac-twice vif-model-for-pvh vif-mtu vif-rate
    vif-subkey videoram-small vncdisplay-without-vnc vnclisten-garbage vncpasswd-long channel-name
    """.split()  # noqa: SIM905
)


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


wrong = load("wrongconfigs", ROOT / "tests" / "xen" / "wrongconfigs.py")
NAMES = wrong.names()


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOOL_ETC_DIR", str(tmp_path / "etc"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


def test_there_are_enough() -> None:
    assert len(NAMES) >= 60
    assert all((wrong.DATA / f"{name}.cfg").exists() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_refused_once_and_at_its_line(name: str) -> None:
    path = wrong.DATA / f"{name}.yaml"
    with pytest.raises(ConfigError) as caught:
        load_all(path)
    problems = problems_of(caught.value)
    expected = {"many": 4, "usb-for-pv": 2}.get(name, 1)
    assert len(problems) == expected, [p.message for p in problems]
    text = path.read_text().split("\n")
    for problem in problems:
        assert problem.file == str(path)
        assert 2 <= problem.line <= len(text), problem.message
        assert problem.source == text[problem.line - 1]


@pytest.mark.parametrize("name", NAMES)
def test_what_convert_makes_of_xls_twin_is_right_or_refused(name: str) -> None:
    try:
        made = convert_file(str(wrong.DATA / f"{name}.cfg"))
    except ConfigError as error:
        assert error.line >= 1
    else:
        assert made.config is None or yaml.safe_load(made.text)["name"] == made.config.name


def test_the_page_is_what_xtool_says() -> None:
    assert wrong.PAGE.read_text() == wrong.page(wrong.read_answers()), "run scripts/wrong-configs"


def test_xls_answers_are_about_these_files() -> None:
    answers = wrong.read_answers()
    assert answers == {} or sorted(answers) == NAMES


# --- the JSON Schema ------------------------------------------------------------------------------------
def errors_of(document: object) -> list[str]:
    return [error.message for error in VALIDATOR(domain_schema()).iter_errors(document)]


def test_the_schema_is_one_and_is_published() -> None:
    VALIDATOR.check_schema(domain_schema())
    VALIDATOR.check_schema(domain_schema(template=True))
    published = (ROOT / "docs" / "xtool.schema.json").read_text()
    assert published == schema_text(), "run python -m xtool.config.schema docs/xtool.schema.json"
    assert json.loads(published)["$schema"].endswith("2020-12/schema")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_examples_carry_it_and_keep_to_it(path: Path) -> None:
    first, *_ = path.read_text().split("\n")
    assert first == "# yaml-language-server: $schema=../docs/xtool.schema.json"
    assert (path.parent / first.partition("=")[2]).resolve() == ROOT / "docs" / "xtool.schema.json"
    assert errors_of(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_refuses_what_it_can_see(name: str) -> None:
    try:
        document = yaml.safe_load((wrong.DATA / f"{name}.yaml").read_text())
    except yaml.YAMLError:
        assert name in BEYOND_SCHEMA
        return
    assert bool(errors_of(document)) == (name not in BEYOND_SCHEMA)


@pytest.mark.parametrize(
    "text",
    [
        "{name: a, type: pvh, memory: 2GiB, kernel: /k, disk: ['/a,raw,xvda'], vif: [{}, '']}",
        "{name: a, type: hvm, memory: 512M, vnc: 1, usb: yes, usbdevice: [tablet], boot: dc, viridian: true}",
        "{name: 5, type: hvm, memory: '64', viridian: [defaults, '!freq'], smbios: {oem: [a, b]}}",
        "{name: a, extends: base.yaml}",
        "{name: a, type: pv, memory: 64, kernel: k, disk: [{vdev: xvda, target: /a, no-discard: true}]}",
        "{name: a, type: pvh, memory: 64, kernel: k, cloud_init: {user_data: {a: [1]}, vdev: xvdy}}",
    ],
)
def test_the_schema_takes_what_is_right(text: str, tmp_path: Path) -> None:
    document = yaml.safe_load(text)
    assert errors_of(document) == []
    if "extends" not in document and document["name"] != 5:
        path = tmp_path / "a.yaml"
        path.write_text(text)
        load_all(path)


def test_every_key_has_a_description_and_every_choice_its_words() -> None:
    properties = domain_schema()["properties"]
    assert all(schema.get("description") for schema in properties.values())
    actions = ["destroy", "restart", "rename-restart", "preserve", "coredump-destroy", "coredump-restart"]
    assert properties["on_crash"]["enum"] == actions
    assert properties["vcpus"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 512}
    assert "not supported" in properties["pci"]["description"]
