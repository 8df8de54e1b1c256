"""Where the lab's warm xtool (``xtool.cli.warm``) listens; shell lines that stop, start and await it."""

SOCKET = "/run/xtool-warm.sock"
#: Written by whoever starts the server; while that process lives without a socket, it is still importing.
PID_FILE = "/run/xtool-warm.pid"
#: Ends the server; it first sees off whom it serves.
STOP = f"read -r pid <{PID_FILE} 2>/dev/null && kill $pid 2>/dev/null; rm -f {SOCKET} {PID_FILE}"
START = (
    "PYTHONPATH=/opt/xtool/src:/opt/xtool/deps setsid python3 -S -m xtool.cli.warm "
    f"</dev/null >/var/log/xtool-warm.log 2>&1 & echo $! >{PID_FILE}"
)
#: Returns when the server answers, or has failed.
WAIT = f"read -r pid <{PID_FILE}; until [ -S {SOCKET} ] || ! kill -0 $pid 2>/dev/null; do sleep 0.1; done"
