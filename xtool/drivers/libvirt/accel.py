"""Does KVM work here? A device node does not say so: nested or emulated hosts have one that fails.

Fact: what a vCPU needs of KVM is set when QEMU starts, even with its CPUs stopped (``-S``): an accelerator
that cannot do it ends QEMU there, within a tenth of a second.
"""

from __future__ import annotations

import os
import subprocess

_QUIT = b'{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n'
_TIME = 20.0
EMULATORS = ("/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm")


def find_emulator() -> str | None:
    """QEMU for x86 PCs as libvirt would find it, None where there is none."""
    return next((path for path in EMULATORS if os.access(path, os.X_OK)), None)


def kvm_works(emulator: str, device: str = "/dev/kvm") -> bool:
    """Whether ``emulator`` can start a machine with KVM and the host's CPU."""
    if not os.access(device, os.R_OK | os.W_OK):
        return False
    argv = [emulator, "-accel", "kvm", "-cpu", "host", "-m", "16", "-display", "none", "-S"]
    try:
        done = subprocess.run(
            [*argv, "-nodefaults", "-no-user-config", "-qmp", "stdio"],
            input=_QUIT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TIME,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
