"""A content-addressed cache of decompressed kernels, shared by all processes of one user.

In ``<cache>/kernels``::

    <digest>.elf     the decompressed kernel; named by the BLAKE2b of the compressed file
    <digest>.meta    its size and CRC-32, and the state in which it was last verified
    key-<...>        a source file's device, inode, size, mtime and ctime -> its digest

Facts and rules
---------------
* A file appears complete or not at all: it is written without a name (``O_TMPFILE``) and linked when
  done, so a killed process leaves nothing, not even a temporary file.
* Files are not synced. After a power cut one may hold zeros, so ``.meta`` remembers under which boot, and
  with which inode, mtime and ctime the content was last compared with its CRC; anything else is read
  through once more. What fails is rebuilt.
* A source changed within the clock's grain keeps its mtime, so a source modified in the last ``settle``
  seconds gets no key (its digest is computed each time).
* Only one process decompresses at a time; others wait, at most ``patience`` seconds, and then
  do the work themselves: whoever holds the lock may be stuck.
* The cache is never needed: on any ``OSError`` (full disk, read-only, no home) the work is done without.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep, time_ns
from typing import NamedTuple

from xtool import paths

_MAGIC = "xtool-kernel-2"
_CHUNK = 1 << 20
GIB = 1 << 30


class NewEntry:
    """A cache file being written: counts and checksums what passes. Raises ``OSError``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = 0
        self.crc = 0
        #: Set before the first write when the CRC-32 is known, and compared, already.
        self.known_crc = False

    def write(self, chunk: bytes) -> None:
        if not self.known_crc:
            self.crc = zlib.crc32(chunk, self.crc)
        self.size += len(chunk)
        view = memoryview(chunk)
        while view:
            view = view[os.write(self.fd, view) :]


class _Meta(NamedTuple):
    size: int
    crc: int
    state: str


class KernelCache:
    """``directory`` defaults to ``kernels`` below xtool's cache folder, ``capacity`` is in bytes,
    ``settle`` and
    ``patience`` in seconds. No method raises ``OSError`` except ``create``."""

    def __init__(
        self,
        directory: Path | None = None,
        *,
        capacity: int = GIB,
        settle: float = 2.0,
        patience: float = 60.0,
    ) -> None:
        self.directory = directory or paths.cache_dir() / "kernels"
        self.capacity = capacity
        self._patience = patience
        self._settle_ns = int(settle * 1e9)

    # -- looking up

    def digest_of(self, source: os.stat_result) -> str | None:
        """The digest of a source file seen before with exactly this ``stat``."""
        return self._read_text(_key(source))

    def remember(self, source: os.stat_result, digest: str) -> None:
        if time_ns() - max(source.st_mtime_ns, source.st_ctime_ns) > self._settle_ns:
            self._write_text(_key(source), digest)

    def open(self, digest: str) -> int | None:
        """A file descriptor of the verified decompressed kernel, or None."""
        fields = (self._read_text(f"{digest}.meta") or "").split(" ")
        try:
            meta = _Meta(int(fields[1]), int(fields[2]), " ".join(fields[3:]))
            fd = os.open(self.directory / f"{digest}.elf", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, IndexError, ValueError):
            return None
        if fields[0] != _MAGIC or not self._verify(digest, fd, meta):
            os.close(fd)
            return None
        return fd

    def _verify(self, digest: str, fd: int, meta: _Meta) -> bool:
        try:
            stat = os.fstat(fd)
            if stat.st_size != meta.size or not meta.size:
                return False
            if meta.state == _state(stat):
                os.utime(self.directory / f"{digest}.meta")  # the age that ``prune`` goes by
                return True
            crc = 0
            while chunk := os.read(fd, _CHUNK):
                crc = zlib.crc32(chunk, crc)
            if crc != meta.crc:
                return False
        except OSError:
            return False
        self._write_meta(digest, meta.size, crc, stat)
        return True

    # -- adding

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the right to decompress. Look again for the kernel after entering."""
        import fcntl

        fd = -1
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # no lock file to leave
            end = monotonic() + self._patience
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if monotonic() > end:
                        break
                    sleep(0.02)
        except OSError:
            pass
        try:
            yield
        finally:
            if fd >= 0:
                os.close(fd)

    @contextmanager
    def create(self, digest: str) -> Iterator[NewEntry]:
        """Write an entry; it appears when the block ends without an exception. Raises ``OSError``.

        The descriptor is closed at the end of the block: ``os.dup`` it to keep on reading.
        """
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = self.directory / f"{digest}.elf"
        with _unnamed(self.directory) as (fd, publish):
            entry = NewEntry(fd)
            yield entry
            if entry.size > self.capacity:
                return
            publish(name)
            self._write_meta(digest, entry.size, entry.crc, os.fstat(fd))
        self.prune(keep=digest)

    def prune(self, keep: str = "") -> None:
        """Remove the least recently used entries until the rest fit, and keys that lead nowhere."""
        try:
            with os.scandir(self.directory) as listing:
                files = {entry.name: entry.stat() for entry in listing}
        except OSError:
            return
        kernels = [name[:-4] for name in files if name.endswith(".elf")]

        def age(digest: str) -> int:
            return files.get(f"{digest}.meta", files[f"{digest}.elf"]).st_mtime_ns

        total = sum(files[f"{digest}.elf"].st_size for digest in kernels)
        for digest in sorted(kernels, key=age):
            if total <= self.capacity:
                break
            if digest != keep:
                self._remove(f"{digest}.elf")
                self._remove(f"{digest}.meta")
                total -= files[f"{digest}.elf"].st_size
        self._prune_keys(files)

    def _prune_keys(self, files: dict[str, os.stat_result]) -> None:
        for name in files:
            if name.startswith("key-"):
                digest = self._read_text(name)
                if digest is None or not (self.directory / f"{digest}.elf").exists():
                    self._remove(name)

    # -- small files

    def _remove(self, name: str) -> None:
        try:
            os.unlink(self.directory / name)
        except OSError:
            pass

    def _read_text(self, name: str) -> str | None:
        try:
            return _read_small(f"{self.directory}/{name}")
        except (OSError, ValueError):
            return None

    def _write_meta(self, digest: str, size: int, crc: int, stat: os.stat_result) -> None:
        self._write_text(f"{digest}.meta", f"{_MAGIC} {size} {crc} {_state(stat)}")

    def _write_text(self, name: str, text: str) -> None:
        try:
            with _unnamed(self.directory) as (fd, publish):
                os.write(fd, text.encode("ascii"))
                publish(self.directory / name)
        except OSError:
            pass


@contextmanager
def _unnamed(directory: Path) -> Iterator[tuple[int, _Publish]]:
    """A file without a name, and what gives it one. Where the file system has no ``O_TMPFILE`` the file
    has a temporary name until then."""
    temporary: Path | None = None
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(directory, flags | os.O_TMPFILE, 0o600)
    except IsADirectoryError:
        fd = -1
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        fd = -1
    if fd < 0:
        temporary = directory / f".new-{os.getpid()}-{time_ns()}"
        fd = os.open(temporary, flags | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield fd, _Publish(fd, temporary)
    finally:
        os.close(fd)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class _Publish(NamedTuple):
    fd: int
    temporary: Path | None

    def __call__(self, name: Path) -> None:
        if self.temporary is not None:
            os.rename(self.temporary, name)
            return
        directory = os.open(name.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # A link cannot replace a name; whoever looks in between finds nothing and does the work itself.
            name.unlink(missing_ok=True)
            # With a directory given, Python uses linkat(2), which alone follows /proc's link to the file.
            os.link(f"/proc/self/fd/{self.fd}", name.name, dst_dir_fd=directory, follow_symlinks=True)
        except FileExistsError:
            pass  # another process was faster with the same content
        finally:
            os.close(directory)


def _key(stat: os.stat_result) -> str:
    numbers = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return "key-" + "-".join(f"{n:x}" for n in numbers)


def _read_small(path: str) -> str:
    """Much cheaper than ``open``: this is on the path of every create."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1024).decode("ascii")
    finally:
        os.close(fd)


def _state(stat: os.stat_result) -> str:
    try:
        boot = _read_small("/proc/sys/kernel/random/boot_id")[:36]
    except OSError:
        boot = f"unknown-{time_ns()}"  # never equal: verify each time
    return f"{boot} {stat.st_dev:x} {stat.st_ino:x} {stat.st_mtime_ns:x} {stat.st_ctime_ns:x}"
