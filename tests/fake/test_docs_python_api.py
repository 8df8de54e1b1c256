"""The examples in ``docs/python-api.md``, run on the host in memory, with a daemon for those that ask one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from clientpage import signatures
from daemons import running
from docblocks import ROOT, blocks

from xtool import paths

PAGE = ROOT / "docs" / "python-api.md"


def test_the_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths.run_dir().mkdir(exist_ok=True)
    image = tmp_path / "data.img"
    image.write_bytes(bytes(1 << 20))
    names: dict[str, object] = {"kernel": ROOT / "build/guest/tiny-pv.elf", "image": image}
    seen = 0
    for block in blocks(PAGE):
        if block.language != "python" or block.mark:
            continue
        code = compile(block.text, block.where, "exec")
        if "SocketClient(" in block.text:
            with running(names["client"].host, tmp_path) as daemon:  # type: ignore[attr-defined]
                exec(code, {**names, "socket": str(daemon.path)})
        else:
            exec(code, names)
        assert capsys.readouterr().out.splitlines() == re.findall(r"# -> (.*)", block.text), block.where
        seen += 1
    assert seen == 7


def test_the_signatures() -> None:
    [listed] = [block for block in blocks(PAGE) if block.mark == "a script: signatures"]
    assert shape(listed.text) == shape(signatures()), (
        "python tests/clientpage.py prints what stands there; ruff format breaks its lines"
    )


def shape(code: str) -> tuple[str, list[str]]:
    """The code and its comments, however the lines are broken."""
    return ast.unparse(ast.parse(code)), [line for line in code.splitlines() if line.startswith("#")]
