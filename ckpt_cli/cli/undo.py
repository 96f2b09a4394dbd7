"""`ckpt undo`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import DryRun, File, JsonReport
from ckpt_cli.cli.output import report, talk
from ckpt_cli.edits.undo import undo
from ckpt_cli.render.edits import to_json, undo_text
from ckpt_cli.render.json import json_text


def undo_command(
    file: File,
    force: Annotated[
        bool, typer.Option("--force", help="Restore it even if the file changed since, or if that is not known.")
    ] = False,
    dry_run: DryRun = False,
    json: JsonReport = False,
) -> None:
    """Restore the newest backup that an edit kept.

    That is FILE.bak, or the one with the highest number (FILE.bak.2), which then takes the place of FILE; of a set,
    all files of that edit together. Refused where FILE changed since that edit.

    Example: ckpt undo model.pt
    """
    done = undo(file, force=force, dry_run=dry_run)
    if json:
        report(json_text(to_json(done)))
    else:
        talk(undo_text(done))
