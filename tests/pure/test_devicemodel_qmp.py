"""QMP: the parser alone, a real QEMU, and a hostile peer."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtool.devicemodel.qmp import MAX_LINE, QmpClient, QmpGoneError, QmpStream, query, serial_ttys
from xtool.errors import DeadlineError, DeviceModelError, RemoteProtocolError, XtoolError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
OK = b'{"return": {}, "id": 1}\r\n'

short = st.text(max_size=8)
leaves = st.none() | st.booleans() | st.integers() | short
values = leaves | st.lists(leaves, max_size=3) | st.dictionaries(short, leaves, max_size=2)
messages = st.lists(st.dictionaries(short, values, max_size=3), max_size=3)
#: A busy machine is no failure.
calm = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def wire(objects: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\r\n" for one in objects)


@calm
@given(messages)
def test_whole(objects: list[dict[str, object]]) -> None:
    assert QmpStream().feed(wire(objects)) == objects


@calm
@given(messages)
def test_byte_at_a_time_and_truncated(objects: list[dict[str, object]]) -> None:
    stream, found = QmpStream(), []
    data = wire(objects)
    for at in range(len(data)):
        found += stream.feed(data[at : at + 1])
        assert found == objects[: data[: at + 1].count(b"\n")]


@calm
@given(st.binary(max_size=200))
def test_garbage_raises_only_remote_protocol_errors(data: bytes) -> None:
    try:
        found = QmpStream().feed(data)
    except RemoteProtocolError:
        return
    assert len(found) <= data.count(b"\n")


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000 + b"\n", b"[]\n", b"1\n", b'{"a": ' + b"9" * 5000 + b"}\n", b"\xff{}\n", b"{}trailing\n"],
    ids=["deep", "list", "number", "digits", "not utf-8", "trailing"],
)
def test_not_qmp(line: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        QmpStream().feed(line)


def test_an_endless_line_is_refused_before_it_fills_the_memory() -> None:
    """HF 41: an answer of a gigabyte."""
    stream = QmpStream()
    with pytest.raises(RemoteProtocolError, match="more than"):
        for _ in range(MAX_LINE // 4096 + 2):
            stream.feed(b"x" * 4096)
    with pytest.raises(RemoteProtocolError, match="more than"):
        QmpStream().feed(b"x" * (MAX_LINE + 1) + b"\n")


def test_serial_ttys() -> None:
    chardevs = [
        {"label": "serial0", "filename": "pty:/dev/pts/3", "frontend-open": True},
        {"label": "serial1", "filename": "file"},
        {"label": "qmp", "filename": "unix:/x"},
        {"label": "serialx", "filename": "pty:/dev/pts/9"},
        {"label": "serial2", "filename": "pty:/dev/pts/4"},
    ]
    assert serial_ttys(chardevs) == {0: "/dev/pts/3", 2: "/dev/pts/4"}
    for wrong in ([1], [{}], [{"label": 3, "filename": ""}]):
        with pytest.raises(RemoteProtocolError):
            serial_ttys(wrong)


class Peer:
    """Something that listens and says what a test wants said, then hangs up (or not)."""

    def __init__(self, path: Path, says: bytes, *, hang_up: bool) -> None:
        self.heard = b""
        self._says, self._hang_up = says, hang_up
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            try:
                connection.sendall(self._says)
                if self._hang_up:
                    connection.shutdown(socket.SHUT_WR)
                while data := connection.recv(4096):  # until the client has closed
                    self.heard += data
            except OSError:
                pass

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()


def converse(path: Path, says: bytes, *, hang_up: bool = True, deadline: float = 5.0) -> object:
    peer = Peer(path, says, hang_up=hang_up)
    try:
        return query(path, "query-status", deadline=deadline)
    finally:
        peer.join()


def test_events_between_answers_are_passed_over(tmp_path: Path) -> None:
    says = GREETING + b'{"event": "RESUME"}\n' + OK + b'{"event": "X"}\n{"return": {"a": 1}, "id": 2}\n'
    assert converse(tmp_path / "s", says) == {"a": 1}


@pytest.mark.parametrize(
    ("says", "kind", "words"),
    [
        (b"", QmpGoneError, "closed"),
        (GREETING, QmpGoneError, "closed"),
        (GREETING + OK, QmpGoneError, "closed"),
        (GREETING + OK + b'{"return": {', QmpGoneError, "closed"),
        (b"HTTP/1.1 200 OK\n", RemoteProtocolError, "not QMP"),
        (OK, RemoteProtocolError, "greet"),
        (GREETING + b'{"return": {}, "id": 99}\n', RemoteProtocolError, "not sent"),
        (GREETING + b'{"return": {}, "id": true}\n', RemoteProtocolError, "not sent"),
        (GREETING + b'{"return": {}}\n', RemoteProtocolError, "not sent"),
        (GREETING + OK + OK, RemoteProtocolError, "not sent"),
        (GREETING + b'{"error": {"desc": "no"}, "id": 1}\n', RemoteProtocolError, "handshake"),
        (GREETING + OK + b'{"error": {"desc": "boo"}, "id": 2}\n', DeviceModelError, "refused .*boo"),
        (GREETING + OK + b'{"error": "odd", "id": 2}\n', DeviceModelError, "refused .*odd"),
    ],
)
def test_peers_that_misbehave(tmp_path: Path, says: bytes, kind: type[XtoolError], words: str) -> None:
    with pytest.raises(kind, match=words):
        converse(tmp_path / "s", says)


def test_a_silent_or_babbling_peer_meets_the_deadline(tmp_path: Path) -> None:
    """HF 41: a QEMU that a guest has taken over may say nothing, or never stop."""
    with pytest.raises(DeadlineError):
        converse(tmp_path / "a", GREETING, hang_up=False, deadline=0.2)
    babble = GREETING + b'{"event": "X"}\n' * 1000
    with pytest.raises(DeadlineError):
        converse(tmp_path / "b", babble, hang_up=False, deadline=0.2)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(QmpGoneError, match="no QEMU answers"):
        query(tmp_path / "none", "query-status")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "closed"))
    with pytest.raises(QmpGoneError, match="refused"):
        query(tmp_path / "closed", "query-status")


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Path]:
    """A real QEMU without any machine, and its QMP socket."""
    binary = shutil.which("qemu-system-x86_64")
    if not binary:
        pytest.skip("no qemu-system-x86_64 on this machine")
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        fd = listener.fileno()
        words = [binary, "-machine", "none", "-nodefaults", "-display", "none", "-serial", "pty"]
        words += ["-chardev", f"socket,id=qmp,fd={fd},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
        process = subprocess.Popen(words, pass_fds=(fd,), stdout=subprocess.DEVNULL)
    yield path
    process.terminate()
    assert process.wait(30) == 0


def test_real_qemu(qemu: Path) -> None:
    assert query(qemu, "query-status", deadline=30)["status"] == "running"
    with pytest.raises(DeviceModelError, match=r"refused .*no-such-command"):
        query(qemu, "no-such-command", deadline=30)
    with QmpClient(qemu) as client:  # many at once, answered in any order we like
        numbers = [client.send("query-version") for _ in range(6)]
        answers = [client.receive(number, deadline=30) for number in reversed(numbers)]
    assert all(answer["qemu"]["major"] >= 7 for answer in answers)
    schema = query(qemu, "query-qmp-schema", deadline=30)  # the longest answer there is
    assert len(schema) > 100
    tty = serial_ttys(query(qemu, "query-chardev", deadline=30))[0]
    assert Path(tty).is_char_device()


def test_real_qemu_says_the_same_to_the_reference_client(qemu: Path) -> None:
    legacy = pytest.importorskip("qemu.qmp")

    async def ask() -> object:
        client = legacy.QMPClient("reference")
        await client.connect(str(qemu))
        try:
            return await client.execute("query-version")
        finally:
            await client.disconnect()

    assert asyncio.run(asyncio.wait_for(ask(), 30)) == query(qemu, "query-version", deadline=30)
