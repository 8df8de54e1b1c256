"""Opening Xen's device nodes, with an error that says what to do."""

from __future__ import annotations

import os

from xtool.errors import NoXenError, PrivilegeError


def open_device(path: str, module: str, flags: int = 0) -> int:
    """Open ``path`` for reading and writing; a file descriptor that does not survive exec.

    ``module`` is the kernel module that provides the node. Raises ``PrivilegeError``, ``NoXenError``.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags)
    except PermissionError as error:
        raise PrivilegeError(f"not allowed to open {path}", hint="run as root (sudo xtool ...)") from error
    except OSError as error:
        if os.path.isdir("/proc/xen") or os.path.exists("/sys/hypervisor/type"):
            hint = f"this looks like Xen: load the {module} kernel module (modprobe {module})"
        else:
            hint = "use a Xen host with -H ssh://root@host, or the lab: xtool lab up, then xtool -H lab ..."
        raise NoXenError(
            f"no Xen hypervisor here: {path}: {os.strerror(error.errno or 0)}", hint=hint
        ) from error
