"""The leak oracle: comparing, and each probe on a host made for it (or on this one)."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xtool.cli.doctor import doctor_app
from xtool.errors import HostError, UsageError
from xtool.fake.hypervisor import FakeHypervisor
from xtool.fake.store import FakeStoreDaemon
from xtool.hypercall.port import CreateSpec, EvtchnState, Hypervisor
from xtool.toolstack import leak_files, leak_probes, leaks
from xtool.toolstack.leaks import HostSnapshot, Leak, Suppression
from xtool.xenstore.client import StoreClient
from xtool.xenstore.port import Store


@dataclass
class FakeHost:
    hv: Hypervisor
    store: Store


@pytest.fixture
def host() -> FakeHost:
    return FakeHost(FakeHypervisor(), StoreClient(FakeStoreDaemon().connect))


def create(host: FakeHost) -> int:
    return host.hv.create_domain(CreateSpec(handle=b"\x07" * 16, grant_version=1))


class TestDiff:
    BEFORE = HostSnapshot(
        {"domains": {"a": "1", "b": "2"}, "files": {"/x": "file"}, "gone": {}}, {"p": "why"}
    )

    def test_new_gone_changed(self) -> None:
        after = HostSnapshot({"domains": {"b": "3", "c": "4"}, "files": {}}, {"gone": "not now"})
        assert leaks.diff(self.BEFORE, after) == [
            Leak("domains", "a", "gone", "1", ""),
            Leak("domains", "b", "changed", "2", "3"),
            Leak("domains", "c", "new", "", "4"),
        ]
        assert leaks.incomparable(self.BEFORE, after) == {"p": "why", "gone": "not now"}

    def test_files_that_went_are_no_leak_but_new_ones_are(self) -> None:
        after = HostSnapshot({"files": {"/y": "file"}})
        assert leaks.diff(self.BEFORE, after) == [Leak("files", "/y", "new", "", "file")]

    def test_suppressions_match_the_whole_key_and_the_kind(self) -> None:
        after = HostSnapshot({"domains": {"a": "9", "b": "2", "aa": "1"}})
        rule = Suppression("domains", "a", "because", ("changed",))
        assert leaks.diff(self.BEFORE, after, (rule,)) == [Leak("domains", "aa", "new", "", "1")]
        other = Suppression("domains", "a", "because", ("gone",))
        assert len(leaks.diff(self.BEFORE, after, (other,))) == 2

    def test_every_suppression_has_a_reason_and_a_known_probe(self) -> None:
        probes = leaks.all_probes()
        for rule in leaks.SUPPRESSIONS:
            assert rule.probe in probes and len(rule.reason) > 5
        assert probes.keys() >= leaks.ONLY_NEW

    def test_json_both_ways(self) -> None:
        assert HostSnapshot.from_json(self.BEFORE.to_json()) == self.BEFORE

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "probes": {"a": 1}}', "null"]
    )
    def test_json_that_is_no_snapshot(self, text: str) -> None:
        with pytest.raises(UsageError, match="not a snapshot"):
            HostSnapshot.from_json(text)

    def test_json_of_another_format(self) -> None:
        with pytest.raises(UsageError, match="format 7"):
            HostSnapshot.from_json('{"format": 7, "probes": {}, "missing": {}}')


class TestSnapshot:
    def test_a_failing_probe_is_noted(self, host: FakeHost) -> None:
        def broken(_: object) -> dict[str, str]:
            raise HostError("no such thing here")

        taken = leaks.snapshot(host, {"a": lambda _: {"k": "v"}, "b": broken})
        assert taken == HostSnapshot({"a": {"k": "v"}}, {"b": "no such thing here"})

    def test_a_domain_shows_in_domains_memory_and_store(self, host: FakeHost) -> None:
        probes = {name: leak_probes.PROBES[name] for name in ("domains", "memory", "xenstore")}
        before = leaks.snapshot(host, probes)
        assert before.missing == {}
        domid = create(host)
        host.hv.set_max_memory(domid, 1 << 20)
        host.hv.populate(domid, range(16))
        host.store.write(f"/local/domain/{domid}/name", "web", perms=("n0", f"r{domid}"))
        found = leaks.diff(before, leaks.snapshot(host, probes))
        assert Leak("domains", f"domain {domid}", "new", "", "07070707-0707-0707-0707-070707070707") in found
        assert Leak("memory", f"domain {domid}", "new", "", "16") in found
        name = Leak("xenstore", f"/local/domain/{domid}/name", "new", "", f"'web' n0,r{domid}")
        assert name in found
        host.hv.destroy_domain(domid)
        host.store.rm(f"/local/domain/{domid}")
        assert leaks.diff(before, leaks.snapshot(host, probes)) == []

    def test_permissions_count(self, host: FakeHost) -> None:
        host.store.write("/tool/x", "1", perms=("n0",))
        before = leaks.snapshot(host, {"xenstore": leak_probes.xenstore})
        host.store.set_perms("/tool/x", ("n0", "r5"))
        found = leaks.diff(before, leaks.snapshot(host, {"xenstore": leak_probes.xenstore}))
        assert found == [Leak("xenstore", "/tool/x", "changed", "'1' n0", "'1' n0,r5")]

    def test_event_channels_are_counted_by_what_they_connect(self, host: FakeHost) -> None:
        class Ports(FakeHypervisor):
            def evtchn_status(self, domid: int, port: int) -> EvtchnState | None:
                return states[port - 1] if port <= len(states) else None

        closed = EvtchnState("closed", None, None, None)
        to_guest = EvtchnState("interdomain", 5, 3, None)
        states = [EvtchnState("virq", None, None, 2), closed, to_guest, to_guest]
        assert leak_probes.event_channels(FakeHost(Ports(), host.store)) == {
            "virq 2": "1",
            "interdomain with domain 5": "2",
        }

    def test_a_walk_survives_nodes_that_go(self) -> None:
        daemon = FakeStoreDaemon()
        store, other = StoreClient(daemon.connect), StoreClient(daemon.connect)
        store.write("/tool/a/b", "1")
        handle = daemon.handle

        def meddle(link: object, packet: object) -> None:
            handle(link, packet)  # type: ignore[arg-type]
            if packet.payload == b"/tool/a\0":  # type: ignore[attr-defined]
                daemon.handle = handle  # type: ignore[method-assign]
                other.rm("/tool/a")

        daemon.handle = meddle  # type: ignore[method-assign, assignment]
        assert [path for path, _ in leak_probes.walk(store, ("/tool",))] == ["/tool"]


class TestWaitClean:
    def test_waits_for_what_ends_and_looks_only_there_again(
        self, host: FakeHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks: list[str] = []

        def dying(_: object) -> dict[str, str]:
            looks.append("dying")
            return {"domain 5": "dying"} if 1 < len(looks) < 6 else {}

        def quiet(_: object) -> dict[str, str]:
            looks.append("quiet")
            return {}

        monkeypatch.setattr(leaks, "all_probes", lambda: {"dying": dying, "quiet": quiet})
        monkeypatch.setattr(leaks, "LOOK_PAUSE", 0)
        before = leaks.snapshot(host, leaks.all_probes())
        assert leaks.wait_clean(host, before, 30) == []
        assert looks == ["dying", "quiet", "dying", "quiet", "dying", "dying"]

    def test_says_what_stays(self, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = iter([{}, {"x": "1"}, {"x": "1"}, {"x": "1"}])
        monkeypatch.setattr(leaks, "all_probes", lambda: {"p": lambda _: next(answers)})
        before = leaks.snapshot(host)
        assert leaks.wait_clean(host, before, 0) == [Leak("p", "x", "new", "", "1")]

    def test_a_probe_that_fails_is_not_clean(self, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
        def probe(_: object) -> dict[str, str]:
            if ready:
                return {}
            raise HostError("xenstored is gone")

        ready = [1]
        monkeypatch.setattr(leaks, "all_probes", lambda: {"p": probe})
        before = leaks.snapshot(host)
        ready.clear()
        assert [leak.after for leak in leaks.wait_clean(host, before, 0)] == ["xenstored is gone"]


GRANT_LOG = """\
(XEN) [   12.1] gnttab_usage_print_all [ key 'g' pressed
(XEN) grant-table for remote d9 (v1)
(XEN) [0x001]      0 0x012345 0x00000001          0 0x000001 0x19
(XEN) gnttab_usage_print_all ] done
(XEN) gnttab_usage_print_all [ key 'g' pressed
(XEN)       -------- active --------       -------- shared --------
(XEN) [ref] localdom mfn      pin          localdom gmfn     flags
(XEN) grant-table for remote d0 (v1)
(XEN)   1 frames (64 max), 0 maptrack frames (1024 max)
(XEN) [0x008]      3 0x012345 0x00000001          3 0x000001 0x19
(XEN) grant-table for remote d5 (v2)
(XEN)   1 frames (64 max), 0 maptrack frames (1024 max)
(XEN) [0x000]      0 0x012345 0x00000002          0 0x0feff0 0x19
(XEN) [0x001]      7 0x012345 0x00000002          7 0x0feff0 0x19
(XEN) no active grant table entries
(XEN) gnttab_usage_print_all ] done
(XEN) later
"""


class TestParsing:
    def test_grants_of_the_last_dump(self) -> None:
        assert list(leak_probes.parse_grants(GRANT_LOG)) == [("domain 5 grant 0x000", "mapped by domain 0")]

    @pytest.mark.parametrize(
        "log",
        ["", GRANT_LOG[GRANT_LOG.rindex("pressed") :], GRANT_LOG[: GRANT_LOG.rindex("] done") - 30]],
        ids=["nothing", "no beginning", "no end"],
    )
    def test_a_dump_that_is_not_whole(self, log: str) -> None:
        with pytest.raises(HostError, match="message ring"):
            list(leak_probes.parse_grants(log))

    def test_process_names_with_brackets(self) -> None:
        tail = " ".join(str(n) for n in range(30))
        process = leak_files.Process(f"77 (a) (b c) S 1 {tail}")
        assert (process.pid, process.name, process.state, process.parent) == (77, "a) (b c", "S", 1)
        assert process.start == 17

    @pytest.mark.parametrize(
        ("target", "kind"),
        [
            ("socket:[123]", "socket"),
            ("pipe:[9]", "pipe"),
            ("/dev/pts/7", "/dev/pts"),
            ("/dev/xen/evtchn", "/dev/xen/evtchn"),
            ("anon_inode:[eventpoll]", "anon_inode:[eventpoll]"),
        ],
    )
    def test_descriptor_kinds(self, target: str, kind: str) -> None:
        assert leak_files.descriptor_kind(target) == kind


class TestThisMachine:
    """The Linux probes on the machine the tests run on."""

    def test_a_process_that_stays_is_found_by_pid_and_start(self, host: FakeHost) -> None:
        with subprocess.Popen(["sleep", "1000"]) as child:
            try:
                table = leak_files.processes(host)
                [key] = [key for key in table if key.startswith(f"{child.pid}@")]
                assert key.endswith(" sleep") and table[key] == "sleep 1000"
            finally:
                child.kill()
        assert key not in leak_files.processes(host)
        assert not any(key.startswith(f"{os.getpid()}@") for key in table)

    def test_links_of_this_machine(self, host: FakeHost) -> None:
        assert "lo" in leak_files.network_links(host)

    def test_files(self, host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leak_files, "ROOT", tmp_path)
        monkeypatch.setenv("XTOOL_RUN_DIR", str(tmp_path / "run/xtool"))
        monkeypatch.setenv("XTOOL_LOG_DIR", str(tmp_path / "var/log/xtool"))
        for name in ("var/log/xen", "run/lock", "run/xtool/domains", "tmp"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "var/lock").symlink_to("../run/lock")
        before = leaks.snapshot(host, {"files": leak_files.files})
        (tmp_path / "run/xtool/domains/u.json").touch()
        (tmp_path / "run/lock/xenconsole.5").touch()
        (tmp_path / "tmp/dangling").symlink_to("nowhere")
        os.mkfifo(tmp_path / "tmp/fifo")
        (tmp_path / "var/log/xen/qemu-dm-web.log").touch()  # suppressed
        found = leaks.diff(before, leaks.snapshot(host, {"files": leak_files.files}))
        assert [(leak.key, leak.after) for leak in found] == [
            ("/run/xtool/domains/u.json", "file"),
            ("/tmp/dangling", "link"),
            ("/tmp/fifo", "special file"),
            ("/var/lock/xenconsole.5", "file"),
        ]

    def test_loop_devices(self, host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leak_files, "ROOT", tmp_path)
        (tmp_path / "sys/block/loop0/loop").mkdir(parents=True)
        (tmp_path / "sys/block/loop0/loop/backing_file").write_text("/disk.img\n")
        (tmp_path / "sys/block/loop1").mkdir()
        assert leak_files.block_devices(host) == {"loop0": "/disk.img"}

    def test_kernel_log(self, host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leak_files, "ROOT", tmp_path)
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev/kmsg").write_text("6,1,100,-;fine\n4,2,200,-;WARNING: CPU: 0 at x\n6,3,3,-;ok\n")
        assert leak_files.kernel_log(host) == {"message 2": "WARNING: CPU: 0 at x"}


class TestDoctor:
    def run(self, *args: str) -> tuple[int, str]:
        result = CliRunner().invoke(doctor_app, list(args))
        return result.exit_code, result.stdout

    def test_diff_of_files(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one.json", tmp_path / "two.json"
        one.write_text(HostSnapshot({"domains": {}}).to_json())
        two.write_text(HostSnapshot({"domains": {"domain 5": "u\x1b[2J"}}).to_json())
        assert self.run("diff", str(one), str(one)) == (0, "Nothing was left behind.\n")
        code, text = self.run("diff", str(one), str(two))
        assert code == 1 and "domain 5" in text and "\x1b" not in text
        code, text = self.run("diff", str(one), str(two), "-o", "json")
        assert code == 1
        assert json.loads(text)[0]["key"] == "domain 5"
        code, text = self.run("diff", str(one), str(one), "-o", "yaml")
        assert (code, text) == (0, "[]\n")

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(doctor_app, ["diff", str(tmp_path / "none")])
        assert isinstance(result.exception, UsageError)
