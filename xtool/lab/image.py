"""The lab's image: a Debian root disk with Xen, the hypervisor, dom0's kernel and initramfs.

An image is a folder in the cache, named by the hash of its recipe::

    root.img        ext4, raw and sparse: dom0's root disk, never written to again
    xen             the hypervisor, an ELF (QEMU's multiboot loader does not take it compressed)
    vmlinuz         dom0's kernel
    initrd.gz       dom0's initramfs
    id_ed25519      the key that opens the lab's sshd; host_key.pub is the key sshd shows
    firmware/       hvmloader and SeaBIOS, which dry runs on this machine can use
    versions.json   what is in it

No root is needed: mmdebstrap makes the tree (as root, or in a user namespace, or by fakechroot),
``fakeroot`` keeps its owners, ``mke2fs -d`` makes the file system without mounting anything.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from xtool import paths
from xtool.errors import LabError
from xtool.lab import apt, modules
from xtool.lab.cpio import CpioArchive, write_initramfs
from xtool.lab.steps import build_folder, require_space, require_tools, run
from xtool.progress import Progress

#: Bump when this module changes what an image holds.
_FORMAT = 2
_XEN = "4.17"
_PACKAGES = (
    "busybox-static",
    "ethtool",
    "fio",
    "iproute2",
    "iperf3",
    "kmod",
    "mount",
    "openssh-server",
    "ovmf",
    "passt",
    "procps",
    "python3",
    "python3-libnbd",
    "qemu-block-extra",
    "qemu-system-xen",
    "qemu-utils",
    "seabios",
    f"xen-utils-{_XEN}",
    "xenstore-utils",
)
_TEST_DEPENDENCIES = ("pytest>=8", "pytest-timeout>=2.2", "hypothesis>=6.90")
#: Drivers for hardware the lab never has: half of the modules' size.
_NO_DRIVERS = ("gpu", "media", "infiniband", "staging", "iio", "net/wireless", "hwmon", "input", "mtd")
_BOOT_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
_DISK_SIZE = 4 << 30
_SPACE_NEEDED = 4 << 30
_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mmdebstrap": "mmdebstrap",
    "fakeroot": "fakeroot",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "dpkg-deb": "dpkg",
}
#: Magic number of CPython 3.11 bytecode, the lab's Python.
LAB_PYC_MAGIC = (3495).to_bytes(2, "little") + b"\r\n"


def cache() -> Path:
    return paths.cache_dir() / "lab"


def lab_file(name: str) -> bytes:
    """A file that comes with xtool and goes into an image."""
    return importlib.resources.files("xtool.lab").joinpath("files", name).read_bytes()


def python_requirements() -> list[str]:
    """What xtool and its tests need inside the lab, as pip requirements."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        found = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        import importlib.metadata

        found = [r for r in importlib.metadata.requires("xtool") or [] if "extra ==" not in r]
    return [*found, *_TEST_DEPENDENCIES]


def recipe_hash() -> str:
    """Names an image: the same recipe gives the same name, on any machine and without network."""
    names = (
        *("dom0-initramfs-init", "inittab", "rc", "sshd_config", "xtool-launcher", "xtool.pth"),
        "defaults.yaml",
    )
    recipe = {
        "format": _FORMAT,
        "packages": _PACKAGES,
        "xen": _XEN,
        "python": python_requirements(),
        "drivers left out": _NO_DRIVERS,
        "modules": _BOOT_MODULES,
        "disk": _DISK_SIZE,
        "files": {name: hashlib.sha256(lab_file(name)).hexdigest() for name in names},
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def image_folder() -> Path:
    return cache() / "images" / recipe_hash()


def ensure_image(progress: Progress) -> Path:
    """The image's folder, built now if it is not in the cache. Raises LabError."""
    folder = image_folder()
    if not folder.is_dir():
        require_tools(_TOOLS)
        require_space(folder.parent, _SPACE_NEEDED, "the lab's image")
        build_folder(folder, "building the lab's image", progress, lambda target: _build(target, progress))
    _share_firmware(folder / "firmware")
    return folder


def _share_firmware(folder: Path) -> None:
    shared = paths.firmware_dir()
    for file in folder.iterdir():
        if not (shared / file.name).exists():
            shared.mkdir(parents=True, exist_ok=True)
            temporary = shared / f".{file.name}-{os.getpid()}"
            shutil.copyfile(file, temporary)
            temporary.rename(shared / file.name)


def _build(target: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=target, prefix="work-") as name:
        work = Path(name)
        overlay = work / "overlay"
        overlay.mkdir()
        debs = cache() / "debs"
        kernel_name = apt.kernel_package("linux-image-amd64")
        kernel = work / "kernel"
        apt.unpack(apt.fetch(kernel_name, debs, progress), kernel)
        hypervisor = work / "hypervisor"
        apt.unpack(apt.fetch(f"xen-hypervisor-{_XEN}-amd64", debs, progress), hypervisor)
        progress.step("unpacking the hypervisor and dom0's kernel")
        _boot_files(target, kernel, hypervisor)
        shutil.move(kernel / "lib", overlay / "lib")
        _keys(target)
        _overlay(target, overlay)
        progress.step("installing Python packages for the lab")
        _python_packages(overlay / "opt/xtool/deps")
        _root_disk(target / "root.img", work, overlay, progress)
        versions = {"xen": _XEN, "kernel": kernel_name, "recipe": recipe_hash()}
        (target / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def _boot_files(target: Path, kernel: Path, hypervisor: Path) -> None:
    (compressed,) = (hypervisor / "boot").glob("xen-*.gz")
    (target / "xen").write_bytes(gzip.decompress(compressed.read_bytes()))
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    shutil.copyfile(image, target / "vmlinuz")
    for driver in _NO_DRIVERS:
        shutil.rmtree(
            kernel / "lib/modules" / modules.kernel_release(kernel) / "kernel/drivers" / driver, True
        )
    shutil.rmtree(kernel / "lib/modules" / modules.kernel_release(kernel) / "kernel/sound", True)
    modules.run_depmod(kernel)
    archive = CpioArchive()
    archive.device("dev/console", 5, 1)
    for name in ("bin", "proc", "root", "modules"):
        archive.folder(name)
    archive.file("bin/busybox", static_busybox(), 0o755)
    archive.file("init", lab_file("dom0-initramfs-init"), 0o755)
    modules.add_modules(archive, kernel, _BOOT_MODULES, "modules")
    write_initramfs(archive, target / "initrd.gz")


def static_busybox() -> bytes:
    """The busybox of the package busybox-static, installed here or fetched."""
    installed = shutil.which("busybox", path="/bin:/usr/bin")
    if installed is not None:
        data = Path(installed).read_bytes()
        if b"ld-linux" not in data[:4096]:  # no program interpreter named: it is the static one
            return data
    with tempfile.TemporaryDirectory() as name:
        from xtool.progress import SILENT

        apt.unpack(apt.fetch("busybox-static", cache() / "debs", SILENT), Path(name))
        return Path(name, "bin/busybox").read_bytes()


def _keys(target: Path) -> None:
    for name in ("id_ed25519", "host_key"):
        run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "xtool-lab", "-f", target / name],
            "making ssh keys",
        )


def _overlay(target: Path, overlay: Path) -> None:
    """Files laid over the Debian tree. ``host_key`` leaves the image folder: only sshd needs it."""

    def place(path: str, data: bytes, mode: int = 0o644) -> None:
        full = overlay / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_bytes(data)
        full.chmod(mode)

    place("etc/inittab", lab_file("inittab"))
    place("etc/lab/rc", lab_file("rc"), 0o755)
    place("etc/ssh/sshd_config", lab_file("sshd_config"))
    place("etc/ssh/lab_host_key", (target / "host_key").read_bytes(), 0o600)
    place("etc/ssh/lab_authorized_keys", (target / "id_ed25519.pub").read_bytes(), 0o600)
    place("etc/hosts", b"127.0.0.1 localhost lab\n")
    place("etc/hostname", b"lab\n")
    place("usr/local/bin/xtool", lab_file("xtool-launcher"), 0o755)
    place("usr/lib/python3/dist-packages/xtool.pth", lab_file("xtool.pth"))
    place("etc/xtool/defaults.yaml", lab_file("defaults.yaml"))
    place("opt/xtool/src/.keep", b"")
    (target / "host_key").unlink()


def _python_packages(folder: Path) -> None:
    """Install wheels for the lab's Python (3.11, glibc 2.36), whatever Python runs here."""
    platforms = [f"manylinux{form}_x86_64" for form in ("2014", "_2_17", "_2_28", "_2_34", "_2_36")]
    run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)),
            *("--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"),
            *(option for platform in platforms for option in ("--platform", platform)),
            *("--no-compile", *python_requirements()),
        ],
        "installing Python packages for the lab",
    )
    if importlib.util.MAGIC_NUMBER == LAB_PYC_MAGIC:
        # Compiled here, because the emulated CPU takes fifteen times as long; timestamps hold, as
        # tar and mke2fs keep them.
        run(
            [sys.executable, "-m", "compileall", "-q", "-s", folder, "-p", "/opt/xtool/deps", folder],
            "compiling Python packages",
        )


def _root_disk(disk: Path, work: Path, overlay: Path, progress: Progress) -> None:
    """Debian tree plus ``overlay`` as an ext4 disk image."""
    archive = work / "debian.tar"
    stages = {
        "running apt-get update": "reading Debian's package lists",
        "downloading packages": "downloading Debian packages",
        "extracting archives": "unpacking Debian packages",
        "installing essential": "installing Debian's essential packages",
        "installing remaining": "installing Xen and its tools",
        "creating tarball": "packing the root file system",
    }

    def on_line(line: str) -> None:
        for sign, text in stages.items():
            if line.startswith("I: ") and sign in line:
                progress.step(text)

    options = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
    apt_conf = work / "apt.conf"
    apt_conf.write_text(apt.acquire_options())
    sources = apt.sources()
    # An empty suite with "-" reads the sources from stdin; else mmdebstrap knows Debian's own.
    place = ["", str(archive), "-"] if sources else [apt.CODENAME, str(archive)]
    run(
        [
            *("mmdebstrap", "--variant=essential", "--format=tar", f"--include={','.join(_PACKAGES)}"),
            *("--dpkgopt=force-unsafe-io", *options, f"--aptopt={apt_conf}"),
            # Of this machine's network set-up nothing stays in the image.
            '--customize-hook=rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/apt/sources.list.d/*',
            '--customize-hook=rm -f "$1"/etc/resolv.conf "$1"/etc/ssh/ssh_host_* "$1"/etc/apt/sources.list',
            *place,
        ],
        "installing Debian into the lab's image",
        stdin=sources.encode(),
        on_line=on_line,
    )
    progress.step("making the root disk")
    script = (
        "set -e\n"
        'mkdir "$1/tree"\n'
        'tar -C "$1/tree" -xpf "$1/debian.tar" && rm "$1/debian.tar"\n'
        # merged /usr: /lib is a link in the tree, so the overlay's lib goes below usr
        'cp -a --no-preserve=ownership "$1/overlay/lib/modules" "$1/tree/usr/lib/"\n'
        'mkdir "$3"\n'
        f'cp "$1/tree/usr/lib/xen-{_XEN}/boot/hvmloader" "$1/tree/usr/share/seabios/bios-256k.bin" "$3/"\n'
        'rm -rf "$1/overlay/lib"\n'
        'cp -a --no-preserve=ownership "$1/overlay/." "$1/tree/"\n'
        'cd "$1/tree" && chown -R 0:0 opt etc/lab etc/xtool etc/ssh usr/lib/modules && cd - >/dev/null\n'
        "mke2fs -q -t ext4 -L lab -m 0 -O ^has_journal,^metadata_csum -E lazy_itable_init=0,root_owner=0:0"
        f' -d "$1/tree" "$2" {_DISK_SIZE >> 10}k\n'
    )
    shell = ["sh", "-c", script, "sh", str(work), str(disk), str(disk.parent / "firmware")]
    run(shell if os.geteuid() == 0 else ["fakeroot", *shell], "making the root disk")
    if disk.stat().st_size != _DISK_SIZE:
        raise LabError("making the root disk gave a file of the wrong size")
