"""Test guests: Debian's kernels with a small busybox userland, and disks that boot the same.

Made in ``build/guest`` of the working tree::

    vmlinuz             Debian's cloud kernel: PV, PVH and HVM
    vmlinuz-generic     Debian's ordinary kernel (xz payload)
    initramfs.cpio.gz   busybox; prints XTOOL-GUEST-READY, then a "# " prompt, on the kernel's console
    disk.img            a disk with a boot record and one FAT partition: syslinux, the kernel, the initramfs
    cd.iso              a CD (El Torito): isolinux, the same kernel and initramfs

Nothing is installed on this machine and no root is needed. Facts: ``mkfs.fat --offset`` counts 512-byte
sectors, mtools' ``@@`` and syslinux's ``--offset`` count bytes; syslinux wants an active partition entry
and its ``mbr.bin`` (440 bytes) in sector 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

from xtool.errors import LabError
from xtool.lab import apt, modules
from xtool.lab.cpio import CpioArchive, write_initramfs
from xtool.lab.image import cache, lab_file, static_busybox
from xtool.lab.steps import build_folder, require_space, require_tools, run
from xtool.progress import Progress

#: What a guest prints when its userland is there.
READY = "XTOOL-GUEST-READY"
FILES = ("vmlinuz", "vmlinuz-generic", "initramfs.cpio.gz", "disk.img", "cd.iso")
_FORMAT = 1
_DISK_SIZE = 32 << 20
_PARTITION_START = 1 << 20
_FRONTENDS = ("xen-blkfront", "xen-netfront", "isofs")
_COMMAND_LINE = "console=ttyS0"
_TOOLS = {
    "xorriso": "xorriso",
    "syslinux": "syslinux",
    "mcopy": "mtools",
    "mkfs.fat": "dosfstools",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
}
_ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
_LDLINUX = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
_MBR = Path("/usr/lib/syslinux/mbr/mbr.bin")


def recipe_hash() -> str:
    files = [hashlib.sha256(lab_file(name)).hexdigest() for name in ("guest-init", "guest-load-modules")]
    recipe = [_FORMAT, _DISK_SIZE, _FRONTENDS, _COMMAND_LINE, files]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def ensure_guests(target: Path, progress: Progress) -> bool:
    """Put the test guests into ``target`` (``build/guest``); true if anything changed there.

    Raises LabError.
    """
    built = cache() / "guests" / recipe_hash()
    if not built.is_dir():
        require_tools(_TOOLS)
        for file, package in (
            (_ISOLINUX, "isolinux"),
            (_LDLINUX, "syslinux-common"),
            (_MBR, "syslinux-common"),
        ):
            if not file.exists():
                raise LabError(f"the Debian package {package} is missing", hint="run scripts/setup")
        require_space(built.parent, 1 << 30, "the test guests")
        build_folder(built, "building the test guests", progress, lambda folder: _build(folder, progress))
    target.mkdir(parents=True, exist_ok=True)
    changed = False
    for name in FILES:
        changed |= _place(built / name, target / name)
    return changed


def _place(source: Path, target: Path) -> bool:
    """Copy unless the same is there (by size and time, which the copy keeps)."""
    wanted = source.stat()
    if target.is_file():
        status = target.stat()
        if (status.st_size, status.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
            return False
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    run(["cp", "--sparse=always", "--preserve=timestamps", source, temporary], f"copying {target.name}")
    os.replace(temporary, target)
    return True


def _build(folder: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix="work-") as name:
        work = Path(name)
        archive = CpioArchive()
        for package, kernel in (
            ("linux-image-cloud-amd64", "vmlinuz"),
            ("linux-image-amd64", "vmlinuz-generic"),
        ):
            tree = work / kernel
            deb = apt.fetch(apt.kernel_package(package), cache() / "debs", progress)
            progress.step(f"unpacking {package}")
            apt.unpack(deb, tree)
            modules.run_depmod(tree)
            (image,) = (tree / "boot").glob("vmlinuz-*")
            shutil.copyfile(image, folder / kernel)
            modules.add_modules(archive, tree, _FRONTENDS, f"modules/{modules.kernel_release(tree)}")
        progress.step("making the guests' initramfs, disk and CD")
        _initramfs(archive, folder / "initramfs.cpio.gz")
        _cd(folder, work)
        _disk(folder, work)


def _initramfs(archive: CpioArchive, path: Path) -> None:
    archive.device("dev/console", 5, 1)
    for name in ("bin", "sbin", "proc", "sys", "tmp", "run", "mnt", "root"):
        archive.folder(name)
    busybox = static_busybox()
    archive.file("bin/busybox", busybox, 0o755)
    for name in _applets(busybox):
        archive.link(f"bin/{name}", "busybox")
    archive.file("init", lab_file("guest-init"), 0o755)
    archive.file("etc/load-modules", lab_file("guest-load-modules"), 0o755)
    archive.file("etc/ready", f"\n{READY}\n".encode())
    # The kernel runs these two when the toolstack asks; forced, because nothing here needs to be ended.
    for name in ("poweroff", "reboot"):
        archive.file(f"sbin/{name}", f"#!/bin/sh\nexec /bin/busybox {name} -f\n".encode(), 0o755)
    write_initramfs(archive, path)


def _applets(busybox: bytes) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        program = Path(name, "busybox")
        program.write_bytes(busybox)
        program.chmod(0o755)
        return [each for each in run([program, "--list"], "asking busybox").split() if each != "busybox"]


def _boot_menu() -> str:
    return (
        "SERIAL 0 115200\nDEFAULT linux\nPROMPT 0\nTIMEOUT 0\n"
        f"LABEL linux\n  KERNEL /vmlinuz\n  INITRD /initrd.gz\n  APPEND {_COMMAND_LINE}\n"
    )


def _cd(folder: Path, work: Path) -> None:
    tree = work / "cd"
    (tree / "isolinux").mkdir(parents=True)
    shutil.copyfile(_ISOLINUX, tree / "isolinux/isolinux.bin")
    shutil.copyfile(_LDLINUX, tree / "isolinux/ldlinux.c32")
    (tree / "isolinux/isolinux.cfg").write_text(_boot_menu())
    shutil.copyfile(folder / "vmlinuz", tree / "vmlinuz")
    shutil.copyfile(folder / "initramfs.cpio.gz", tree / "initrd.gz")
    run(
        [
            *("xorriso", "-as", "mkisofs", "-quiet", "-r", "-J", "-V", "XTOOL", "-o", folder / "cd.iso"),
            *("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"),
            *("-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", tree),
        ],
        "making the CD image",
    )


def boot_record(code: bytes, start: int, size: int) -> bytes:
    """Sector 0 of a disk with one active FAT partition; ``start`` and ``size`` are in bytes."""
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x0E, b"\xfe\xff\xff", start // 512, size // 512)
    return code[:440].ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa"


def _disk(folder: Path, work: Path) -> None:
    disk = folder / "disk.img"
    size = _DISK_SIZE - _PARTITION_START
    with open(disk, "wb") as handle:
        handle.truncate(_DISK_SIZE)
        handle.write(boot_record(_MBR.read_bytes(), _PARTITION_START, size))
    sectors = _PARTITION_START // 512
    run(
        [
            *("mkfs.fat", "-F", "16", "-i", "58544f4c", "--invariant", "-n", "XTOOL", "-h", str(sectors)),
            *(f"--offset={sectors}", disk, str(size >> 10)),
        ],
        "making the disk's file system",
    )
    menu = work / "syslinux.cfg"
    menu.write_text(_boot_menu())
    for source, name in (
        (folder / "vmlinuz", "vmlinuz"),
        (folder / "initramfs.cpio.gz", "initrd.gz"),
        (menu, "syslinux.cfg"),
    ):
        run(["mcopy", "-i", f"{disk}@@{_PARTITION_START}", source, f"::/{name}"], "filling the disk")
    run(["syslinux", "--install", "--offset", str(_PARTITION_START), disk], "making the disk bootable")
