"""What it costs to start a command line, in instructions of the process itself.

    python -m benchmarks.start [--python /usr/bin/python3] [-o json]        # needs valgrind

``callgrind`` counts every instruction in user space, so the figures repeat on any machine and under any load.
The zygote's child, which carries the line out, is another process and not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What pip writes for the entry point (pip before 25.0 imports ``re`` as well).
PIP = "import sys\nfrom xtool.cli.entry import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
OLD_PIP = "import re\n" + PIP
#: What a distribution's package, or the lab, puts into /usr/bin.
LEAN = f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\nfrom xtool.cli.entry import main\nsys.exit(main())\n"


def instructions(command: list[str], environment: dict[str, str]) -> int:
    """Of the process itself, not of its children."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise SystemExit(f"callgrind counted nothing: {done.stderr[-500:]}")
    return int(found[1])


def measure(python: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *(path for path in sys.path if "site-packages" in path)]
            ),
            "PYTHONHASHSEED": "0",
            "XTOOL_RUN_DIR": str(folder / "run"),
            "XTOOL_LOG_DIR": str(folder / "log"),
        }
        for file, text in (("pip", PIP), ("old-pip", OLD_PIP), ("lean", LEAN)):
            (folder / file).write_text(text)
        lines = {
            "python3 -c pass": [python, "-c", "pass"],
            "python3 -S -c pass": [python, "-S", "-c", "pass"],
            "python3 -I -S -c pass": [python, "-I", "-S", "-c", "pass"],
            "without a zygote, xtool --version": [python, str(folder / "pip"), "--version"],
        }
        warm = {
            "pip's script, warm": [python, str(folder / "pip"), "--version"],
            "pip's script before 25.0, warm": [python, str(folder / "old-pip"), "--version"],
            "python3 -S script, warm": [python, "-S", str(folder / "lean"), "--version"],
            "python3 -I -S script, warm": [python, "-I", "-S", str(folder / "lean"), "--version"],
        }
        found = {}
        for what, command in lines.items():
            subprocess.run(command, env=environment, capture_output=True, check=True)  # byte code is written
            found[what] = instructions(command, environment)
        zygote = subprocess.Popen([python, "-m", "xtool.daemon.zygote"], env=environment)
        try:
            end = time.monotonic() + 60
            while not (folder / "run" / "zygote.sock").exists():
                if zygote.poll() is not None or time.monotonic() > end:
                    raise SystemExit("the zygote did not come up")
                time.sleep(0.05)
            for what, command in warm.items():
                subprocess.run(command, env=environment, capture_output=True, check=True)
                found[what] = instructions(command, environment)
        finally:
            zygote.terminate()
            zygote.wait()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.start", description="Instructions of a start.")
    parser.add_argument("-o", choices=("table", "json"), default="table")
    parser.add_argument("--python", default=os.path.realpath(sys.executable), help="the interpreter")
    options = parser.parse_args()
    found = measure(options.python)
    if options.o == "json":
        print(json.dumps(found))
        return 0
    base = found["python3 -c pass"]
    for what, count in found.items():
        print(f"{what:<36} {count / 1e6:8.1f} million  {count / base:5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
