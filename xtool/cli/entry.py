"""``xtool``, as it starts: hand the line to the zygote if one answers, else carry it out in this process.

Nothing but ``xtool.warmlink`` is imported before that is known. ``XTOOL_WARM=0`` asks for an own process. A
root whose line was carried out here leaves a zygote behind for the next one, on a Xen host.
"""

import posix
import sys

from xtool import warmlink

#: A host that runs domains: elsewhere nothing would be gained by a process that stays.
_XEN = "/dev/xen/privcmd"


def main() -> int:
    """The ``xtool`` script; returns the exit status."""
    wanted = posix.environ.get(b"XTOOL_WARM") != b"0"
    if wanted:
        status = warmlink.hand_over(sys.argv[1:])
        if status is not None:
            return status
    if "site" not in sys.modules and sys.flags.no_site:  # started with -S: what is installed is not yet found
        import site

        site.main()
    from xtool.cli.app import main as carry_out

    status = carry_out()
    if wanted and posix.geteuid() == 0 and _is_xen_host():
        start_zygote()
    return status


def _is_xen_host() -> bool:
    try:
        posix.stat(_XEN)
    except OSError:
        return False
    return True


def start_zygote() -> None:
    """Leave a zygote behind; if there is one already, it ends at once. Never fails."""
    import os

    try:
        null = os.open(os.devnull, os.O_RDWR)
        files = [(os.POSIX_SPAWN_DUP2, null, number) for number in (0, 1, 2)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(word for word in sys.path if word)}
        argv = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-m", "xtool.daemon.zygote"]
        os.posix_spawn(sys.executable, argv, environment, file_actions=files, setsid=True)
        os.close(null)
    except OSError:
        pass
