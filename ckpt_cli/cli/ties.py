"""`ckpt ties`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import File, Format, Json, Names, Style, opened
from ckpt_cli.cli.output import answer, style_of, talk
from ckpt_cli.errors import UsageError
from ckpt_cli.ops.ties import find_ties, judge
from ckpt_cli.render.json import json_text
from ckpt_cli.render.text import escaped
from ckpt_cli.render.ties import ties_text, to_json, verdict_text, verdict_to_json


def ties_command(
    file: File,
    names: Names = None,
    equal: Annotated[
        bool, typer.Option("--equal", help="Add tensors that are bit-identical but stored apart (reads them).")
    ] = False,
    style: Format = Style.auto,
    json: Json = False,
) -> None:
    """Show which names are one tensor.

    And which overlap, which only lie in one storage, which are recorded as aliases.

    With two names (or two prefixes): are these tied? The exit code says it, 0 for yes and 1 for no.

    Example: ckpt ties model.pt 2.weight 4.weight && echo same tensor
    """
    layout = style_of(style, json=json)
    if names and len(names) != 2:
        raise UsageError("ties takes no name or two", hint="ckpt ties FILE NAME NAME")
    with opened(file) as checkpoint:
        if names:
            verdict = judge(checkpoint, *names)
        else:
            ties = find_ties(checkpoint, equal=equal)
    if names:
        answer(json_text(verdict_to_json(verdict)) if layout == "json" else [verdict_text(verdict)])
        raise typer.Exit(0 if verdict.tied else 1)
    if layout == "json":
        answer(json_text(to_json(ties)))
    else:
        answer(ties_text(ties, layout))
    if ties.claim:
        talk(f"note: {escaped(ties.claim)}\n")
