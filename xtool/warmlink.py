"""How a process hands work to the zygote (``xtool.daemon.zygote``): where it listens, and what is said.

This is all that a command line imports when a zygote answers, so it imports next to nothing itself: ``os``,
``socket`` and ``signal`` around the modules used here take longer to load than the hand-over takes.

The conversation, on a Unix stream socket, which begins with the caller::

    caller   b"XT1", kind, mask, length (u32)    kind C: a command line; K: a keeper; W: the watcher
             descriptors (SCM_RIGHTS)            C: the folder, then those of 0, 1, 2 that mask has bits for
             length bytes of fields, each ended by NUL
    zygote   A                                   taken; anything else, or nothing: do it yourself
    caller   a byte per signal                   for as long as it takes
    zygote   E, status                           how it ended

The fields: the stamp of the installed code; then for C the umask, the number of arguments, the arguments, the
environment as ``NAME=value``; for K the domid, the uuid, and xtool's own environment; for W that alone.

Facts: arguments and environment hold no NUL and need not be UTF-8. A caller that is killed cannot say so: its
end shows as the end of the stream.
"""

import posix
import sys

TYPE_CHECKING = False  # typing's own would cost more than all the rest
if TYPE_CHECKING:
    from typing import Any

MAGIC = b"XT1"
HEAD = len(MAGIC) + 2 + 4
#: Most that a request may be long, bytes; Linux' own limit for arguments and environment is far below.
MAX_REQUEST = 8 << 20
TAKEN, ENDED = b"A", b"E"
#: Where the work is done when the process that did it was killed: what a shell says of SIGKILL.
KILLED = 137

_TERM, _HUP, _INT, _QUIT, _USR1, _WINCH, _TSTP, _CONT, _STOP = 15, 1, 2, 3, 10, 28, 20, 18, 19
PASSED_ON = (_INT, _TERM, _HUP, _QUIT, _USR1, _WINCH)


def environment() -> dict[bytes, bytes]:
    """As it is now: ``posix.environ`` is what it was when the process started."""
    module = sys.modules.get("os")
    return posix.environ if module is None else dict(module.environb)


def run_dir() -> str:
    """``paths.run_dir`` for who has not imported it."""
    module = sys.modules.get("os")
    if module is not None:
        return module.environ.get("XTOOL_RUN_DIR") or "/run/xtool"
    return posix.environ.get(b"XTOOL_RUN_DIR", b"").decode("utf-8", "surrogateescape") or "/run/xtool"


def socket_path() -> str:
    return f"{run_dir()}/zygote.sock"


def stamp() -> bytes:
    """Which installed code this is: another one must not carry out our command lines, nor we its."""
    at = posix.stat(__file__)
    return f"{__file__}:{at.st_ino}:{at.st_mtime_ns}:{at.st_size}".encode("utf-8", "surrogateescape")


def request(kind: bytes, mask: int, fields: list[bytes]) -> tuple[bytes, bytes]:
    """The head of a request and its body."""
    body = b"".join([field + b"\0" for field in fields])
    return MAGIC + kind + bytes((mask,)) + len(body).to_bytes(4, "little"), body


def hand_over(arguments: list[str]) -> int | None:
    """Have the command line carried out by the zygote; its exit status, or None if that cannot be."""
    mask, descriptors = 0, []
    for number in (0, 1, 2):  # before anything of ours takes the number of one that is closed
        try:
            posix.fstat(number)
        except OSError:  # so it shall be over there
            continue
        mask |= 1 << number
        descriptors.append(number)
    link = connect()
    if link is None:
        return None
    # From before anybody can act on the line: a signal that comes meanwhile must not find us without.
    early: list[int] = []
    before = _pass_signals(link, early)
    if not _taken(link, arguments, mask, descriptors):
        link.close()
        _restore_signals(before)
        for number in early:
            posix.kill(posix.getpid(), number)
        return None
    return _status(link)


def _taken(link: "Any", arguments: list[str], mask: int, descriptors: list[int]) -> bool:
    here = -1
    try:
        here = posix.open(".", posix.O_PATH | posix.O_CLOEXEC)
        umask = posix.umask(0)
        posix.umask(umask)
        words = [word.encode("utf-8", "surrogateescape") for word in arguments]
        fields = [stamp(), b"%d" % umask, b"%d" % len(words), *words]
        fields += [name + b"=" + value for name, value in environment().items()]
        sent = _send(link, *request(b"C", mask, fields), [here, *descriptors])
        return sent and bool(link.recv(1) == TAKEN)
    except OSError:
        return False
    finally:
        if here >= 0:
            posix.close(here)


def ask_for_keeper(domid: int, uuid: str) -> bool:
    """Have a keeper forked by the zygote; False if there is none, or it will not."""
    return _ask_for(b"K", [b"%d" % domid, uuid.encode()])


def ask_for_watcher() -> bool:
    """The same of the watcher."""
    return _ask_for(b"W", [])


def _ask_for(kind: bytes, words: list[bytes]) -> bool:
    link = connect()
    if link is None:
        return False
    named = [name + b"=" + value for name, value in environment().items() if name.startswith(b"XTOOL_")]
    try:
        link.settimeout(5.0)
        return _send(link, *request(kind, 0, [stamp(), *words, *named]), []) and link.recv(1) == TAKEN
    except OSError:
        return False
    finally:
        link.close()


def connect() -> "Any":
    """A connection to the zygote (a ``_socket.socket``), or None."""
    import _socket

    link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        link.connect(socket_path())
    except OSError:
        link.close()
        return None
    return link


def _send(link: "Any", head: bytes, body: bytes, descriptors: list[int]) -> bool:
    import _socket

    numbers = b"".join([number.to_bytes(4, "little") for number in descriptors])
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)] if descriptors else []
    sent = link.sendmsg([head], rights, _socket.MSG_NOSIGNAL)
    link.sendall(body, _socket.MSG_NOSIGNAL)
    return bool(sent == len(head))


def _pass_signals(link: "Any", early: list[int]) -> "dict[int, Any]":
    """Pass signals on from now on, noting them in ``early``; what was done on them before."""
    import _signal  # type: ignore[import-not-found]
    import _socket

    def pass_on(number: int, _frame: object) -> None:
        early.append(number)
        try:
            link.send(bytes((number,)), _socket.MSG_NOSIGNAL | _socket.MSG_DONTWAIT)
        except OSError:
            pass  # it has ended: the answer is on its way

    def stop(number: int, _frame: object) -> None:
        pass_on(number, None)
        posix.kill(posix.getpid(), _STOP)
        pass_on(_CONT, None)

    before = {}
    for number in (*PASSED_ON, _TSTP):
        known = _signal.getsignal(number)
        if known != _signal.SIG_IGN:
            before[number] = known
            _signal.signal(number, stop if number == _TSTP else pass_on)
    return before


def _restore_signals(before: "dict[int, Any]") -> None:
    import _signal

    for number, action in before.items():
        _signal.signal(number, action)


def _status(link: "Any") -> int:
    """Wait until it has ended."""
    answer = b""
    while len(answer) < 2:
        try:
            part = link.recv(2 - len(answer))
        except OSError:
            part = b""
        if not part:
            try:
                posix.write(2, b"xtool: the process that carried this out was killed\n")
            except OSError:
                pass
            return KILLED
        answer += part
    return int(answer[1])
