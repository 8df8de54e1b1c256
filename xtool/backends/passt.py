"""A guest's network through passt: outbound connections and port forwards, with nothing set up on the host.

passt is a process of its own that turns the guest's frames into sockets of the host's and back. It gives the
guest its addresses by DHCP, NDP and DHCPv6.

Facts about passt
-----------------
* Frames go over a stream socket, each after its length: 4 bytes, big-endian. A length that makes no sense
  makes passt close the socket.
* ``--fd`` takes one end of a socket pair: no path in the file system, nobody else can connect, and passt ends
  when the other end is closed. So it ends with this process, however that ends. Connections through it
  end then, too; a bridge loses none.
* It drops root's rights by itself, and puts itself into namespaces of its own.
* It neither checks nor completes checksums it is given, but its answers have them. A TCP packet longer than
  the guest's MTU is taken as it is, up to 65,535 bytes: so what a guest wants cut may go whole.
* It listens to nothing but what ``-t`` and ``-u`` say. ``address/port:port`` binds to one address.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from struct import Struct

from xtool.backends import vnethdr
from xtool.backends.link import FRAME_ROOM, Link, LinkGoneError, LinkSource
from xtool.backends.vnethdr import Offload
from xtool.errors import HostError
from xtool.proto.netif import MAX_FRAME

_LENGTH = Struct(">I")
#: Bytes taken from the socket at once.
_CHUNK = 1 << 18
_SOCKET_BUFFER = 4 << 20
#: How much of what passt says is kept for the reason, bytes.
_LAST_WORDS = 2000
#: Seconds a passt may take to end before it is killed.
_END_TIME = 0.3


class StreamLink(Link):
    """Frames over a connected stream socket, as QEMU's ``-netdev stream`` has them. Owns the socket."""

    head = _LENGTH.size
    offloads = False

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        self._sock = sock
        self._kept = b""
        self._in = memoryview(bytearray(_CHUNK + FRAME_ROOM))
        self._from = self._to = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def prepare(self, room: memoryview, todo: Offload) -> None:
        if todo.csum_blank:
            with room[self.head :] as frame:
                vnethdr.finish(frame, todo)
        room[: self.head] = _LENGTH.pack(len(room) - self.head)

    @property
    def blocked(self) -> bool:
        return bool(self._kept)

    def send(self, frames: Sequence[memoryview]) -> int:
        frames = list(frames)
        while frames:
            # A frame that went in part must be finished: so what is left is kept, which is one batch.
            sent = 0 if self._kept else self._write(frames[:512])
            if not sent:
                self._kept += b"".join(frames)
                break
            while frames and sent >= len(frames[0]):
                sent -= len(frames.pop(0))
            if sent:
                frames[0] = frames[0][sent:]
        return 0

    def _write(self, parts: Sequence[memoryview | bytes]) -> int:
        try:
            return self._sock.sendmsg(parts, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _gone(error) from error

    def flush(self) -> None:
        while self._kept:
            sent = self._write([self._kept])
            if not sent:
                return
            self._kept = self._kept[sent:]

    def receive(self, room: memoryview) -> int:
        size = self._complete()
        if not size:
            if self._from:  # the rest of a frame goes to the front
                rest = bytes(self._in[self._from : self._to])
                self._in[: len(rest)] = rest
                self._from, self._to = 0, len(rest)
            if not self._read() or not (size := self._complete()):
                return 0
        room[:size] = self._in[self._from : self._from + size]
        self._from += size
        if self._from == self._to:
            self._from = self._to = 0
        return size

    @property
    def holds(self) -> bool:
        there = self._to - self._from - _LENGTH.size
        return there >= 0 and there >= min(_LENGTH.unpack_from(self._in, self._from)[0], MAX_FRAME)

    def _complete(self) -> int:
        """The size, with its length, of the frame that is there; 0 if it is not there as a whole."""
        if self._to - self._from < _LENGTH.size:
            return 0
        size: int = _LENGTH.unpack_from(self._in, self._from)[0]
        if not vnethdr.ETH_HLEN <= size <= MAX_FRAME:
            raise LinkGoneError(f"passt sent a frame of {size} bytes")
        size += _LENGTH.size
        return size if self._to - self._from >= size else 0

    def _read(self) -> bool:
        try:
            count = self._sock.recv_into(self._in[self._to :])
        except BlockingIOError:
            return False
        except OSError as error:
            raise _gone(error) from error
        if not count:
            raise _gone(None)
        self._to += count
        return True

    def offload(self, room: memoryview, size: int, csum: tuple[bool, bool]) -> Offload:
        return vnethdr.NOTHING

    def close(self) -> None:
        self._sock.close()


def _gone(error: OSError | None) -> LinkGoneError:
    why = os.strerror(error.errno or 0) if error is not None else "it closed the connection"
    return LinkGoneError(f"passt is gone: {why}")


def port_options(forwards: Sequence[str]) -> list[str]:
    """passt's options for forwards as ``config`` has them: ``tcp:127.0.0.1:2222:22``. The address is never
    left out. Raises ``ValueError``."""
    options: dict[str, list[str]] = {"tcp": [], "udp": []}
    for forward in forwards:
        protocol, _, rest = forward.partition(":")
        address, outer, inner = ["", "", "", *rest.rsplit(":", 2)][-3:]
        if protocol not in options or not address or not (outer.isdecimal() and inner.isdecimal()):
            raise ValueError(f"{forward[:60]!r} is no forward")
        options[protocol] += [f"{address.strip('[]')}/{outer}:{inner}"]
    found = []
    for name, specs in (("-t", options["tcp"]), ("-u", options["udp"])):
        for spec in specs or ["none"]:
            found += [name, spec]
    return found


class PasstSource(LinkSource):
    """Starts a passt, and another one when it died. ``mtu`` is what it tells the guest, None for passt's own
    idea (65520); ``program`` is for tests."""

    def __init__(
        self, forwards: Sequence[str] = (), *, mtu: int | None = None, program: Sequence[str] = ("passt",)
    ) -> None:
        self._options = port_options(forwards)
        self.forwards = tuple(forwards)
        self.mtu = mtu
        self._program = list(program)
        self._process: subprocess.Popen[bytes] | None = None
        self._link: StreamLink | None = None
        self.starts = 0
        self._words = -1
        self._said = b""

    def command(self, fd: int) -> list[str]:
        mtu = ["-m", str(self.mtu)] if self.mtu else []
        return [*self._program, "--foreground", "--quiet", "--fd", str(fd), *mtu, *self._options]

    def open(self, count: int) -> Sequence[Link]:
        self._end()
        self._said = b""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # Its end does not wait either: what nobody reads is not said.
        words, stderr = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    self.command(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                os.close(words)
                raise HostError(
                    f"cannot start {self._program[0]}: {os.strerror(error.errno or 0)}",
                    hint="network: user needs the package passt",
                ) from error
            finally:
                os.close(stderr)
        self.starts += 1
        self._words = words
        self._link = StreamLink(ours)
        return (self._link,)

    def accept(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        """passt's frames are whole and plain."""

    def last_words(self) -> str:
        """The end of what passt has said."""
        with suppress(OSError):
            while self._words >= 0 and (piece := os.read(self._words, 1 << 16)):
                self._said = (self._said + piece)[-_LAST_WORDS:]
        return self._said.decode("ascii", "backslashreplace").strip()

    def describe(self) -> dict[str, object]:
        process = self._process
        return {
            "helper": self._program[0],
            "pid": process.pid if process and process.poll() is None else None,
            "starts": self.starts,
            "forwards": list(self.forwards),
        }

    def _end(self) -> None:
        """Let passt go, and see that it does."""
        if self._link is not None:
            self._link.close()
            self._link = None
        process = self._process
        if process is None:
            return
        # With its socket closed it ends by itself, at once.
        try:
            process.wait(_END_TIME)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.last_words()
        self._process = None
        os.close(self._words)
        self._words = -1

    def close(self, *, for_good: bool) -> None:
        self._end()
