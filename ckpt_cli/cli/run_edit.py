"""The common part of the commands that edit a checkpoint: options in, a report out."""

from __future__ import annotations

from dataclasses import replace

from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.progress import watched
from ckpt_cli.edits.plan import EditOptions, Planner
from ckpt_cli.edits.transaction import transaction
from ckpt_cli.render.edits import edit_text, to_json
from ckpt_cli.render.json import json_text

__all__ = ["EditOptions", "edit"]


def edit(file: str, plan: Planner, options: EditOptions, *, json: bool) -> None:
    """Carry out an edit and report it: on stderr, or as JSON on stdout."""
    with watched() as on_progress:
        done = transaction(file, plan, replace(options, on_progress=on_progress))
    if json:
        report(json_text(to_json(done)))
    else:
        talk(edit_text(done))
