"""cloud-init seeds on the host in memory: what is on them, and that they come and go with their domains."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from uuid import uuid4

import pycdlib
import pytest
import yaml

from xtool import paths
from xtool.abi.hvm import HVM_PARAM_TIMER_MODE
from xtool.builder.build import BUILDERS
from xtool.config import DomainConfig, parse_config
from xtool.errors import HostError, UsageError
from xtool.toolstack import journal, seed
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.create import create
from xtool.toolstack.destroy import destroy, recover
from xtool.toolstack.host import Host
from xtool.toolstack.lifecycle import settle
from xtool.toolstack.names import find
from xtool.toolstack.plan import plan

Config = Callable[..., DomainConfig]
RUN = CreateOptions()
SECRET = "hunter2secret"
CLOUD = (
    "{user_data: {password: " + SECRET + ", runcmd: [[touch, /tmp/x]], n: 1, s: '1'}, "
    "meta_data: {local-hostname: other}, network_config: {version: 2}}"
)


def read(path: Path) -> dict[str, bytes]:
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    label = iso.pvd.volume_identifier.decode().strip()
    found = {"label": label.encode()}
    for child in iso.list_children(joliet_path="/"):
        name = child.file_identifier().decode("utf-16-be")
        if child.is_file():
            out = BytesIO()
            iso.get_file_from_iso_fp(out, joliet_path=f"/{name}")
            found[name] = out.getvalue()
    iso.close()
    return found


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_the_seed_has_what_the_file_says_and_goes_with_the_domain(
    host: Host, config: Config, kind: str
) -> None:
    result = create(host, config(kind, cloud_init=CLOUD), RUN)
    path = paths.seed_file(result.uuid)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    found = read(path)
    assert found["label"] == b"cidata"
    assert found["user-data"].startswith(b"#cloud-config\n")
    assert yaml.safe_load(found["user-data"]) == {
        "password": SECRET,
        "runcmd": [["touch", "/tmp/x"]],
        "n": 1,
        "s": "1",
    }
    assert yaml.safe_load(found["meta-data"]) == {"instance-id": result.uuid, "local-hostname": "other"}
    assert yaml.safe_load(found["network-config"]) == {"version": 2}
    # The guest sees one read-only disk more.
    folder = f"/local/domain/{result.domid}/device/vbd"
    (devid,) = host.store.list(folder)
    backend = host.store.read_text(f"{folder}/{devid}/backend")
    assert host.store.read_text(f"{backend}/mode") == "r"
    assert host.store.read_text(f"{backend}/dev") == "xvdz"
    # A restart makes it from the configuration: the drive is not one of its disks.
    entry = journal.read(result.uuid)
    assert entry is not None and entry.config is not None and "disk" not in entry.config
    destroy(host, find(host, "test"))
    assert not path.exists() and list(path.parent.iterdir()) == []


def test_rock_ridge_and_joliet_names_are_clouds_init(tmp_path: Path) -> None:
    made = seed.Seed("", "xvdz", {"user-data": b"#!/bin/sh\n", "meta-data": b"{}\n"})
    path = tmp_path / "seed.iso"
    path.write_bytes(seed.image(made))
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    names = {iso.full_path_from_dirrecord(c, rockridge=True) for c in iso.list_children(rr_path="/")}
    assert {"/user-data", "/meta-data"} <= names
    iso.close()


@pytest.mark.parametrize("stage", ["memory", "seal"])
def test_a_create_that_fails_leaves_no_seed(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(_: object) -> None:
        assert list((paths.run_dir() / "seeds").iterdir())  # it was there
        raise RuntimeError("injected")

    monkeypatch.setattr(BUILDERS["pvh"], stage, fail)
    with pytest.raises(RuntimeError, match="injected"):
        create(host, config("pvh", cloud_init=CLOUD), RUN)
    assert list((paths.run_dir() / "seeds").iterdir()) == []


def test_what_a_killed_create_left_is_found(host: Host, config: Config) -> None:
    result = create(host, config("pvh", cloud_init=CLOUD), RUN)
    path = paths.seed_file(result.uuid)
    path.with_name(path.name + ".new").write_bytes(b"half")
    journal.update(result.uuid, state="creating")
    recover(host)
    assert list(path.parent.iterdir()) == []
    assert journal.entries() == []


def test_no_room_for_a_seed_is_an_error_that_leaves_nothing(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seed, "image", full)
    with pytest.raises(HostError, match="No space left"):
        create(host, config("pvh", cloud_init=CLOUD), RUN)
    assert journal.entries() == [] and list((paths.run_dir() / "seeds").iterdir()) == []


def test_secrets_are_in_no_repr(host: Host, config: Config) -> None:
    wanted = config("pvh", cloud_init=CLOUD)
    made = plan(wanted, host.facts(wanted), uuid4())
    assert SECRET not in repr(wanted) + repr(made)
    assert made.seed is not None and SECRET.encode() in made.seed.files["user-data"]


def hvm(text: str) -> DomainConfig:
    return parse_config(f"name: w\ntype: hvm\nmemory: 64\ncloud_init: {{}}\n{text}", "w.yaml", "/")


@pytest.mark.parametrize(
    ("disks", "vdev"),
    [
        ("", "hdd"),
        ("disk: ['/c,raw,hdd,cdrom']", "hdc"),
        ("disk: ['/c,raw,xvdd']", "hdc"),
        ("disk: ['/a,raw,hda', '/b,raw,hdb', '/c,raw,hdc', '/d,raw,hdd']\nhdtype: ahci", "xvdf"),
        ("disk: ['/a,raw,hda', '/b,raw,hdd,cdrom']\nhdtype: ahci", "hdc"),
    ],
)
def test_an_hvm_guests_seed_is_a_cd_on_a_free_place(disks: str, vdev: str) -> None:
    config, made = seed.with_seed(hvm(disks), uuid4())
    assert made is not None and made.vdev == vdev
    assert config.disks[-1].cdrom and config.disks[-1].vdev == vdev


def test_no_place_is_told() -> None:
    full = hvm("disk: ['/a,raw,hda', '/b,raw,hdb', '/c,raw,hdc', '/d,raw,hdd']")
    with pytest.raises(UsageError, match="no drive is left"):
        seed.with_seed(full, uuid4())


def test_an_hvm_guest_finds_it_in_its_device_model(host: Host) -> None:
    config = hvm("firmware: /bios\n")
    made = plan(config, host.facts(config), uuid4())
    (disk,) = made.devicemodel.disks  # type: ignore[union-attr]
    assert disk.cdrom and made.seed is not None and disk.path == made.seed.path


def test_timer_mode_and_grant_version_reach_the_hypervisor(host: Host, config: Config) -> None:
    """Two other keys that end as one argument of a hypercall each."""
    wanted = config("pvh", timer_mode="one_missed_tick_pending", max_grant_version=1)
    domid = create(host, wanted, RUN).domid
    domain = host.hv.all[domid]  # type: ignore[attr-defined]
    assert domain.params[HVM_PARAM_TIMER_MODE] == 3 and domain.spec.grant_version == 1


def test_a_restart_makes_the_seed_again(host: Host, config: Config) -> None:
    result = create(host, config("pvh", cloud_init=CLOUD, on_reboot="restart"), RUN)
    path = paths.seed_file(result.uuid)
    first = read(path)
    host.hv.shutdown_domain(result.domid, 1)  # SHUTDOWN_reboot
    done = settle(host, result.domid, result.uuid)
    assert done is not None and done.action == "restarted"
    assert read(path) == first
    destroy(host, find(host, "test"))
    assert not path.exists()
