"""Where a backend process spends its time, if the environment of whoever starts it asks for that::

    XTOOL_PROFILE_BACKENDS=/tmp/profiles xtool create web.yaml

leaves ``backend-<domid>-<pid>.prof`` (for ``pstats``) there when the process is told to let go; one that is
killed leaves none. It is Python's own profiler, which makes calls dearer than they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "XTOOL_PROFILE_BACKENDS"


@contextmanager
def profiled(domid: int) -> Iterator[None]:
    """Profile what is done within, if the environment names a folder for it."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        yield
        return
    import cProfile

    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        profile.dump_stats(os.path.join(folder, f"backend-{domid}-{os.getpid()}.prof"))
