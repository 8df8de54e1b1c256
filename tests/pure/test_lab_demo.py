"""How the demo reads a guest's console."""

from __future__ import annotations

import subprocess

import pytest

from xtool.lab.demo import Guest, at_prompt, last_line, table

OUTPUT = (
    b"pv: domain 7, pv, running, built in 0.52 s\r\n[    0.000000] Linux version 6.1\r\n"
    b"\r\nXTOOL-GUEST-READY\r\n\r\nBusyBox v1.35\r\n\r\n# \x1b[6n"
)


@pytest.mark.parametrize("size", [1, 7, len(OUTPUT)])
def test_a_console_in_pieces_of_any_size(size: int) -> None:
    guest = Guest("pv", subprocess.Popen(["true"]), 0.0)
    told = [text for at in range(0, len(OUTPUT), size) for text in guest.take(OUTPUT[at : at + size])]
    guest.process.wait()
    assert (guest.domid, guest.type, guest.build_time) == (7, "pv", 0.52)
    assert guest.userland is not None
    assert [text.split(" ")[1] for text in told] == ["domain", "userland"]
    assert "0.52 s" in table([guest])


def test_no_prompt_before_the_ready_line() -> None:
    assert not at_prompt(b"\r\n# not a guest's prompt\r\n")
    assert not at_prompt(b"\r\nXTOOL-GUEST-READY\r\n")
    assert at_prompt(OUTPUT)


def test_what_a_guest_says_is_made_safe() -> None:
    assert last_line(b"one\n\x1b[2Jtwo\x07\r\nhalf") == "[2Jtwo"
    assert last_line(b"") == ""
