"""Where disks come from: addresses, what qemu-nbd is told, and headers of qcow2 images."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtool.backends.imageheader import HEAD, MAGIC, Header, check_local, parse_header
from xtool.backends.nbdsource import NbdServer, QemuNbd, file_name, source_for
from xtool.config.devices import WEB_FORMATS
from xtool.config.single import parse_disk
from xtool.devices.backendkinds import KINDS
from xtool.devices.hotplug import sharing
from xtool.diskurl import DiskUrl, is_url, parse_url
from xtool.errors import HostError, UsageError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nbd://host", ("nbd", "host", 10809, "", "")),
        ("nbd://Host:7/a%20b/c", ("nbd", "host", 7, "a b/c", "")),
        ("nbd://[::1]/x", ("nbd", "::1", 10809, "x", "")),
        ("nbd+unix:///x?socket=/run/a.sock", ("nbd+unix", "", 0, "x", "/run/a.sock")),
        ("https://host/a%20b.img?k=v", ("https", "host", 443, "/a%20b.img?k=v", "")),
        ("http://host:8080/", ("http", "host", 8080, "/", "")),
    ],
)
def test_addresses(text: str, found: tuple[object, ...]) -> None:
    assert parse_url(text) == DiskUrl(*found, text)  # type: ignore[arg-type]
    assert parse_url(text).web == text.startswith("http")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ftp://host/a", "only"),
        ("file:///etc/shadow", "only"),
        ("nbds://host/a", "only"),
        ("http://user:secret@host/a", "password"),
        ("nbd://user@host/a", "user"),
        ("nbd:///a", "no host"),
        ("nbd://host:0/a", "port"),
        ("nbd://host:99999/a", "[Pp]ort"),
        ("nbd://host/a?b=c", "query"),
        ("nbd://host/a%00b", "zero"),
        ("nbd://host/%ff", "UTF-8"),
        ("nbd+unix:///a", "socket="),
        ("nbd+unix:///a?socket=relative", "socket="),
        ("nbd+unix:///a?socket=/a&tls-psk-file=/etc/shadow", "socket="),
        ("nbd+unix://host/a?socket=/a", "socket="),
        ("nbd+unix:///a?socket=/" + "a" * 107, "107"),
        ("http://host/a b", "%XX"),
        ('http://host/"a', "%XX"),
        ("http://host/a\n", "%XX"),
        ("http://host/a#b", "%XX"),
        ("http://host/" + "a" * 2000, "longer"),
    ],
)
def test_what_is_no_address(text: str, reason: str) -> None:
    assert is_url(text)
    with pytest.raises(ValueError, match=reason):
        parse_url(text)
    with pytest.raises((UsageError, HostError)):
        parse_disk([f"target={text}", "vdev=xvda", "format=raw", "access=ro"])
    with pytest.raises(HostError):
        source_for(text, "raw", readonly=True, folder=None)


@given(
    st.text(max_size=60)
    | st.builds("{}://{}".format, st.sampled_from(["nbd", "http", "nbd+unix"]), st.text())
)
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        found = parse_url(text)
    except ValueError:
        return
    assert is_url(text) and (found.host or found.socket)
    assert parse_url(found.text).identity == found.identity


def test_two_ways_to_write_one_address_are_one_disk() -> None:
    one, other = "nbd://HOST:10809/a%62", "nbd://host/ab"
    assert sharing.identity(one) == sharing.identity(other) != frozenset()
    assert sharing.identity(one) != sharing.identity("nbd://host/abc")
    assert sharing.look_at(one).kind == "remote" and sharing.users(one) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http://h/a,raw,xvda", "cannot be written"),
        ("https://h/a,vmdk,xvda,ro", "vmdk"),
        ("nbd://h/a,qcow2,xvda", "qcow2"),
        ("nbd://h/a,raw,xvda,script=x", "script"),
    ],
)
def test_what_cannot_come_from_there(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_disk([spec], "/")


def test_paths_stay_paths() -> None:
    for path, found in (("/a://b", "/a:/b"), ("b/c.img", "/dir/b/c.img"), ("./a:b", "/dir/a:b")):
        disk = parse_disk([f"{path},raw,xvda"], "/dir")
        assert (disk.target, disk.remote) == (found, False)


def test_what_qemu_nbd_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "a,b';$(x).img")
    Path(path).touch()
    for form in KINDS["vbd", "xtool"].formats:
        name = file_name(path, form, readonly=False)
        assert name.startswith("json:")
        told = json.loads(name[5:])
        assert told["file"] == {"driver": "file", "filename": path}
        assert told["driver"] == {"vhd": "vpc"}.get(form, form)
    for form in WEB_FORMATS:
        told = json.loads(file_name("https://h/a,b?c=$(x)", form, readonly=True)[5:])
        assert told["file"]["driver"] == "https" and told["file"]["url"] == "https://h/a,b?c=$(x)"
        assert ("backing" in told) == (form == "qcow2") and told.get("backing") is None
    command = QemuNbd(path, "qcow2", readonly=True).command(5)
    assert command[:2] == ["setpriv", "--pdeathsig=TERM"] and command[3] == "qemu-nbd"
    assert "--read-only" in command and command[-1] == file_name(path, "qcow2", readonly=True)
    assert not {"--persistent", "-t", "sh"} & set(command)
    assert isinstance(source_for("nbd://h/x", "raw", readonly=False, folder=None), NbdServer)


# --- headers
def header(
    backing: bytes = b"", form: bytes = b"", *, version: int = 3, features: int = 0, bits: int = 16
) -> bytes:
    length = 104 if version >= 3 else 72
    extension = struct.pack(">II", 0xE2792ACA, len(form)) + form.ljust((len(form) + 7) & ~7, b"\0")
    extensions = struct.pack(">II4s4x", 0x6803F857, 4, b"more") + (extension if form else b"") + bytes(8)
    offset = length + len(extensions) if backing else 0
    head = struct.pack(">4sIQII", MAGIC, version, offset, len(backing), bits).ljust(72, b"\0")
    if version >= 3:
        head += struct.pack(">QQQII", features, 0, 0, 4, length)
    return head + extensions + backing


@pytest.mark.parametrize("version", [2, 3])
def test_headers(version: int) -> None:
    assert parse_header(header(version=version)) == Header()
    assert parse_header(header(b"base.img", b"raw", version=version)) == Header("base.img", "raw")
    assert parse_header(header(b"base.img", version=version)) == Header("base.img")
    assert parse_header(b"a raw disk" * 100) is None and parse_header(b"") is None
    whole = header(b"base.img", b"qcow2", version=version)
    for size in range(len(whole)):
        try:
            found = parse_header(whole[:size])
        except ValueError:
            continue
        assert found is None or not found.backing


def test_a_data_file_shows() -> None:
    assert parse_header(header(features=4)) == Header(data_file=True)


@given(st.binary(max_size=300).map(lambda rest: header()[:4] + rest) | st.binary(max_size=300))
def test_any_header_is_read_or_refused(head: bytes) -> None:
    try:
        parse_header(head)
    except ValueError:
        pass


def test_chains(tmp_path: Path) -> None:
    def image(name: str, *of: bytes) -> str:
        (tmp_path / name).write_bytes(header(*of).ljust(HEAD, b"\0"))
        return str(tmp_path / name)

    image("base")
    check_local(image("a", b"base", b"raw"), "qcow2")
    check_local(image("b", b"a", b"qcow2"), "qcow2")
    check_local(image("c", b"nbd://h/x", b"raw"), "qcow2")
    check_local(image("d", b"a"), "raw")  # a raw disk, whatever a guest wrote there
    with pytest.raises(HostError, match="which format its backing file a has"):
        check_local(image("e", b"a"), "qcow2")
    with pytest.raises(HostError, match="which format its backing file a has"):
        check_local(image("f", b"e", b"qcow2"), "qcow2")
    with pytest.raises(HostError, match="more than 64"):
        check_local(image("g", b"g", b"qcow2"), "qcow2")
    with pytest.raises(HostError, match="cannot be opened"):
        check_local(image("h", b"none", b"qcow2"), "qcow2")
