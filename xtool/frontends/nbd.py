"""A disk of ours as an NBD export on a Unix socket: for qemu-img, nbdcopy, guestfish, a kernel's nbd.

One client at a time, many requests under way. ``server.run()`` serves until ``stop``; whatever a client does
wrong ends its connection and nothing else.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from xtool.abi.io import BLKIF_OP_READ, BLKIF_OP_WRITE
from xtool.errors import RemoteProtocolError
from xtool.frontends.blockrings import Done
from xtool.proto import nbd
from xtool.proto.blkfeatures import BlockOffer

#: Bytes of requests under way at a time, and of answers not taken: then no more is read from the client.
MOST_UNDER_WAY = 8 << 20


class Disk(Protocol):
    """What is served: ``BlockFrontend`` is one."""

    offer: BlockOffer

    @property
    def size(self) -> int: ...
    def submit(self, operation: int, offset: int, data: memoryview, done: Done) -> None: ...
    def submit_flush(self, done: Done) -> None: ...
    def submit_discard(self, offset: int, length: int, done: Done) -> None: ...
    def poll(self) -> None: ...
    def fileno(self) -> int: ...
    def events_came(self) -> None: ...


class NbdServer:
    """Listens at ``path`` (mode 0600). ``relax`` is for tests: called with nothing, once a round."""

    def __init__(self, disk: Disk, path: Path, relax: Callable[[], None] | None = None) -> None:
        self.disk = disk
        self._path = path
        self._relax = relax
        self._stopped = False
        self._client: _Client | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            self._listener.bind(str(path))
            self._listener.listen(4)
        except BaseException:
            self._listener.close()
            raise
        finally:
            os.umask(before)

    def run(self) -> None:
        while not self._stopped:
            self.step(1.0)

    def stop(self) -> None:
        self._stopped = True

    def step(self, timeout: float) -> None:
        """One round; sleeps at most ``timeout`` seconds."""
        poll = select.poll()
        poll.register(self.disk.fileno(), select.POLLIN)
        client = self._client
        if client is None:
            poll.register(self._listener.fileno(), select.POLLIN)
        else:
            poll.register(client.socket.fileno(), client.events())
        for fd, events in poll.poll(1000 * timeout):
            if fd == self.disk.fileno():
                self.disk.events_came()
            elif client is None:
                self._accept()
            elif not client.work(events):
                self._hang_up()
        if self._relax is not None:
            self._relax()
        self.disk.poll()
        if self._client is not None and not self._client.flush():
            self._hang_up()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._client = _Client(self.disk, connection)

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def close(self) -> None:
        self._hang_up()
        if self._listener.fileno() >= 0:
            self._listener.close()
            self._path.unlink(missing_ok=True)


class _Client:
    """One connection. ``_want`` bytes are collected, then ``_next`` is called with them."""

    def __init__(self, disk: Disk, connection: socket.socket) -> None:
        self.socket = connection
        self._disk = disk
        self._input = bytearray()
        self._output: deque[bytes | memoryview] = deque()
        self._output_size = 0
        self._under_way = 0
        self._open = True
        self._leaving = False
        self._want = 4
        self._next: Callable[[bytes], None] = self._flags
        self._option = 0
        self._request: nbd.Request | None = None
        self._zeroes = True
        self._say(
            nbd.GREETING.pack(nbd.MAGIC, nbd.OPTION_MAGIC, nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)
        )

    # --- moving bytes
    def events(self) -> int:
        busy = self._under_way + self._output_size > MOST_UNDER_WAY
        return (0 if busy or self._leaving else select.POLLIN) | (select.POLLOUT if self._output else 0)

    def work(self, events: int) -> bool:
        """False: it is over."""
        if events & (select.POLLERR | select.POLLHUP) and not events & select.POLLIN:
            return False
        try:
            if events & select.POLLIN:
                data = self.socket.recv(1 << 18)
                if not data:
                    return False
                self._input += data
                while len(self._input) >= self._want and not self._leaving:
                    part = bytes(self._input[: self._want])
                    del self._input[: self._want]
                    self._next(part)
        except (OSError, RemoteProtocolError):
            return False
        return self.flush()

    def flush(self) -> bool:
        """Send what can be sent; False: it is over."""
        try:
            while self._output:
                part = self._output.popleft()
                sent = self.socket.send(part)
                self._output_size -= sent
                if sent < len(part):
                    self._output.appendleft(memoryview(part)[sent:])
                    break
        except BlockingIOError:
            self._output.appendleft(part)
        except OSError:
            return False
        return not (self._leaving and not self._output and not self._under_way)

    def _say(self, *parts: bytes) -> None:
        if self._open:
            self._output.extend(part for part in parts if part)
            self._output_size += sum(map(len, parts))

    def _expect(self, size: int, step: Callable[[bytes], None]) -> None:
        self._want, self._next = size, step

    def close(self) -> None:
        self._open = False
        self.socket.close()

    # --- the handshake
    def _flags(self, raw: bytes) -> None:
        self._zeroes = not int.from_bytes(raw, "big") & nbd.FLAG_NO_ZEROES
        self._expect(nbd.OPTION.size, self._option_head)

    def _option_head(self, raw: bytes) -> None:
        magic, self._option, length = nbd.OPTION.unpack(raw)
        if magic != nbd.OPTION_MAGIC or length > nbd.MAX_OPTION:
            raise RemoteProtocolError(f"an NBD option of {length} bytes")
        if length:
            self._expect(length, self._option_body)
        else:
            self._option_body(b"")

    def _option_body(self, body: bytes) -> None:
        option = self._option
        self._expect(nbd.OPTION.size, self._option_head)
        if option == nbd.OPT_EXPORT_NAME:
            self._say(nbd.EXPORT.pack(self._disk.size, self._export_flags()) + bytes(124 * self._zeroes))
            self._expect(nbd.REQUEST.size, self._head)
        elif option in (nbd.OPT_INFO, nbd.OPT_GO):
            info = nbd.INFO_EXPORT_BODY.pack(nbd.INFO_EXPORT, self._disk.size, self._export_flags())
            unit = self._disk.offer.sector_size
            sizes = nbd.INFO_SIZES_BODY.pack(nbd.INFO_BLOCK_SIZE, unit, 4096, nbd.MAX_PAYLOAD)
            for data in (info, sizes):
                self._say(nbd.build_option_reply(option, nbd.REP_INFO, data))
            self._say(nbd.build_option_reply(option, nbd.REP_ACK))
            if option == nbd.OPT_GO:
                self._expect(nbd.REQUEST.size, self._head)
        elif option == nbd.OPT_LIST and not body:
            self._say(nbd.build_option_reply(option, nbd.REP_SERVER, bytes(4)))
            self._say(nbd.build_option_reply(option, nbd.REP_ACK))
        elif option == nbd.OPT_ABORT:
            self._say(nbd.build_option_reply(option, nbd.REP_ACK))
            self._leaving = True
        else:
            self._say(nbd.build_option_reply(option, nbd.REP_ERR_UNSUP))

    def _export_flags(self) -> int:
        offer = self._disk.offer
        flags = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.READ_ONLY * offer.readonly
        return flags | nbd.SEND_TRIM * bool(offer.discard_granularity)

    # --- requests
    def _head(self, raw: bytes) -> None:
        request = nbd.parse_request(raw)
        if request.command == nbd.CMD_WRITE and request.length:
            self._request = request
            self._expect(request.length, self._write)
        elif request.command == nbd.CMD_DISC:
            self._leaving = True
        else:
            self._carry_out(request, b"")

    def _write(self, data: bytes) -> None:
        self._expect(nbd.REQUEST.size, self._head)
        assert self._request is not None
        self._carry_out(self._request, data)

    def _carry_out(self, request: nbd.Request, data: bytes) -> None:
        disk, unit = self._disk, self._disk.offer.sector_size
        moves = request.command in (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_TRIM)
        beyond = request.offset + request.length > disk.size
        if moves and (beyond or request.offset % unit or request.length % unit):
            self._say(nbd.build_reply(request.cookie, errno.ENOSPC if beyond and data else errno.EINVAL))
        elif request.command == nbd.CMD_READ:
            found = bytearray(request.length)
            done = self._done(request, found)
            disk.submit(BLKIF_OP_READ, request.offset, memoryview(found), done)
        elif request.command == nbd.CMD_WRITE and disk.offer.readonly:
            self._say(nbd.build_reply(request.cookie, errno.EPERM))
        elif request.command == nbd.CMD_WRITE:
            disk.submit(BLKIF_OP_WRITE, request.offset, memoryview(data), self._done(request))
        elif request.command == nbd.CMD_FLUSH:
            disk.submit_flush(self._done(request))
        elif request.command == nbd.CMD_TRIM and not disk.offer.readonly:
            disk.submit_discard(request.offset, request.length, self._done(request))
        else:
            self._say(nbd.build_reply(request.cookie, errno.EINVAL))

    def _done(self, request: nbd.Request, found: bytearray | None = None) -> Done:
        size = request.length + nbd.REPLY.size
        self._under_way += size

        def done(error: OSError | None) -> None:
            self._under_way -= size
            number = errno.EIO if error else 0
            self._say(nbd.build_reply(request.cookie, number), bytes(found or b"") if not error else b"")

        return done
