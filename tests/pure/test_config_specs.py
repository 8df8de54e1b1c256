"""xl's spec strings and CPU lists."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from xtool.config.cpus import parse_cpu_list, resolve_cpus
from xtool.config.devices import DiskConfig, VifConfig, parse_rate
from xtool.config.specs import SpecError, parse_disk_spec, parse_vif_spec
from xtool.config.vdev import vdev_number

RELAXED = settings(deadline=None)  # a busy machine is no failure


def disk(text: str) -> DiskConfig:
    return DiskConfig.model_validate({item.key: item.value for item in parse_disk_spec(text)})


def vif(text: str) -> VifConfig:
    return VifConfig.model_validate({item.key: item.value for item in parse_vif_spec(text)})


def test_the_forms_the_manual_calls_equal_are_equal() -> None:
    first = disk("/dev/vg/guest-volume,,hda")
    assert first == disk("/dev/vg/guest-volume,raw,hda")
    assert disk("/dev/vg/guest-volume,raw,hda,rw") == disk(
        "format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume"
    )
    assert disk("/root/image.iso,,hdc,cdrom") == disk("/root/image.iso,,hdc,,cdrom")
    assert disk("/root/image.iso,,hdc,cdrom") == disk("/root/image.iso,raw,hdc,devtype=cdrom")


def test_target_takes_the_rest() -> None:
    assert disk("vdev=xvda,target=/a,b=c,d ").target == "/a,b=c,d "
    assert disk(",raw,xvda,rw,target=/x").target == "/x"


def test_flags() -> None:
    given_all = disk("/a,raw,xvda,direct-io-safe,no-discard,untrusted")
    assert (given_all.direct_io_safe, given_all.discard, given_all.trusted) == (True, False, False)


@pytest.mark.parametrize(
    ("text", "offset", "message"),
    [
        ("phy:/dev/sda,hda,w", 0, "the prefix phy: is deprecated"),
        ("qcow2:/a,hda,w", 0, "the prefix qcow2: is deprecated"),
        ("wat:/a,hda,w", 0, "the prefix wat: is deprecated"),
        ("nbd:/a,hda,w", 0, "the prefix nbd: is deprecated"),
        ("/a,raw,hdc:cdrom", 7, ":cdrom after a vdev"),
        ("/a,raw,hda,rw,more", 14, "too many positional"),
        ("/a,raw,hda,vdev=hdb", 11 + 5, "vdev is given twice"),
        ("/a,raw,hda,fromat=raw", 11, "fromat is not a sub-key"),
        ("/a,raw,hda,colo", 11, "xl's colo is not supported"),
        ("/a,target=/b", 3 + 7, "target is given twice"),
        ("/a,raw,hda,cdrom,devtype=disk", 17 + 8, "devtype is given twice"),
    ],
)
def test_disk_refusals(text: str, offset: int, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_disk_spec(text)
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("text", "size", "ops"),
    [
        ("bytes-per-second=20MiB,ops-per-second=500", 20 << 20, 500),
        ("bytes-per-second=512K", 512 << 10, None),
        ("bytes-per-second=65536", 65536, None),
        ("bytes-per-second=1TiB,ops-per-second=1", 1 << 40, 1),
        ("bytes-per-second=0,ops-per-second=0", None, None),
        ("bytes-per-second=none,ops-per-second=none", None, None),
    ],
)
def test_limits_of_a_disk(text: str, size: int | None, ops: int | None) -> None:
    found = disk(f"/a,raw,xvda,{text}")
    assert (found.bytes_per_second, found.ops_per_second) == (size, ops)
    assert disk(found.to_spec()) == found
    assert DiskConfig.model_validate(found.to_dict()) == found
    assert bool(found.only_xtool) == bool(size or ops)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bytes-per-second=20", "out of range"),
        ("bytes-per-second=2TiB", "out of range"),
        ("bytes-per-second=20MB", "is not a number of bytes"),
        ("bytes-per-second=-1", "is not a number of bytes"),
        ("bytes-per-second=fast", "is not a number of bytes"),
        ("ops-per-second=-1", "out of range"),
        ("ops-per-second=1.5", "a number is wanted"),
        ("ops-per-second=5,backendtype=phy", "ops-per-second has no effect for backendtype: phy"),
        ("bytes-per-second=1MiB,backendtype=qdisk", "bytes-per-second has no effect for backendtype: qdisk"),
        ("persistent=1,backendtype=phy", "persistent has no effect"),
    ],
)
def test_limits_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        disk(f"/a,raw,xvda,{text}")


def test_switches_in_a_spec_string() -> None:
    for more in ("shared=1", "persistent=1,backendtype=xtool", "direct-io-safe,no-discard,untrusted"):
        found = disk(f"/a,raw,xvda,{more}")
        assert disk(found.to_spec()) == found


def test_vif_examples_of_the_manual() -> None:
    card = vif("mac=00:16:3E:74:3d:76,model=rtl8139,bridge=xenbr0")
    assert (card.mac, card.model, card.bridge) == ("00:16:3e:74:3d:76", "rtl8139", "xenbr0")
    assert vif("") == VifConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mac=00:16:3e:00:00", "is not a MAC address"),
        ("mac=01:16:3e:00:00:00", "multicast"),
        ("mtu=10", "out of range"),
        ("rate=10", "is not a rate"),
        ("type=vif,model=e1000", "model has no effect"),
    ],
)
def test_vif_values(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        vif(text)


@pytest.mark.parametrize("text", ["bridg=x", "netdev=eth0", "xenbr0", "mac=a,mac=b", "colo_ft=1"])
def test_vif_refusals(text: str) -> None:
    with pytest.raises(SpecError):
        parse_vif_spec(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10Mb/s", (1_250_000, 50_000)),
        ("250KB/s", (250_000, 50_000)),
        ("1MB/s@20ms", (1_000_000, 20_000)),
        ("8b/s@1s", (1, 1_000_000)),
        ("1GB/s@7us", (10**9, 7)),
        ("0MB/s", None),
        ("1MB", None),
        ("1MB/s@", None),
        ("9999999999GB/s", None),
    ],
)
def test_rates(text: str, rate: tuple[int, int] | None) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("vdev", "number"),
    [
        ("xvda", 51712),
        ("xvda1", 51713),
        ("xvdp15", 51967),
        ("xvdq", 1 << 28 | 16 << 8),
        ("xvdtq37", 1 << 28 | 536 << 8 | 37),
        ("d0", 51712),
        ("d1p2", 51730),
        ("d536p37", 1 << 28 | 536 << 8 | 37),
        ("hda", 768),
        ("hdb", 832),
        ("hdc", 5632),
        ("hdc2", 5634),
        ("sda", 2048),
        ("sdb3", 2067),
        ("51712", 51712),
        ("hde", None),
        ("hda64", None),
        ("sdq", None),
        ("xvd", None),
        ("xvda256", None),
        ("vda", None),
        ("", None),
        ("xvda ", None),
    ],
)
def test_vdev_numbers(vdev: str, number: int | None) -> None:
    assert vdev_number(vdev) == number


_word = st.text(
    st.characters(codec="ascii", exclude_categories=("C",), exclude_characters=","), min_size=1
).filter(lambda text: text == text.strip())
_path = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=20).map(
    lambda text: "/" + text.replace("/", "_")
)


@RELAXED
@given(
    st.fixed_dictionaries(
        {
            "vdev": st.sampled_from(["xvda", "hdc2", "sdb", "d5p1"]),
            "target": _path.filter(lambda p: p not in ("/.", "/..")),
        },
        optional={
            "format": st.sampled_from(["raw", "qcow2", "vhd"]),
            "access": st.sampled_from(["rw", "ro"]),
            "backend": _word,
            "script": _word,
            "direct-io-safe": st.booleans(),
            "discard": st.booleans(),
            "trusted": st.booleans(),
        },
    )
)
def test_a_disk_survives_its_spec_string(data: dict[str, object]) -> None:
    config = DiskConfig.model_validate(data)
    assert disk(config.to_spec()) == config


@RELAXED
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "mac": st.just("00:16:3e:00:00:01"),
            "bridge": _word,
            "ip": _word,
            "script": _word,
            "vifname": _word,
            "rate": st.just("1MB/s@20ms"),
            "devid": st.integers(0, 65535),
            "mtu": st.integers(68, 65535),
            "trusted": st.booleans(),
        },
    )
)
def test_a_vif_survives_its_spec_string(data: dict[str, object]) -> None:
    config = VifConfig.model_validate(data)
    assert vif(config.to_spec()) == config


@RELAXED
@given(st.text(max_size=40))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    for parse in (parse_disk_spec, parse_vif_spec):
        try:
            for item in parse(text):
                assert item.value
        except SpecError as error:
            assert 0 <= error.offset <= len(text)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("all", {0, 1, 2, 3}),
        ("0-2", {0, 1, 2}),
        ("0-3,^1", {0, 2, 3}),
        ("^1,0-3", {0, 1, 2, 3}),
        ("nodes:1", {2, 3}),
        ("nodes:0-1,^node:0", {2, 3}),
        ("nodes:all,^3", {0, 1, 2}),
        ("2", {2}),
        ("7", set()),
        ("0, 3", {0, 3}),
    ],
)
def test_cpu_lists(text: str, cpus: set[int]) -> None:
    assert resolve_cpus(text, range(4), {0: [0, 1], 1: [2, 3]}) == cpus


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "-1", "3-1", "^all", "nodes:", "0,,1", "99999", "^", "0-3,^^1"]
)
def test_what_is_no_cpu_list(text: str) -> None:
    assert parse_cpu_list(text) is None


@RELAXED
@given(st.text(st.sampled_from(list("0123456789-,^nodesal: ")), max_size=20))
def test_any_text_is_a_cpu_list_or_not(text: str) -> None:
    terms = parse_cpu_list(text)
    assert terms is None or all(term.first <= term.last for term in terms)


def test_a_network_of_its_own() -> None:
    """xtool's own sub-keys; forwards listen on the loopback address unless another one is given."""
    user = vif("network=user,forwards=2222:22 udp:0.0.0.0:53 tcp:[::1]:80:8080,rate-in=1MB/s")
    assert user.forwards == "tcp:127.0.0.1:2222:22 udp:0.0.0.0:53:53 tcp:[::1]:80:8080"
    assert vif(user.to_spec()) == user == VifConfig.model_validate(user.to_dict())
    assert (
        VifConfig.model_validate({"network": "user", "forwards": ["tcp:22"]}).forwards
        == "tcp:127.0.0.1:22:22"
    )
    for wrong in (
        "network=user,bridge=b",
        "network=user,backendtype=vif",
        "forwards=tcp:22",
        "network=user,forwards=tcp:0:22",
        "network=user,forwards=sctp:22",
        "network=user,forwards=tcp:1.2.3:1:2",
        "queues=2",
        "rate-in=1MB/s",
    ):
        with pytest.raises(ValidationError):
            vif(wrong)
