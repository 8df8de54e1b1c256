"""Shell lines that stop, start and await the zygote (``xtool.daemon.zygote``) in the lab's dom0."""

FOLDER = "/run/xtool"
SOCKET = f"{FOLDER}/zygote.sock"
#: Written by whoever starts it; while that process lives without a socket, it is still importing.
PID_FILE = "/run/xtool-zygote.pid"
#: Ends it; what it forked goes on. It removes its socket itself, unless it was killed.
STOP = f"read -r pid <{PID_FILE} 2>/dev/null && kill $pid 2>/dev/null; rm -f {SOCKET} {PID_FILE}"
START = (
    "PYTHONPATH=/opt/xtool/src:/opt/xtool/deps setsid python3 -S -m xtool.daemon.zygote --idle 1e9 "
    f"</dev/null >/var/log/xtool-zygote.log 2>&1 & echo $! >{PID_FILE}"
)
#: Returns when it answers, or has failed.
WAIT = f"read -r pid <{PID_FILE}; until [ -S {SOCKET} ] || ! kill -0 $pid 2>/dev/null; do sleep 0.1; done"
