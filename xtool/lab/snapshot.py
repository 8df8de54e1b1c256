"""Saved labs: a machine at rest after its boot, shared by all labs of the same settings.

Facts: QEMU's migration stream into a file holds memory and devices but no disk; a machine that was
stopped before it was saved stays stopped when restored; after a finished migration the source can go on
(``cont``). Only one QEMU version is sure to read its own stream, so the version is in the key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from xtool.lab.image import cache
from xtool.lab.qmp import Qmp
from xtool.lab.spec import LabSpec, Paths, qemu_argv
from xtool.lab.steps import run


def key(image: Path, spec: LabSpec) -> str:
    """Names the snapshots that a lab of these settings can start from."""
    version = run(["qemu-system-x86_64", "--version"], "asking QEMU's version").splitlines()[0]
    host = ""
    if spec.accel == "kvm":
        host = next(
            (ln for ln in Path("/proc/cpuinfo").read_text().splitlines() if ln.startswith("model name")), ""
        )
    nowhere = Paths(*[Path("/")] * 5)  # all of the command line but its paths and port counts
    text = json.dumps([image.name, version, host, qemu_argv(spec, nowhere, 0, None)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _folder() -> Path:
    return cache() / "snapshots"


def latest(name: str) -> Path | None:
    """The newest snapshot under a key, or None."""
    folder = _folder() / name
    whole = sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    return whole[-1] if whole else None


def tree(snapshot: Path) -> dict[str, str]:
    """Which xtool tree the snapshot holds (path -> content hash)."""
    found: dict[str, str] = json.loads((snapshot / "tree.json").read_text())
    return found


def save(name: str, qmp: Qmp, disk: Path, image: Path, held: dict[str, str]) -> Path:
    """Save the stopped machine behind ``qmp``, whose root disk is ``disk``, under a key."""
    final = _folder() / name / f"{time.time_ns():020d}"
    temporary = final.parent / f".{final.name}"
    temporary.mkdir(parents=True)
    try:
        qmp.save_state(temporary / "state")
        # The finished migration has flushed the disk and let go of it. Based on the image again, the copy
        # depends on no older snapshot.
        run(
            [
                *("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "qcow2"),
                *("-B", image / "root.img", "-F", "raw", disk, temporary / "disk.qcow2"),
            ],
            "copying the lab's disk",
        )
        (temporary / "tree.json").write_text(json.dumps(held))
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune(used: set[str]) -> None:
    """Remove snapshots that are not the newest of their key and that no lab (ids in ``used``) stands on."""
    for folder in _folder().iterdir() if _folder().is_dir() else ():
        for old in sorted(folder.iterdir())[:-1]:
            if old.name not in used and not old.name.startswith("."):
                shutil.rmtree(old, ignore_errors=True)


def drop(name: str) -> None:
    """Forget every snapshot under a key."""
    shutil.rmtree(_folder() / name, ignore_errors=True)
