"""The common part of the commands that rewrite a checkpoint: options in, a report out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.progress import watched
from ckpt_cli.edits.transaction import Options, Planned, rewrite
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.render.edits import edit_text, to_json
from ckpt_cli.render.json import json_text

__all__ = ["Options", "edit"]


def edit(file: str, plan: Callable[[Checkpoint], Planned], options: Options, *, json: bool) -> None:
    """Carry out an edit and report it: on stderr, or as JSON on stdout."""
    with watched() as on_progress:
        done = rewrite(file, plan, replace(options, on_progress=on_progress))
    if json:
        report(json_text(to_json(done)))
    else:
        talk(edit_text(done))
