"""``docs/tutorial.md`` followed on real Xen: its files, its commands, what is typed, what it says.

It takes minutes, so ``XTOOL_LONG=1`` runs it. ``XTOOL_TEST_LABS`` names a lab that runs, to be used: one
with room for 0.75 GiB of guests, and without a db, an app or a web.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docblocks import ROOT, Block, blocks, commands, same

from xtool.errors import DeadlineError
from xtool.lab.image import image_folder

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not os.environ.get("XTOOL_LONG"), reason="long: XTOOL_LONG=1 runs it"),
]
XTOOL = (sys.executable, "-m", "xtool.cli.app")
GIVEN = os.environ.get("XTOOL_TEST_LABS", "").partition(",")[0]
NAME = GIVEN or f"test-tutorial-{os.getpid()}"
#: How long what is typed into a guest may take, seconds.
TYPING = 40


class Reader:
    """``console`` is the guest whose console was opened last, ``printed`` what the last command printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.console = self.printed = ""

    def xtool(self, *words: str, status: int = 0, typed: str | None = None) -> str:
        done = subprocess.run(
            [*XTOOL, *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            input=typed,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == status, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    def follow(self, block: Block) -> None:
        if block.language == "yaml":
            file = self.folder / block.title
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text)
        elif block.language == "text" and block.text.startswith("ip "):
            words = ("-H", f"lab:{NAME}", "console", "--timeout", str(TYPING), self.console)
            self.xtool(*words, status=DeadlineError.exit_code, typed=block.text)
        elif block.language == "text":
            assert self.printed.splitlines() == block.text.splitlines(), block.where
        else:
            status = int(block.mark.rpartition(" ")[2]) if "exit status" in block.mark else 0
            for command in commands(block):
                if command.ours:
                    self.carry_out(list(command.words[1:]), command.expected, status, block.where)

    def carry_out(self, words: list[str], expected: tuple[str, ...], status: int, where: str) -> None:
        if words[0] == "lab":
            if words[1] != "exec":  # up and down are the fixture's
                return
            words.insert(2, NAME)
        elif words[0] == "-H":
            words[1] = f"lab:{NAME}"
            if words[2] == "console" and "--log" not in words:
                self.console = words[3]
                return
        self.printed = self.xtool(*words, status=status)
        assert not expected or same(expected, self.printed), f"{where}\n{self.printed}"


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    if not image_folder().is_dir():
        pytest.skip("the lab's image is not built: run scripts/setup")
    made = Reader(tmp_path)
    try:
        if not GIVEN:
            made.xtool("lab", "up", NAME, "--memory", "3GiB")
        yield made
    finally:
        if GIVEN:
            for guest in ("web", "app", "db"):
                subprocess.run([*XTOOL, "-H", f"lab:{NAME}", "destroy", guest], check=False)
        else:
            subprocess.run([*XTOOL, "lab", "remove", NAME], check=False)


def test_the_tutorial(reader: Reader) -> None:
    for block in blocks(ROOT / "docs/tutorial.md"):
        reader.follow(block)
    assert "web" not in reader.xtool("-H", f"lab:{NAME}", "list", "-o", "names")
