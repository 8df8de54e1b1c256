"""``xtool``: global options, the table of verbs, and the one place where errors become exit codes.

Only what the command line asks for is imported: the table below names each verb's module, ``xtool --help``
reads the table alone, and ``-H`` hands the rest of the line on before anything heavy is loaded. That
matters in the lab, where Python imports fifteen times slower than on real hardware.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from xtool.errors import UnsupportedError, UsageError, XtoolError

if TYPE_CHECKING:
    from xtool.cli.client import Opener


class Verb(NamedTuple):
    """``function`` of ``module`` carries it out; for a sub-app it is a ``typer.Typer``."""

    module: str
    function: str
    summary: str


VERBS = {
    "create": Verb("create", "create", "Start a domain from its file."),
    "check": Verb("create", "check", "Say whether a domain file is right."),
    "plan": Verb("apply", "plan", "Say what apply would change."),
    "diff": Verb("apply", "diff", "Say how a running domain differs from its file."),
    "apply": Verb("apply", "apply", "Make what runs what the files say."),
    "list": Verb("query", "list_domains", "List the domains."),
    "info": Verb("query", "info", "Show the host: Xen, CPUs, memory."),
    "dmesg": Verb("query", "dmesg", "Show Xen's message buffer."),
    "domid": Verb("query", "domid", "Show the id of a domain."),
    "domname": Verb("query", "domname", "Show the name of a domain."),
    "vcpu-list": Verb("query", "vcpu_list", "List vCPUs: state, where they run, affinity."),
    "console": Verb("attach", "console", "Attach to a domain's console."),
    "pause": Verb("lifecycle", "pause", "Stop a domain's vCPUs."),
    "unpause": Verb("lifecycle", "unpause", "Let a paused domain run."),
    "shutdown": Verb("lifecycle", "shutdown", "Ask a domain to power off."),
    "reboot": Verb("lifecycle", "reboot", "Ask a domain to reboot."),
    "destroy": Verb("lifecycle", "destroy", "End a domain at once."),
    "block-attach": Verb("devices", "block_attach", "Give a running domain a disk."),
    "block-detach": Verb("devices", "block_detach", "Take a disk away from a running domain."),
    "block-list": Verb("devices", "block_list", "List a domain's disks, and who serves them."),
    "block-limit": Verb("devices", "block_limit", "Limit how fast a disk is read and written."),
    "block-serve": Verb("devices", "block_serve", "Serve a disk over NBD on a Unix socket."),
    "network-attach": Verb("devices", "network_attach", "Give a running domain an interface."),
    "network-detach": Verb("devices", "network_detach", "Take an interface away."),
    "network-list": Verb("devices", "network_list", "List a domain's interfaces."),
    "network-limit": Verb("devices", "network_limit", "Limit what an interface sends and is sent."),
    "cd-insert": Verb("devices", "cd_insert", "Put a medium into a CD drive."),
    "cd-eject": Verb("devices", "cd_eject", "Take the medium out of a CD drive."),
    "wiring": Verb("wiring", "wiring", "Show the split drivers: both ends, ports, grants, rings."),
    "gc": Verb("garbage", "gc", "Find what crashed toolstacks left behind, and remove it."),
    "lab": Verb("lab", "lab_app", "A real Xen host inside QEMU: up, down, shell..."),
    "doctor": Verb("doctor", "doctor_app", "Say whether this host is fit to run guests."),
    "rename": Verb("everyday", "rename", "Give a running domain another name."),
    "vm-list": Verb("everyday", "vm_list", "List the guests: uuid, id, name."),
    "uptime": Verb("everyday", "uptime", "Show for how long domains have run."),
    "set": Verb("everyday", "set_", "Change a running domain's configuration, now or at its next start."),
    "config-show": Verb("everyday", "config_show", "Show the configuration a domain runs with."),
    "channel-list": Verb("everyday", "channel_list", "List a domain's channels."),
    "vncviewer": Verb("everyday", "vncviewer", "Show a domain's VNC display."),
    "pci-list": Verb("everyday", "pci_list", "List the PCI devices a domain was given."),
    "pci-assignable-list": Verb("everyday", "pci_assignable_list", "List the PCI devices pciback holds."),
    "top": Verb("top", "top", "Show what the domains use, live."),
    "metrics": Verb("top", "metrics", "Print what the domains use, for Prometheus."),
    "completion": Verb("completion", "completion", "Print a shell's completion script."),
    "config": Verb("domainxml", "config_app", "Domain files to and from libvirt's domain XML."),
    # tuning
    "vcpu-pin": Verb("tuning", "vcpu_pin", "Say which CPUs a vCPU may use."),
    "vcpu-set": Verb("tuning", "vcpu_set", "Ask a domain for another number of vCPUs."),
    "mem-set": Verb("tuning", "mem_set", "Ask a domain to have more or less memory."),
    "mem-max": Verb("tuning", "mem_max", "Set the most memory a domain may have."),
    "sched-credit": Verb("sched", "sched_credit", "Show or set the credit scheduler: weights, caps."),
    "sched-credit2": Verb("sched", "sched_credit2", "Show or set the credit2 scheduler."),
    "sched-rtds": Verb("sched", "sched_rtds", "Show or set the rtds scheduler: periods, budgets."),
    "cpupool-list": Verb("cpupool", "cpupool_list", "List the CPU pools."),
    "cpupool-create": Verb("cpupool", "cpupool_create", "Make a CPU pool."),
    "cpupool-destroy": Verb("cpupool", "cpupool_destroy", "Take a CPU pool away."),
    "cpupool-rename": Verb("cpupool", "cpupool_rename", "Give a CPU pool another name."),
    "cpupool-cpu-add": Verb("cpupool", "cpupool_cpu_add", "Put CPUs into a CPU pool."),
    "cpupool-cpu-remove": Verb("cpupool", "cpupool_cpu_remove", "Take CPUs out of a CPU pool."),
    "cpupool-migrate": Verb("cpupool", "cpupool_migrate", "Move a domain into another CPU pool."),
    "cpupool-numa-split": Verb("cpupool", "cpupool_numa_split", "Make a CPU pool of each NUMA node."),
    "trigger": Verb("control", "trigger", "Send a domain an NMI or the press of a button."),
    "sysrq": Verb("control", "sysrq", "Press a SysRq key of a domain's kernel."),
    "debug-keys": Verb("control", "debug_keys", "Send debug keys to Xen."),
    "set-parameters": Verb("control", "set_parameters", "Set parameters of Xen while it runs."),
    "dump-core": Verb("control", "dump_core", "Write a domain's memory to a core file."),
    # the daemon
    "daemon": Verb("daemon", "daemon_app", "Run, ask and stop xtoold, the daemon of this host."),
    "events": Verb("daemon", "events", "Show what happens to the domains, as it happens."),
    # domain files
    "explain": Verb("config", "explain", "Say where each value of a domain file comes from."),
    "schema": Verb("config", "schema", "Print the JSON Schema of domain files."),
    "convert": Verb("config", "convert", "Make a domain file of an xl.cfg, or the other way round."),
}
SUB_APPS = ("lab", "doctor", "config", "daemon")
#: These act on this machine, so -H makes no sense for them.
LOCAL_ONLY = ("lab", "config", "completion", "schema", "convert")
#: These look into a Xen host by other ways than the toolstack's client.
XEN_ONLY = ("doctor", "plan", "diff", "apply")
#: What a target begins with that libvirt carries out.
LIBVIRT = ("qemu:", "qemu+", "xen://", "xen+", "test://", "test+")
#: What the shells' completion scripts ask for names with; no verb, and nothing heavy is imported for it.
COMPLETE = "__complete"

USAGE = "usage: xtool [-H TARGET] [-v] VERB [ARGUMENTS]..."
HELP_TAIL = """
options:
  -H, --host TARGET  carry the verb out there: lab, lab:NAME or ssh://user@host; unix:/path is a daemon's
                     socket; or by libvirt: qemu:, qemu:///system, xen:///system, ...
  -v, --verbose      tell more, and show tracebacks of bugs
  --version          show the version
  -h, --help         show this; "xtool VERB --help" tells more of a verb

A verb may be shortened as long as it is unambiguous: "xtool des web".

examples:
  xtool lab up
  xtool -H lab create configs/pvh.yaml -c
"""


class Globals(NamedTuple):
    """The command line up to the verb, and what follows."""

    host: str | None
    verbose: bool
    show: str | None  # "help" or "version"
    rest: list[str]


def main(argv: Sequence[str] | None = None, *, opener: Opener | None = None) -> int:
    """Carry out one command line and return its exit code (``docs/exit-codes.md``).

    ``opener`` gives the toolstack's client; without it, the one of this host.
    """
    verbose = False
    try:
        line = parse_globals(list(sys.argv[1:] if argv is None else argv))
        verbose = line.verbose
        _exit_on_signals()
        return _run(line, opener)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except XtoolError as error:
        from xtool.cli.report import report

        report(error)
        return error.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141  # as a shell reports a program that SIGPIPE ended
        if verbose:  # a bug of ours: say so, and do not drown the reader
            raise
        from xtool.cli.report import report_bug

        report_bug(error)
        return 70
    except BaseException as leaving:  # SystemExit, or a signal: their code is the exit status
        code = getattr(leaving, "code", None)
        if not isinstance(code, int):
            raise
        return code
    finally:
        _flush()


def run() -> NoReturn:
    """The ``xtool`` script."""
    sys.exit(main())


def parse_globals(argv: list[str]) -> Globals:
    """Split off what stands before the verb. Raises ``UsageError``."""
    host, verbose, at = None, False, 0
    while at < len(argv):
        word = argv[at]
        if word in ("-h", "--help", "--version"):
            return Globals(host, verbose, "version" if word == "--version" else "help", argv[at + 1 :])
        if word in ("-v", "--verbose"):
            verbose = True
        elif word in ("-H", "--host"):
            at += 1
            if at == len(argv):
                raise UsageError(f"{word} wants a target", hint="as in: xtool -H lab list")
            host = argv[at]
        elif word.startswith("--host="):
            host = word[7:]
        elif word.startswith("-H"):
            host = word[2:].removeprefix("=")
        elif word.startswith("-"):
            raise UsageError(f"unknown option {word}", hint="xtool --help lists the options")
        else:
            break
        at += 1
    return Globals(host, verbose, None, argv[at:])


def find_verb(word: str) -> str:
    """The verb ``word`` stands for: itself, or the only one it begins. Raises ``UsageError``."""
    if word in VERBS:
        return word
    fits = [verb for verb in VERBS if verb.startswith(word)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UsageError(f"{word!r} is ambiguous", hint=f"it may be {', '.join(fits)}")
    from xtool.config.problems import did_you_mean

    raise UsageError(
        f"unknown verb {word!r}", hint=did_you_mean(word, VERBS) or "xtool --help lists the verbs"
    )


def help_text() -> str:
    width = max(map(len, VERBS))
    rows = [f"  {verb:<{width}}  {known.summary}" for verb, known in VERBS.items()]
    return "\n".join([USAGE, "", "Builds and runs Xen domains.", "", "verbs:", *rows, HELP_TAIL.rstrip()])


def _run(line: Globals, opener: Opener | None) -> int:
    if line.show == "version":
        from xtool import __version__

        print(f"xtool {__version__}")
        return 0
    if line.show == "help" or not line.rest:
        print(help_text())
        return 0 if line.show else 2
    if line.rest[0] == COMPLETE:
        return _complete(line, opener)
    verb = find_verb(line.rest[0])
    if line.host is not None and line.host.startswith(LIBVIRT) and verb not in LOCAL_ONLY:
        from xtool.cli import client

        if verb in XEN_ONLY:
            raise UnsupportedError(
                f"xtool {verb} needs Xen's own driver: it looks into a Xen host", hint="use it without -H"
            )
        client.use_libvirt(line.host)
        return run_verb(verb, line.rest[1:])
    if line.host is not None and line.host.startswith("unix:") and verb not in LOCAL_ONLY:
        from xtool.cli import client

        client.use(client.over(line.host.removeprefix("unix:")))
        try:
            return run_verb(verb, line.rest[1:])
        finally:
            client.use(None)
    if line.host is not None and verb not in LOCAL_ONLY:
        from xtool.cli.remote import run_remote

        return int(run_remote(line.host, [verb, *line.rest[1:]]))
    if opener is not None:
        from xtool.cli import client

        client.use(opener)
    return run_verb(verb, line.rest[1:])


def _complete(line: Globals, opener: Opener | None) -> int:
    if line.host is not None:
        from xtool.cli.remote import run_remote

        return int(run_remote(line.host, line.rest))
    from xtool.cli import client, names

    if opener is not None:
        client.use(opener)
    return names.main(line.rest[1:])


def run_verb(verb: str, args: list[str]) -> int:
    """Build the one command that is asked for, and run it."""
    import typer

    command = command_of(verb)
    usage_error: Any = typer.BadParameter.__base__  # where it lives differs between Typer's releases
    try:
        with command.make_context(f"xtool {verb}", args) as context:
            result = command.invoke(context)
    except typer.Exit as leaving:
        return leaving.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return 2
        where = error.ctx.command_path if getattr(error, "ctx", None) else f"xtool {verb}"
        raise UsageError(error.format_message(), hint=f"{where} --help shows how") from None
    return result if isinstance(result, int) else 0


@cache
def command_of(verb: str) -> Any:
    """The verb as a command of Typer's. Reading a function's parameters takes as long as a small verb does:
    the zygote has those that are used most from before (``zygote.VERBS``)."""
    from importlib import import_module

    import typer

    known = VERBS[verb]
    target: Any = getattr(import_module(f"xtool.cli.{known.module}"), known.function)
    return typer.main.get_command(target if verb in SUB_APPS else single_command(verb, target))


def single_command(verb: str, function: Callable[..., Any]) -> Any:
    """A Typer app of one command; its docstring is the help, paragraph by paragraph."""
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(verb, context_settings={"help_option_names": ["-h", "--help"]})(function)
    return app


def _exit_on_signals() -> None:
    """End by an exception on SIGTERM and SIGHUP too, so that what was begun is undone."""
    import signal

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, leave)
    except ValueError:
        pass  # not in the main thread: signals are someone else's business


def _nobody_reads() -> bool:
    """Standard output's reader went away (any other broken pipe would be a bug)."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def _flush() -> None:
    """A reader that went away (``xtool list | head -1``) is no error worth a traceback at exit."""
    for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:  # started with it closed
                stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        except (OSError, ValueError):
            pass  # nowhere left to tell


if __name__ == "__main__":
    run()
