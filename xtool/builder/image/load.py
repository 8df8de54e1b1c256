"""From a path to a ``KernelImage`` or ``Ramdisk``: open, map, unwrap, parse.

Facts
-----
* The file is mapped, not read; the decompressed kernel is mapped from the cache's file, or from an
  anonymous memory file where there is no cache. Memory use does not depend on how often it is loaded.
* A mapping keeps its file's content if the name is removed or replaced. A file that is *shortened* in
  place while it is mapped kills the reader (SIGBUS); kernels are installed by renaming, so none is.
"""

from __future__ import annotations

import mmap
import os
import stat as stat_module
from contextlib import nullcontext
from typing import TYPE_CHECKING

from xtool.builder.image import bzimage, elf
from xtool.builder.image.cache import NewEntry
from xtool.builder.image.decompress import decompress, sniff
from xtool.builder.image.model import KernelImage, Ramdisk, content_digest
from xtool.builder.image.xzcheck import stored_crc32
from xtool.errors import ImageError

if TYPE_CHECKING:
    from xtool.builder.image.cache import KernelCache

#: The largest kernel file, and the largest it may decompress to (bytes).
MAX_SOURCE = 1 << 30
MAX_KERNEL = 1 << 30


def load_kernel(path: str, *, cache: KernelCache | None = None) -> KernelImage:
    """Load a kernel: an ELF file, a Linux bzImage, or a compressed ELF file.

    With ``cache`` a compressed kernel is decompressed once per content. Raises ``ImageError``.
    """
    data, stat = _map_file(path, "kernel", MAX_SOURCE)
    if bytes(data[:4]) == elf.MAGIC:
        return _finish(path, "elf", "none", data, False, None)
    if bzimage.is_bzimage(data):
        form = "bzimage"
        payload = bzimage.find_payload(data, path)
        packed = data[payload.offset : payload.offset + payload.length]
        size: int | None = payload.size
    else:
        form, packed, size = "elf", data, None
    compression = sniff(bytes(packed[:16]))
    if compression is None:
        if form == "bzimage" and bytes(packed[:4]) == elf.MAGIC:
            return _finish(path, form, "none", packed, False, content_digest(data))
        raise _unknown(path, form, packed)
    if form == "bzimage" and compression != "gzip":
        packed = packed[:-4]  # the size Linux appended; gzip's own size is part of its format

    digest = cache.digest_of(stat) if cache else None
    fd = cache.open(digest) if cache and digest else None
    known = fd is not None
    if digest is None or fd is None:
        # A key is believed only as long as it leads to an entry: nothing is stored under what it says.
        digest = content_digest(data)
        fd = cache.open(digest) if cache else None
    cached = fd is not None
    if fd is None:
        with cache.turn() if cache else nullcontext():
            fd = cache.open(digest) if cache else None  # somebody else may have been at it already
            cached = fd is not None
            if fd is None:
                fd = _unwrap(packed, compression, size, digest, cache, path)
    if _changed(path, stat):
        os.close(fd)
        raise ImageError(f"{path} changed while it was being read", hint="try again")
    if cache and not known:
        cache.remember(stat, digest)
    unpacked = _map(fd, path)
    if bytes(unpacked[:4]) != elf.MAGIC:
        raise ImageError(f"{path}: what is {compression}-compressed in it is not an ELF kernel")
    return _finish(path, form, compression, unpacked, cached, digest)


def load_ramdisk(path: str) -> Ramdisk:
    """Map a ramdisk. Raises ``ImageError`` if it is missing, empty or not a file."""
    data, _ = _map_file(path, "ramdisk", None)
    return Ramdisk(path, data)


def _finish(
    path: str, form: str, compression: str, data: memoryview, cached: bool, digest: str | None
) -> KernelImage:
    machine, entry, segments, notes = elf.parse_elf(data, path)
    return KernelImage(path, form, compression, data, cached, machine, entry, segments, notes, digest)


def _unknown(path: str, form: str, packed: memoryview) -> ImageError:
    if form == "bzimage":
        head = bytes(packed[:4]).hex(" ")
        return ImageError(
            f"{path} is a bzImage whose payload has an unknown compression (it begins with {head})"
        )
    return ImageError(
        f"{path} is not a kernel: neither an ELF file, nor a Linux bzImage, nor a compressed ELF file",
        hint="kernel: must name a vmlinuz or vmlinux file",
    )


# -- files


def _map_file(path: str, what: str, limit: int | None) -> tuple[memoryview, os.stat_result]:
    try:
        # Not to block on a FIFO; regular files do not care.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(
            f"cannot open the {what} {path}: {reason}",
            hint=f"check the {what}: line and the file's permissions",
        ) from error
    try:
        stat = os.fstat(fd)
        if not stat_module.S_ISREG(stat.st_mode):
            raise ImageError(f"the {what} {path} is not a regular file")
        if not stat.st_size:
            raise ImageError(f"the {what} {path} is empty")
        if limit is not None and stat.st_size > limit:
            raise ImageError(f"the {what} {path} has {stat.st_size} bytes; at most {limit} are accepted")
    except BaseException:
        os.close(fd)
        raise
    return _map(fd, path), stat


def _map(fd: int, path: str) -> memoryview:
    """Map all of ``fd``, which is closed."""
    try:
        return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot map {path}: {error}") from error
    finally:
        os.close(fd)


def _changed(path: str, before: os.stat_result) -> bool:
    """Whether the file was written to since; being replaced or removed is fine, we hold the old one."""
    try:
        now = os.stat(path)
    except OSError:
        return False
    same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
    return same and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)


# -- decompressing


def _unwrap(
    packed: memoryview, compression: str, size: int | None, digest: str, cache: KernelCache | None, path: str
) -> int:
    """Decompress into the cache, or into memory if that does not work. Returns a file descriptor."""
    if cache:
        fd = -1
        try:
            with cache.create(digest) as entry:
                _decompress(packed, compression, size, entry, path)
                fd = os.dup(entry.fd)
        except OSError:
            pass  # a full or read-only disk: what was decompressed so far goes away with the entry
        if fd >= 0:
            return fd
    fd = os.memfd_create("xtool-kernel", os.MFD_CLOEXEC)
    try:
        _decompress(packed, compression, size, NewEntry(fd), path)
    except OSError as error:
        os.close(fd)
        raise ImageError(
            f"no room to decompress {path}: {error.strerror}", hint="free some memory"
        ) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


class _Limited:
    """Passes chunks on to ``entry`` and enforces the size."""

    def __init__(self, entry: NewEntry, path: str) -> None:
        self._entry = entry
        self._path = path

    def write(self, chunk: bytes) -> None:
        if self._entry.size + len(chunk) > MAX_KERNEL:
            raise ImageError(
                f"{self._path} decompresses to more than {MAX_KERNEL} bytes; that is not a kernel"
            )
        self._entry.write(chunk)


def _decompress(packed: memoryview, compression: str, size: int | None, entry: NewEntry, path: str) -> None:
    known = stored_crc32(packed) if compression == "xz" else None
    if known is not None:
        entry.crc, entry.known_crc = known, True
    decompress(packed, compression, _Limited(entry, path), path)
    if not entry.size:
        raise ImageError(f"{path}: its {compression} data decompresses to nothing")
    if size is not None and entry.size & 0xFFFFFFFF != size:
        raise ImageError(
            f"{path} is corrupt: its payload decompresses to {entry.size} bytes, its trailer says {size}",
            hint="copy or download the file again",
        )
