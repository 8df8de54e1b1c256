"""Finding and opening a domain's console tty.

Facts about consoles
--------------------
- The PV console of any domain is served by ``xenconsoled``, which makes a pty and writes its name to
  ``/local/domain/N/console/tty`` once the domain is introduced. QEMU does the same for an emulated serial
  port that was configured as ``pty``, at ``/local/domain/N/serial/0/tty``.
- ``xenconsoled`` keeps what the guest prints while nobody is attached: the pty's few KiB, and up to
  ``console/limit`` bytes of its own. Beyond that the oldest output is lost. QEMU throws serial output away
  while nobody has the pty open, so whoever wants a guest's first line opens the tty before unpausing.
- Two readers of one pty each get half of the output. Xen's ``xenconsole`` therefore holds a lock on
  ``/var/lock/xenconsole.N``; we take the same one.
- A guest that could write the tty node could make us open any file, so a node that the guest may write
  is refused, and so is anything but a pty (XSA-57).
"""

from __future__ import annotations

import fcntl
import os
import stat
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from xtool.errors import DeadlineError, DomainError, DomainNotFoundError, UsageError
from xtool.xenstore import paths
from xtool.xenstore.perms import may_write
from xtool.xenstore.port import Store
from xtool.xenstore.watches import wait_for

KINDS = ("pv", "serial")
LOCK_DIR = "/var/lock"
_PTS = "/dev/pts/"
#: Linux's majors for the pty's user side: UNIX98_PTY_SLAVE_MAJOR and the seven after it.
_PTS_MAJORS = range(136, 144)


def tty_node(domid: int, kind: str) -> str:
    """The xenstore path of the tty's name. ``kind`` is ``pv`` or ``serial``."""
    if kind not in KINDS:
        raise UsageError(f"no console of kind {kind!r}", hint="the kinds are pv and serial")
    return (paths.console(domid) if kind == "pv" else paths.serial(domid)) + "/tty"


def wait_for_tty(store: Store, domid: int, kind: str, deadline: float) -> str:
    """The tty of this console, as soon as it is known; at most ``deadline`` seconds.

    Raises ``DomainNotFoundError`` when the domain is gone or goes, ``DomainError`` for a tty that must not
    be opened, ``DeadlineError`` when none came.
    """
    node = tty_node(domid, kind)
    home = paths.domain(domid)

    def look() -> str | None:
        found = store.get_many((node, home))
        if found[home] is None:
            raise DomainNotFoundError(f"there is no domain {domid}, or it has just ended")
        return found[node] or None

    server = "xenconsoled" if kind == "pv" else "the device model"
    try:
        name = wait_for(store, [home], look, deadline, f"domain {domid} has no {kind} console yet")
    except DeadlineError as error:
        hint = f"{server} announces it; is it running?"
        if kind == "serial":
            hint += " The domain file needs serial: pty"
        raise DeadlineError(error.message, hint=hint) from None
    for path in (node, paths.parent(node)):
        if may_write(store.get_perms(path), domid):
            raise DomainError(
                f"the guest itself may change {path}, so the name of its console there cannot be trusted",
                hint="whoever created the domain gave it wrong permissions in xenstore",
            )
    check_tty_name(name)
    return name


def check_tty_name(name: str) -> None:
    """Raises ``DomainError`` for anything but ``/dev/pts/NUMBER``."""
    number = name.removeprefix(_PTS)
    if not name.startswith(_PTS) or not (number.isascii() and number.isdecimal()) or len(number) > 9:
        raise DomainError(f"not the name of a pty: {name[:100]!r}", hint="it will not be opened")


def open_tty(name: str) -> int:
    """Open a console's pty for both ways, non-blocking and raw. The caller closes the descriptor.

    Raises ``DomainError`` when it is no pty (any more).
    """
    check_tty_name(name)
    try:
        fd = os.open(name, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise DomainError(
            f"cannot open the console {name}: {error.strerror}", hint="has the domain ended?"
        ) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISCHR(status.st_mode) or os.major(status.st_rdev) not in _PTS_MAJORS:
            raise DomainError(f"{name} is not a pty")
        # Else the terminal layer would echo the guest's own output back to it. Not TCSAFLUSH, the default:
        # it drops what the guest printed before we came.
        tty.setraw(fd, termios.TCSANOW)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def console_lock(domid: int, directory: str | None = None) -> Iterator[None]:
    """Be the only reader of this domain's console, among xtool's and Xen's own clients.

    Raises ``DomainError`` when somebody else is attached. Without the right to lock, goes on unlocked.
    """
    path = f"{LOCK_DIR if directory is None else directory}/xenconsole.{domid}"
    fd = -1
    while fd < 0:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            break
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise DomainError(
                f"the console of domain {domid} is in use", hint="leave the other console with Ctrl-]"
            ) from None
        if not _same_file(fd, path):  # the one before us has removed it between our open and our lock
            os.close(fd)
            fd = -1
    try:
        yield
    finally:
        if fd >= 0:
            os.unlink(path)
            os.close(fd)


def _same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
