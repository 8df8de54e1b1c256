"""``python -m xtool.daemon``: what the client and systemd start."""

from __future__ import annotations

import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    from argparse import ArgumentParser

    parser = ArgumentParser("xtoold", description="The daemon of xtool: docs/daemon.md.")
    parser.add_argument("--host", default="xen:", help="xen: or fake:")
    parser.add_argument("--socket", type=Path, help="where to listen (default: /run/xtool/xtoold.sock)")
    parser.add_argument("--ready-fd", type=int, default=-1, help="gets a byte when the daemon listens")
    words = parser.parse_args(argv)
    from xtool.daemon.main import run
    from xtool.errors import XtoolError

    try:
        return run(words.host, words.socket, words.ready_fd)
    except XtoolError as error:
        print(f"xtoold: {error.message}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
