"""The table of ``docs/wrong-configs.md``: what xl does with a wrong configuration, and what xtool says.

``tests/data/wrong`` has each mistake twice, for xtool (``.yaml``) and for xl (``.cfg``). In the lab's dom0::

    python3 tests/xen/wrongconfigs.py --xl > tests/data/wrong/xl.json      # runs xl on every .cfg

and anywhere ``python3 tests/xen/wrongconfigs.py`` writes the page from that file and from what xtool says
now. ``scripts/wrong-configs`` does both. xl only reads each file (``xl create -n``), and where its first
lines ask for it also creates the domain, paused, and destroys it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from xtool.cli.report import describe
from xtool.config.load import load_all
from xtool.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "wrong"
ANSWERS = DATA / "xl.json"
PAGE = ROOT / "docs" / "wrong-configs.md"
_CREATE = "# xl create -p"
_NOISE = ("Parsing config from",)
_DEADLINE = 120
_HEAD = """# Wrong configurations

What xl (of Xen 4.17, in the lab) does with a wrong file, and what xtool says to the same mistake. Each row
is a pair of files in `tests/data/wrong`: `NAME.cfg` and `NAME.yaml`.
`scripts/wrong-configs` makes this page; a test holds xtool's column to what it says now.

Where xl "takes" a file, it was only asked to read it (`xl create -n`), and what the domain would have become
is not known; where it "creates" it, it did so with `xl create -p`, and the domain was destroyed.

"""


def names() -> list[str]:
    return sorted(path.stem for path in DATA.glob("*.yaml"))


def subject(name: str) -> str:
    """What is wrong, from the file's first line."""
    return (DATA / f"{name}.yaml").read_text().split("\n")[0].removeprefix("# ")


def xtool_says(name: str) -> list[str]:
    """What ``xtool check`` prints, its lines; the file by its name alone."""
    path = DATA / f"{name}.yaml"
    try:
        load_all(path)
    except ConfigError as error:
        return [line.replace(f"{DATA}/", "") for line in describe(error)]
    return ["ok"]


def ask_xl() -> dict[str, dict[str, object]]:
    """Every file through ``xl create -n``, and through ``xl create -p`` where it asks for that."""
    answers = {}
    for name in names():
        path = DATA / f"{name}.cfg"
        status, said = _xl("create", "-n", str(path))
        answer: dict[str, object] = {"read": status, "said": said}
        if _CREATE in path.read_text().split("\n")[:2] and status == 0:
            before = _domids()
            status, said = _xl("create", "-p", str(path))
            answer |= {"created": status, "said": said}
            for domid in _domids() - before:
                _xl("destroy", str(domid))
        answers[name] = answer
    return answers


def _xl(*arguments: str) -> tuple[int, list[str]]:
    try:
        done = subprocess.run(
            ["xl", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=_DEADLINE, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, [f"(no answer within {_DEADLINE} s)"]
    lines = [line.replace(f"{DATA}/", "") for line in done.stderr.splitlines()]
    return done.returncode, [line for line in lines if line.strip() and not line.startswith(_NOISE)]


def _domids() -> set[int]:
    listed = subprocess.run(["xl", "list"], capture_output=True, text=True, check=True).stdout
    return {int(line[40:].split()[0]) for line in listed.splitlines()[1:]}


def page(answers: dict[str, dict[str, object]]) -> str:
    rows = ["| Mistake | xl | xtool |", "|---|---|---|"]
    silent = 0
    for name in names():
        answer = answers.get(name)
        silent += answer is not None and _is_silent(answer)
        cells = (f"{subject(name)}<br>`{name}`", _xl_cell(answer), _cell(_without_source(xtool_says(name))))
        rows.append("| " + " | ".join(cells) + " |")
    asked = (
        f"xl takes {silent} of these {len(names())} files without a word."
        if answers
        else "xl was not asked yet."
    )
    return f"{_HEAD}{asked}\n\n" + "\n".join(rows) + "\n"


def _is_silent(answer: dict[str, object]) -> bool:
    return not answer["said"] and not answer["read"] and not answer.get("created")


def _xl_cell(answer: dict[str, object] | None) -> str:
    if answer is None:
        return "not asked yet"
    said = answer["said"]
    assert isinstance(said, list)
    if _is_silent(answer):
        return "**creates it** without a word" if "created" in answer else "**takes it** without a word"
    if "created" in answer:
        how = "creates it" if answer["created"] == 0 else f"fails to create it ({answer['created']})"
    else:
        how = "takes it" if answer["read"] == 0 else f"refuses it ({answer['read']})"
    return f"{how}:<br>{_cell(said[:4])}"


def _without_source(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("  ")]


def _cell(lines: list[str]) -> str:
    safe = [line.replace("\\", "\\\\").replace("|", "\\|").replace("`", "'") for line in lines]
    return "<br>".join(f"`{line}`" for line in safe)


def read_answers() -> dict[str, dict[str, object]]:
    found = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    assert isinstance(found, dict)
    return found


if __name__ == "__main__":
    if "--xl" in sys.argv[1:]:
        print(json.dumps(ask_xl(), indent=1))
    else:
        PAGE.write_text(page(read_answers()))
