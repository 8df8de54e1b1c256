"""``console_backend: xtool`` and ``channel`` on the host in memory, and what the console verb prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xtool.backends.consolelog import ConsoleLog, log_path
from xtool.backends.viewers import socket_path
from xtool.cli import app
from xtool.cli.attach import when
from xtool.config import DomainConfig, parse_config
from xtool.devices.hotplug.fake import FakeKernel
from xtool.errors import ConfigError, DeviceError, UsageError
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.create import create
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient
from xtool.xenstore.perms import may_write

Config = Callable[..., DomainConfig]
RUN = CreateOptions(devices=0.3)


@pytest.fixture(autouse=True)
def own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "log"))


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_consoles_from_create_to_destroy(host: Host, config: Config, kind: str) -> None:
    channel = "['name=org.test.agent,connection=SOCKET,path=/run/agent.sock', {name: b}]"
    done = create(host, config(kind, console_backend="xtool", channel=channel), RUN)
    domid, client = done.domid, LocalClient(host)
    home, back = f"/local/domain/{domid}", f"/local/domain/0/backend/xtool-console/{domid}"
    get = host.store.get
    # What keeps xenconsoled away, and what the guest must not be able to change (XSA-57).
    assert (get(f"{home}/console/type"), get(f"{home}/console/state")) == ("xtool", "4")
    for name in ("type", "tty", "port", "ring-ref", "state"):
        assert not may_write(host.store.get_perms(f"{home}/console/{name}"), domid)
    assert get(f"{back}/0/frontend") == f"{home}/console"
    assert [get(f"{home}/device/console/{n}/name") for n in (1, 2)] == ["org.test.agent", "b"]
    assert host.store.get_perms(f"{back}/1/path") == ("n0",)
    first = client.console("test")
    assert (first.socket, first.tty) == (str(socket_path(domid)), "")
    assert client.console("test", number=1).socket == "/run/agent.sock"
    assert client.console("test", number=2).socket == str(socket_path(domid, 2))
    with pytest.raises(DeviceError, match="no console 3"):
        client.console("test", number=3)
    devices = client.wiring("test")[0].devices
    assert [(d.backend_kind, d.server) for d in devices] == [("xtool", "process")] * 3
    client.destroy("test")
    assert isinstance(host.hotplug, FakeKernel) and host.hotplug.served == {}
    assert not host.store.exists(back) and not host.store.exists(home)


def test_without_the_key_it_is_xenconsoleds(host: Host, config: Config) -> None:
    domid = create(host, config("pv"), RUN).domid
    assert host.store.get(f"/local/domain/{domid}/console/type") == "xenconsoled"
    assert not host.store.exists(f"/libxl/{domid}/device/console")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("name=a,connection=tcp", "connection"),
        ("connection=pty", "name is missing"),
        ("name=a,pth=/x", "pth is not a sub-key"),
        ("name=a,path=/x", "path has no effect"),
    ],
)
def test_channels_that_are_wrong(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(f"name: a\ntype: pv\nmemory: 16\nkernel: /k\nchannel: ['{spec}']\n", "t.yaml", "/")


def test_a_channel_keeps_its_keys() -> None:
    text = "name: a\ntype: pv\nmemory: 16\nkernel: /k\nconsole_backend: xtool\nchannel: [{name: x}]\n"
    config = parse_config(text, "t.yaml", "/")
    assert config.to_dict()["channel"] == [{"name": "x"}]
    assert parse_config(config.to_yaml(), "t.yaml", "/") == config


def test_the_log_is_printed_escaped(host: Host, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """HF 34, 35: raw in the file, nothing that steers a terminal in what is printed."""
    done = create(host, config("pv"), RUN)
    client = LocalClient(host)
    client.close = lambda: None  # type: ignore[method-assign]

    def run(*argv: str) -> tuple[int, str, str]:
        code = app.main(["console", *argv], opener=lambda: client)
        return code, *capsys.readouterr()

    code, _, err = run("--log", "test")
    assert code == 15 and "console_backend: xtool" in err
    clock = [1_000_000.0]
    log = ConsoleLog(log_path(done.uuid), burst=1000, rate=1, now=lambda: clock[0])
    log.boot(0)
    log.add(b"old \x1b[2J\x9b line", 20)
    clock[0] += 5
    log.add("one\r\ntäil\x85x\n".encode(), 40)
    log.add(b"x" * 5000, 0)
    clock[0] = time.time()
    log.add(b"now\n", 44)
    log.close()
    code, out, _ = run("--log", "test")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 5
    assert [line[25:] for line in lines] == [
        "-- connected --",
        "old \\x1b[2J\\x9b lineone",
        "täil\\x85x",
        "-- 5000 bytes were not kept --",
        "now",
    ]
    assert lines[1][17:19] == "40" and lines[2][17:19] == "45"  # the second in which a line began
    assert run("--log", "--since", "1h", "test")[1].splitlines()[-1].endswith("  now")
    assert len(run("--log", "--since", "1h", "test")[1].splitlines()) <= 2
    client.destroy("test")
    assert len(run("--log", done.uuid)[1].splitlines()) == 5
    assert run("--log", "nobody")[0] == 9 and run("--since", "1h", "x")[0] == 2


def test_times() -> None:
    assert when("90s", 100.0) == 10.0 and when("2h", 7200.0) == 0.0
    assert when("2024-05-01T12:00+00:00", 0) == 1714564800.0
    with pytest.raises(UsageError):
        when("soon", 0)
