"""The whole model: every key with values of its kind, through text and back; and keys new to the builder."""

from __future__ import annotations

import json
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.config import DomainConfig, parse_config
from xtool.config.hvmwords import ENLIGHTENMENTS, SMBIOS, viridian_mask
from xtool.config.model import FIELDS, about, guests_of
from xtool.config.problems import problems_of
from xtool.config.schema import _known
from xtool.config.xlkeys import UNSUPPORTED
from xtool.devicemodel.argv import build_argv
from xtool.devicemodel.spec import DeviceModelSpec
from xtool.devices.declare import _hvmloader
from xtool.errors import ConfigError, UsageError
from xtool.toolstack.host import HostFacts
from xtool.toolstack.plan import DomainPlan, plan

RELAXED = settings(deadline=None)
UUID_ONE = UUID(int=1)
FACTS = HostFacts(
    xen_version="4.17.0",
    pv=True,
    hvm=True,
    hap=True,
    grant_v2=True,
    cpus=4,
    hvmloader="/loader",
    firmware={"seabios": "/bios", "ovmf": None},
)
_WORD = st.from_regex(r"[a-z][a-z0-9]{0,6}", fullmatch=True)
_TEXT = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=20).filter(str.strip)
_GROUPS = ["defaults", "all", "!freq", *ENLIGHTENMENTS]
_DISK = st.builds(lambda n: f"/{n},raw,xvd{n}", st.sampled_from("abcd"))
_ODD = st.sampled_from(["on", "1", "0x1", "1e3", "~", "2020-01-01"])
_SPECIAL: dict[str, st.SearchStrategy[object]] = {
    "name": _WORD,
    "type": st.nothing(),
    "memory": st.integers(64, 4096),
    "cpus": st.sampled_from(["0-3", ["0"], "nodes:0"]),
    "boot": st.sampled_from(["c", "dc", "ncd"]),
    "vnclisten": st.sampled_from(["127.0.0.1", "0.0.0.0:3", "[::1]:2"]),
    "vncpasswd": _WORD,
    "viridian": st.booleans()
    | st.lists(st.sampled_from(["defaults", "all", "!freq", *ENLIGHTENMENTS]), max_size=4),
    "smbios": st.dictionaries(st.sampled_from(SMBIOS), _TEXT, max_size=3),
    "disk": st.lists(
        st.builds(lambda n: f"/{n},raw,xvd{n}", st.sampled_from("abcd")), max_size=2, unique=True
    ),
    "vif": st.lists(st.sampled_from(["", "bridge=b", "mtu=1400,untrusted"]), max_size=2),
    "channel": st.lists(st.builds(lambda n: {"name": n}, _WORD), max_size=2),
    "cloud_init": st.fixed_dictionaries(
        {},
        optional={
            "user_data": st.dictionaries(_WORD, st.integers() | st.booleans() | _TEXT | st.none(), max_size=3)
            | st.builds(lambda text: f"#!/bin/sh\n{text}\n", _TEXT),
            "meta_data": st.dictionaries(_WORD, _TEXT, max_size=2),
            "network_config": st.just({"version": 2}),
            "vdev": st.sampled_from(["xvdy", "hdc"]),
        },
    ),
    "uuid": st.uuids().map(str),
    "usbdevice": st.sampled_from(["tablet", ["mouse"]]),
}


def value_of(key: str) -> st.SearchStrategy[object]:
    if key in _SPECIAL:
        return _SPECIAL[key]
    kind, known = about(key, "kind"), _known(FIELDS[key])
    if "choices" in known:
        return st.sampled_from(known["choices"])
    if kind == "switch":
        return st.booleans() | st.sampled_from([0, 1])
    if kind in ("number", "seconds", "size"):
        low, high = known["bounds"]
        unit = 1 << 20 if kind == "size" else 1
        return st.integers(low // unit, min(high // unit, 4096))
    if kind in ("text or list", "list"):
        return _WORD | st.lists(_TEXT, max_size=3)
    return _WORD.map(lambda word: f"/{word}") if kind.endswith("path") else _TEXT


@st.composite
def documents(draw: st.DrawFn) -> dict[str, object]:
    guest = draw(st.sampled_from(["pv", "pvh", "hvm"]))
    keys = [key for key in FIELDS if guest in guests_of(key) and key != "type"]
    chosen = {"name", "memory", *draw(st.lists(st.sampled_from(keys), max_size=8))}
    if guest != "hvm":
        chosen.add("kernel")
    return {"type": guest, **{key: draw(value_of(key)) for key in FIELDS if key in chosen}}


@settings(deadline=None, max_examples=400)
@given(documents())
def test_load_dump_load_is_the_identity(document: dict[str, object]) -> None:
    text = json.dumps(document)
    try:
        config = parse_config(text, "x.yaml", "/")
    except ConfigError as error:
        # Only what two keys do to each other can be wrong, and it is told with a place.
        assert all(problem.line == 1 and problem.column >= 1 for problem in problems_of(error))
        return
    assert parse_config(config.to_yaml(), "y.yaml", "/") == config
    assert parse_config(json.dumps(config.to_dict()), "z.yaml", "/") == config


@RELAXED
@given(
    st.recursive(
        st.integers()
        | st.booleans()
        | st.none()
        | _TEXT
        | st.sampled_from(["on", "1", "0x1", "1e3", "~", "2020-01-01"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
        max_leaves=8,
    )
)
def test_user_data_means_what_was_written(value: object) -> None:
    """What cloud-init's YAML reader makes of the seed is what it would make of the domain file."""
    import yaml

    data = {"k": value}
    text = yaml.safe_dump(
        {"name": "a", "type": "pvh", "memory": 64, "kernel": "k", "cloud_init": {"user_data": data}}
    )
    config = parse_config(text, "x", "/")
    assert config.cloud_init is not None
    assert yaml.safe_load(config.cloud_init.user_data) == data


def test_every_known_key_of_xl_is_taken_or_refused_with_a_reason() -> None:
    assert not set(UNSUPPORTED) & set(FIELDS)
    assert all(reason and not reason.endswith(".") for reason in UNSUPPORTED.values())
    for key in UNSUPPORTED:
        with pytest.raises(ConfigError) as caught:
            parse_config(f"name: a\ntype: pvh\nmemory: 64\nkernel: k\n{key}: 1\n", "x", "/")
        assert caught.value.message == f"xl's {key} is not supported by xtool: {UNSUPPORTED[key]}"


# --- keys that reach the builder and the device model -----------------------------------------------------
def planned(text: str, kind: str = "hvm") -> DomainPlan:
    kernel = "" if kind == "hvm" else "kernel: /k\n"
    config = parse_config(f"name: a\ntype: {kind}\nmemory: 4096\n{kernel}{text}", "x", "/")
    return plan(config, FACTS, UUID_ONE)


def test_enlightenments_become_their_mask() -> None:
    # base, and freq's bit clear: public/hvm/params.h has HVMPV_base_freq as bit 0, HVMPV_no_freq as bit 1.
    assert planned("viridian: [base, freq]").build.viridian == 0b1
    assert planned("viridian: [base]").build.viridian == 0b11
    assert planned("viridian: true").build.viridian == 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 11 | 1 << 12
    assert planned("viridian: [defaults, synic, '!crash_ctl']").build.viridian >> 6 & 3 == 0b10
    assert planned("viridian: false").build.viridian == viridian_mask(()) == 0
    for wrong in ("[synic]", "[all, '!base']", "[nope]", "maybe"):
        with pytest.raises(ConfigError):
            planned(f"viridian: {wrong}")


def test_what_hvmloader_reads() -> None:
    made = planned("smbios: {oem: [a, b], system_serial_number: 4}\nacpi_s3: 0\nmmio_hole: 1024\n")
    assert made.hvm is not None
    nodes = dict(_hvmloader(made.hvm))
    assert nodes["bios-strings/oem-1"] == "a" and nodes["bios-strings/oem-2"] == "b"
    assert nodes["bios-strings/system-serial-number"] == "4"
    assert (nodes["platform/acpi_s3"], nodes["platform/acpi_s4"]) == ("0", "1")
    assert nodes["platform/mmio_hole_size"] == str(1 << 30)
    low, high = map(int, nodes["platform/generation-id"].split(":"))
    assert 0 < low < 1 << 64 and 0 < high < 1 << 64
    other = planned("ms_vm_genid: none").hvm
    assert other is not None and "platform/generation-id" not in dict(_hvmloader(other))
    assert isinstance(made.devicemodel, DeviceModelSpec)
    assert made.devicemodel.max_ram_below_4g == 3 << 30 and made.build.mmio_hole == 1 << 30


def test_the_hole_is_where_ram_is_not() -> None:
    from xtool.builder.hvmlayout import plan_hvm

    layout = plan_hvm(("k", 1 << 20, 2 << 20), None, 4096, 4 << 30, device_model=True, mmio_hole=1 << 30)
    assert (layout.low_end, layout.high_end) == (3 << 30, 5 << 30)


def test_usb_controllers_and_timers() -> None:
    for version, device in ((2, "usb-ehci,id=usb"), (3, "nec-usb-xhci,id=usb")):
        spec = planned(f"usb: true\nusbversion: {version}\n").devicemodel
        assert isinstance(spec, DeviceModelSpec)
        argv = build_argv(spec, 1, "qemu", 3)
        assert device in argv and "-usb" not in argv
    spec = planned("usb: true\nusbversion: 1\n").devicemodel
    assert isinstance(spec, DeviceModelSpec) and "-usb" in build_argv(spec, 1, "qemu", 3)
    assert planned("timer_mode: one_missed_tick_pending", "pvh").build.timer_mode == 3
    assert planned("", "pvh").build.timer_mode == 1
    assert planned("max_grant_version: 1", "pv").build.grant_version == 1
    assert planned("", "pv").build.grant_version == 2


def test_arguments_for_the_qemu_that_serves_disks() -> None:
    from xtool.devicemodel.qdisk import QdiskSpec, build_qdisk_argv

    text = "device_model_args_pv: [-trace, x]\ndisk: ['/a,qcow2,xvda,w,backendtype=qdisk']\n"
    config = parse_config(f"name: a\ntype: pv\nmemory: 64\nkernel: /k\n{text}", "x", "/")
    from dataclasses import replace

    from xtool.devices.backendkinds import TargetFacts

    made = plan(config, replace(FACTS, targets={"/a": TargetFacts("file")}), UUID_ONE)
    assert isinstance(made.devicemodel, QdiskSpec)
    assert build_qdisk_argv(made.devicemodel, 1, "qemu", 3)[-2:] == ["-trace", "x"]
    with pytest.raises(UsageError, match="device_model_args_pv has no effect"):
        planned("device_model_args_pv: [-x]", "pv")


def test_the_model_is_frozen() -> None:
    config = parse_config("name: a\ntype: pvh\nmemory: 64\nkernel: k\n")
    with pytest.raises(ValueError):
        config.memory = 1  # type: ignore[misc]
    assert isinstance(config, DomainConfig)
