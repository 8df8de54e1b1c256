"""The network block device protocol (``doc/proto.md`` of the NBD project), both ends. Pure.

Of the handshakes the fixed newstyle one, of the replies the simple ones.

Facts about NBD
---------------
* The server speaks first; the client answers with flags, then options, each answered, until GO or
  EXPORT_NAME.
* A request is 28 bytes, then a write's data; a simple reply is 16 bytes, then a read's data. Replies may come
  in any order; ``cookie`` says which request each belongs to.
* A server may close the connection after anything it does not like.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from xtool.errors import RemoteProtocolError

MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN = (1 << 31) + 1, (1 << 31) + 3, (1 << 31) + 6
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_TRIM = 1, 2, 4, 32
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM = 0, 1, 2, 3, 4
CMD_FLAG_FUA = 1

#: Most data of one request; what servers must take.
MAX_PAYLOAD = 32 << 20
#: Longest option.
MAX_OPTION = 4096

GREETING = Struct(">8s8sH")
OPTION = Struct(">8sII")
OPTION_REPLY = Struct(">QIII")
EXPORT = Struct(">QH")
INFO_EXPORT_BODY = Struct(">HQH")
INFO_SIZES_BODY = Struct(">HIII")
REQUEST = Struct(">IHHQQI")
REPLY = Struct(">IIQ")


class Request(NamedTuple):
    """``length`` of the data asked for, or that follow (a write). Bytes."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


def parse_request(raw: bytes) -> Request:
    """Raises ``RemoteProtocolError``."""
    magic, *fields = REQUEST.unpack(raw)
    if magic != REQUEST_MAGIC:
        raise RemoteProtocolError(f"an NBD request beginning with {magic:#x}")
    request = Request(*fields)
    if request.length > MAX_PAYLOAD and request.command in (CMD_READ, CMD_WRITE):
        raise RemoteProtocolError(f"an NBD request for {request.length} bytes")
    return request


def build_reply(cookie: int, error: int) -> bytes:
    return REPLY.pack(REPLY_MAGIC, error, cookie)


def build_option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data
