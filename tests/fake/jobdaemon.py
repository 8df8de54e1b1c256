"""A daemon whose jobs are processes, each with a host in memory of its own, for tests to interrupt and kill.

``python jobdaemon.py SOCKET FOLDER``. A create of a domain named ``stop-STAGE`` goes half through that stage,
says so by a file ``at-NAME`` and waits: for a file ``go-NAME``, or to be interrupted. Every job leaves
``left-NAME``: what its host holds at its end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

from xtool.builder.build import BUILDERS
from xtool.client.start import lock_path
from xtool.daemon import main as daemon_main
from xtool.daemon.hosts import hosts_of
from xtool.daemon.jobs import JobRunner
from xtool.fake.hypervisor import FakeHypervisor
from xtool.paths import run_dir
from xtool.progress import SILENT, Progress
from xtool.toolstack import journal
from xtool.toolstack.api import Client, CreateOptions, CreateResult
from xtool.toolstack.host import open_host
from xtool.toolstack.local import LocalClient

FOLDER = Path(sys.argv[2])


class Stopping(LocalClient):
    name = ""

    def create(self, config: Any, options: CreateOptions, progress: Progress = SILENT) -> CreateResult:
        self.name = config.name
        stage = self.name.removeprefix("stop-").partition(".")[0]
        if stage == "wire":
            self.host.store.introduce = lambda *_: self.stop()  # type: ignore[method-assign, assignment]
        elif stage == "step":
            progress = StopAtStep(self)
        elif hasattr(BUILDERS["pv"], stage):
            original = getattr(BUILDERS["pv"], stage)

            def half(builder: Any) -> None:
                original(builder)
                self.stop()

            setattr(BUILDERS["pv"], stage, half)
        if stage == "late":
            made = super().create(config, options, progress)
            self.stop()
            return made
        return super().create(config, options, progress)

    def stop(self) -> None:
        (FOLDER / f"at-{self.name}").write_text(str(os.getpid()))
        end = time.monotonic() + 60
        while not (FOLDER / f"go-{self.name}").exists():
            assert time.monotonic() < end, "nobody said go"
            time.sleep(0.02)

    def close(self) -> None:
        hv = self.host.hv
        assert isinstance(hv, FakeHypervisor)
        state = {
            "domains": sorted(hv.all),
            "mapped": hv.mapped,
            "free": hv.host().free_pages == FakeHypervisor().host().free_pages,
            "journal": [entry.uuid for entry in journal.entries() if entry.name == self.name],
            "nodes": sorted(self.host.store.list("/local/domain")),
        }
        if self.name:
            temporary = FOLDER / f".left-{self.name}"
            temporary.write_text(json.dumps(state))
            temporary.replace(FOLDER / f"left-{self.name}")
        super().close()


class StopAtStep:
    def __init__(self, client: Stopping) -> None:
        self.client = client

    def step(self, text: str) -> None:
        self.client.stop()

    def advance(self, done: int, total: int | None = None) -> None:
        pass


def main() -> None:
    run_dir().mkdir(parents=True, exist_ok=True)
    assert lock_path().parent.is_dir()
    daemon_main.runner_of = lambda hosts: JobRunner(  # type: ignore[assignment]
        lambda: cast("Client", Stopping(open_host("fake:")))
    )
    daemon_main.hosts_of = lambda uri: hosts_of("fake:")  # type: ignore[assignment]
    sys.exit(daemon_main.run("fake:", Path(sys.argv[1]), int(sys.argv[3])))


if __name__ == "__main__":
    main()
