"""What a lab is made of, and the QEMU command line that makes it: pure functions.

Facts about QEMU's emulation that the flags answer:

- with SMAP on, TCG breaks a PV dom0 early (page fault in Xen's bounce frame): ``-smap,-smep``;
- with RDTSCP, PVH and HVM guests fail on emulated SVM instruction lengths: ``-rdtscp``;
- with XSAVE (and so AVX) on, data went bad in dom0 under load: checksum errors over ssh, programs dying;
  with ``-xsave`` the same load ran clean. The cause was not found;
- the CPU cannot claim an invariant TSC, so Xen traps a guest's RDTSC by default, which is slow: the lab's
  ``/etc/xtool/defaults.yaml`` says ``tsc_mode: native``;
- each FXRSTOR of any CPU clears a flag (IGNNE) in a word of CPU 0's state, ``hflags2``, without a lock
  (``cpu_clear_ignne``; found in 7.2, still there in 9.2). If CPU 0 leaves a guest at that moment, "nested
  paging is on" is put back into the word, the host's next fetch is taken for a nested page fault, and the
  host's state is saved as the guest's, which then triple faults. So no guest shall run on CPU 0:
  ``SPARE_CPU0``;
- ``-icount`` charges string copies per byte unless the CPU hides fast ones: ``-erms,-fsrm``;
- a modules line for multiboot is ``file args,file args``, so no comma may be in a path;
- a readable /dev/kvm proves nothing: nested virtualisation must be there for Xen's own HVM guests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from xtool.errors import LabError

DEFAULT_MEMORY = 8 << 30
DEFAULT_CPUS = 2
DOM0_MEMORY_MIB = 1536

XEN_COMMAND_LINE = (
    f"console=com1 com1=115200 dom0_mem={DOM0_MEMORY_MIB}M,max:{DOM0_MEMORY_MIB}M dom0_max_vcpus=2 "
    # QEMU's memory starts zeroed: scrubbing it would only make this machine back all of it.
    "loglvl=all guest_loglvl=all noreboot bootscrub=0"
)
DOM0_COMMAND_LINE = "console=hvc0 earlyprintk=xen quiet net.ifnames=0 panic=1"
#: dom0's ``/etc/lab/rc`` then makes "all but CPU 0" the default of guests, xtool's and xl's.
SPARE_CPU0 = "lab.spare_cpu0"


@dataclass(frozen=True)
class LabSpec:
    """The machine a lab emulates. ``memory`` is in bytes; ``accel`` is ``kvm`` or ``tcg``."""

    memory: int = DEFAULT_MEMORY
    cpus: int = DEFAULT_CPUS
    accel: str = "tcg"
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.accel not in ("kvm", "tcg"):
            raise LabError(f"no accelerator {self.accel!r}", hint="--accel takes auto, kvm or tcg")
        if self.deterministic and self.accel == "kvm":
            raise LabError(
                "a deterministic lab counts instructions, which KVM cannot", hint="use --accel tcg"
            )
        if self.memory < 2 << 30:
            raise LabError(
                f"{self.memory >> 20} MiB is too little for a lab: dom0 alone takes {DOM0_MEMORY_MIB} MiB",
                hint="give at least 2GiB",
            )
        if not 1 <= self.cpus <= 64:
            raise LabError(f"a lab has 1 to 64 CPUs, not {self.cpus}")


def nested_kvm_works(cpuinfo: str, nested: str, device: bool) -> bool:
    """Whether KVM can run the lab with HVM guests inside.

    ``cpuinfo`` is /proc/cpuinfo, ``nested`` the kvm module's parameter of that name, ``device`` whether
    /dev/kvm can be opened.
    """
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return device and ("vmx" in flags or "svm" in flags) and nested.strip() in ("1", "Y")


def choose_accel(wanted: str) -> str:
    """``auto`` -> ``kvm`` where it can really run this, else ``tcg``; anything else as it is."""
    if wanted != "auto":
        return wanted
    nested = ""
    for module in ("kvm_intel", "kvm_amd"):
        parameter = Path(f"/sys/module/{module}/parameters/nested")
        if parameter.is_file():
            nested = parameter.read_text()
    device = os.access("/dev/kvm", os.R_OK | os.W_OK)
    return "kvm" if nested_kvm_works(Path("/proc/cpuinfo").read_text(), nested, device) else "tcg"


@dataclass(frozen=True)
class Paths:
    """Where one running lab's files are."""

    image: Path
    disk: Path
    console_log: Path
    console_socket: Path
    qmp_socket: Path


def qemu_argv(spec: LabSpec, at: Paths, port: int, state: Path | None) -> list[str]:
    """QEMU's argument vector. ``port`` is the loopback port of the lab's sshd.

    With ``state`` (a saved machine state) QEMU waits, paused, until told to continue; without, it boots.
    """
    dom0 = DOM0_COMMAND_LINE
    if spec.accel == "kvm":
        accel, cpu = ["-accel", "kvm"], "host"
    elif spec.deterministic:
        accel = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off,align=off"]
        cpu = "max,-smap,-smep,-rdtscp,-xsave,-erms,-fsrm"
    else:
        accel, cpu = ["-accel", "tcg,thread=multi"], "max,-smap,-smep,-rdtscp,-xsave"
        if spec.cpus > 1:
            dom0 = f"{dom0} {SPARE_CPU0}"
    log = f"path={at.console_socket},server=on,wait=off,logfile={at.console_log},logappend=on"
    return [
        *("qemu-system-x86_64", "-name", "xtool-lab", "-nodefaults", "-no-user-config"),
        *("-machine", "pc", *accel, "-cpu", cpu, "-smp", str(spec.cpus), "-m", f"{spec.memory >> 20}M"),
        *("-display", "none", "-vga", "none"),
        *("-kernel", str(at.image / "xen"), "-append", XEN_COMMAND_LINE),
        *("-initrd", f"{at.image / 'vmlinuz'} {dom0},{at.image / 'initrd.gz'}"),
        # Unsafe is right here: the disk is thrown away with the lab, snapshots are copies made at rest.
        *("-drive", f"file={at.disk},format=qcow2,if=none,id=root,cache=unsafe,discard=unmap"),
        *("-device", "virtio-blk-pci,drive=root"),
        *(
            "-netdev",
            f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22",
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
        ),
        *("-chardev", f"socket,id=console,{log}", "-serial", "chardev:console"),
        *(
            "-chardev",
            f"socket,id=qmp,path={at.qmp_socket},server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
        ),
        *(("-incoming", f"exec:cat {_quoted(state)}", "-S") if state else ()),
    ]


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
