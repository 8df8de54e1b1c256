"""An Intel machine with VT-x in software: the lab's image, started by bochs.

QEMU emulates SVM only, bochs VMX with EPT and VPID. The machine is made in a folder::

    cd.iso          GRUB, the image's hypervisor and kernel, its initramfs with another /init and ATA drivers
    root.img        a copy of the image's root disk, which dom0 writes to
    tree.img        the working tree's xtool, tests and test guests, for /opt/xtool/src
    bochsrc         the machine
    serial.log      Xen's and dom0's console, as it comes

Facts about bochs 2.7 as Debian has it:

- a flat disk image must have exactly the size of its geometry, cylinders * 16 * 63 sectors;
- it is built with its debugger, which waits for the command ``c`` before the machine starts;
- it has no display library without a display. ``term`` draws for a terminal and is content with
  ``/dev/null``; ``rfb`` would listen on a port;
- left to find a sound card where there is none, it ends with "buffer overflow detected": the sound drivers
  are the dummies;
- ``clock: sync=none`` counts time in instructions (``ips`` of them are a second): nothing in the machine
  times out because this one is busy, and idle time is skipped;
- its ACPI calls a machine that powers off a panic, which ends the process with a status that is not 0;
- it does some tens of millions of instructions a second. So nothing on the CD is compressed (reading is
  cheap, unpacking the kernel takes minutes), and Xen does without the mitigations that switch page tables at
  each system call of dom0;
- SIGTERM does not end it.

GRUB starts Xen by ``multiboot``; it unpacks modules that are compressed with gzip, their first stream only.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from xtool.builder.image.load import load_kernel
from xtool.errors import LabError
from xtool.lab import modules, sync
from xtool.lab.cpio import CpioArchive
from xtool.lab.image import lab_file
from xtool.lab.steps import require_tools, run
from xtool.progress import Progress

MEMORY_MIB = 2048
DOM0_MEMORY_MIB = 768
#: Instructions that are one second in the machine.
IPS = 100_000_000
CPU = "corei7_haswell_4770"
XEN_COMMAND_LINE = (
    f"console=com1 com1=115200 dom0_mem={DOM0_MEMORY_MIB}M,max:{DOM0_MEMORY_MIB}M "
    "loglvl=all guest_loglvl=all noreboot bootscrub=0 xpti=no spec-ctrl=no pv-l1tf=no"
)
DOM0_COMMAND_LINE = "console=hvc0 earlyprintk=xen quiet net.ifnames=0 panic=1"
#: Labels of the two disks' file systems; ``files/bochs-init`` looks for them.
TREE_LABEL = "xtool-src"
_BOOT_MODULES = ("ata_piix", "sd_mod", "crc32c_generic", "ext4")
_TREE_SIZE = 256 << 20
_SECTOR, _HEADS, _SECTORS_PER_TRACK = 512, 16, 63
_CYLINDER = _SECTOR * _HEADS * _SECTORS_PER_TRACK
_BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
_VGA_BIOS = Path("/usr/share/bochs/VGABIOS-lgpl-latest")
_GRUB = Path("/usr/lib/grub/i386-pc")
_TOOLS = {
    "bochs-bin": "bochs bochs-term bochsbios vgabios",
    "grub-mkrescue": "grub-common",
    "xorriso": "xorriso",
    "mformat": "mtools",
    "debugfs": "e2fsprogs",
    "mke2fs": "e2fsprogs",
    "setpriv": "util-linux",
}


def require() -> None:
    """Raise LabError unless what this module runs is installed."""
    require_tools(_TOOLS)
    for path, package in (
        (_BIOS, "bochsbios"),
        (_VGA_BIOS, "bochsbios vgabios"),
        (_GRUB / "multiboot.mod", "grub-pc-bin"),
        (Path("/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so"), "bochs-term"),
    ):
        if not path.exists():
            raise LabError(f"the Debian package {package} is missing ({path})", hint="run scripts/test-vtx")


def make_machine(image: Path, folder: Path, tests: Iterable[str], progress: Progress) -> None:
    """Fill ``folder`` with a machine that starts ``image`` and then runs the check with these tests.

    The image is only read. Raises LabError.
    """
    progress.step("copying the lab's root disk")
    root = folder / "root.img"
    run(["cp", "--sparse=always", image / "root.img", root], "copying the root disk")
    progress.step("making a disk of the working tree")
    tree = folder / "tree.img"
    _tree_disk(tree, folder / "tree", tests)
    progress.step("making the boot CD")
    _boot_cd(image, folder)
    (folder / "bochsrc").write_text(bochsrc(whole_cylinders(root), whole_cylinders(tree)))
    (folder / "commands").write_text("c\n")


def cylinders(size: int) -> int:
    """Cylinders of a disk that holds ``size`` bytes."""
    return -(-size // _CYLINDER)


def whole_cylinders(disk: Path) -> int:
    """Lengthen a disk image to its geometry; returns the cylinders."""
    count = cylinders(disk.stat().st_size)
    os.truncate(disk, count * _CYLINDER)
    return count


def bochsrc(root_cylinders: int, tree_cylinders: int) -> str:
    """The machine's description; paths in it are relative to the machine's folder."""
    geometry = f"heads={_HEADS}, spt={_SECTORS_PER_TRACK}"
    lines = [
        "config_interface: textconfig",
        "display_library: term",
        f"cpu: model={CPU}, count=1, ips={IPS}, reset_on_triple_fault=0",
        f"memory: guest={MEMORY_MIB}, host={MEMORY_MIB}",
        f"romimage: file={_BIOS}, options=fastboot",
        f"vgaromimage: file={_VGA_BIOS}",
        f"ata0-master: type=disk, mode=flat, path=root.img, cylinders={root_cylinders}, {geometry}",
        "ata0-slave: type=cdrom, path=cd.iso, status=inserted",
        "ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15",
        f"ata1-master: type=disk, mode=flat, path=tree.img, cylinders={tree_cylinders}, {geometry}",
        "boot: cdrom",
        "com1: enabled=1, mode=file, dev=serial.log",
        "clock: sync=none, time0=utc",
        "vga: extension=vbe, update_freq=1, realtime=0",
        "sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy",
        "speaker: enabled=0",
        "log: bochs.log",
        "panic: action=fatal",
        "error: action=report",
        "info: action=ignore",
        "debug: action=ignore",
    ]
    return "".join(f"{line}\n" for line in lines)


def _tree_disk(disk: Path, folder: Path, tests: Iterable[str]) -> None:
    root = sync.project_root()
    wanted = sorted(sync.tree_files(root))
    with tarfile.open(fileobj=io.BytesIO(sync.pack(root, wanted, []))) as archive:
        archive.extractall(folder, filter="data")
    (folder / "vtx-tests").write_text("".join(f"{test}\n" for test in tests))
    run(
        [
            *("mke2fs", "-q", "-t", "ext4", "-L", TREE_LABEL, "-m", "0", "-O", "^has_journal,^metadata_csum"),
            *("-E", "lazy_itable_init=0,root_owner=0:0", "-d", folder, disk, f"{_TREE_SIZE >> 10}k"),
        ],
        "making a disk of the working tree",
    )


def _boot_cd(image: Path, folder: Path) -> None:
    boot = folder / "cd/boot"
    (boot / "grub").mkdir(parents=True)
    shutil.copyfile(image / "xen", boot / "xen")
    with load_kernel(str(image / "vmlinuz")) as kernel:
        (boot / "vmlinux").write_bytes(kernel.data)
    more = CpioArchive()
    more.file("init", lab_file("bochs-init"), 0o755)
    modules.add_modules(more, _boot_modules(image, folder / "kernel"), _BOOT_MODULES, "modules")
    # Linux unpacks one archive after the other: what comes later replaces what came before.
    (boot / "initrd").write_bytes(gzip.decompress((image / "initrd.gz").read_bytes()) + more.to_bytes())
    (boot / "grub/grub.cfg").write_text(
        "serial --unit=0 --speed=115200\nterminal_output serial\n"
        f"multiboot /boot/xen {XEN_COMMAND_LINE}\n"
        f"module /boot/vmlinux {DOM0_COMMAND_LINE}\n"
        "module /boot/initrd\nboot\n"
    )
    run(
        [
            *("grub-mkrescue", "-d", _GRUB, "--locales=", "--fonts=", "--themes=", "--compress=no"),
            *("-o", folder / "cd.iso", folder / "cd"),
        ],
        "making the boot CD",
    )


def _boot_modules(image: Path, target: Path) -> Path:
    """A tree that holds the drivers dom0 needs to find its disks, taken from the image's root disk."""
    disk = image / "root.img"
    listed = run(["debugfs", "-R", "ls -p /usr/lib/modules", disk], "looking for dom0's kernel modules")
    releases = [
        name
        for line in listed.splitlines()
        if line.startswith("/") and (name := line.split("/")[5]) not in (".", "..")
    ]
    if len(releases) != 1:
        raise LabError(f"the lab's root disk has kernel modules of {releases or 'no release'}, not of one")
    base = target / "lib/modules" / releases[0]
    source = f"/usr/lib/modules/{releases[0]}"
    _dump(disk, source, base, ["modules.dep", "modules.builtin"])
    wanted = modules.load_order(
        (base / "modules.dep").read_text(), _BOOT_MODULES, (base / "modules.builtin").read_text()
    )
    _dump(disk, source, base, wanted)
    return target


def _dump(disk: Path, source: str, target: Path, names: list[str]) -> None:
    """Copy files out of a file system image."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
    script = "".join(f'dump {source}/{name} "{target / name}"\n' for name in names)
    run(["debugfs", "-f", "/dev/stdin", disk], "reading the lab's root disk", stdin=script.encode())
    missing = [name for name in names if not (target / name).is_file()]
    if missing:
        raise LabError(f"not on the lab's root disk: {source}/{missing[0]}")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Bochs with the machine of ``folder``; it is gone when the block is left, or when this process dies."""
    with open(folder / "debugger.log", "wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "bochs-bin", "-q", "-f", "bochsrc", "-rc", "commands"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
            cwd=folder,
            env=dict(os.environ, TERM="vt100"),
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
