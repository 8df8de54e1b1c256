"""``xtool config``: domain files to libvirt's domain XML, and back."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from xtool.cli.create import File, Only, Overrides, VarsFiles
from xtool.cli.output import escape, note, write
from xtool.errors import ConfigError, UsageError

config_app = typer.Typer(
    help="Domain files to and from libvirt's domain XML.",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
FORMATS = ("libvirt-xml", "yaml")
_MAX_FILE = 1 << 20


@config_app.command("export")
def export(
    file: File,
    form: Annotated[
        str, typer.Option("--format", metavar="libvirt-xml|yaml", help="What to write.")
    ] = "libvirt-xml",
    driver: Annotated[
        str | None,
        typer.Option(metavar="qemu|xen", help="For which of libvirt's drivers.", show_default="by type"),
    ] = None,
    overrides: Overrides = None,
    vars_files: VarsFiles = None,
    only: Only = None,
) -> None:
    """Write a domain file as libvirt's domain XML, or as YAML with nothing left implicit in xl's strings.

    examples:

      xtool config export web.yaml > web.xml

      xtool config export --driver xen --set memory=2GiB web.yaml
    """
    from xtool.config.load import load_placed

    if form not in FORMATS:
        raise UsageError(f"unknown format {form!r}", hint=f"it is {' or '.join(FORMATS)}")
    if driver not in (None, "qemu", "xen"):
        raise UsageError(f"unknown driver {driver!r}", hint="it is qemu or xen")
    config, place = load_placed(file, overrides or (), vars_files or (), only)
    if form == "yaml":
        write(config.to_yaml().rstrip("\n"))
        return
    from uuid import uuid4

    from xtool.drivers.libvirt import domainxml, honour
    from xtool.drivers.libvirt.facts import Facts

    kind = driver or ("qemu" if config.type == "hvm" else "xen")
    facts = Facts(kind, {"qemu": "libvirt's QEMU driver", "xen": "libvirt's Xen driver"}[kind])
    try:
        honour.check(config, facts)
    except ConfigError as error:
        raise place(error) from None
    write(domainxml.render(config, facts, str(config.uuid or uuid4())).strip("\n"))


@config_app.command("import")
def import_(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="libvirt's domain XML; - is standard input.", show_default=False),
    ],
) -> None:
    """Write libvirt's domain XML as a domain file. What has no place in one is told on standard error.

    examples:

      virsh dumpxml web | xtool config import - > web.yaml

      xtool config import web.xml
    """
    from xtool.drivers.libvirt.importxml import import_xml

    try:
        with sys.stdin.buffer if file == "-" else open(file, "rb") as stream:
            raw = stream.read(_MAX_FILE + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", file=file, hint="check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8", file=file, hint="save it as UTF-8") from None
    config, left_out = import_xml(text, file)
    write(config.to_yaml().rstrip("\n"))
    for line in left_out:
        note(f"not carried over: {escape(line)}")
