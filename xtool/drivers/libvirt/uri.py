"""Which libvirt driver ``-H`` names. Pure.

::

    qemu:                          embedded, in a folder of ours: nothing to set up
    qemu:///embed[?root=/PATH]     the same, with its own folder
    qemu:///system, qemu:///session, xen:///system, test:///default, qemu+ssh://host/system ...

``accel=kvm`` or ``accel=tcg`` in the query overrides what a ``qemu`` driver chooses.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from xtool import paths
from xtool.errors import UsageError

_SCHEME = re.compile(r"(qemu|xen|test)(\+[a-z0-9]+)?:(?=//)|qemu:$")
#: libvirt puts QEMU's sockets below the root, 55 bytes deeper; a Unix socket's path has 107.
MAX_ROOT = 107 - 55


@dataclass(frozen=True)
class Target:
    """``kind`` is ``qemu``, ``xen`` or ``test``; ``root`` is set for an embedded driver; ``uri`` is what
    libvirt opens; ``accel`` is ``kvm``, ``tcg`` or "" for what works."""

    kind: str
    uri: str
    root: str = ""
    accel: str = ""
    remote: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return {"qemu": "libvirt's QEMU driver", "xen": "libvirt's Xen driver"}.get(
            self.kind, "libvirt's test driver"
        )


def is_libvirt(target: str) -> bool:
    """``xen:`` alone is our own driver."""
    return _SCHEME.match(target) is not None


def parse_target(text: str) -> Target:
    """Raises ``UsageError``."""
    if not is_libvirt(text):
        raise UsageError(f"{text!r} is no libvirt driver", hint="as in qemu:///embed or xen:///system")
    try:
        parts = urlsplit("qemu:///embed" if text == "qemu:" else text)
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError as error:
        raise UsageError(f"-H {text}: {error}", hint="as in qemu:///embed?root=/path") from None
    kind, _, transport = parts.scheme.partition("+")
    accel = options.pop("accel", "")
    if accel not in ("", "kvm", "tcg") or (accel and kind != "qemu"):
        raise UsageError(f"-H {text}: accel is kvm or tcg, for a qemu driver")
    if parts.path != "/embed":
        # urlunsplit would drop the slashes of an empty host.
        uri = f"{parts.scheme}://{parts.netloc}{parts.path}"
        uri += f"?{urlencode(options)}" if options else ""
        return Target(kind, uri, "", accel, bool(parts.netloc or transport not in ("", "unix")))
    if kind != "qemu" or transport or parts.netloc:
        raise UsageError(f"-H {text}: only QEMU's driver is there embedded", hint="qemu:///embed")
    root = options.pop("root", "") or str(paths.state_dir() / "libvirt")
    if options:
        raise UsageError(f"-H {text}: unknown option {next(iter(options))}", hint="it knows root and accel")
    if not root.startswith("/"):
        raise UsageError(f"-H {text}: root is no absolute path", hint="as in qemu:///embed?root=/path")
    root = os.path.normpath(root)
    if len(os.fsencode(root)) > MAX_ROOT:
        raise UsageError(
            f"the path {root} is too long for the root of an embedded driver: {MAX_ROOT} bytes at most",
            hint="QEMU's sockets are below it, and the kernel limits their paths",
        )
    return Target(kind, f"qemu:///embed?root={quote(root)}", root, accel)
