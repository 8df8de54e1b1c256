"""QEMU as a process: started early, waited for, found again, ended. Touches no xenstore.

Facts about QEMU under Xen, and what they ask of the caller:

- Before ``spawn``: the domain exists, its memory limit and (HAP) paging pool are set, and its vCPUs exist
  (QEMU binds one event channel per vCPU as it starts). The guest's RAM need not be there yet: QEMU adds
  its own pages (video memory, a few ROMs) above the end of RAM, so starting it overlaps with the build.
- Its pages count against the domain's limit: ``videoram`` and at most ``MAXMEM_SLACK`` for ROMs.
- It writes only below ``/local/domain/0/device-model/<domid>``; nodes a former domain left there must be
  removed before ``spawn``. It needs no node of the guest.
- It is ready when it answers QMP; it then has written ``state`` = ``running`` there too.
- It ignores SIGPIPE, and ends on SIGTERM in good order (disks flushed) even with ``-no-shutdown``.

Messages: QEMU's output goes through a pipe to ``dd``, which copies the first ``LOG_LIMIT`` bytes to the
log and ends; what a guest makes QEMU print later is refused by the pipe (a limit on file sizes would hit
its disk images as well). The pipe does not block, so a full disk or a stuck log never stops QEMU.

The process outlives whoever started it: it has a session of its own, and no descriptor of ours.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

from xtool import paths
from xtool.devicemodel import pidfd
from xtool.devicemodel.argv import build_argv, find_device_model
from xtool.devicemodel.qdisk import QdiskSpec, build_qdisk_argv
from xtool.devicemodel.qmp import QmpClient, QmpGoneError, serial_ttys
from xtool.devicemodel.spec import DeviceModelSpec
from xtool.errors import DeadlineError, DeviceModelError, LocalProtocolError, RemoteProtocolError

#: Bytes above memory (videoram included) that the domain's limit must allow, as libxl does.
MAXMEM_SLACK = 1 << 20
#: Most that is kept of one QEMU's output, in bytes.
LOG_LIMIT = 1 << 20
#: QEMU's number of the listening QMP socket.
_QMP_FD = 3
#: How long a killed process may take to disappear, in seconds: only a hung kernel needs that.
_KILL_TIME = 10.0


class VncAddress(NamedTuple):
    host: str
    port: str


class Ready(NamedTuple):
    """What a device model that came up says: serial port number -> pty, and where VNC listens."""

    serial: dict[int, str]
    vnc: VncAddress | None


#: What this process spawned and has not seen off, and what it saw of the ends of others among them.
_spawned: set[int] = set()
_ends: dict[int, str] = {}


def reap_ended() -> None:
    """See off device models (and their ``dd``) that others ended: they are zombies of this process else.

    A process that lives long calls this on SIGCHLD.
    """
    for pid in tuple(_spawned):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            _spawned.discard(pid)
            continue
        if pidfd.wait(fd, 0):
            _ends[pid] = pidfd.reap(fd)
            _seen_off(pid)
        os.close(fd)


def _seen_off(pid: int) -> None:
    """The number may come to mean another process from now on."""
    _spawned.discard(pid)
    for domid in [domid for domid, pump in _pumps.items() if pump == pid]:
        del _pumps[domid]


#: The ``dd`` of each device model this process started: its child, and so its to reap.
_pumps: dict[int, int] = {}


def _reap_pump(domid: int) -> None:
    """See the ``dd`` of a device model off, which ends with it."""
    pid = _pumps.get(domid)
    if pid is None:
        return
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:  # reaped already
        _seen_off(pid)
        return
    if pidfd.wait(fd, 1.0):
        pidfd.reap(fd)
        _seen_off(pid)
    os.close(fd)


def qmp_path(domid: int) -> Path:
    return paths.run_dir() / f"qmp-{domid}.sock"


def log_path(name: str) -> Path:
    return paths.log_dir() / f"qemu-{name.replace('/', '_')}.log"


class DeviceModel:
    """One running (or just ended) QEMU.

    ``pid`` belongs at ``/local/domain/<domid>/image/device-model-pid``, where libxl looks for it too.
    """

    def __init__(
        self,
        domid: int,
        pid: int,
        pid_fd: int,
        *,
        log: Path | None = None,
        pump: tuple[int, int] | None = None,
    ) -> None:
        self.domid = domid
        self.pid = pid
        self.log = log
        self._fd = pid_fd
        self._pump = pump  # pid and pidfd of the dd that writes the log, when it is our child
        self._status = ""
        self._client: QmpClient | None = None
        self._asked: dict[str, int] = {}

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._fd

    def alive(self) -> bool:
        return not pidfd.wait(self._fd, 0)

    def ask(self, spec: DeviceModelSpec | QdiskSpec, *, deadline: float = 5.0) -> None:
        """Put the questions of ``wait_ready`` now; QEMU answers them when it is ready."""
        self._client = QmpClient(qmp_path(self.domid), deadline=deadline)
        self._asked = {"status": self._client.send("query-status")}
        if spec.serial:
            self._asked["serial"] = self._client.send("query-chardev")
        if spec.vnc:
            self._asked["vnc"] = self._client.send("query-vnc")

    def wait_ready(self, deadline: float, *, vnc_password: str | None = None) -> Ready:
        """Wait at most ``deadline`` seconds until QEMU serves the guest; then it may be unpaused.

        Raises ``DeviceModelError`` with QEMU's last words when it dies, ``DeadlineError`` when it neither
        comes up nor dies. Does not end QEMU: ``stop`` is the caller's undo.
        """
        if self._client is None:
            raise LocalProtocolError("wait_ready works once, on a device model from spawn")
        until = time.monotonic() + deadline
        answers: dict[str, object] = {}
        try:
            for name, number in self._asked.items():
                left = max(0.0, until - time.monotonic())
                answers[name] = self._client.receive(number, deadline=left)
            if vnc_password is not None:
                left = max(0.0, until - time.monotonic())
                self._client.execute("change-vnc-password", {"password": vnc_password}, deadline=left)
        except QmpGoneError:
            raise self._died() from None
        except DeadlineError:
            raise DeadlineError(
                f"the device model of domain {self.domid} was not ready within {deadline:g} s",
                hint=self._hint(),
            ) from None
        finally:
            self._hang_up()
        status = answers["status"]
        if not isinstance(status, dict) or status.get("status") != "running":
            raise DeviceModelError(f"QEMU came up in an unexpected state: {str(status)[:200]}")
        return Ready(serial_ttys(answers.get("serial", [])), _vnc_address(answers.get("vnc")))

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _died(self) -> DeviceModelError:
        """QEMU's end as an error; also when it only closed the connection."""
        if not pidfd.wait(self._fd, 1.0):
            return DeviceModelError(
                f"the device model of domain {self.domid} closed its control connection", hint=self._hint()
            )
        self._reap()
        words = self.last_words()
        text = f"the device model of domain {self.domid} {self._status or 'ended'} as it started"
        if "DES algorithm" in words:  # which VNC's passwords need
            hint = "this QEMU knows no VNC passwords: leave vncpasswd out, and reach the display through ssh"
            return DeviceModelError(f"{text}: {words}", hint=hint)
        return DeviceModelError(f"{text}: {words}" if words else text, hint=self._hint())

    def _hint(self) -> str:
        return f"its messages: {self.log}" if self.log else "look at its messages in the log folder"

    def last_words(self) -> str:
        """The last line QEMU wrote, or nothing."""
        if self._pump is not None:
            pidfd.wait(self._pump[1], 1.0)  # after QEMU's end the rest of the pipe is written out at once
        if self.log is None:
            return ""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().decode(errors="backslashreplace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:400]

    def stop(self, *, grace: float = 1.0) -> None:
        """End QEMU, whatever state it is in, and remove its socket. Doing it twice is no error.

        It has ``grace`` seconds to write out its disks after SIGTERM; then it is killed. Raises
        ``DeviceModelError`` only when the kernel cannot end it (stuck in I/O).
        """
        self._hang_up()
        pidfd.terminate(self._fd)
        if not pidfd.wait(self._fd, grace):
            pidfd.kill(self._fd)
            if not pidfd.wait(self._fd, _KILL_TIME):
                raise DeviceModelError(
                    f"the device model of domain {self.domid} (pid {self.pid}) cannot be killed",
                    hint="it hangs in the kernel, probably on a disk or network file system",
                )
        self._reap()
        _reap_pump(self.domid)
        qmp_path(self.domid).unlink(missing_ok=True)
        self.close()

    def _reap(self) -> None:
        self._status = pidfd.reap(self._fd) or _ends.pop(self.pid, "") or self._status
        _seen_off(self.pid)
        if self._pump is not None and pidfd.wait(self._pump[1], 1.0):
            pidfd.reap(self._pump[1])
            _seen_off(self._pump[0])

    def close(self) -> None:
        """Forget the process, which goes on if it runs. ``stop`` does this too."""
        self._hang_up()
        for fd in (self._fd, self._pump[1] if self._pump else -1):
            if fd >= 0:
                os.close(fd)
        self._fd, self._pump = -1, None


def spawn(spec: DeviceModelSpec | QdiskSpec, domid: int, *, binary: str | None = None) -> DeviceModel:
    """Start QEMU for the domain and return at once; see the facts above for what must precede.

    ``binary`` None takes the host's. Raises ``DeviceModelError`` when it cannot be started; what happens
    later shows in ``wait_ready``.
    """
    program = find_device_model(binary)
    socket_path = qmp_path(domid)
    opened: list[int] = []
    model: DeviceModel | None = None
    try:
        log = _open_log(spec.name, opened)
        listener = _listen(socket_path, opened)
        pipe_read, pipe_write = os.pipe()
        opened += (pipe_read, pipe_write)
        os.set_blocking(pipe_write, False)
        if isinstance(spec, QdiskSpec):
            argv = build_qdisk_argv(spec, domid, program, _QMP_FD)
        else:
            argv = build_argv(spec, domid, program, _QMP_FD)
        pid = _start(argv, {0: "/dev/null", 1: pipe_write, 2: pipe_write, _QMP_FD: listener})
        model = DeviceModel(domid, pid, os.pidfd_open(pid), log=log_path(spec.name))
        dd = ["dd", "bs=512", f"count={LOG_LIMIT // 512}", "status=none"]
        pump = _start(dd, {0: pipe_read, 1: log, 2: "/dev/null"})
        model._pump = (pump, os.pidfd_open(pump))
        _pumps[domid] = pump
        model.ask(spec)
    except BaseException as error:
        if model is not None:
            model.stop(grace=0)
        socket_path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            where = f" ({error.filename})" if error.filename else ""
            raise DeviceModelError(
                f"the device model {program} cannot be started: {error.strerror}{where}"
            ) from error
        raise
    finally:
        for fd in opened:
            os.close(fd)
    return model


def find(domid: int, *, uuid: str = "", pid: int | None = None) -> DeviceModel | None:
    """The QEMU that serves the domain, whoever started it; None when there is none.

    ``pid`` (from ``/local/domain/<domid>/image/device-model-pid``) is only where to look first: a process
    counts if its own command line names the domain, and the ``uuid`` if one is given. So a stale or
    forged number never leads to a stranger, and a QEMU whose number was not yet written is found as well.
    """
    for candidate in _candidates(pid):
        try:
            fd = os.pidfd_open(candidate)
        except OSError:
            continue
        # The descriptor is taken first: if that process still runs after its command line was read,
        # the command line was its own.
        if pidfd.serves(candidate, domid, uuid) and not pidfd.wait(fd, 0):
            return DeviceModel(domid, candidate, fd)
        os.close(fd)
    return None


def _candidates(first: int | None) -> list[int]:
    others = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return others if first is None or first <= 1 else [first, *others]


def _vnc_address(answer: object) -> VncAddress | None:
    if not isinstance(answer, dict) or answer.get("enabled") is not True:
        return None
    host, port = answer.get("host"), answer.get("service")
    if not isinstance(host, str) or not isinstance(port, str):
        raise RemoteProtocolError("QEMU's answer to query-vnc has not the expected shape")
    return VncAddress(host, port)


def _open_log(name: str, opened: list[int]) -> int:
    """A new log; the former one is kept as ``....1``."""
    path = log_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name(path.name + ".1"))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    opened.append(fd)
    return fd


def _listen(path: Path, opened: list[int]) -> int:
    """A listening socket only root can reach. Connecting works from now on; QEMU accepts when it can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        listener.bind(str(path))
        os.chmod(path, 0o600)  # nobody can connect before listen
        listener.listen(1)
        opened.append(fd := listener.detach())
    return fd


def _start(argv: list[str], files: dict[int, int | str]) -> int:
    """Run a program in a session of its own with exactly these descriptors; returns its pid."""
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
    copies: list[int] = []
    for number, source in files.items():
        if isinstance(source, str):
            actions.append((os.POSIX_SPAWN_OPEN, number, source, os.O_RDWR, 0))
        else:
            # A copy with a high number: ours may be 0, 1 or 2 when we were started with those closed.
            copies.append(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 16))
            actions.append((os.POSIX_SPAWN_DUP2, copies[-1], number))
    # Ours are close-on-exec; these are what our own parent left open.
    actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd not in files]
    # XEN_QEMU_CONSOLE_LIMIT: Xen's own QEMU bounds its output by it, too.
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    environment["XEN_QEMU_CONSOLE_LIMIT"] = str(LOG_LIMIT)
    before = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir("/")  # so that it keeps no mount busy
        pid = os.posix_spawnp(argv[0], argv, environment, file_actions=actions, setsid=True, setsigmask=())
        _spawned.add(pid)
        return pid
    finally:
        os.fchdir(before)
        for fd in (before, *copies):
            os.close(fd)


def _inheritable() -> list[int]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(entry)):
                found.append(int(entry))
        except OSError:  # the descriptor that listed the folder
            continue
    return found


__all__ = ["DeviceModel", "Ready", "VncAddress", "find", "log_path", "qmp_path", "spawn"]
