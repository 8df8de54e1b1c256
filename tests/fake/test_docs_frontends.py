"""The examples in ``docs/frontends.md``, run on the machine in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from domainzero import DomainZero, domain_zero

PAGE = Path(__file__).parents[2] / "docs" / "frontends.md"
SIZE = 4 << 20


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DomainZero]:
    with domain_zero(tmp_path, monkeypatch) as found:
        yield found
        found.check_clean()


def test_the_examples(world: DomainZero, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"\x11" * 510 + b"\x55\xaa" + b"\x11" * (SIZE - 512))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {"host": world.host, "image": image}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        f"True {SIZE}",
        "b'hello'",
        "True",
        "b'typed'",
        "b'printed'",
        "b'from the guest' 5 b'to it'",
    ]
    assert image.read_bytes()[4096:4101] == b"hello" and not any(image.read_bytes()[1 << 20 : 2 << 20])
    assert world.wire.recv(1 << 16)[-46:] == bytes(46)


def test_the_verb_is_as_the_page_says() -> None:
    from xtool.cli.devices import _served
    from xtool.toolstack.api import ServedDisk

    path = "/run/xtool/block-serve-4711.sock"
    said = _served(ServedDisk(f"nbd+unix:///?socket={path}", path, "/images/web.img", 8 << 30, True))
    assert said in PAGE.read_text()
