"""What the zygote's children make of a request, and who may ask for what. The zygote itself: tests/fake."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtool import warmlink
from xtool.cli.app import VERBS
from xtool.daemon import warmaccess, warmchild
from xtool.daemon.warmaccess import Groups, access_for, access_of, environment_for, may_look

STAMP = b"stamp"
_WORD = st.binary(max_size=8).filter(lambda word: b"\0" not in word)
_NAME = st.binary(min_size=1, max_size=5).filter(lambda word: b"\0" not in word and b"=" not in word)


@given(st.lists(_WORD, max_size=5), st.dictionaries(_NAME, _WORD, max_size=5), st.integers(0, 0o777))
def test_what_is_sent_is_understood(words: list[bytes], environment: dict[bytes, bytes], umask: int) -> None:
    fields = [STAMP, b"%d" % umask, b"%d" % len(words), *words]
    fields += [name + b"=" + value for name, value in environment.items()]
    head, body = warmlink.request(b"C", 0b101, fields)
    assert len(head) == warmlink.HEAD
    wanted = warmchild.parse_request(head[3:4], head[4], body, [7, 8, 9], STAMP)
    assert isinstance(wanted, warmchild.CommandLine)
    assert [os.fsencode(word) for word in wanted.arguments] == words
    assert (wanted.environment, wanted.umask) == (environment, umask)
    assert (wanted.folder, wanted.files) == (7, {0: 8, 2: 9})
    # Of another installation, or with other descriptors than it says.
    assert warmchild.parse_request(b"C", 0b101, body, [7, 8, 9], b"other") is None
    assert warmchild.parse_request(b"C", 0b111, body, [7, 8, 9], STAMP) is None


@given(st.binary(max_size=60), st.integers(0, 255), st.sampled_from([b"C", b"K", b"X"]), st.integers(0, 4))
def test_nonsense_is_refused(body: bytes, mask: int, kind: bytes, files: int) -> None:
    for whole in (body, STAMP + b"\0" + body, STAMP + b"\0" + body + b"\0"):
        try:
            found = warmchild.parse_request(kind, mask, whole, list(range(files)), STAMP)
        except (ValueError, IndexError):
            continue
        if isinstance(found, warmchild.CommandLine):
            assert files == 1 + bin(mask).count("1") and set(found.files) <= {0, 1, 2}


def test_a_keeper_is_asked_for() -> None:
    _, body = warmlink.request(b"K", 0, [STAMP, b"7", b"uuid", b"XTOOL_LOG_DIR=/x"])
    wanted = warmchild.parse_request(b"K", 0, body, [], STAMP)
    assert wanted == warmchild.KeeperRequest(7, "uuid", {b"XTOOL_LOG_DIR": b"/x"})


def test_the_watcher_is_asked_for() -> None:
    _, body = warmlink.request(b"W", 0, [STAMP, b"XTOOL_LOG_DIR=/x"])
    wanted = warmchild.parse_request(b"W", 0, body, [], STAMP)
    assert wanted == warmchild.WatcherRequest({b"XTOOL_LOG_DIR": b"/x"})
    assert warmchild.parse_request(b"W", 0, body, [], b"other code") is None


def test_who_may_do_what() -> None:
    groups = Groups(10, 20)
    assert access_for({10, 20}, groups) == "full"
    assert access_for({5, 20}, groups) == "look"
    assert access_for({5}, groups) == "none"
    assert access_for({5}, Groups(None, None)) == "none"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(
    ("gid", "others", "access"),
    [(4242, [], "full"), (9, [4242], "full"), (9, [4343, 1], "look"), (9, [1, 2], "none"), (0, [], "none")],
)
def test_the_kernel_tells_who_it_is(
    tmp_path_factory: pytest.TempPathFactory, gid: int, others: list[int], access: str
) -> None:
    """By the process that connected, its supplementary groups included; root's group is not root."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0xtool-test-access")
    listener.listen(1)
    child = os.fork()
    if child == 0:
        os.setgroups(others)
        os.setresgid(gid, gid, gid)
        os.setresuid(12345, 12345, 12345)
        link = socket.socket(socket.AF_UNIX)
        link.connect("\0xtool-test-access")
        link.recv(1)
        os._exit(0)
    with listener, listener.accept()[0] as link:
        assert access_of(link, Groups(4242, 4343)) == access
    os.waitpid(child, 0)
    us, them = socket.socketpair()
    with us, them:
        assert access_of(us, Groups(4242, 4343)) == "root"


@pytest.mark.parametrize(
    ("line", "may"),
    [
        (["list"], True),
        (["-v", "list", "-o", "json"], True),
        (["li"], True),
        (["--version"], True),
        ([], True),
        (["info"], True),
        (["destroy", "web"], False),
        (["create", "/etc/shadow"], False),
        (["check", "/etc/shadow"], False),
        (["dmesg", "--clear"], False),
        (["console", "web"], False),
        (["-H", "lab", "list"], False),
        (["-Hlab", "list"], False),
        (["lis", "t"], True),
        (["nonsense"], False),
        (["-x", "list"], False),
        (["lab", "up"], False),
    ],
)
def test_what_may_be_looked_at(line: list[str], may: bool) -> None:
    assert may_look(line) is may


def test_no_verb_for_looking_takes_the_name_of_a_file() -> None:
    """By its command's own parameters: none is a path, and every option is one we know."""
    import importlib

    import typer

    from xtool.cli.app import single_command

    for verb in warmaccess.LOOKING_VERBS & VERBS.keys():
        known = VERBS[verb]
        function = getattr(importlib.import_module(f"xtool.cli.{known.module}"), known.function)
        command = typer.main.get_command(single_command(verb, function))
        for parameter in command.params:
            known_names = {"domain", "domains", "name", "domid", "output", "long", "short", "help"}
            assert parameter.name in known_names, (verb, parameter.name)


def test_a_strangers_environment_names_no_file() -> None:
    ours = {b"PATH": b"/usr/bin", b"XTOOL_RUN_DIR": b"/run/xtool", b"TERM": b"dumb"}
    theirs = {
        b"PATH": b"/tmp/evil",
        b"XTOOL_RUN_DIR": b"/tmp/evil",
        b"XTOOL_CONNECT": b"fake:",
        b"LD_PRELOAD": b"/tmp/evil.so",
        b"TERM": b"xterm-256color",
        b"LC_ALL": b"../../tmp/evil",
        b"LANG": b"de_DE.UTF-8",
        b"TZ": b"/etc/shadow",
        b"HOME": b"/tmp",
    }
    for access in ("look", "full"):
        assert environment_for(access, theirs, ours) == {  # type: ignore[arg-type]
            b"PATH": b"/usr/bin",
            b"XTOOL_RUN_DIR": b"/run/xtool",
            b"TERM": b"xterm-256color",
            b"LANG": b"de_DE.UTF-8",
        }
    assert environment_for("root", theirs, ours) == theirs


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be in many groups")
@pytest.mark.parametrize(("count", "seen"), [(0, 0), (256, 256), (257, 0)])
def test_many_groups(count: int, seen: int) -> None:
    """Who is in too many is a stranger, and does his work himself."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups(range(1000, 1000 + count))
            us, _them = socket.socketpair()
            status = 0 if len(warmaccess._groups(us)) == seen else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
