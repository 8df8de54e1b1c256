"""The cloud-init seed of a domain: planned as one more drive, made when the domain is, gone with it.

Facts: NoCloud looks for a file system labelled ``cidata``; ISO 9660 names are short and in capitals, so the
real names are in the Rock Ridge and Joliet extensions, of which Linux takes the first. Linux leaves emulated
CD drives alone when it gives up an HVM guest's emulated disks, so there the seed is a CD.

The image lies in ``/run/xtool/seeds``, readable for root only: it holds what the user-data does, secrets
too. ``journal.remove`` takes it away, and so does everything that forgets a domain.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any
from uuid import UUID

from xtool import paths
from xtool.config.vdev import vdev_number
from xtool.devicemodel.spec import emulated_place
from xtool.errors import HostError, UsageError

if TYPE_CHECKING:
    from xtool.config import DomainConfig

LABEL = "cidata"
_ISO_NAMES = {"user-data": "USERDATA", "meta-data": "METADATA", "network-config": "NETWORK"}


@dataclass(frozen=True)
class Seed:
    """What is to be on it: file name -> content. ``path`` is where the image will be."""

    path: str
    vdev: str
    files: dict[str, bytes] = field(repr=False)


def with_seed(config: DomainConfig, uuid: UUID) -> tuple[DomainConfig, Seed | None]:
    """The configuration with the seed's drive among its disks, and the seed. Pure.

    Raises ``UsageError`` when there is no place for the drive.
    """
    wanted = config.cloud_init
    if wanted is None:
        return config, None
    from xtool.config.devices import DiskConfig

    vdev = wanted.vdev or _free_vdev(config)
    path = str(paths.seed_file(str(uuid)))
    cdrom = config.type == "hvm" and (vdev.startswith("hd") or not wanted.vdev)
    drive = {"vdev": vdev, "target": path, "devtype": "cdrom" if cdrom else "disk", "access": "ro"}
    disk = DiskConfig.model_validate(drive)
    files = {"user-data": wanted.user_data.encode(), "meta-data": _meta_data(config, uuid)}
    if wanted.network_config is not None:
        files["network-config"] = wanted.network_config.encode()
    return config.model_copy(update={"disks": (*config.disks, disk)}), Seed(path, vdev, files)


def _free_vdev(config: DomainConfig) -> str:
    if config.type == "hvm":
        candidates = ["hdd", "hdc", "hdb", "hda", "xvdf", "xvde"]  # the last two: AHCI has six places
        taken = {None, *(emulated_place(disk.vdev, config.hdtype) for disk in config.disks)}
        free = [vdev for vdev in candidates if emulated_place(vdev, config.hdtype) not in taken]
    else:
        numbers = {disk.number for disk in config.disks}
        candidates = [f"xvd{letter}" for letter in "zyxwvutsrqponmlkjihgfedcba"]
        free = [vdev for vdev in candidates if vdev_number(vdev) not in numbers]
    if not free:
        raise UsageError("cloud_init: no drive is left for the seed", hint="say where: vdev under cloud_init")
    return free[0]


def _meta_data(config: DomainConfig, uuid: UUID) -> bytes:
    import yaml

    given: Any = yaml.safe_load(config.cloud_init.meta_data) if config.cloud_init else None
    whole = {"instance-id": str(uuid), "local-hostname": config.name, **(given or {})}
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True).encode()


def image(seed: Seed) -> bytes:
    """The file system."""
    import pycdlib

    iso = pycdlib.PyCdlib()
    iso.new(vol_ident=LABEL, rock_ridge="1.09", joliet=3)
    for name, content in seed.files.items():
        iso.add_fp(
            BytesIO(content), len(content), f"/{_ISO_NAMES[name]}.;1", rr_name=name, joliet_path=f"/{name}"
        )
    out = BytesIO()
    iso.write_fp(out)
    iso.close()
    return out.getvalue()


def write_seed(seed: Seed, undo: ExitStack) -> None:
    """Make the image, whole or not at all. Raises ``HostError``."""
    temporary = f"{seed.path}.new"
    undo.callback(_unlink, seed.path)
    undo.callback(_unlink, temporary)
    try:
        os.makedirs(os.path.dirname(seed.path), mode=0o700, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(image(seed))
        os.replace(temporary, seed.path)
    except OSError as error:
        raise HostError(
            f"cannot write the cloud-init seed {seed.path}: {error.strerror}",
            hint=f"xtool keeps its state in {paths.run_dir()}: make room there, or set XTOOL_RUN_DIR",
        ) from error


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
