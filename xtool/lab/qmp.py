"""A small QMP client for the lab's own QEMU: one command at a time, events skipped.

Facts: QEMU greets with ``{"QMP": ...}``, wants ``qmp_capabilities`` first, ends each message with a
newline, and serves one client of a socket at a time.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from xtool.errors import LabError


class Qmp:
    """A connection; use it in ``with``. Raises LabError when QEMU refuses or goes away."""

    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
            self._reader = self._socket.makefile("rb")
            self._message()
            self.command("qmp_capabilities")
        except OSError as error:
            self._socket.close()
            raise LabError(f"the lab's QEMU does not answer on {path}: {error}") from error
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._reader.close()
        self._socket.close()

    def _message(self) -> dict[str, Any]:
        try:
            line = self._reader.readline()
        except OSError as error:
            raise LabError(f"the lab's QEMU does not answer: {error}") from error
        if not line.endswith(b"\n"):
            raise LabError("the lab's QEMU went away")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise LabError("the lab's QEMU talks nonsense") from error
        return dict(message)

    def command(self, name: str, **arguments: Any) -> Any:
        """Run one command and give what it returns."""
        request = json.dumps({"execute": name, "arguments": arguments}) + "\n"
        try:
            self._socket.sendall(request.encode())
        except OSError as error:
            raise LabError(f"the lab's QEMU does not take {name}: {error}") from error
        while True:
            message = self._message()
            if "error" in message:
                raise LabError(f"the lab's QEMU refused {name}: {message['error'].get('desc')}")
            if "return" in message:
                return message["return"]

    def save_state(self, path: Path, deadline: float = 120.0) -> None:
        """Write the paused machine's state to ``path`` (QEMU's migration stream)."""
        import shlex

        self.command("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.command("migrate", uri=f"exec:cat > {shlex.quote(str(path))}")
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            # No event is promised for a migration's end unless asked for; this is short and rare.
            status = self.command("query-migrate")
            if status.get("status") == "completed":
                return
            if status.get("status") in ("failed", "cancelled"):
                raise LabError(
                    f"saving the lab's state failed: {status.get('error-desc', 'no reason given')}"
                )
            time.sleep(0.05)
        raise LabError(f"saving the lab's state took more than {deadline:.0f} s")

    def wait_restored(self, deadline: float = 120.0) -> None:
        """Wait until a machine started from a saved state has read it all."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            status = self.command("query-status")["status"]
            if status != "inmigrate":
                return
            time.sleep(0.05)
        raise LabError(f"restoring the lab took more than {deadline:.0f} s")
