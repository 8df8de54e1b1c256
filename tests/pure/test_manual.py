"""Help, man pages: every verb has a summary and two examples, every option is documented, groff is
content."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from xtool.cli import app, manpages
from xtool.cli.manual import Command, Parameter, usage, verbs


@cache
def commands() -> tuple[Command, ...]:
    return tuple(verbs())


def test_all_verbs_are_there() -> None:
    assert {one.words[0] for one in commands()} == set(app.VERBS)
    assert ("doctor", "diff") in [one.words for one in commands()]


@pytest.mark.parametrize("verb", sorted(app.VERBS))
def test_each_verb_says_what_it_does(verb: str) -> None:
    for one in commands():
        if one.words[0] != verb:
            continue
        where = " ".join(one.words)
        assert one.summary and one.summary[0].isupper() and one.summary.endswith((".", "...")), where
        # An app's commands have their own.
        least = 0 if one.subcommands else 3 - len(one.words)
        assert one.text and len(one.examples) >= least, where
        if verb != "lab":
            assert all("xtool " in line and f" {where}" in line for line in one.examples), where
        for parameter in one.parameters:
            assert parameter.help.strip(), f"{where}: {parameter.names} is not documented"
            assert parameter.help.rstrip()[-1] in ".;)?", f"{where}: {parameter.names}: {parameter.help!r}"


def test_usage() -> None:
    [one] = [one for one in commands() if one.words == ("network-limit",)]
    assert usage(one) == "network-limit [OPTION]... DOMAIN DEVICE"
    [one] = [one for one in commands() if one.words == ("doctor",)]
    assert usage(one).endswith("[COMMAND]")


def test_an_option_is_told_as_typer_has_it() -> None:
    [one] = [one for one in commands() if one.words == ("list",)]
    output = next(option for option in one.options if "--output" in option.names)
    assert output.names == ("-o", "--output") and output.values == ("table", "json", "yaml", "names")
    assert not output.flag and next(o for o in one.options if "--long" in o.names).flag
    [domain] = one.arguments
    assert (domain.kind, domain.metavar, domain.multiple) == ("domain", "[DOMAIN]", False)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return manpages.write_all(tmp_path_factory.mktemp("man"))


def test_there_is_a_page_for_each_verb(pages: list[Path]) -> None:
    assert {path.name for path in pages} == {"xtool.1", *(f"xtool-{verb}.1" for verb in app.VERBS)}
    overview = pages[0].read_text()
    assert all(f"xtool\\-{verb.replace('-', chr(92) + '-')} (1)" in overview for verb in app.VERBS)


@pytest.mark.skipif(not shutil.which("groff"), reason="no groff here: scripts/setup installs it")
def test_groff_is_content(pages: list[Path]) -> None:
    """No warning of any kind, and what it makes says what the help says."""
    argv = ["groff", "-man", "-Tutf8", "-ww", "-rLL=100n", "-P-c"]
    done = subprocess.run([*argv, *map(str, pages)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    shown = " ".join(re.sub(".\b", "", done.stdout).replace("\u2010\n", "").split())
    for one in commands():
        for line in one.examples:
            assert " ".join(line.split()) in shown


@pytest.mark.skipif(not shutil.which("man"), reason="no man here: scripts/setup installs it")
def test_man_is_content(pages: list[Path]) -> None:
    argv = ["man", "--warnings", "-E", "UTF-8", "-P", "cat", "-l"]
    done = subprocess.run([*argv, *map(str, pages)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_text_that_roff_would_take_for_its_own() -> None:
    parameter = Parameter(("--x",), "N", ".a 'b' \\c - ~d^`", False, False, False, (), "")
    page = manpages.page(Command(("v",), "'s.", (".x",), ("'e",), (parameter,)), [])
    assert "\\&.x" in page and "\n'" not in page and "\n.a" not in page
    assert "\\&.a \\(aqb\\(aq \\ec \\- \\(tid\\(ha\\(ga" in page
