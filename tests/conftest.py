"""For every test: signals do what they do in a person's shell.

A job started in the background, as continuous integration often is, begins with SIGINT and SIGQUIT (and under
``nohup`` SIGHUP) ignored, and every process it starts inherits that: tests of Ctrl-C would wait for ever.

hypothesis' deadline for one example is off: on a busy machine, or in emulation, any example may be late.
"""

import signal

from hypothesis import settings

settings.register_profile("xtool", deadline=None)
settings.load_profile("xtool")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)
