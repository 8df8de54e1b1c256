"""One lab: its files, its QEMU, its snapshot.

A lab's folder (``$XDG_STATE_HOME/xtool/labs/NAME``)::

    lock            held while the lab is started, stopped or synced
    lab.json        the record of a started QEMU: pid, port, settings, what xtool tree it holds
    disk.qcow2      this start's changes to the root disk, thrown away by the next start
    console.log     the serial console: Xen and dom0
    qemu.log        what QEMU itself said

A snapshot (``$XDG_CACHE_HOME/xtool/lab/snapshots/KEY/ID``) is a machine's state at rest after boot and
sync: ``state`` (QEMU's migration stream), ``disk.qcow2`` (on the image) and ``tree.json``. It is never
written again, so a crashed lab harms nothing, and every lab of the same settings starts from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xtool import paths
from xtool.errors import LabError, UsageError
from xtool.lab import snapshot, warmup
from xtool.lab import sync as trees
from xtool.lab.image import ensure_image
from xtool.lab.processes import end_process, free_port, process_start_ticks, spawn
from xtool.lab.qmp import Qmp
from xtool.lab.spec import LabSpec, Paths, qemu_argv
from xtool.lab.ssh import SshTarget
from xtool.lab.steps import locked, require_space, run
from xtool.progress import SILENT, Progress

DEFAULT_NAME = "default"
_SPACE_NEEDED = 2 << 30
#: A sync of more than this after a restore is worth a new snapshot.
_RESNAPSHOT_BYTES = 4 << 20


@dataclass
class Record:
    """lab.json. ``start_ticks`` tells our QEMU from a later process with the same pid."""

    pid: int
    start_ticks: int
    port: int
    instance: str
    image: str
    snapshot: str | None
    spec: dict[str, Any]
    started: float
    ready: bool = False
    tree: trees.Record = field(default_factory=dict)


def labs_folder() -> Path:
    return paths.state_dir() / "labs"


def lab_names() -> list[str]:
    """Names of the labs that exist here, started or not."""
    folder = labs_folder()
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


class Lab:
    """A lab by name. Methods raise LabError."""

    def __init__(self, name: str = DEFAULT_NAME) -> None:
        allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
        if not name or len(name) > 40 or not set(name) <= allowed or not name[0].isalnum():
            raise UsageError(
                f"{name!r} cannot be a lab's name",
                hint="use small letters, digits, dots, dashes, underscores",
            )
        self.name = name
        self.folder = labs_folder() / name

    # What is there

    def record(self) -> Record | None:
        """The record of a QEMU that still runs, or None (a stale record counts as none)."""
        try:
            record = Record(**json.loads((self.folder / "lab.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return record if process_start_ticks(record.pid) == record.start_ticks else None

    def crashed(self) -> bool:
        """Whether a started QEMU ended without ``down``."""
        return (self.folder / "lab.json").exists() and self.record() is None

    def require_running(self) -> Record:
        record = self.record()
        if record is not None and record.ready:
            return record
        up = "xtool lab up" + ("" if self.name == DEFAULT_NAME else f" {self.name}")
        if record is not None:
            raise LabError(f"the lab {self.name} is still starting", hint=f"wait for it: {up}")
        if self.crashed():
            raise LabError(
                f"the lab {self.name} has crashed: {self._last_words()}", hint=f"start it again: {up}"
            )
        raise LabError(f"the lab {self.name} is not up", hint=f"start it: {up}")

    def ssh(self, record: Record) -> SshTarget:
        return SshTarget(
            port=record.port,
            key=Path(record.image, "id_ed25519"),
            known_hosts=self.folder / "known_hosts",
            control=self._socket("ssh"),
        )

    @property
    def console_log(self) -> Path:
        return self.folder / "console.log"

    def _socket(self, kind: str) -> Path:
        """A socket's path: in the lab's folder or, where that is too long, in a short private one."""
        path = self.folder / f"{kind}.sock"
        if len(str(path)) <= 80:  # a socket's path has 107 bytes and ssh appends 17 while it makes one
            return path
        import hashlib

        short = Path("/tmp", f"xtool-labs-{os.geteuid()}")
        short.mkdir(mode=0o700, exist_ok=True)
        status = short.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077 or short.is_symlink():
            raise LabError(
                f"{short} belongs to somebody else", hint="remove it, or use a shorter XDG_STATE_HOME"
            )
        return short / f"{hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]}.{kind}"

    def _last_words(self) -> str:
        for name in ("qemu.log", "console.log"):
            with contextlib.suppress(OSError):
                lines = (self.folder / name).read_bytes()[-4000:].decode(errors="replace").split("\n")
                words = [line.strip() for line in lines if line.strip()]
                if words:
                    return words[-1]
        return "it said nothing"

    @contextlib.contextmanager
    def _locked(self, progress: Progress) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self.folder / "lock", progress, f"busy with the lab {self.name}"):
            yield

    def _write(self, record: Record) -> None:
        temporary = self.folder / "lab.json.new"
        temporary.write_text(json.dumps(asdict(record)))
        os.replace(temporary, self.folder / "lab.json")

    # Starting

    def up(self, spec: LabSpec, progress: Progress = SILENT, *, cold: bool = False) -> Record:
        """Start the lab unless it runs, and bring xtool into it. ``cold`` boots even with a snapshot."""
        with self._locked(progress):
            record = self.record()
            if record is not None and record.ready:
                if record.spec != asdict(spec):
                    raise LabError(
                        f"the lab {self.name} is up with other settings",
                        hint="take it down first: xtool lab down, or start another one: xtool lab up NAME",
                    )
                return self._sync(record, progress)[0]
            if record is not None:
                progress.step("stopping a lab whose start was interrupted")
                self._stop(record)
            elif self.crashed():
                progress.step(f"the lab {self.name} had crashed ({self._last_words()}): starting it anew")
            image = ensure_image(progress)
            require_space(self.folder, _SPACE_NEEDED, "the lab's disk and snapshot")
            saved = None if cold else snapshot.latest(snapshot.key(image, spec))
            if saved is not None:
                try:
                    return self._start(image, spec, saved, progress)
                except LabError as error:
                    progress.step(f"the snapshot cannot be restored ({error.message}): booting instead")
                    shutil.rmtree(saved, ignore_errors=True)
            return self._start(image, spec, None, progress)

    def _start(self, image: Path, spec: LabSpec, saved: Path | None, progress: Progress) -> Record:
        progress.step("restoring the lab" if saved else "booting the lab: starting QEMU")
        record: Record | None = None
        try:
            record = self._launch(image, spec, saved)
            if saved:
                with Qmp(self._socket("qmp")) as qmp:
                    qmp.wait_restored()
                    qmp.command("cont")
                record.tree = snapshot.tree(saved)
            else:
                self._wait_boot(record, progress)
            progress.step("connecting to the lab")
            target = self.ssh(record)
            target.open_master()
            target.run(f"date -u -s @{time.time():.3f} >/dev/null")
            record, result = self._sync(record, progress)
            if saved is None or result.sent > _RESNAPSHOT_BYTES:
                self._snapshot(record, spec, progress)
            record.ready = True
            self._write(record)
        except BaseException:
            if record is not None:
                self._stop(record)
            raise
        return record

    def _launch(self, image: Path, spec: LabSpec, saved: Path | None) -> Record:
        """Start QEMU on a new overlay and a free port."""
        public = (image / "host_key.pub").read_text().split()
        (self.folder / "known_hosts").write_text(f"xtool-lab {public[0]} {public[1]}\n")
        for name in ("console.log", "qemu.log", "disk.qcow2"):
            (self.folder / name).unlink(missing_ok=True)
        for kind in ("qmp", "console", "ssh"):
            self._socket(kind).unlink(missing_ok=True)
        disk = self.folder / "disk.qcow2"
        backing = (saved / "disk.qcow2", "qcow2") if saved else (image / "root.img", "raw")
        run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", backing[0], "-F", backing[1], disk],
            "making a disk",
        )
        at = Paths(image, disk, self.console_log, self._socket("console"), self._socket("qmp"))
        for _ in range(5):
            port = free_port()
            process = spawn(
                qemu_argv(spec, at, port, saved / "state" if saved else None), self.folder / "qemu.log"
            )
            ticks = process_start_ticks(process.pid)
            record = Record(
                pid=process.pid,
                start_ticks=ticks or 0,
                port=port,
                instance=secrets.token_hex(8),
                image=str(image),
                snapshot=str(saved) if saved else None,
                spec=asdict(spec),
                started=time.time(),
            )
            self._write(record)
            while process.poll() is None:
                if self._socket("qmp").exists():
                    return record
                time.sleep(0.02)
            said = (self.folder / "qemu.log").read_text(errors="replace")
            if "host forwarding" not in said:
                break  # not a port that somebody took in between
        (self.folder / "lab.json").unlink(missing_ok=True)
        raise LabError(f"QEMU did not start: {self._last_words()}", hint=f"see {self.folder / 'qemu.log'}")

    def _wait_boot(self, record: Record, progress: Progress, deadline: float = 900.0) -> None:
        """Follow the serial console until dom0 is ready, telling the steps it goes through."""
        end = time.monotonic() + deadline
        while not self.console_log.exists():
            time.sleep(0.05)
        pending = b""
        with open(self.console_log, "rb") as log:
            while time.monotonic() < end:
                chunk = log.read()
                if not chunk:
                    if process_start_ticks(record.pid) != record.start_ticks:
                        raise LabError(f"QEMU ended while the lab booted: {self._last_words()}")
                    time.sleep(0.1)
                    continue
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    if _boot_line(line.decode(errors="replace").strip(), progress):
                        return
        raise LabError(
            f"the lab did not come up within {deadline:.0f} s", hint=f"see its console: {self.console_log}"
        )

    def _snapshot(self, record: Record, spec: LabSpec, progress: Progress) -> None:
        progress.step("saving a snapshot")
        target = self.ssh(record)
        # What every later start then need not do: import xtool, decompress the test guests' kernel.
        kernel = f"{trees.TARGET}/configs/pv.yaml"
        target.run(f"{warmup.WAIT}; [ ! -e {kernel} ] || xtool create --dry-run {kernel} >/dev/null")
        # No connection may be open across a snapshot: the restored end would wait for a peer long gone.
        target.run("sync")
        target.close_master()
        with Qmp(self._socket("qmp")) as qmp:
            qmp.command("stop")
            snapshot.save(
                snapshot.key(Path(record.image), spec),
                qmp,
                self.folder / "disk.qcow2",
                Path(record.image),
                record.tree,
            )
            qmp.command("cont")
        used = {Path(r.snapshot).name for r in (Lab(n).record() for n in lab_names()) if r and r.snapshot}
        snapshot.prune(used)
        target.open_master()

    # While it runs

    def sync(self, progress: Progress = SILENT) -> trees.SyncResult:
        """Bring the working tree's xtool into the running lab."""
        with self._locked(progress):
            return self._sync(self.require_running(), progress)[1]

    def _sync(self, record: Record, progress: Progress) -> tuple[Record, trees.SyncResult]:
        target = self.ssh(record)
        held, record.tree = record.tree, {}
        wanted = trees.Hashes(trees.project_root()).record()
        if wanted == held:
            record.tree = held
            return record, trees.SyncResult(0, 0, 0)
        self._write(record)  # if the sync is cut off, the next one sends everything
        target.open_master()
        record.tree, result = trees.sync(target, held, progress)
        self._write(record)
        return record, result

    # Stopping

    def down(self, progress: Progress = SILENT) -> bool:
        """Stop the lab; false if it was not running. What was changed in it since its start is gone."""
        with self._locked(progress):
            record = self.record()
            if record is None:
                (self.folder / "lab.json").unlink(missing_ok=True)
                (self.folder / "disk.qcow2").unlink(missing_ok=True)
                return False
            progress.step(f"stopping the lab {self.name}")
            self._stop(record)
            return True

    def remove(self, progress: Progress = SILENT) -> None:
        """Stop the lab and remove its folder."""
        if self.folder.is_dir():
            self.down(progress)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _stop(self, record: Record) -> None:
        self.ssh(record).close_master()
        if process_start_ticks(record.pid) == record.start_ticks:
            with contextlib.suppress(LabError), Qmp(self._socket("qmp"), timeout=5) as qmp:
                qmp.command("quit")
            end_process(record.pid, record.start_ticks)
        for kind in ("qmp", "console", "ssh"):
            self._socket(kind).unlink(missing_ok=True)
        (self.folder / "disk.qcow2").unlink(missing_ok=True)
        (self.folder / "lab.json").unlink(missing_ok=True)


def _boot_line(line: str, progress: Progress) -> bool:
    """Tell what a console line says; true for the last one of a boot. Raises LabError for a failure."""
    if "XTOOL-LAB-READY" in line:
        return True
    if "XTOOL-LAB-FAILED" in line or "Kernel panic" in line or "Panic on CPU" in line:
        raise LabError(f"the lab's boot failed: {line}", hint="see its console: xtool lab log")
    if "XTOOL-LAB-STEP " in line:
        progress.step("booting the lab: " + line.split("XTOOL-LAB-STEP ", 1)[1])
    elif "Xen version" in line:
        progress.step("booting the lab: Xen " + line.split("Xen version ", 1)[1].split(" ")[0])
    elif "*** Building a PV Dom0" in line or "*** LOADING DOMAIN 0" in line:
        progress.step("booting the lab: dom0's kernel")
    return False
