"""The command line: which verb, what it prints, how it fails, and what it imports."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from xtool import errors
from xtool.cli import app
from xtool.cli.report import caret_block, describe
from xtool.config import DomainConfig
from xtool.errors import (
    ConfigError,
    DeadlineError,
    DomainNotFoundError,
    HostMemoryError,
    UsageError,
    XtoolError,
)
from xtool.progress import SILENT, Progress
from xtool.toolstack import api

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
WEB = api.DomainInfo(3, "web", "u-3", "pvh", "running", "", 256 * MIB, 512 * MIB, 2, 1.25, True)
EVIL = api.DomainInfo(4, "e\x1b[31mvil", "u-4", "pv", "shutdown", "poweroff", 8 * MIB, 8 * MIB, 1, 0.0, False)
DOM0 = api.DomainInfo(0, "Domain-0", "u-0", "pv", "running", "", 1536 * MIB, 1536 * MIB, 2, 9.0, False)


class MemoryClient:
    """A toolstack of three domains that remembers what it was asked."""

    def __init__(self) -> None:
        self.domains = [DOM0, WEB, EVIL]
        self.calls: list[tuple[object, ...]] = []
        self.fail: XtoolError | BaseException | None = None

    def _find(self, domain: str) -> api.DomainInfo:
        for known in self.domains:
            if domain in (known.name, str(known.domid), known.uuid):
                return known
        raise DomainNotFoundError(f"there is no domain {domain}", hint="xtool list shows those there are")

    def _did(self, action: str, domain: str, *more: object) -> api.LifecycleResult:
        found = self._find(domain)
        self.calls.append((action, found.domid, *more))
        return api.LifecycleResult(found.domid, found.name, action)

    def create(
        self, config: DomainConfig, options: api.CreateOptions, progress: Progress = SILENT
    ) -> api.CreateResult:
        progress.step("memory")
        if self.fail:
            raise self.fail
        self.calls.append(("create", config.name, config.memory, options.paused))
        span = api.Span("memory", 0.001, 0.25, 7)
        return api.CreateResult(config.name, 5, "u-5", config.type, 0.5, (span,))

    def dry_run(self, config: DomainConfig) -> api.DryRun:
        raise AssertionError("--dry-run goes to the fake host")

    def list(self, domain: str | None = None) -> list[api.DomainInfo]:
        return self.domains if domain is None else [self._find(domain)]

    def info(self) -> api.HostInfo:
        return api.HostInfo(
            "4.17.5", ("xen-3.0-x86_64",), "console=com1", 0x15, 0x15, "AMD", "QEMU", "SVM",
            True, True, False, ("hvm", "hap"), 2, 1, 2, 1, 2_500_000, 8 << 30, 6 << 30, 0, "credit2", 3,
        )  # fmt: skip

    def dmesg(self, *, clear: bool = False) -> str:
        self.calls.append(("dmesg", clear))
        return "(XEN) one\n(XEN) t\two\x1b[2J\n"

    def vcpu_list(self, domain: str | None = None) -> api.Vcpus:
        return [
            api.VcpuInfo("web", 3, 0, 1, "running", 1.25, "all", "all"),
            api.VcpuInfo("web", 3, 1, None, "offline", 0.0, "0-1", "all"),
        ]

    def console(self, domain: str, kind: str | None = None, *, deadline: float = 10.0) -> api.ConsoleTarget:
        raise NotImplementedError

    def pause(self, domain: str) -> api.LifecycleResult:
        return self._did("paused", domain)

    def unpause(self, domain: str) -> api.LifecycleResult:
        return self._did("unpaused", domain)

    def shutdown(
        self, domain: str, *, wait: bool = False, acpi_fallback: bool = False, deadline: float = 600.0
    ) -> api.LifecycleResult:
        return self._did("destroyed" if wait else "requested", domain, acpi_fallback, deadline)

    def reboot(
        self, domain: str, *, wait: bool = False, acpi_fallback: bool = False, deadline: float = 600.0
    ) -> api.LifecycleResult:
        return replace(self._did("restarted", domain, wait), new_domid=9)

    def destroy(self, domain: str) -> api.LifecycleResult:
        return self._did("destroyed", domain)

    def settle(self, domid: int, uuid: str, progress: Progress = SILENT) -> api.LifecycleResult | None:
        return None

    def gc(self) -> api.Results:
        return []

    def leftovers(self) -> list[object]:
        return []

    def close(self) -> None:
        self.calls.append(("close",))


@pytest.fixture
def client() -> MemoryClient:
    return MemoryClient()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(client: MemoryClient, capsys: pytest.CaptureFixture[str]) -> Run:
    def go(*argv: str) -> tuple[int, str, str]:
        code = app.main(argv, opener=lambda: client)
        out, err = capsys.readouterr()
        return code, out, err

    return go


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "new.yaml"
    path.write_text("name: new\ntype: pvh\nmemory: 64\nkernel: k\n")
    return str(path)


def test_list(run: Run) -> None:
    code, out, err = run("list")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "Name          ID  Type   Mem  VCPUs  State                Time(s)",
        "Domain-0       0  pv    1536      2  running                  9.0",
        "web            3  pvh    256      2  running                  1.2",
        "e\\x1b[31mvil   4  pv       8      1  shutdown (poweroff)      0.0",
    ]


@pytest.mark.parametrize("verb", ["list", "info", "vcpu-list", "dmesg", "gc"])
@pytest.mark.parametrize("form", ["json", "yaml"])
def test_programs_get_data(run: Run, verb: str, form: str) -> None:
    code, out, _ = run(verb, "-o", form)
    assert code == 0
    assert "\x1b" not in out
    data = json.loads(out) if form == "json" else yaml.safe_load(out)
    keys = {
        "list": set(api.DomainInfo.__dataclass_fields__), "info": set(api.HostInfo.__dataclass_fields__),
        "vcpu-list": set(api.VcpuInfo.__dataclass_fields__), "dmesg": {"text"}, "gc": set(),
    }[verb]  # fmt: skip
    assert set(data[0] if isinstance(data, list) and data else data) == keys


def test_json_holds_the_name_as_it_is(run: Run) -> None:
    assert json.loads(run("list", "4", "-o", "json")[1])[0]["name"] == "e\x1b[31mvil"


def test_info_and_vcpus_for_people(run: Run) -> None:
    out = run("info")[1]
    assert "hardware virtualisation     : SVM" in out and "total memory                : 8192" in out
    out = run("vcpu-list", "web")[1]
    assert [line.split()[3] for line in out.splitlines()] == ["CPU", "1", "-"]


def test_dmesg_escapes_but_keeps_lines(run: Run, client: MemoryClient) -> None:
    assert run("dmesg", "-c")[1] == "(XEN) one\n(XEN) t\two\\x1b[2J\n"
    assert client.calls == [("dmesg", True), ("close",)]


def test_domid_and_domname(run: Run) -> None:
    assert run("domid", "web")[1] == "3\n"
    assert run("domname", "4")[1] == "e\\x1b[31mvil\n"
    assert json.loads(run("domid", "web", "-o", "json")[1]) == {"domid": 3}


@pytest.mark.parametrize("verb", ["pause", "unpause", "destroy", "shutdown", "reboot", "domid", "console"])
def test_an_unknown_domain(run: Run, verb: str) -> None:
    code, out, err = run(verb, "nobody")
    assert (code, out) == (9, "")
    assert err == "error: there is no domain nobody\nhint: xtool list shows those there are\n"


def test_lifecycle(run: Run, client: MemoryClient) -> None:
    assert run("pause", "web")[1] == "web (domain 3): paused\n"
    assert run("shutdown", "-w", "-F", "--timeout", "5", "web")[1] == "web (domain 3): destroyed\n"
    assert run("reboot", "web")[1] == "web (domain 3): restarted as domain 9\n"
    assert [c for c in client.calls if c != ("close",)] == [
        ("paused", 3), ("destroyed", 3, True, 5.0), ("restarted", 3, False),
    ]  # fmt: skip


def test_several_domains_at_once(run: Run, client: MemoryClient) -> None:
    assert run("pause", "web", "4", "web")[:2] == (
        0,
        "web (domain 3): paused\ne\\x1b[31mvil (domain 4): paused\n",
    )
    code, out, err = run("destroy", "nobody", "web")  # one that fails stops none of the others
    assert (code, out) == (9, "web (domain 3): destroyed\n") and "there is no domain nobody" in err
    assert run("unpause", "-a")[:2] == (0, "web (domain 3): unpaused\n")
    assert [call[:2] for call in client.calls if call != ("close",)] == [
        ("paused", 3), ("paused", 4), ("destroyed", 3), ("unpaused", 3),
    ]  # fmt: skip


def test_a_guest_that_does_not_listen_is_forced(run: Run, client: MemoryClient) -> None:
    asked = client.shutdown

    def deaf(domain: str, **more: object) -> api.LifecycleResult:
        if more["wait"]:
            raise DeadlineError(f"{domain} did not shut down within 1 s", hint="xtool destroy ends it")
        return asked(domain, **more)  # type: ignore[arg-type]

    client.shutdown = deaf  # type: ignore[method-assign]
    assert run("shutdown", "-w", "web")[0] == 13
    code, out, err = run("shutdown", "--force", "--timeout", "1", "web", "4")
    assert code == 0 and err.count("did not shut down within 1 s: destroyed") == 2
    assert out == "web (domain 3): destroyed\ne\\x1b[31mvil (domain 4): destroyed\n"
    # Both were asked before either was waited for.
    assert [c[:2] for c in client.calls if c != ("close",)] == [
        ("requested", 3), ("requested", 4), ("destroyed", 3), ("destroyed", 4),
    ]  # fmt: skip


def test_shutdown_all_leaves_strangers_alone(run: Run, client: MemoryClient) -> None:
    code, out, err = run("shutdown", "-a", "-w")
    assert (code, out) == (0, "web (domain 3): destroyed\n")
    assert err == "e\\x1b[31mvil was not created by xtool: left alone\n"
    assert [call[:2] for call in client.calls] == [("requested", 3), ("destroyed", 3), ("close",)]


@pytest.mark.parametrize("argv", [("shutdown",), ("shutdown", "-a", "web"), ("reboot",)])
def test_shutdown_wants_one_or_all(run: Run, client: MemoryClient, argv: tuple[str, ...]) -> None:
    code, _, err = run(*argv)
    assert code == 2 and "wants a domain, or -a" in err and client.calls == []


def test_create(run: Run, client: MemoryClient, config: str) -> None:
    code, out, err = run("create", config, "-p", "--set", "memory=1GiB", "--timings")
    assert code == 0 and err == "  memory\n"
    assert out.splitlines() == [
        "new: domain 5, pvh, paused, built in 0.50 s",
        "",
        "Stage   Begin (ms)  Took (ms)  Hypercalls",
        "memory         1.0      250.0           7",
    ]
    assert client.calls == [("create", "new", 1024 * MIB, True), ("close",)]


def test_create_says_how_to_see_the_display(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "win.yaml"
    file.write_text("name: win\ntype: hvm\nmemory: 64\nvnc: true\nvncpasswd: hush\n")
    _, out, err = run("create", str(file))
    assert "xtool vncviewer win shows its display" in err and "password of the domain file" in err
    assert "hush" not in out + err
    assert "vncviewer" not in run("create", str(file), "--set", "vnc=false")[2]


def test_create_for_programs(run: Run, config: str) -> None:
    data = json.loads(run("create", config, "-o", "json")[1])
    assert set(data) == set(api.CreateResult.__dataclass_fields__)
    assert data["timings"] == [{"name": "memory", "start": 0.001, "duration": 0.25, "hypercalls": 7}]


@pytest.mark.parametrize("more", [("--dry-run", "-c"), ("--dry-run", "-p"), ("-c", "-o", "json")])
def test_create_options_that_exclude_each_other(run: Run, config: str, more: tuple[str, ...]) -> None:
    code, _, err = run("create", config, *more)
    assert code == 2 and "exclude" in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (HostMemoryError("populate", errno.ENOMEM, detail="x", hint="less"), 6, "hint: less\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(143), 143, ""),
        (ZeroDivisionError("oops"), 70, "this is a bug in xtool: ZeroDivisionError: oops"),
    ],
)
def test_what_create_raises_becomes_an_exit_code(
    run: Run, client: MemoryClient, config: str, error: BaseException, code: int, text: str
) -> None:
    client.fail = error
    got, out, err = run("create", config)
    assert (got, out) == (code, "") and text in err
    assert client.calls == [("close",)]


def test_check(run: Run, config: str, tmp_path: Path) -> None:
    assert run("check", config) == (0, "ok\n", "")
    assert json.loads(run("check", config, "-o", "json")[1])["memory"] == 64
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: new\ntype: pvh\nmemroy: 64\nvcpus: x\n")
    code, out, err = run("check", str(bad))
    assert (code, out) == (3, "")
    assert err.splitlines()[3:7] == [
        f"error: {bad}:3:1: unknown key memroy",
        "  3 | memroy: 64",
        "    | ^",
        "hint: did you mean memory?",
    ]
    assert f"error: {bad}:4:8: vcpus: a number is wanted, not 'x'" in err


def test_carets_stand_below_their_column() -> None:
    def block(source: str, column: int) -> list[str]:
        return caret_block(ConfigError("m", file="f", line=12, column=column, source=source))

    assert block("name: x", 7) == ["  12 | name: x", "     |       ^"]
    assert block("a\tb", 3) == ["  12 | a b", "     |   ^"]
    assert block("日本: x", 5) == ["  12 | 日本: x", "     |       ^"]
    assert block("\x1b[2Jx", 5) == ["  12 |  [2Jx", "     |     ^"]
    source, caret = block("k: " + "v" * 300 + "X", 304)
    assert len(source) < 120 and source[caret.index("^")] == "X"
    assert block("", 1) == ["  12 | ", "     | ^"]


def test_messages_are_escaped() -> None:
    assert describe(XtoolError("a\x1bb", hint="c\nd")) == ["error: a\\x1bb", "hint: c\\nd"]


@pytest.mark.parametrize(
    ("word", "verb"),
    [("list", "list"), ("li", "list"), ("cr", "create"), ("vcpu-l", "vcpu-list"), ("g", "gc")],
)
def test_a_verb_may_be_shortened(word: str, verb: str) -> None:
    assert app.find_verb(word) == verb


@pytest.mark.parametrize(
    ("word", "hint"),
    [("c", "create, check, console"), ("dom", "domid, domname"), ("lsit", "list"), ("zz", "--help")],
)
def test_a_verb_that_is_none(word: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        app.find_verb(word)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["list", "-o", "xml"], 2, "unknown output format 'xml'\nhint: it is one of table, json, yaml"),
        (["list", "--nope"], 2, "hint: xtool list --help shows how"),
        (["pause"], 2, "pause wants a domain, or -a"),
        (["destroy"], 2, "Missing argument 'DOMAIN...'"),
        (["shutdown", "web", "--timeout", "soon"], 2, "soon"),
        (["--nope"], 2, "unknown option --nope"),
        (["-H"], 2, "-H wants a target"),
        (["console", "-t", "vga", "web"], 2, "unknown console type 'vga'"),
    ],
)
def test_usage_errors(run: Run, argv: list[str], code: int, text: str) -> None:
    got, out, err = run(*argv)
    assert (got, out) == (code, "")
    assert err.startswith("error: ") and text in err


@pytest.mark.parametrize("host", [["-H", "lab"], ["-Hlab"], ["--host", "lab"], ["--host=lab"], ["-H=lab"]])
def test_the_host_stands_before_the_verb(host: list[str]) -> None:
    line = app.parse_globals(["-v", *host, "list", "-H", "x", "--help"])
    assert line == app.Globals("lab", True, None, ["list", "-H", "x", "--help"])


@pytest.mark.parametrize("verb", sorted(set(app.VERBS) - set(app.SUB_APPS)))
def test_each_verb_has_help_with_two_examples(run: Run, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    examples = out.split("Examples:")[1].split("\n\n")[0].strip().splitlines()
    assert len(examples) >= 2 and all(f" {verb}" in line for line in examples)


def test_help_lists_every_verb_and_no_verb_is_misuse(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and all(f"\n  {verb} " in out for verb in app.VERBS)
    assert run()[0] == 2
    assert run("--version")[1].startswith("xtool ")


def test_exit_codes_are_documented() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ") and "`" in line]
    documented = {row[3].strip().strip("`"): int(row[1]) for row in rows if row[3].strip()}
    own = {
        name: cls.exit_code
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, XtoolError) and "exit_code" in vars(cls)
    }
    assert documented == own


def _python(code: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **more)  # type: ignore[call-overload, no-any-return]


HEAVY = ("yaml", "pydantic", "rich", "typer", "asyncio", "numpy", "xtool.config.model")


@pytest.mark.parametrize(
    ("argv", "allowed"), [(["--help"], set()), (["--version"], set()), (["list", "--help"], {"typer"})]
)
def test_only_what_is_needed_is_imported(argv: list[str], allowed: set[str]) -> None:
    code = (
        "import sys; from xtool.cli.app import main; main(%r);"
        "print([m for m in %r if m in sys.modules], file=sys.stderr)"
    )
    done = _python(code % (argv, HEAVY))
    assert set(eval(done.stderr)) <= allowed


@pytest.mark.parametrize(
    "argv", [["--help"], ["list", "--help"], ["check", str(ROOT / "configs" / "pv.yaml")]]
)
def test_a_reader_that_goes_away_is_no_error(argv: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "xtool.cli.app", *argv], stdout=pipe, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_signals_unwind(number: signal.Signals, code: int, config: str) -> None:
    """The verb is stopped in the middle of a create and still closes its client."""
    script = f"""
import sys, time
from xtool.cli.app import main
class Client:
    def create(self, *_):
        print("begun", flush=True)
        time.sleep(60)
    def close(self):
        print("closed", flush=True)
sys.exit(main(["create", {config!r}], opener=Client))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.stdout.read() == "closed\n"
        assert process.wait() == code


def test_a_terminal_gets_a_bar_only_for_long_work(config: str) -> None:
    from xtool.cli import progress

    main_end, tty_end = pty.openpty()
    with os.fdopen(tty_end, "w") as terminal:
        with progress.progress(terminal) as listener:
            listener.step("quick")
        terminal.flush()
        with progress.progress(terminal) as listener:
            assert isinstance(listener, progress.BarProgress)
            listener._begin -= progress.PATIENCE
            listener.step("slow [bold]")
            listener.advance(1, 2)
        shown = os.read(main_end, 65536).decode()
    os.close(main_end)
    assert "quick" not in shown and "slow [bold]" in shown
