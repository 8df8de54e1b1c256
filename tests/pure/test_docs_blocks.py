"""Every block of the documentation does what it says: YAML is loaded by the real loader, each ``xtool``
command is read by the real parser, those that need no Xen are carried out, Python is run. ``docblocks`` has
the marks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import typer
import yaml
from docblocks import ROOT, Block, Command, blocks, commands, pages, same, simple
from docguests import GuestsInMemory, KeptOpen
from image_samples import PV_NOTES, PVH_NOTES, make_elf
from markdown_it import MarkdownIt

from xtool.cli import app
from xtool.config.load import Inputs, load_all
from xtool.errors import UsageError, XtoolError
from xtool.toolstack.local import open_client

LANGUAGES = {"yaml", "sh", "console", "python", "text", "json", "ini", "jinja", "xl", "xml"}
#: Carried out wherever they stand: they need no host.
ANYWHERE = {"check", "explain", "schema", "convert", "completion"}
#: What a host in memory cannot show: no guest runs there, and nobody sits at the terminal.
NOT_IN_MEMORY = {"console", "top", "vncviewer", "events", "daemon", "lab", "doctor", "metrics"}
#: Pages whose Python other tests run, with what the examples want.
PYTHON_ELSEWHERE = {
    "docs/evtchn.md": "pure/test_docs_evtchn_grant.py",
    "docs/grant.md": "pure/test_docs_evtchn_grant.py",
    "docs/frontends.md": "fake/test_docs_frontends.py",
    "docs/python-api.md": "fake/test_docs_python_api.py",
}
#: Folders that documents speak of; while a page is tested they lie in its own folder.
FOLDERS = (
    *("/boot/", "/images/", "/srv/", "/etc/xen/", "/etc/xtool/", "/run/xtool/", "/mnt/"),
    "/opt/xtool/src/build/guest/",
)
MARK = re.compile(r"|on a host|output varies|(on a host, )?exit status \d+")
WEB = "name: web\ntype: pvh\nmemory: 512\nkernel: vmlinuz\n"
WEB_CFG = 'name = "web"\ntype = "pvh"\nmemory = 512\nkernel = "/boot/vmlinuz"\n'
PART = {"pv": "kernel: vmlinuz\n", "pvh": "kernel: vmlinuz\n", "hvm": ""}

ALL = [block for page in pages() for block in blocks(page)]


def named(*languages: str) -> list[Any]:
    return [pytest.param(block, id=block.where) for block in ALL if block.language in languages]


def test_blocks_are_found_as_markdown_has_them() -> None:
    """No block escapes: none is indented code, and each says what language it is."""
    reader = MarkdownIt()
    for page in pages():
        name = str(page.relative_to(ROOT))
        fences = []
        for token in reader.parse(page.read_text(encoding="utf-8")):
            assert token.type != "code_block", (
                f"{name}:{token.map}: put this between ``` and name its language"
            )
            if token.type == "fence":
                assert token.map is not None
                fences.append((token.map[0] + 2, token.content))
        assert fences == [(block.line, block.text) for block in ALL if block.page == name]
    for block in ALL:
        assert block.language in LANGUAGES, f"{block.where}: one of {sorted(LANGUAGES)} behind the fence"
        text = (ROOT / block.page).read_text().splitlines()
        assert "docs:" not in text[block.line - 3] or block.mark, f"{block.where}: the mark is not readable"


@pytest.mark.parametrize("block", named("sh", "console"))
def test_commands_are_read_by_the_real_parser(block: Block) -> None:
    """Verbs, options and arguments are those xtool has; scripts and modules that are named are there."""
    for command in commands(block):
        words = command.words
        where = f"{block.page}:{command.line}: {shlex.join(words)}"
        if command.ours:
            try:
                parse(list(words[1:]))
            except UsageError as error:
                pytest.fail(f"{where}: {error.message}")
        elif words[0].startswith("scripts/"):
            assert (ROOT / words[0]).is_file(), where
        elif words[0].startswith("python") and "-m" in words:
            module = words[words.index("-m") + 1]
            assert module == "venv" or importlib.util.find_spec(module), where


def parse(words: list[str]) -> None:
    """As ``app.main`` reads a command line, up to the call of the verb. Raises ``UsageError``."""
    line = app.parse_globals(words)
    if line.show or not line.rest:
        return
    verb = app.find_verb(line.rest[0])
    made, arguments, path = app.command_of(verb), line.rest[1:], f"xtool {verb}"
    parent = None
    usage_error: Any = typer.BadParameter.__base__
    try:
        while True:
            context = made.make_context(path, arguments, parent=parent)
            rest = [*getattr(context, "_protected_args", ()), *context.args]
            if not hasattr(made, "resolve_command") or not rest:
                return
            name, made, arguments = made.resolve_command(context, rest)
            path, parent = f"{path} {name}", context
    except typer.Exit:
        pass  # --help
    except usage_error as error:
        if type(error).__name__ != "NoArgsIsHelpError":
            raise UsageError(error.format_message()) from None


def test_the_parser_refuses_what_xtool_refuses() -> None:
    for words in ("lisst", "list --wrong", "lab upp", "create", "block-attach web", "-X list", "lab up a b"):
        with pytest.raises(UsageError):
            parse(shlex.split(words))
    for words in ("list", "lab up second", "lab exec -- xl list", "des web", "create --help", "-H lab list"):
        parse(shlex.split(words))


_SPAN = re.compile(r"(?<!`)`(xtool [^`:]+)`(?!`)")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences(page: Path) -> None:
    """The same for `xtool ...` in running text, where it is a whole command."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    for span in _SPAN.findall(text):
        if "..." in span or re.search(r"\b(VERB|SHELL|COMMAND)\b|[\[|]", span):
            continue
        try:
            for command in simple(" ".join(span.split())):
                parse(list(command.words[1:]))
        except UsageError as error:
            # A verb may be spoken of without its arguments.
            if "Missing argument" not in error.message:
                pytest.fail(f"{page.relative_to(ROOT)}: `{span}`: {error.message}")


def rest(kind: str, text: str) -> str:
    """What a domain file wants and ``text`` lacks."""
    given = yaml.safe_load(text)
    wanted = f"name: x\ntype: {kind}\nmemory: 512\n{PART[kind]}"
    return "".join(f"{line}\n" for line in wanted.splitlines() if line.partition(":")[0] not in given)


class Reader:
    """Somebody who follows a page from its first block to its last, in a folder of his own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        kernel = make_elf([*PV_NOTES, *PVH_NOTES])
        for name in FOLDERS:
            self.local(name).mkdir(parents=True)
        for name in ("vmlinuz", "/boot/vmlinuz", "/srv/vmlinuz"):
            self.local(name).write_bytes(kernel)
        for name in ("initrd.img", "/boot/initrd.img"):
            self.local(name).write_bytes(bytes(4096))
        for name in ("root", "more", "data", "drivers.iso", "web", "db", "app"):
            self.local(f"/images/{name.removesuffix('.iso')}.{'iso' if '.' in name else 'img'}").write_bytes(
                bytes(1 << 20)
            )
        self.local("web.yaml").write_text(WEB)
        for name in ("/etc/xen/web.cfg", "web.cfg"):
            self.local(name).write_text(self.moved(WEB_CFG))
        (folder / "configs").symlink_to(ROOT / "configs")
        (folder / "build").mkdir()
        (folder / "build/guest").mkdir()
        for name in ("vmlinuz", "tiny-pv.elf", "tiny-pvh.elf"):
            (folder / "build/guest" / name).write_bytes(kernel)
        (folder / "build/guest/initramfs.cpio.gz").write_bytes(bytes(4096))
        for file in (folder / "build/guest").iterdir():
            self.local(f"/opt/xtool/src/build/guest/{file.name}").write_bytes(file.read_bytes())
        self._client: Any = None
        self._guests = ExitStack()

    def local(self, name: str) -> Path:
        return self.folder / name.lstrip("/")

    def moved(self, text: str) -> str:
        """``text`` with the folders that are this test's in their place."""
        return re.sub(rf"(?<![\w./])({'|'.join(FOLDERS)})", lambda m: f"{self.folder}{m[1]}", text)

    def shown(self, text: str) -> str:
        return text.replace(str(self.folder), "")

    def close(self) -> None:
        self._guests.close()
        if self._client is not None:
            self._client.close()

    # --- YAML -------------------------------------------------------------------------------------
    def yaml(self, block: Block) -> None:
        text, sets = self.moved(block.text), []
        path = self.local(block.title or "block.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if block.mark.startswith("not a domain file: "):
            assert [*yaml.safe_load_all(text)]
            return
        if kind := re.fullmatch(r"part of an? (pv|pvh|hvm) guest", block.mark):
            path.write_text(rest(kind[1], text) + text)
        elif block.mark == "template":
            assert block.title, f"{block.where}: a template has a name"
            user = self.folder / "user.yaml"
            user.write_text(f"extends: ['{path}']\n{rest('pvh', text)}")
            path = user
        elif block.mark.startswith("variables "):
            sets = shlex.split(block.mark)[1:]
        else:
            assert not block.mark, f"{block.where}: {block.mark!r} is no mark of a yaml block"
        assert load_all(path, Inputs(sets))

    # --- commands ---------------------------------------------------------------------------------
    def commands(self, block: Block) -> int:
        """How many were carried out."""
        done = 0
        for command in commands(block):
            if self.runs(block, command):
                self.run(block, command)
                done += 1
        return done

    def runs(self, block: Block, command: Command) -> bool:
        if not command.ours or command.piped:
            return False
        line = app.parse_globals(list(command.words[1:]))
        if line.show or not line.rest:
            return True
        verb = app.find_verb(line.rest[0])
        if "--help" in line.rest:
            return True
        if block.mark.startswith("on a host"):
            return verb not in NOT_IN_MEMORY
        if line.host is not None and verb not in app.LOCAL_ONLY:
            return False
        return verb in ANYWHERE or (verb == "create" and "--dry-run" in line.rest)

    def run(self, block: Block, command: Command) -> None:
        line = app.parse_globals(list(command.words[1:]))
        words = [self.moved(word) for word in line.rest if word not in ("-c", "--console")]
        if line.show:
            words = ["--version" if line.show == "version" else "--help"]
        if self._client is None:
            self._client = open_client("fake:")
            self._guests.enter_context(GuestsInMemory(self._client.host))
        self._capsys.readouterr()
        code = app.main(words, opener=lambda: KeptOpen(self._client))  # type: ignore[arg-type, return-value]
        out, err = (self.shown(text) for text in self._capsys.readouterr())
        where = f"{block.page}:{command.line}: {shlex.join(command.words)}"
        wanted = re.search(r"exit status (\d+)$", block.mark)
        assert code == (int(wanted[1]) if wanted else 0), f"{where}\n{out}{err}"
        if command.output and not command.output.startswith("/dev/"):
            path = self.local(self.moved(command.output).removeprefix(f"{self.folder}/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.moved(out))
        if command.expected and block.mark != "output varies":
            assert same(command.expected, out + err), f"{where}\nshows\n{out}{err}"


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Reader]:
    # A short name, for tables cut long paths.
    with TemporaryDirectory(prefix="d") as name:
        folder = Path(name)
        for variable, value in {
            "XTOOL_RUN_DIR": folder / "run/xtool",
            "XTOOL_ETC_DIR": folder / "etc/xtool",
            "XTOOL_LOG_DIR": folder / "log",
            "XDG_CONFIG_HOME": folder / "home/.config",
            "XDG_CACHE_HOME": folder / "home/.cache",
            "HOME": folder / "home",
        }.items():
            monkeypatch.setenv(variable, str(value))
        (folder / "home").mkdir()
        monkeypatch.chdir(folder)
        made = Reader(folder, capsys)
        yield made
        made.close()
        monkeypatch.chdir(ROOT)


def followed() -> list[Any]:
    wanted = {block.page for block in ALL if block.language in ("yaml", "sh", "console", "json")}
    return [pytest.param(page, id=page) for page in sorted(wanted)]


@pytest.mark.parametrize("page", followed())
def test_a_page_can_be_followed(reader: Reader, page: str) -> None:
    """From its first block to its last: domain files load, commands that need no Xen end as the page says."""
    for block in ALL:
        if block.page != page:
            continue
        try:
            if block.language == "yaml":
                reader.yaml(block)
            elif block.language == "xl":
                assert block.title, f"{block.where}: what is it called?"
                reader.local(block.title).write_text(reader.moved(block.text))
            elif block.language == "json":
                json.loads(block.text)
            elif block.language in ("sh", "console"):
                assert re.fullmatch(r"|on a host|output varies|(on a host, )?exit status \d+", block.mark), (
                    block.where
                )
                done = reader.commands(block)
                assert done or not block.mark, f"{block.where}: marked, and nothing in it is carried out"
        except XtoolError as error:
            pytest.fail(f"{block.where}: {reader.shown(str(error))}")


# --- Python -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", sorted({block.page for block in ALL if block.language == "python"}))
def test_python_runs(reader: Reader, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In order, with what came before; ``print(x)  # -> y`` is held to ``y``."""
    if page in PYTHON_ELSEWHERE:
        assert Path(page).name in (ROOT / "tests" / PYTHON_ELSEWHERE[page]).read_text()
        return
    names = names_for(page, reader)
    for block in ALL:
        if block.page != page or block.language != "python":
            continue
        code = compile(reader.moved(block.text), block.where, "exec")
        if block.mark.startswith("a script: "):
            continue
        assert not block.mark, block.where
        capsys.readouterr()
        exec(code, names)
        said = reader.shown(capsys.readouterr().out).splitlines()
        if wanted := re.findall(r"# -> (.*)", block.text):
            assert said == wanted, block.where


def names_for(page: str, reader: Reader) -> dict[str, Any]:
    """What a page's examples want to be there."""
    from xtool.fake.store import FakeStoreDaemon
    from xtool.xenstore.client import StoreClient

    if page == "docs/xenstore.md":
        from xtool.proto.xsperms import owned_by
        from xtool.xenstore.watches import wait_for

        store = StoreClient(FakeStoreDaemon().connect)
        node = "/local/domain/7/console/tty"
        store.write(node, "/dev/pts/3")
        paths = {"home": "/local/domain/7", "backend": "/local/domain/0/backend/vbd/7/51712", "node": node}
        return {"store": store, "domid": 7, "owned_by": owned_by, "wait_for": wait_for, **paths}
    return {}


# --- the site -----------------------------------------------------------------------------------------
#: Pages of the site that ``scripts/site_hooks.py`` makes.
MADE = {"index.md", "contributing.md", "changelog.md", "examples.md"}


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"(?m)^ *- [^:\n]+: (\S+\.md)$", text[text.index("\nnav:") :])
    pages_there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == pages_there | MADE, "mkdocs.yml: its nav lists every page of docs/"


def test_verbs_page_is_made_from_the_verbs() -> None:
    from xtool.cli.verbpage import page

    assert page() == (ROOT / "docs/verbs.md").read_text(), "run scripts/docs write"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_of_the_repository(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        target = os.path.normpath(page.parent / link)
        made = target in [str(ROOT / "docs" / name) for name in MADE]
        assert made or os.path.exists(target), f"{page.relative_to(ROOT)}: {link}"
