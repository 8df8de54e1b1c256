"""Operations in processes: cancelled at every stage, killed, and outliving the daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from xtool.builder.spec import STAGES
from xtool.client.records import CANCELLED, DONE, FAILED, Operation
from xtool.client.socketclient import OperationCancelledError, SocketClient
from xtool.config import DomainConfig
from xtool.errors import HostError
from xtool.toolstack.api import CreateOptions

HERE = Path(__file__).parent
PAUSED = CreateOptions(paused=True)
Config = Callable[..., DomainConfig]


class Jobs(NamedTuple):
    process: subprocess.Popen[bytes]
    path: Path
    folder: Path

    def client(self) -> SocketClient:
        return SocketClient(str(self.path))

    def begin(self, config: DomainConfig) -> Operation:
        """Start a create; it is where it stops when this returns."""
        client = self.client()
        body = json.dumps({"config": config.to_dict(), "options": {"paused": True}}).encode()
        found = client._ask("POST", "/v1/domains", body)
        client.close()
        self.until(f"at-{config.name}")
        return Operation(**{**found, "lines": tuple(found["lines"])})

    def until(self, name: str, deadline: float = 30.0) -> str:
        """The text of a file, as soon as it is there."""
        end = time.monotonic() + deadline
        path = self.folder / name
        while not path.exists() or not path.read_text():
            assert time.monotonic() < end, f"no {name}"
            time.sleep(0.02)
        return path.read_text()

    def ended(self, operation: Operation) -> Operation:
        client = self.client()
        found: dict[str, Any] = client._ask("GET", f"/v1/operations/{operation.id}?wait=30")
        client.close()
        return Operation(**found)

    def jobs(self) -> int:
        """The process that forks jobs."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(c) for c in children if Path(f"/proc/{c}/comm").read_text() == "xtoold-jobs\n"]
        return pid


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    path = tmp_path / "xtoold.sock"
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "jobdaemon.py"), str(path), str(tmp_path), str(write)],
        pass_fds=(write,),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(read)
    yield Jobs(process, path, tmp_path)
    process.terminate()
    process.wait(20)


EMPTY = {"domains": [], "mapped": 0, "free": True, "journal": []}


@pytest.mark.parametrize("stage", [*STAGES, "wire", "step"])
def test_cancelling_undoes_at_every_stage(jobs: Jobs, config: Config, stage: str) -> None:
    operation = jobs.begin(config(name=f"stop-{stage}"))
    with jobs.client() as client:
        client.cancel(operation.id)
        client.cancel(operation.id)  # a second time must not interrupt the undoing
    assert jobs.ended(operation).state == CANCELLED
    left = json.loads(jobs.until(f"left-stop-{stage}"))
    assert {name: left[name] for name in EMPTY} == EMPTY
    assert not set(left["nodes"]) - {"0"}


def test_cancelling_too_late_still_leaves_nothing(jobs: Jobs, config: Config) -> None:
    """The domain runs already; whoever cancelled is told so, and that is made true."""
    operation = jobs.begin(config(name="stop-late"))
    client = jobs.client()
    client.cancel(operation.id)
    assert jobs.ended(operation).state == CANCELLED
    assert json.loads(jobs.until("left-stop-late"))["domains"] == []


def test_ctrl_c_of_the_client_cancels_and_waits(jobs: Jobs, config: Config) -> None:
    said: list[str] = []

    class Steps:
        def step(self, text: str) -> None:
            said.append(text)

        def advance(self, done: int, total: int | None = None) -> None:
            pass

    def interrupt() -> None:
        jobs.until("at-stop-memory")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        jobs.client().create(config(name="stop-memory"), PAUSED, Steps())
    thread.join()
    assert said[-2:] == ["cancelling create: undoing what it had begun", "undone: nothing is left of it"]
    assert json.loads(jobs.until("left-stop-memory"))["domains"] == []


def test_somebody_else_cancels(jobs: Jobs, config: Config) -> None:
    def cancel() -> None:
        jobs.until("at-stop-seal")
        client = jobs.client()
        (running,) = [o for o in client.operations() if o.state == "running" and o.method == "create"]
        client.cancel(running.id)

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(OperationCancelledError):
        jobs.client().create(config(name="stop-seal"), PAUSED)
    thread.join()


def test_a_stuck_job_blocks_nobody(jobs: Jobs, config: Config) -> None:
    stuck = [jobs.begin(config(name=f"stop-memory.{n}")) for n in range(8)]
    client = jobs.client()
    began = time.monotonic()
    assert client.create(config(name="quick"), PAUSED).domid == 1  # a host of its own
    assert client.gc() is not None
    assert time.monotonic() - began < 20
    assert client.status().operations_running == 8
    for n, operation in enumerate(stuck):
        (jobs.folder / f"go-stop-memory.{n}").touch()
        assert jobs.ended(operation).state == DONE


def test_a_job_that_is_killed_is_a_failed_operation(jobs: Jobs, config: Config) -> None:
    operation = jobs.begin(config(name="stop-tables"))
    os.kill(int(jobs.until("at-stop-tables")), signal.SIGKILL)
    ended = jobs.ended(operation)
    assert ended.state == FAILED and ended.error is not None
    assert jobs.client().create(config(name="next"), PAUSED).name == "next"


def test_the_daemon_is_killed_and_its_job_goes_on(jobs: Jobs, config: Config) -> None:
    jobs.begin(config(name="stop-vcpus"))
    job = int(jobs.until("at-stop-vcpus"))
    parent = jobs.jobs()
    jobs.process.kill()
    jobs.process.wait(20)
    _gone(parent)
    os.kill(job, 0)
    (jobs.folder / "go-stop-vcpus").touch()
    left = json.loads(jobs.until("left-stop-vcpus"))
    assert left["domains"] == [1] and len(left["journal"]) == 1


def test_a_client_of_a_killed_daemon_is_told(jobs: Jobs, config: Config) -> None:
    def kill() -> None:
        jobs.until("at-stop-image")
        jobs.process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(HostError, match=r"goes on by itself|connection"):
        jobs.client().create(config(name="stop-image"), PAUSED)
    thread.join()
    (jobs.folder / "go-stop-image").touch()
    jobs.until("left-stop-image")


def test_the_daemon_ends_with_the_process_that_forks(jobs: Jobs) -> None:
    jobs.client().gc()
    os.kill(jobs.jobs(), signal.SIGKILL)
    assert jobs.process.wait(20) == 70


def test_a_second_daemon_finds_the_first(jobs: Jobs, tmp_path: Path) -> None:
    again = subprocess.run(
        [sys.executable, str(HERE / "jobdaemon.py"), str(tmp_path / "other"), str(tmp_path), "-1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert again.returncode == 75 and not (tmp_path / "other").exists()
    assert jobs.client().status().pid == jobs.process.pid


def _gone(pid: int) -> None:
    end = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}"):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.02)
