"""What a qcow2 image's header names: refused where QEMU would guess, or open files of ours for a stranger.

Facts about qcow2
-----------------
* The header may name a backing file and, in an extension, its format. Without that QEMU guesses it by the
  content. A raw backing file that a guest once wrote to could so be taken for a qcow2 that names any file.
* Bit 2 of the incompatible features: the data are in another file, which an extension names.
* A guest sees the disk, never the header: what an image names is the word of whoever made it.
"""

from __future__ import annotations

import os
import re
from struct import Struct
from typing import NamedTuple

from xtool.errors import HostError

MAGIC = b"QFI\xfb"
_V2 = Struct(">4sIQII")
_FEATURES = Struct(">Q")  # at 72, from version 3 on
_LENGTH = Struct(">I")  # at 100
_EXTENSION = Struct(">II")
_DATA_FILE = 1 << 2
_BACKING_FORMAT = 0xE2792ACA
#: Header, extensions and names are in the first cluster, 2 MiB at most. Names QEMU accepts end far before.
HEAD = 1 << 16
_NAME_MOST = 1023
#: Images one upon the other that are looked at.
_CHAIN_MOST = 64
#: ``json:...``, ``nbd://...``: QEMU takes what precedes a colon for a protocol, unless it has a slash.
_PROTOCOL = re.compile(r"[^/:]+:")


class Header(NamedTuple):
    backing: str = ""
    backing_format: str = ""
    data_file: bool = False


def parse_header(head: bytes) -> Header | None:
    """Of an image's first ``HEAD`` bytes; None if they are no qcow2's. Raises ``ValueError`` for one that is
    out of shape."""
    if len(head) < _V2.size or not head.startswith(MAGIC):
        return None
    _, version, offset, size, cluster_bits = _V2.unpack_from(head)
    length, features = 72, 0
    if version >= 3:
        if len(head) < 104:
            raise ValueError("its header is cut")
        features = _FEATURES.unpack_from(head, 72)[0]
        length = _LENGTH.unpack_from(head, 100)[0]
    if not 9 <= cluster_bits <= 21 or not 72 <= length <= len(head):
        raise ValueError("its header makes no sense")
    end = min(offset or len(head), 1 << cluster_bits, len(head))
    form = _extension(head, length, end, _BACKING_FORMAT)
    backing = b""
    if offset and size:
        if size > _NAME_MOST or offset + size > len(head):
            raise ValueError("the name of its backing file is too long, or beyond the header")
        backing = head[offset : offset + size]
    names = [os.fsdecode(name.split(b"\0")[0]) for name in (backing, form)]
    return Header(names[0], names[1], bool(features & _DATA_FILE))


def _extension(head: bytes, at: int, end: int, wanted: int) -> bytes:
    while at + _EXTENSION.size <= end:
        kind, size = _EXTENSION.unpack_from(head, at)
        at += _EXTENSION.size
        if kind == 0:
            break
        if size > end - at:
            raise ValueError("an extension of its header is cut")
        if kind == wanted:
            return head[at : at + size]
        at += (size + 7) & ~7
    return b""


def check_local(path: str, form: str) -> None:
    """Refuse an image upon a backing file whose format nobody said. Raises ``HostError``."""
    for _ in range(_CHAIN_MOST):
        if form != "qcow2":
            return
        try:
            with open(path, "rb") as file:
                header = parse_header(file.read(HEAD))
        except OSError as error:
            raise HostError(f"{path} cannot be opened: {error.strerror}") from None
        except ValueError as error:
            raise HostError(f"{path}: {error}") from None
        if header is None or not header.backing:
            return  # QEMU tells what it is not
        if not header.backing_format:
            raise HostError(
                f"{path} does not say which format its backing file {header.backing} has",
                hint=f"qemu-img rebase -u -f qcow2 -F FORMAT -b {header.backing} {path}",
            )
        if _PROTOCOL.match(header.backing):
            return
        path = os.path.join(os.path.dirname(path), header.backing)
        form = header.backing_format
    raise HostError(f"more than {_CHAIN_MOST} images, one upon the other, end at {path}")


def check_web(url: str, form: str, patience: float) -> None:
    """Refuse a qcow2 that names other files: they would be this host's. Raises ``HostError``."""
    if form != "qcow2":
        return
    from urllib.error import URLError
    from urllib.request import Request, urlopen

    request = Request(url, headers={"Range": f"bytes=0-{HEAD - 1}"})
    try:
        with urlopen(request, timeout=patience) as answer:
            header = parse_header(answer.read(HEAD))
    except URLError as error:
        raise HostError(f"{url} cannot be read: {error.reason}") from None
    except (OSError, ValueError) as error:
        raise HostError(f"{url} cannot be read: {error}") from None
    if header is not None and (header.backing or header.data_file):
        raise HostError(
            f"{url} is a part of an image: it names another file",
            hint="qemu-img convert makes one image of it",
        )
