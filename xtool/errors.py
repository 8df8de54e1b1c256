"""Every error xtool raises on purpose, as one tree.

::

    XtoolError                    may be shown to a person as it is
    ├── UsageError                the command line does not make sense
    ├── ConfigError               a domain file is wrong; carries file, line, column and a caret
    ├── ImageError                a kernel, ramdisk or firmware cannot be used
    ├── HostError                 this machine cannot do it
    │   ├── NoXenError            no hypervisor here, or its devices are missing
    │   ├── PrivilegeError        Xen is here, we may not use it
    │   ├── UnknownInterfaceError a hypervisor whose interface version we do not know
    │   └── UnsupportedError      the driver that was chosen (-H) cannot do what was asked
    ├── HypercallError            Xen refused an operation (operation, errno)
    │   ├── HostMemoryError       not enough free memory
    │   ├── EventChannelError     an event channel cannot be bound, notified or unmasked
    │   └── GrantError            a page cannot be mapped, copied or shared (domain, grant, status)
    ├── StoreError                xenstored refused an operation (operation, path, errno name)
    │   └── StoreGoneError        the connection to xenstored is lost or talks nonsense
    ├── DomainError
    │   ├── DomainNotFoundError
    │   └── DomainExistsError
    ├── DeviceError               a disk or interface is not there, or is there already
    │   └── ImageInUseError       somebody else has the disk's image open
    ├── DeviceModelError          QEMU did not start, died, or answered with an error
    ├── LabError                  the lab cannot be built, started or reached
    ├── DeadlineError             something did not happen in time
    └── ProtocolError
        ├── LocalProtocolError    we used a protocol wrongly: a bug here
        └── RemoteProtocolError   the peer broke the protocol: its fault, close that device
            ├── RingError         its indexes or its slots on a shared ring make no sense
            ├── FrontendError     a node a frontend wrote makes no sense (node, reason)
            └── BackendError      a node a backend wrote makes no sense (node, reason)

``message`` says what failed and why, ``hint`` says what to do next. ``exit_code`` is stable and
documented in ``docs/exit-codes.md``.
"""

from __future__ import annotations

import errno as _errno


class XtoolError(Exception):
    """An error that may be shown to a person: message, optional hint, stable exit code."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def kind(self) -> str:
        """A short stable word for machines: the class name without ``Error``."""
        return type(self).__name__.removesuffix("Error")


class UsageError(XtoolError):
    exit_code = 2


class ConfigError(XtoolError):
    """A domain file is wrong. ``line`` and ``column`` count from 1; 0 means unknown. ``key`` is what it is
    about (``disk[0].vdev``), empty where it is about no key.

    ``loc`` leads to the value (``("disk", 0, "vdev")``) where the place in the file is not known yet.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        file: str = "",
        line: int = 0,
        column: int = 0,
        source: str | None = None,
        hint: str | None = None,
        key: str = "",
        loc: tuple[str | int, ...] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.key = key
        self.loc = loc
        self.file = file
        self.line = line
        self.column = column
        self.source = source  # the whole source line, for the caret


class ImageError(XtoolError):
    exit_code = 4


class HostError(XtoolError):
    exit_code = 5


class NoXenError(HostError):
    pass


class PrivilegeError(HostError):
    pass


class UnknownInterfaceError(HostError):
    pass


class UnsupportedError(HostError):
    """The driver that was chosen cannot carry out this verb, or not with these options."""


def errno_name(number: int) -> str:
    """``22`` -> ``"EINVAL"``; unknown numbers come back as ``"errno 12345"``."""
    return _errno.errorcode.get(number, f"errno {number}")


class HypercallError(XtoolError):
    """Xen refused ``operation``; ``errno`` is positive."""

    exit_code = 6

    def __init__(
        self, operation: str, errno: int, *, detail: str | None = None, hint: str | None = None
    ) -> None:
        self.operation = operation
        self.errno = errno
        text = f"Xen refused {operation}: {errno_name(errno)}"
        super().__init__(f"{text} ({detail})" if detail else text, hint=hint)


class HostMemoryError(HypercallError):
    pass


class EventChannelError(HypercallError):
    pass


class GrantError(HypercallError):
    """``domid`` and ``ref`` say which grant, ``status`` is Xen's ``GNTST_*`` number (negative); each is None
    where the error is not about one grant, or Xen gave no status."""

    def __init__(
        self,
        operation: str,
        errno: int,
        *,
        domid: int | None = None,
        ref: int | None = None,
        status: int | None = None,
        detail: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(operation, errno, detail=detail, hint=hint)
        self.domid = domid
        self.ref = ref
        self.status = status


class StoreError(XtoolError):
    """xenstored refused ``operation`` on ``path`` with ``errno`` (a name such as ``"ENOENT"``)."""

    exit_code = 7

    def __init__(self, operation: str, path: str, errno: str, *, hint: str | None = None) -> None:
        self.operation = operation
        self.path = path
        self.errno = errno
        super().__init__(f"xenstore {operation} {path}: {errno}", hint=hint)


class StoreGoneError(StoreError):
    pass


class DomainError(XtoolError):
    exit_code = 8


class DomainNotFoundError(DomainError):
    exit_code = 9


class DomainExistsError(DomainError):
    exit_code = 10


class DeviceModelError(XtoolError):
    exit_code = 11


class DeviceError(XtoolError):
    exit_code = 15


class ImageInUseError(DeviceError):
    """A disk's image is in use by somebody else, and one of the two would write to it."""


class LabError(XtoolError):
    exit_code = 12


class DeadlineError(XtoolError):
    exit_code = 13


class ProtocolError(XtoolError):
    exit_code = 14


class LocalProtocolError(ProtocolError):
    pass


class RemoteProtocolError(ProtocolError):
    pass


class RingError(RemoteProtocolError):
    pass


class _NodeError(RemoteProtocolError):
    """What the other end wrote into ``node`` of its directory cannot be used, because of ``reason``."""

    side = ""

    def __init__(self, node: str, reason: str) -> None:
        self.node = node
        self.reason = reason
        super().__init__(f"the {self.side}'s {node}: {reason}")


class FrontendError(_NodeError):
    side = "frontend"


class BackendError(_NodeError):
    side = "backend"
