"""The Ansible collection, built and installed into a folder, and playbooks of it run by ansible-core against
a daemon on the host in memory, or a lab. The modules start the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

#: A module without its collection, its parameters, and what else the task says.
Step = tuple[str, dict[str, Any]] | tuple[str, dict[str, Any], dict[str, Any]]


class Playbooks:
    """``folder`` holds the installed collection and all that ansible writes. ``warm``: a zygote carries the
    command lines out, a fraction of a second each, as on a Xen host; without it they are this user's, who has
    labs."""

    def __init__(self, folder: Path, *, warm: bool = True) -> None:
        self.folder = folder
        self.xtool = folder / "xtool"
        run = folder / "run"
        code = "import sys; from xtool.cli.entry import main; sys.exit(main())"
        where = f"XTOOL_RUN_DIR={run}" if warm else f"HOME={Path.home()}"
        self.xtool.write_text(
            f"#!/bin/sh\n{where} PYTHONPATH={ROOT} exec {sys.executable} -c '{code}' \"$@\"\n"
        )
        self.xtool.chmod(0o755)
        self.ansible("ansible-galaxy", "collection", "build", str(ROOT / "ansible"), "--output-path", "b")
        [self.built] = (folder / "b").glob("*.tar.gz")
        self.ansible(
            "ansible-galaxy", "collection", "install", str(self.built), "-p", "c", "--offline", "--no-deps"
        )
        self._zygote: subprocess.Popen[bytes] | None = None
        if not warm:
            return
        environment = {**os.environ, "XTOOL_RUN_DIR": str(run), "PYTHONPATH": str(ROOT)}
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "xtool.daemon.zygote"], env=environment, cwd="/"
        )
        end = time.monotonic() + 60
        while not (run / "zygote.sock").exists():
            assert self._zygote.poll() is None and time.monotonic() < end
            time.sleep(0.01)

    def close(self) -> None:
        if self._zygote is not None:
            self._zygote.terminate()
            self._zygote.wait()

    @property
    def installed(self) -> Path:
        return self.folder / "c" / "ansible_collections" / "xtool" / "xen"

    def ansible(self, program: str, *words: str) -> str:
        """Standard output. Raises ``AssertionError`` with all it said when it fails."""
        env = {
            **os.environ,
            "HOME": str(self.folder),
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "LC_ALL": "C.UTF-8",  # ansible runs in no other encoding
            "PYTHONPATH": str(ROOT),
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "c"),
            "ANSIBLE_CALLBACK_PLUGINS": str(Path(__file__).parent / "callbacks"),
            "ANSIBLE_STDOUT_CALLBACK": "results",
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_DEPRECATION_WARNINGS": "0",
            "ANSIBLE_PIPELINING": "1",
        }
        argv = [str(BIN / program), *words]
        done = subprocess.run(argv, env=env, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def play(self, host: str, steps: Sequence[Step]) -> list[dict[str, Any]]:
        """What each task returned. Tasks that fail do not end the play."""
        tasks = []
        for name, words, *more in steps:
            shared = {} if name == "image" else {"host": host, "executable": str(self.xtool)}
            task: dict[str, Any] = {f"xtool.xen.{name}": {**shared, **words}, "ignore_errors": True}
            tasks.append({**task, **(more[0] if more else {})})
        done = self.run({"hosts": "localhost", "connection": "local", "tasks": tasks}, "localhost,")
        assert len(done) == len(steps), done
        return done

    def run(self, play: dict[str, Any], inventory: str) -> list[dict[str, Any]]:
        """What each task of the play returned."""
        variables = {"ansible_python_interpreter": sys.executable, **play.get("vars", {})}
        file = self.folder / "play.yml"
        file.write_text(json.dumps([{"gather_facts": False, **play, "vars": variables}]))
        return self.results(str(file), "-i", inventory)

    def results(self, *words: str) -> list[dict[str, Any]]:
        """What each task of a playbook returned."""
        out = self.ansible("ansible-playbook", *words)
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]
