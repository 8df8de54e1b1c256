"""Running one of Xen's hotplug scripts, for those who have their own (``script:``).

Facts about hotplug scripts (Xen's ``tools/hotplug/Linux``)
-----------------------------------------------------------
- They find their device by ``XENBUS_PATH``, relative to the backend domain, and read its nodes with
  ``xenstore-read``; they report by ``hotplug-status`` (``connected``, ``error``, ``busy``) and
  ``hotplug-error`` there.
- A block script is run with ``add`` or ``remove`` and writes ``physical-device``. A vif script is run with
  ``online`` or ``offline`` and the words ``type_if=vif``, and finds the interface in ``vif``.
- Some take a lock in ``/var/lock`` and can wait for each other for a long time: hence the deadline.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from xtool.errors import DeadlineError, HostError

#: Most that is kept of what a script prints, in bytes.
_OUTPUT = 4096


def run(script: str, arguments: list[str], environment: Mapping[str, str], deadline: float) -> None:
    """Run a script to its end. Raises ``HostError`` with its last words when it fails, ``DeadlineError``."""
    import subprocess  # late: it is large, and few have scripts

    if not os.access(script, os.X_OK) or os.path.isdir(script):
        raise HostError(f"the hotplug script {script} is missing or not executable", hint="check script:")
    whole = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "script": script, **environment}
    process = subprocess.Popen(
        [script, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=whole,
        cwd="/",
        start_new_session=True,  # so that what it started can be ended with it
    )
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise DeadlineError(f"the hotplug script {script} did not end within {deadline:g} s") from None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        lines = output[-_OUTPUT:].decode(errors="backslashreplace").strip().splitlines()
        words = f": {lines[-1]}" if lines else ""
        raise HostError(f"the hotplug script {script} failed with status {process.returncode}{words}")
