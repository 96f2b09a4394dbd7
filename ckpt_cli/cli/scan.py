"""`ckpt scan`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import Baseline, File, FindingFormat, FindingStyle, Json
from ckpt_cli.cli.output import answer, style_of, talk
from ckpt_cli.errors import about
from ckpt_cli.ops.accepted import accept
from ckpt_cli.ops.scan import scan
from ckpt_cli.render.json import json_text
from ckpt_cli.render.scan import scan_text, to_json
from ckpt_cli.render.weights_only import aside


def scan_command(
    file: File,
    every: Annotated[bool, typer.Option("-a", "--all", help="Add the names that do no harm.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="GLOB", help="Accept names or codes that match; repeatable.")
    ] = None,
    baseline: Baseline = None,
    style: FindingFormat = FindingStyle.auto,
    json: Json = False,
) -> None:
    """Show the code that would run if something else loaded it.

    Every name that a pickle in the file would import, with the call it feeds, and whatever else no ordinary
    checkpoint has: pickles in strings, streams after the first, records twice or out of place. Nothing is run. Exit 0
    means that there is nothing but notes, 1 that there are errors or warnings.

    Example: ckpt scan model.pt && echo harmless
    """
    layout = style_of(style, json=json)
    with about(file):
        found = scan(file)
        accept(found, allow or (), baseline)
    if layout == "json":
        answer(json_text(to_json(found)))
    elif layout == "sarif":
        from ckpt_cli.render.sarif import SCAN_CODES, to_sarif

        answer(json_text(to_sarif(found, "scan", SCAN_CODES)))
    else:
        answer(scan_text(found, layout, every=every))
        talk(aside(found, layout))
    raise typer.Exit(0 if found.ok else 1)
