"""Ask the C compiler: sizes, offsets and constants of Xen's public headers.

One C program per question, so that what a header does not have is found out first (the compiler names the
lines) and left out of the program that is run.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import xtool.abi
from xtool.abi import base

#: Where Debian's libxen-dev puts ``xen/include/public``.
SYSTEM_HEADERS = Path("/usr/include/xen")

HEADERS = (
    "xen.h", "domctl.h", "sysctl.h", "memory.h", "event_channel.h", "sched.h", "grant_table.h", "version.h",
    "vcpu.h", "features.h", "elfnote.h", "platform.h", "hvm/hvm_op.h", "hvm/params.h",
    "hvm/hvm_info_table.h", "hvm/hvm_vcpu.h", "hvm/save.h", "hvm/e820.h", "hvm/ioreq.h",
    "arch-x86/hvm/start_info.h", "arch-x86/cpuid.h", "io/ring.h", "io/blkif.h", "io/netif.h", "io/console.h",
    "io/xs_wire.h", "io/xenbus.h", "hypfs.h",
)  # fmt: skip

#: The kernel's own headers for its Xen devices (Debian: linux-libc-dev), beside Xen's in /usr/include/xen.
LINUX_HEADERS = ("privcmd.h", "evtchn.h", "gntdev.h", "gntalloc.h")

FLAGS = (
    "-m64",
    "-std=gnu11",
    "-w",
    "-D__XEN_TOOLS__",
    "-D__XEN_INTERFACE_VERSION__=__XEN_LATEST_INTERFACE_VERSION__",
)

#: Python constants whose C spelling is another expression; a module adds its own with ``C_CONSTANTS``.
EXPRESSIONS = {
    **{
        f"HVM_SAVE_CODE_{name}": f"HVM_SAVE_CODE({name})"
        for name in ("END", "HEADER", "CPU", "MTRR", "LAPIC")
    },
    "FLAT_CS64": "FLAT_RING3_CS64",
    "FLAT_SS64": "FLAT_RING3_SS64",
    "E820_RAM": "XEN_HVM_MEMMAP_TYPE_RAM",
    "E820_RESERVED": "XEN_HVM_MEMMAP_TYPE_RESERVED",
    "E820_ACPI": "XEN_HVM_MEMMAP_TYPE_ACPI",
}


class HeaderError(Exception):
    """The compiler rejected the program as a whole."""


def abi_modules() -> list[ModuleType]:
    names = [m.name for m in pkgutil.iter_modules(xtool.abi.__path__) if m.name != "base"]
    return [importlib.import_module(f"xtool.abi.{name}") for name in sorted(names)]


def layouts() -> list[type[ctypes.Structure]]:
    """Every layout that names a C type, of all modules."""
    abi_modules()
    return list(base.LAYOUTS)


def members(cls: type[ctypes.Structure]) -> dict[str, str]:
    """Python field -> C member, padding and private fields left out."""
    renamed: dict[str, str] = cls.C_MEMBERS  # type: ignore[attr-defined]
    return {name: renamed.get(name, name) for name, _ in base.fields_of(cls) if not name.startswith("_")}


def constants() -> dict[str, tuple[str, int]]:
    """``module.NAME`` -> (C expression, Python's value), for all public integers of all modules."""
    found = {}
    for module in abi_modules():
        spelled: dict[str, str] = getattr(module, "C_CONSTANTS", {})
        for name, value in vars(module).items():
            public = not name.startswith("_") or name.startswith("__HYPERVISOR_")
            if public and isinstance(value, int) and not isinstance(value, bool):
                expression = spelled.get(name) or EXPRESSIONS.get(name, name)
                found[f"{module.__name__.rsplit('.', 1)[1]}.{name}"] = (expression, int(value))
    return found


def evaluate(expressions: list[str], headers: Path = SYSTEM_HEADERS) -> dict[str, int]:
    """The value of each C expression that compiles as an integer; the others are missing in the answer.

    Raises ``HeaderError`` if the headers themselves do not compile.
    """
    wanted = list(dict.fromkeys(expressions))
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "ask.c"), Path(folder, "ask")
        Path(folder, "xen").symlink_to(headers)
        # The kernel's headers name Xen's by the path they have in its source tree.
        kernel = Path(folder, "kernel")
        (kernel / "xen/interface").mkdir(parents=True)
        (kernel / "xen/interface/xen.h").write_text("#include <xen/xen.h>\n")
        include = (f"-I{folder}", f"-I{kernel}")
        for _ in range(3):
            lines = _program(wanted, headers)
            source.write_text("\n".join(lines) + "\n")
            run = subprocess.run(
                ["gcc", *FLAGS, "-fmax-errors=0", *include, str(source), "-o", str(program)],
                capture_output=True,
                text=True,
            )
            if run.returncode == 0:
                break
            bad = _rejected(run.stderr, source, lines)
            if not bad:
                raise HeaderError(run.stderr)
            wanted = [e for e in wanted if e not in bad]
        else:
            raise HeaderError(run.stderr)
        out = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    return dict(zip(wanted, map(int, out.split()), strict=True))


def _program(expressions: list[str], headers: Path) -> list[str]:
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <stdint.h>"]
    lines += ["typedef int64_t s64;"]
    lines += [f"#include <xen/{name}>" for name in HEADERS if (headers / name).exists()]
    if headers == SYSTEM_HEADERS:
        lines += ["#include <sys/ioctl.h>"]
        lines += [f"#include <xen/{name}>" for name in LINUX_HEADERS]
    lines += ["int main(void) {"]
    lines += [f'printf("%lld\\n", (long long)({expression}));' for expression in expressions]
    return [*lines, "return 0; }"]


def _rejected(errors: str, source: Path, lines: list[str]) -> set[str]:
    """The expressions whose lines the compiler complains about."""
    bad = set()
    for error in errors.splitlines():
        if error.startswith(f"{source}:") and ": error:" in error:
            line = lines[int(error.split(":")[1]) - 1]
            if line.startswith("printf"):
                bad.add(line.split("(long long)(", 1)[1][: -len("));")])
    return bad


def size_of(c_name: str) -> str:
    return f"sizeof({c_name})"


def offset_of(c_name: str, member: str) -> str:
    return f"offsetof({c_name}, {member})"


def member_size(c_name: str, member: str) -> str:
    return f"sizeof((({c_name} *)0)->{member})"
