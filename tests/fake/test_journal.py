"""What killed processes leave beside the journal's entries."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from xtool.config import DomainConfig
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.create import create
from xtool.toolstack.destroy import recover
from xtool.toolstack.host import Host


def test_gc_sweeps_what_was_killed_before_it_wrote_an_entry(
    host: Host, config: Callable[..., DomainConfig], tmp_path: Path
) -> None:
    create(host, config(), CreateOptions(paused=True))
    folder = tmp_path / "run" / "domains"
    kept = {path.name for path in folder.iterdir()}
    with subprocess.Popen(["true"]) as gone:
        pass
    (folder / f".{uuid4()}.{gone.pid}").write_text("{")  # half-written
    (folder / f".{uuid4()}.{os.getpid()}").write_text("{")  # its writer lives
    (folder / f"{uuid4()}.lock").touch()  # nobody's
    held = str(uuid4())
    with journal.locked(held):
        recover(host)
        left = {path.name for path in folder.iterdir()} - kept
        assert {name.rpartition(".")[2] for name in left} == {str(os.getpid()), "lock"}
        assert f"{held}.lock" in left
