"""`ckpt meta`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, File, Format, Json, Output, Style, WeightsOnly, opened
from ckpt_cli.cli.output import answer, edit, style_of
from ckpt_cli.edits.meta import metadata_of, parse_pairs, plan_meta, strings_of_set
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.render.json import json_text
from ckpt_cli.render.meta import metadata_text, set_metadata_text, to_json


def meta_command(
    file: File,
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY[=VALUE]]...", help="Keys to show or to set.")
    ] = None,
    removed: Annotated[list[str] | None, typer.Option("-d", "--delete", metavar="KEY", help="Remove a key.")] = None,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    style: Format = Style.auto,
    json: Json = False,
) -> None:
    """Show, set and remove strings of a safetensors file's __metadata__.

    Only the header is written, where it has room. Of a sharded checkpoint a key changes where it is, in all shards or
    in the index; a new one goes into all shards.

    Example: ckpt meta model.safetensors format=pt
    """
    layout = style_of(style, json=json)
    if removed or any("=" in pair for pair in pairs or ()):
        changed, gone = parse_pairs(pairs or ()), removed or ()
        edit(
            file,
            lambda checkpoint: plan_meta(checkpoint, changed, gone),
            EditOptions(output, dry_run, backup, weights_only=weights_only),
            json=layout == "json",
        )
        return
    with opened(file) as checkpoint:
        found = metadata_of(checkpoint, pairs or ())
        strings = strings_of_set(checkpoint)
    if layout == "json":
        answer(json_text(to_json(found, strings)))
    elif strings is None:
        answer(metadata_text(found, layout))
    else:
        answer(set_metadata_text([row for row in strings.agreed() if row[0] in found], layout))
