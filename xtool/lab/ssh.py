"""Reaching a lab by ssh, over one connection that stays open.

Facts about OpenSSH: a login costs an emulated CPU over a second, a second session on an open connection
a tenth of that, so one ``ssh -M`` stays in the background per lab. It is started apart, because a master
that a command starts on the way keeps that command's stderr open. The default key exchange (sntrup761)
alone costs a second there; curve25519 does not.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xtool.errors import LabError


@dataclass(frozen=True)
class SshTarget:
    """How to reach one lab."""

    port: int
    key: Path
    known_hosts: Path
    control: Path

    def options(self) -> list[str]:
        return [
            *("-F", "/dev/null", "-p", str(self.port), "-i", str(self.key)),
            *(
                option
                for setting in (
                    "IdentitiesOnly=yes",
                    "BatchMode=yes",
                    f"UserKnownHostsFile={self.known_hosts}",
                    "GlobalKnownHostsFile=/dev/null",
                    "HostKeyAlias=xtool-lab",
                    "StrictHostKeyChecking=yes",
                    "KexAlgorithms=curve25519-sha256",
                    "LogLevel=ERROR",
                    "ServerAliveInterval=15",
                    "ServerAliveCountMax=8",
                    f"ControlPath={self.control}",
                )
                for option in ("-o", setting)
            ),
        ]

    def argv(self, command: Sequence[str] = (), *, tty: bool = False) -> list[str]:
        """``ssh`` running ``command`` (its words are quoted), or a login shell for none."""
        remote = [shlex.join(command)] if command else []
        return [
            "ssh",
            *self.options(),
            "-o",
            "ControlMaster=no",
            "-t" if tty else "-T",
            "root@127.0.0.1",
            *remote,
        ]

    def master_alive(self) -> bool:
        if not self.control.exists():
            return False
        check = ["ssh", *self.options(), "-O", "check", "root@127.0.0.1"]
        return _quiet(check).returncode == 0

    def open_master(self, deadline: float = 30.0, alive: object = None) -> None:
        """Open the connection that later commands share, unless it is open. Raises LabError."""
        if self.master_alive():
            return
        self.control.unlink(missing_ok=True)
        end = time.monotonic() + deadline
        command = ["ssh", *self.options(), "-o", "ControlMaster=yes", "-o", "ControlPersist=yes"]
        command += ["-o", "ConnectTimeout=20", "-fNT", "root@127.0.0.1"]
        while True:
            done = _quiet(command)
            if done.returncode == 0:
                return
            if time.monotonic() > end:
                why = done.stderr.decode(errors="replace").strip() or f"ssh ended with {done.returncode}"
                raise LabError(
                    f"the lab runs but its sshd does not let us in: {why}",
                    hint="see what it says: xtool lab log; start it anew: xtool lab reset",
                )
            time.sleep(0.2)

    def close_master(self) -> None:
        if self.control.exists():
            _quiet(["ssh", *self.options(), "-O", "exit", "root@127.0.0.1"])
            self.control.unlink(missing_ok=True)

    def run(self, script: str, *, stdin: bytes | None = None, timeout: float = 300.0) -> bytes:
        """Run a shell script text in the lab and return its stdout. Raises LabError when it fails."""
        command = ["ssh", *self.options(), "-o", "ControlMaster=no", "-T", "root@127.0.0.1", script]
        try:
            done = subprocess.run(
                command,
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"the lab did not answer within {timeout:.0f} s", hint="xtool lab reset"
            ) from error
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace").strip()
            raise LabError(f"a command in the lab ended with status {done.returncode}: {text}")
        return done.stdout


def _quiet(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    # stderr goes to a file, not a pipe: a master in the background would keep the pipe open for ever.
    import tempfile

    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, check=False
        )
        with contextlib.suppress(OSError):
            os.lseek(errors.fileno(), 0, os.SEEK_SET)
        return subprocess.CompletedProcess(command, done.returncode, b"", errors.read())
