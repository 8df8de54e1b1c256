"""The block of ``docs/python-api.md`` with a client's methods: ``python tests/clientpage.py`` prints it."""

from __future__ import annotations

import inspect
import re

from xtool.client.routes import IN_PROCESS, ROUTES
from xtool.progress import SILENT
from xtool.toolstack.api import Client


def signatures() -> str:
    """Each method with its parameters, and what its route says of it."""
    lines = []
    for name in (*ROUTES, *IN_PROCESS):
        found = inspect.signature(getattr(Client, name))
        given = list(found.parameters.values())[1:]  # without self
        shown = [re.sub(r": '([^']+)'", r": \1", str(each)).replace(repr(SILENT), "SILENT") for each in given]
        named = [at for at, each in enumerate(given) if each.kind is inspect.Parameter.KEYWORD_ONLY]
        if named:
            shown.insert(named[0], "*")
        text = ", ".join(shown)
        about = f"{ROUTES[name].how.upper()}: {ROUTES[name].summary}" if name in ROUTES else IN_PROCESS[name]
        lines += [f"# {about}", f"def {name}({text}) -> {found.return_annotation}: ..."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(signatures(), end="")
