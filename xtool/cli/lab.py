"""``xtool lab``: a real Xen host inside QEMU, from image to shell."""

from __future__ import annotations

import os
import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from xtool.cli.options import Output
from xtool.cli.output import MIB, columns, emit, escape_lines, note, pairs
from xtool.cli.progress import progress
from xtool.errors import LabError, UsageError

if TYPE_CHECKING:
    from xtool.lab.machine import Lab, Record
    from xtool.lab.spec import LabSpec

lab_app = typer.Typer(
    help="A real Xen host inside QEMU, for machines without Xen.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(metavar="[NAME]", help="Which lab.", show_default=False)]
DEFAULT = "default"


class CommandAfterDashes(TyperCommand):
    """``[NAME] -- COMMAND...``: what follows the first ``--`` is left alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.meta["command"] = args[at + 1 :]
            args = args[:at]
        elif not {"-h", "--help"} & set(args[:1]):
            raise UsageError("the command to run follows two dashes", hint="as in: xtool lab exec -- xl list")
        return list(super().parse_args(ctx, args))


def _lab(name: str) -> Lab:
    from xtool.lab.machine import Lab

    return Lab(name)


def _spec(memory: str | None, cpus: int | None, accel: str, deterministic: bool) -> LabSpec:
    from xtool.lab import spec

    size = spec.DEFAULT_MEMORY
    if memory is not None:
        from xtool.config.units import to_size

        try:
            size = to_size(memory)
        except ValueError as error:
            raise UsageError(f"--memory {memory}: {error}", hint="as in: --memory 8GiB") from None
    chosen = spec.choose_accel("tcg" if deterministic and accel == "auto" else accel)
    return spec.LabSpec(size, spec.DEFAULT_CPUS if cpus is None else cpus, chosen, deterministic)


Memory = Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of the whole lab (8GiB).")]
Cpus = Annotated[int | None, typer.Option(metavar="N", help="Its CPUs (2).")]
Accel = Annotated[str, typer.Option(metavar="auto|kvm|tcg", help="KVM where it can run Xen, else emulation.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Count instructions, not time: timings that repeat, slowly.")
]


@lab_app.command()
def up(
    name: Name = DEFAULT,
    memory: Memory = None,
    cpus: Cpus = None,
    accel: Accel = "auto",
    deterministic: Deterministic = False,
) -> None:
    """Start a lab; the first time this builds its image and boots it, later it restores a snapshot.

    \b
    Examples:
      xtool lab up
      xtool lab up bench --deterministic
    """
    lab = _lab(name)
    began = time.monotonic()
    with progress() as listener:
        record = lab.up(_spec(memory, cpus, accel, deterministic), listener)
    _tell_up(name, record, time.monotonic() - began)


def _tell_up(name: str, record: Record, took: float) -> None:
    note(f"the lab {name} is up ({took:.1f} s, ssh on 127.0.0.1:{record.port})")
    suffix = "" if name == DEFAULT else f":{name}"
    note(f"next: xtool -H lab{suffix} info, or: xtool lab shell{'' if name == DEFAULT else ' ' + name}")


@lab_app.command()
def build() -> None:
    """Build what is missing of the lab's image and the test guests, and start nothing.

    \b
    Examples:
      xtool lab build
    """
    from xtool.lab.guests import ensure_guests
    from xtool.lab.image import ensure_image
    from xtool.lab.sync import project_root

    with progress() as listener:
        image = ensure_image(listener)
        guests = project_root() / "build/guest"
        ensure_guests(guests, listener)
    note(f"the lab's image is in {image}")
    note(f"the test guests are in {guests}")


@lab_app.command()
def down(name: Name = DEFAULT) -> None:
    """Stop a lab. What was changed inside since its start is gone.

    \b
    Examples:
      xtool lab down
      xtool lab down bench
    """
    with progress() as listener:
        stopped = _lab(name).down(listener)
    note(f"the lab {name} is down" if stopped else f"the lab {name} was not up")


@lab_app.command()
def reset(
    name: Name = DEFAULT,
    cold: Annotated[
        bool, typer.Option("--cold", help="Boot it anew instead of restoring a snapshot.")
    ] = False,
) -> None:
    """Start a lab afresh, with the settings it has: nothing of what happened inside stays.

    \b
    Examples:
      xtool lab reset
      xtool lab reset --cold
    """
    from xtool.lab.spec import LabSpec

    lab = _lab(name)
    record = lab.record()
    spec = LabSpec(**record.spec) if record is not None else _spec(None, None, "auto", False)
    began = time.monotonic()
    with progress() as listener:
        lab.down(listener)
        fresh = lab.up(spec, listener, cold=cold)
    _tell_up(name, fresh, time.monotonic() - began)


@lab_app.command()
def remove(name: Name = DEFAULT) -> None:
    """Stop a lab and forget it.

    \b
    Examples:
      xtool lab remove bench
      xtool lab remove
    """
    with progress() as listener:
        _lab(name).remove(listener)
    note(f"the lab {name} is gone")


@lab_app.command()
def status(name: Name = DEFAULT, output: Output = "table") -> int:
    """Show one lab; exit status 1 when it is not up.

    \b
    Examples:
      xtool lab status
      xtool lab status -o json
    """
    found = _describe(name)
    emit(found, output, lambda: pairs((key, value) for key, value in found.items() if value is not None))
    return 0 if found["state"] == "up" else 1


@lab_app.command("list")
def list_labs(output: Output = "table") -> None:
    """List the labs of this user.

    \b
    Examples:
      xtool lab list
      xtool lab list -o json
    """
    from xtool.lab.machine import lab_names

    rows = [_describe(name) for name in lab_names()]
    header = ["Name", "State", "Port", "Memory", "CPUs", "Accel", "Deterministic"]
    keys = ["name", "state", "port", "memory_mib", "cpus", "accel", "deterministic"]
    cells = [["" if row[key] is None else row[key] for key in keys] for row in rows]
    emit(rows, output, lambda: columns(header, cells, ["Port", "Memory", "CPUs"]))


def _describe(name: str) -> dict[str, Any]:
    lab = _lab(name)
    record = lab.record()
    if record is None:
        state = "crashed" if lab.crashed() else "down"
        keys = ("port", "pid", "memory_mib", "cpus", "accel", "deterministic", "uptime", "image")
        return {"name": name, "state": state, **dict.fromkeys(keys)}
    return {
        "name": name,
        "state": "up" if record.ready else "starting",
        "port": record.port,
        "pid": record.pid,
        "memory_mib": record.spec["memory"] // MIB,
        "cpus": record.spec["cpus"],
        "accel": record.spec["accel"],
        "deterministic": record.spec["deterministic"],
        "uptime": round(time.time() - record.started),
        "image": record.image,
    }


@lab_app.command()
def sync(name: Name = DEFAULT) -> None:
    """Bring this working tree's xtool, tests and guests into a lab; only what changed is sent.

    \b
    Examples:
      xtool lab sync
      xtool lab sync bench
    """
    began = time.monotonic()
    with progress() as listener:
        result = _lab(name).sync(listener)
    took = time.monotonic() - began
    if result.sent:
        sent = f"{result.files} files sent ({result.sent / 1024:.0f} KiB), {result.removed} removed"
        note(f"{sent} in {took:.1f} s")
    else:
        note("nothing changed")


@lab_app.command()
def shell(name: Name = DEFAULT) -> None:
    """Open a shell in a lab's dom0.

    \b
    Examples:
      xtool lab shell
      xtool lab shell bench
    """
    _hand_over(name, [], tty=sys.stdin.isatty())


@lab_app.command("exec", cls=CommandAfterDashes)
def execute(ctx: typer.Context, name: Name = DEFAULT) -> None:
    """Run a command in a lab's dom0: its input, output and exit status are the command's.

    The command follows two dashes: xtool lab exec [NAME] -- COMMAND...

    \b
    Examples:
      xtool lab exec -- xl list
      xtool lab exec bench -- sh -c 'cat > /tmp/file' < file
    """
    command = ctx.meta["command"]
    if not command:
        raise UsageError("no command to run", hint="xtool lab shell opens a shell")
    if sys.stdin.isatty() and sys.stdout.isatty():
        _hand_over(name, command, tty=True)
    from xtool.cli.remote import open_remote, run_group

    with open_remote(f"lab:{name}") as remote:
        raise typer.Exit(run_group(remote, shlex.join(command)))


def _hand_over(name: str, command: list[str], *, tty: bool) -> NoReturn:
    """Become ssh: signals, terminal and exit status are then its own business."""
    lab = _lab(name)
    target = lab.ssh(lab.require_running())
    target.open_master()
    argv = target.argv(command, tty=tty)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(argv[0], argv)


@lab_app.command()
def log(
    name: Name = DEFAULT,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more comes.")] = False,
    qemu: Annotated[bool, typer.Option("--qemu", help="What QEMU itself said.")] = False,
) -> None:
    """Show a lab's serial console: Xen's and dom0's messages.

    \b
    Examples:
      xtool lab log
      xtool lab log -f
    """
    lab = _lab(name)
    path = lab.folder / "qemu.log" if qemu else lab.console_log
    if not path.exists():
        raise LabError(f"the lab {name} has no log yet", hint="start it: xtool lab up")
    if follow:
        os.execvp("tail", ["tail", "-n", "+1", "-F", str(path)])
    print(escape_lines(path.read_text(errors="replace").replace("\r", "")), end="", flush=True)


if __name__ == "__main__":
    lab_app()
