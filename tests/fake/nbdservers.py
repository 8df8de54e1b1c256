"""NBD and web servers for tests, on loopback and Unix sockets; and qemu-img."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic, sleep

import pytest

from xtool.backends.libnbd import binding
from xtool.errors import HostError


def _missing() -> str:
    try:
        binding()
    except HostError as error:
        return error.message
    return "" if shutil.which("qemu-nbd") else "qemu-utils is not installed"


#: scripts/setup installs what these need.
needs_engine = pytest.mark.skipif(bool(_missing()), reason=_missing() or "it is there")
needs_curl = pytest.mark.skipif(
    not list(Path("/usr/lib").glob("*/qemu/block-curl.so")), reason="qemu-block-extra is not installed"
)
#: Formats of ours, and qemu-img's names for them.
QEMU_NAMES = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx"}


def qemu_img(*words: object) -> str:
    return subprocess.run(
        ["qemu-img", *map(str, words)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def make(path: Path, form: str, data: bytes) -> Path:
    """An image with this content."""
    raw = path.with_suffix(".source")
    raw.write_bytes(data)
    qemu_img("convert", "-f", "raw", "-O", QEMU_NAMES[form], raw, path)
    raw.unlink()
    return path


def content(path: Path, form: str) -> bytes:
    """What qemu-img says is in an image that nobody uses."""
    raw = path.with_suffix(".content")
    qemu_img("convert", "-f", QEMU_NAMES[form], "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


class Server:
    """A qemu-nbd that somebody else runs: on a port of loopback, or on a Unix socket."""

    def __init__(self, path: Path, unix: Path | None = None, form: str = "raw") -> None:
        self.path, self.unix, self.form = path, unix, form
        self.port = 0 if unix else _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"nbd+unix:///?socket={self.unix}" if self.unix else f"nbd://127.0.0.1:{self.port}"

    def start(self) -> None:
        where = [f"--socket={self.unix}"] if self.unix else ["--bind=127.0.0.1", f"--port={self.port}"]
        what = [str(self.path)] if self.form == "json" else [f"--format={self.form}", str(self.path)]
        name = f"json:{self.path.read_text()}" if self.form == "json" else what[-1]
        self._process = subprocess.Popen(
            ["qemu-nbd", "--persistent", "--shared=2", "--discard=unmap", *where, *what[:-1], name]
        )
        end = monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None and monotonic() < end
            sleep(0.01)

    def _answers(self) -> bool:
        try:
            if self.unix:
                with socket.socket(socket.AF_UNIX) as link:
                    link.connect(str(self.unix))
            else:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Ranges(SimpleHTTPRequestHandler):
    """Files with ranges, which Python's own handler has not."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._give(body=True)

    def do_HEAD(self) -> None:
        self._give(body=False)

    def _give(self, *, body: bool) -> None:
        try:
            data = Path(self.translate_path(self.path)).read_bytes()
        except OSError:
            self.send_error(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2] or len(data) - 1)) if match else (0, len(data) - 1)
        part = data[first : last + 1]
        self.send_response(206 if match else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if match:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serves a folder; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def qemu_nbds(image: Path) -> list[int]:
    """Processes that serve this image."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if words and words[0].endswith(b"qemu-nbd") and any(os.fsencode(image) in word for word in words):
            found.append(int(entry.parent.name))
    return found
