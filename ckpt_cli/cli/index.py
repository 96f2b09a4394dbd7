"""`ckpt index`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, JsonReport
from ckpt_cli.cli.output import report, talk
from ckpt_cli.edits.index import index
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.render.edits import edit_text, to_json
from ckpt_cli.render.json import json_text


def index_command(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of shards, or the index in it that is to be written.")
    ],
    dry_run: DryRun = False,
    backup: Backup = False,
    json: JsonReport = False,
) -> None:
    """Write the index of a folder of shards, from the shards.

    Which shard has which tensor, and how many bytes they have in all: model.safetensors.index.json or
    pytorch_model.bin.index.json. What an old index notes besides is kept. No shard is changed.

    Example: ckpt index shards/
    """
    done = index(folder, EditOptions(dry_run=dry_run, backup=backup))
    if json:
        report(json_text(to_json(done)))
    else:
        talk(edit_text(done))
