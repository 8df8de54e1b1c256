"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

from xtool.cli.output import check_format

Output = Annotated[
    str,
    typer.Option("-o", "--output", metavar="table|json|yaml", help="What to print.", callback=check_format),
]
Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="Its name, id or uuid.", show_default=False)]
MaybeDomain = Annotated[
    str | None, typer.Argument(metavar="[DOMAIN]", help="Its name, id or uuid.", show_default=False)
]
Domains = Annotated[
    list[str], typer.Argument(metavar="DOMAIN...", help="Names, ids or uuids.", show_default=False)
]
MaybeDomains = Annotated[
    list[str] | None, typer.Argument(metavar="[DOMAIN]...", help="Names, ids or uuids.", show_default=False)
]
