"""-H: targets, command lines, and sending files, to a shell of this machine in ssh's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from pids import ends

from xtool.apply.described import read
from xtool.cli import remote, remotefiles
from xtool.cli.remote import Remote, parse_ssh, wants_terminal
from xtool.cli.remoteargs import split_file, take_options
from xtool.config import load_config
from xtool.config.load import Inputs
from xtool.errors import ConfigError, HostError, UsageError
from xtool.progress import SILENT

# Where programs that these tests start find this module and what it imports.
TESTS = os.pathsep.join([os.path.dirname(__file__), str(Path(__file__).parents[1])])


@pytest.mark.parametrize(
    ("target", "address", "port"),
    [
        ("ssh://host", "host", ""),
        ("ssh://root@host:2222", "root@host", "2222"),
        ("ssh://a@[fe80::1]:22", "a@fe80::1", "22"),
    ],
)
def test_targets(target: str, address: str, port: str) -> None:
    assert parse_ssh(target) == (address, port)


@pytest.mark.parametrize(
    "target",
    ["host", "http://host", "ssh://", "ssh://host/path", "ssh://-oX=y", "ssh://h:port", "ssh://a:pw@h"],
)
def test_what_is_no_target(target: str) -> None:
    with pytest.raises(UsageError):
        parse_ssh(target)


def test_a_lab_that_is_not_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(Exception, match="is not up") as caught:
        remote.run_remote("lab:other", ["list"])
    assert caught.value.hint == "start it: xtool lab up other"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "line",
    [
        "create --set memory=64 x.yaml -p -o json",
        "create -p -o json --set=memory=64 x.yaml",
        "create -p -o json --set memory=64 -- x.yaml",
    ],
)
def test_the_file_is_found_among_options(line: str) -> None:
    assert split_file(line.split()) == ("x.yaml", ["memory=64"], ["create", "-p", "-o", "json"])


def test_a_terminal_only_where_streams_may_merge() -> None:
    assert wants_terminal(["list"], (True, True, True))
    assert not wants_terminal(["list"], (True, False, True))
    assert not wants_terminal(["list"], (True, True, False))
    assert wants_terminal(["create", "x", "-c"], (True, True, False))
    assert not wants_terminal(["console", "x"], (False, True, True))


@dataclass(frozen=True)
class Here(Remote):
    """A shell of this machine, with a home of its own, in the place of another host (where signals that
    are ignored here would not be)."""

    home: str = ""
    etc: str = "/nonexistent"

    def argv(self, command: str, *flags: str) -> list[str]:
        own = [f"HOME={self.home}", f"XTOOL_ETC_DIR={self.etc}"]
        return ["env", "--default-signal", "-u", "XDG_CACHE_HOME", *own, "sh", "-c", command]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "it's home").mkdir()
    return Here("there", [], "", home=str(tmp_path / "it's home"))


PVH = "name: a\ntype: pvh\nmemory: 64\nkernel: {}\n"
HVM = "name: a\ntype: hvm\nmemory: 64\ndisk: ['{},raw,hda,w', '{},raw,hdc,cdrom']\n"


def sent(there: Here) -> list[str]:
    folder = Path(there.home, ".cache/xtool/sent")
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_goes_over_once_by_content(there: Here, tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    kernel = tmp_path / "vm/kernel"
    kernel.write_bytes(os.urandom(700_000))
    file = tmp_path / "vm/a.yaml"
    file.write_text(PVH.format("kernel"))
    path = remotefiles.send_domain(there, str(file), ["memory=96"], SILENT, files=True)
    config = load_config(path)
    assert config.memory == 96 << 20
    assert config.kernel is not None and Path(config.kernel).read_bytes() == kernel.read_bytes()
    assert config.kernel.startswith(there.home)
    before = Path(config.kernel).stat()

    (tmp_path / "vm/same").write_bytes(kernel.read_bytes())  # other name, same content
    file.write_text(PVH.format("same"))
    again = load_config(remotefiles.send_domain(there, str(file), [], SILENT, files=True))
    assert again.kernel == config.kernel and Path(again.kernel).stat() == before
    assert len([name for name in sent(there) if not name.startswith("domains/")]) == 1


def test_absolute_paths_are_the_other_hosts_first(there: Here, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"k")
    file = tmp_path / "a.yaml"
    file.write_text(PVH.format(kernel))
    config = load_config(remotefiles.send_domain(there, str(file), [], SILENT, files=True))
    assert config.kernel == str(kernel), "it exists there: used as it is"
    file.write_text(PVH.format("/no/such/kernel"))
    with pytest.raises(ConfigError, match="no file /no/such/kernel on this machine, nor on there"):
        remotefiles.send_domain(there, str(file), [], SILENT, files=True)
    file.write_text(PVH.format("nothing"))
    with pytest.raises(ConfigError, match=r"kernel: no file .*/nothing on this machine$"):
        remotefiles.send_domain(there, str(file), [], SILENT, files=True)


def test_a_writable_disk_is_a_copy_and_stays(there: Here, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"d" * 4096)
    (tmp_path / "cd").write_bytes(b"c" * 2048)
    file = tmp_path / "a.yaml"
    file.write_text(HVM.format("disk", "cd"))
    config = load_config(remotefiles.send_domain(there, str(file), [], SILENT, files=True))
    disk, cd = (str(d.target) for d in config.disks)
    Path(disk).write_bytes(b"written by the guest")
    again = load_config(remotefiles.send_domain(there, str(file), [], SILENT, files=True))
    assert [str(d.target) for d in again.disks] == [disk, cd]
    assert Path(disk).read_bytes() == b"written by the guest"
    assert (tmp_path / "disk").read_bytes() == b"d" * 4096


def test_apply_sends_what_plan_only_names(there: Here, tmp_path: Path) -> None:
    """And what create sent is where plan looks for it."""
    for name in ("k", "disk", "cd"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(HVM.format("disk", "cd"))
    two.write_text(PVH.format("k").replace("name: a", "name: b"))
    described = read([str(one), str(two)], Inputs())
    planned = remotefiles.place(there, described, SILENT, send=False)
    assert sent(there) == []
    assert remotefiles.place(there, planned[1:], SILENT, send=True)[0].config == planned[1].config
    assert planned[1].config.kernel is not None and Path(planned[1].config.kernel).is_file()
    assert len(sent(there)) == 1, "of that domain only"
    created = load_config(remotefiles.send_domain(there, str(one), [], SILENT, files=True))
    assert [disk.target for disk in created.disks] == [disk.target for disk in planned[0].config.disks]
    Path(str(created.disks[0].target)).write_bytes(b"written by the guest")
    again = remotefiles.place(there, described, SILENT, send=True)
    assert [one.config for one in again] == [one.config for one in planned]
    assert Path(str(created.disks[0].target)).read_bytes() == b"written by the guest"
    (tmp_path / "k").unlink()
    with pytest.raises(ConfigError, match=r"no file .*/k on this machine") as caught:
        remotefiles.place(there, described, SILENT, send=False)
    assert caught.value.file == str(two)


def test_what_arrives_damaged_is_not_kept(there: Here, tmp_path: Path) -> None:
    file = tmp_path / "kernel"
    file.write_bytes(b"content")
    wrong = remotefiles.Wanted(str(file), "0" * 64, 7, "")
    with pytest.raises(HostError, match="not what was sent"):
        remotefiles.send_files(there, [wrong], SILENT)
    assert sent(there) == []


def test_files_that_a_sync_brought_are_not_sent(there: Here, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel")
    digest = remotefiles.FileHashes().digest(str(kernel), SILENT)
    there.held[digest] = "/opt/there/kernel"
    file = tmp_path / "a.yaml"
    file.write_text(PVH.format("kernel"))
    path = remotefiles.send_domain(there, str(file), [], SILENT, files=True)
    assert "kernel: /opt/there/kernel" in Path(path).read_text()
    assert [name for name in sent(there) if not name.startswith("domains/")] == []


def test_exit_status_and_missing_xtool(there: Here, capfd: pytest.CaptureFixture[str]) -> None:
    assert remote.run_process(there, "sh -c 'echo out; echo err >&2; exit 42'", []) == 42
    assert capfd.readouterr() == ("out\n", "err\n")


@pytest.mark.parametrize("early", [False, True], ids=["while it runs", "before it runs"])
def test_a_signal_reaches_the_remote_command(there: Here, tmp_path: Path, early: bool) -> None:
    """Also one that comes while the connection is made: before there is anything to signal."""
    program = tmp_path / "run.py"
    program.write_text(
        "import os, signal, sys\n"
        "sys.path[:0] = sys.argv[2].split(os.pathsep)\n"
        "from xtool.cli import remote\n"
        "from test_remote import Here\n"
        "class Slow(Here):\n"
        "    def argv(self, command, *options):\n"
        "        if 'XTOOL_EARLY' in os.environ and 'ready' in command:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            command = 'sleep 0.3; ' + command\n"
        "        return super().argv(command, *options)\n"
        "sys.exit(remote.run_process(Slow('there', [], '', home=sys.argv[1]), sys.argv[3], []))\n"
    )
    command = "sh -c 'trap \"echo stopped; exit 5\" INT; echo ready; while :; do sleep 0.05; done'"
    if early:  # it is signalled as soon as it has left its process id, which may be before its trap
        command = "sh -c 'echo ready; while :; do sleep 0.05; done'"
    argv = [sys.executable, str(program), there.home, TESTS, command]
    env = {**os.environ, "XTOOL_EARLY": "yes"} if early else None
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        try:
            if early:
                assert process.wait(20) in (130, 2, -2)
                return
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "stopped\n"
            assert process.wait(20) == 5
        finally:
            process.kill()


def test_a_signal_reaches_all_that_a_command_started(there: Here, tmp_path: Path) -> None:
    """As ``xtool lab exec -- sh -c "cd /where && pytest"`` interrupted; what sshd starts has a session."""
    program = tmp_path / "run.py"
    program.write_text(
        "import os, sys\n"
        "sys.path[:0] = sys.argv[2].split(os.pathsep)\n"
        "from xtool.cli import remote\n"
        "from test_remote import Here\n"
        "class Apart(Here):\n"
        "    def argv(self, command, *options):\n"
        "        return ['setsid', '--wait', *super().argv(command, *options)]\n"
        "sys.exit(remote.run_group(Apart('there', [], '', home=sys.argv[1]), sys.argv[3]))\n"
    )
    command = "sh -c 'sh -c \"echo \\$\\$; while :; do sleep 0.05; done\"; exit 5'"
    argv = [sys.executable, str(program), there.home, TESTS, command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            inner = int(process.stdout.readline())
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) in (143, 5)
            assert ends(inner)
        finally:
            process.kill()


def test_templates_and_several_domains_are_read_here(there: Here, tmp_path: Path) -> None:
    """What goes over is rendered, merged and whole: braces in it mean nothing there."""
    from xtool.config.load import Inputs, load_all

    (tmp_path / "k").write_bytes(b"k")
    (tmp_path / "base.yaml").write_text("type: pvh\nkernel: k\nmemory: 32\n")
    file = tmp_path / "a.yaml"
    text = "extends: base.yaml\nname: {0}\ncmdline: \"{{{{ '{{{{' }}}} {{{{ word }}}}\"\n"
    file.write_text("---\n".join(text.format(name) for name in ("one", "two")))
    (tmp_path / "vars.yaml").write_text("word: w\n")
    inputs = Inputs((), [str(tmp_path / "vars.yaml")])
    path = remotefiles.send_domain(there, str(file), inputs, SILENT, files=True)
    loaded = [one.config for one in load_all(path)]
    assert [(c.name, c.cmdline, c.memory >> 20) for c in loaded] == [("one", "{{ w", 32), ("two", "{{ w", 32)]
    assert all(c.kernel is not None and c.kernel.startswith(there.home) for c in loaded)
    path = remotefiles.send_domain(there, str(file), inputs, SILENT, files=True, only="two")
    assert [one.config.name for one in load_all(path)] == ["two"]


def test_the_defaults_are_those_of_the_other_host(
    there: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not this machine's; the user's own stay. They may have what a file needs, and are gone afterwards."""
    from xtool.config.load import load_all

    far, near, own = (tmp_path / name for name in ("far", "near", "own"))
    for folder in (far, near, own / "xtool"):
        folder.mkdir(parents=True)
    (far / "defaults.yaml").write_text("memory: 48\non_crash: preserve\ntsc_mode: native\nkernel: /bin/sh\n")
    (near / "defaults.yaml").write_text("memory: 999\nvcpus: 9\n")
    (own / "xtool/defaults.yaml").write_text("tsc_mode: always_emulate\n")
    monkeypatch.setenv("XTOOL_ETC_DIR", str(near))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(own))
    there = replace(there, etc=str(far))
    file = tmp_path / "a.yaml"
    file.write_text("name: a\ntype: pvh\n")
    [sent] = load_all(remotefiles.send_domain(there, str(file), [], SILENT, files=True))
    config = sent.config
    assert (config.memory >> 20, config.vcpus, config.on_crash) == (48, 1, "preserve")
    assert (config.tsc_mode, config.kernel) == ("always_emulate", "/bin/sh")
    file.write_text("name: a\ntype: pvh\nkernel: k\n")
    assert load_config(file).memory >> 20 == 999
    file.write_text("name: a\ntype: pvh\n")
    (far / "defaults.yaml").write_text("memory: 48\nkernel: /bin/sh\nname: x\n")
    with pytest.raises(ConfigError) as caught:
        remotefiles.send_domain(there, str(file), [], SILENT, files=True)
    assert (caught.value.file, caught.value.line) == (f"{near}/defaults.yaml of {there.name}", 3)


def test_options_that_are_used_up_here() -> None:
    line = "create --set only=x a.yaml --only b --vars-file=v -o json --vars-file w -- c"
    taken, rest = take_options(line.split(), ("--only", "--vars-file"))
    assert taken == {"--only": ["b"], "--vars-file": ["v", "w"]}
    assert rest == ["create", "--set", "only=x", "a.yaml", "-o", "json", "--", "c"]
