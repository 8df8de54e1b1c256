"""Bringing the working tree's xtool into a lab, only what changed.

What the lab holds is recorded here (path -> content hash) for one *instance*: one start of the lab. A lab
restored from a snapshot starts with the record saved beside that snapshot. Bytecode is compiled on this
side, where it costs a fifteenth, when this Python writes the lab's bytecode.

Facts: a ``.pyc`` header is the magic, flags (0: by timestamp), then the source's mtime and size as u32;
tar keeps whole-second mtimes, so both ends agree.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import marshal
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xtool.errors import LabError
from xtool.lab import warmup
from xtool.lab.image import LAB_PYC_MAGIC, cache
from xtool.lab.ssh import SshTarget
from xtool.progress import Progress

#: Where the tree lies in the lab.
TARGET = "/opt/xtool/src"
_PARTS = ("xtool", "tests", "configs", "benchmarks", "build/guest", "scripts", "guests", "pyproject.toml")
_SKIP_FOLDERS = {"__pycache__", ".pytest_cache", ".mypy_cache", ".hypothesis"}

Record = dict[str, str]


@dataclass(frozen=True)
class SyncResult:
    """What a sync did. ``sent`` is in bytes before compression."""

    files: int
    removed: int
    sent: int


def project_root() -> Path:
    """The working tree this xtool runs from (or, installed, the folder that holds the package)."""
    return Path(__file__).resolve().parents[2]


def tree_files(root: Path) -> Iterator[str]:
    """Paths, relative to ``root``, of what goes into a lab."""
    parts = _PARTS if (root / "pyproject.toml").is_file() else ("xtool",)
    for part in parts:
        top = root / part
        if top.is_file():
            yield part
        for folder, folders, files in os.walk(top):
            folders[:] = sorted(set(folders) - _SKIP_FOLDERS)
            for name in sorted(files):
                path = Path(folder, name)
                # dot files are half-written ones of editors and builds
                if not name.startswith(".") and not name.endswith(".pyc") and path.is_file():
                    yield str(path.relative_to(root))


class Hashes:
    """Content hashes of a tree, remembered by inode, size and mtime so that a second look is fast."""

    def __init__(self, root: Path) -> None:
        self._root = root
        key = hashlib.sha256(str(root).encode()).hexdigest()[:16]
        self._file = cache() / "hashes" / f"{key}.json"
        self._known: dict[str, list[object]] = {}
        try:
            self._known = json.loads(self._file.read_text())
        except (OSError, ValueError):
            pass

    def record(self) -> Record:
        """path -> hash of mode and content, for the tree as it is now."""
        fresh: dict[str, list[object]] = {}
        record: Record = {}
        for path in tree_files(self._root):
            try:
                status = os.stat(self._root / path)
                mark: list[object] = [
                    status.st_ino,
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_mode & 0o111,
                ]
                known = self._known.get(path)
                if known is not None and known[:4] == mark:
                    digest = str(known[4])
                else:
                    with open(self._root / path, "rb") as handle:
                        digest = hashlib.file_digest(handle, "sha256").hexdigest()
            except FileNotFoundError:
                continue  # it went away while we looked: the next sync sees that
            fresh[path] = [*mark, digest]
            record[path] = f"{digest}{'x' if status.st_mode & 0o111 else ''}"
        if fresh != self._known:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(fresh))
            os.replace(temporary, self._file)
            self._known = fresh
        return record


def difference(held: Record, wanted: Record) -> tuple[list[str], list[str]]:
    """(paths to send, paths to remove) that turn ``held`` into ``wanted``."""
    send = sorted(path for path, digest in wanted.items() if held.get(path) != digest)
    return send, sorted(set(held) - set(wanted))


def bytecode(source: bytes, path: str, mtime: int) -> bytes | None:
    """The .pyc of one module as the lab wants it, or None if this Python or the source cannot give it."""
    if importlib.util.MAGIC_NUMBER != LAB_PYC_MAGIC:
        return None
    store = cache() / "bytecode" / hashlib.sha256(path.encode() + b"\0" + source).hexdigest()
    try:
        code = store.read_bytes()
    except OSError:
        try:
            code = marshal.dumps(compile(source, f"{TARGET}/{path}", "exec", dont_inherit=True))
        except (SyntaxError, ValueError):
            return None  # the lab's Python will say what is wrong with it
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(code)
        os.replace(temporary, store)
    stamp = (mtime & 0xFFFFFFFF).to_bytes(4, "little") + (len(source) & 0xFFFFFFFF).to_bytes(4, "little")
    return LAB_PYC_MAGIC + bytes(4) + stamp + code


def pack(root: Path, send: list[str], remove: list[str]) -> bytes:
    """A tar archive of the files to send, with a ``.remove`` list of the others."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, data: bytes, mtime: int, mode: int) -> None:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(data), mtime, mode
            archive.addfile(entry, io.BytesIO(data))

        add(".remove", b"".join(path.encode() + b"\0" for path in remove), 0, 0o644)
        for path in send:
            try:
                status = os.stat(root / path)
                data = (root / path).read_bytes()
            except FileNotFoundError:
                continue
            mtime = int(status.st_mtime)
            add(path, data, mtime, 0o755 if status.st_mode & 0o111 else 0o644)
            if path.endswith(".py") and path.startswith("xtool/"):
                compiled = bytecode(data, path, mtime)
                if compiled is not None:
                    folder, name = path.rsplit("/", 1)
                    add(f"{folder}/__pycache__/{name[:-3]}.cpython-311.pyc", compiled, mtime, 0o644)
    return buffer.getvalue()


_UNPACK = (
    f"{warmup.STOP}; mkdir -p {TARGET} && cd {TARGET} && tar -xf - --no-same-owner && "
    "xargs -0 -r rm -f <.remove && rm -f .remove && find . -type d -empty -delete && "
    f"{{ {warmup.START}; }}"
)


def sync(target: SshTarget, held: Record, progress: Progress) -> tuple[Record, SyncResult]:
    """Make the lab hold what the working tree holds; returns the new record and what was done.

    Raises LabError; then what the lab holds is unknown, so the caller forgets its record.
    """
    root = project_root()
    wanted = Hashes(root).record()
    if not wanted:
        raise LabError(f"nothing to sync: no xtool found in {root}")
    send, remove = difference(held, wanted)
    if not send and not remove:
        return wanted, SyncResult(0, 0, 0)
    progress.step(f"sending {len(send)} files to the lab")
    archive = pack(root, send, remove)
    target.run(_UNPACK, stdin=archive)
    return wanted, SyncResult(len(send), len(remove), len(archive))
