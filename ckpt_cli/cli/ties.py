"""`ckpt ties`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_cli.cli.options import File, Format, Json, NamesAndFiles, Style, opened
from ckpt_cli.cli.output import Reply, style_of, talk
from ckpt_cli.cli.several import parted, reply_about
from ckpt_cli.errors import UsageError
from ckpt_cli.ops.ties import find_ties, judge
from ckpt_cli.render.text import escaped
from ckpt_cli.render.ties import ties_block, to_json, verdict_block, verdict_text, verdict_to_json

if TYPE_CHECKING:
    from ckpt_cli.model.checkpoint import Checkpoint


def ties_command(
    file: File,
    names: NamesAndFiles = None,
    equal: Annotated[
        bool, typer.Option("--equal", help="Add tensors that are bit-identical but stored apart (reads them).")
    ] = False,
    style: Format = Style.auto,
    json: Json = False,
) -> int:
    """Show which names are one tensor.

    And which overlap, which only lie in one storage, which are recorded as aliases.

    With two names (or two prefixes): are these tied? The exit code says it, 0 for yes and 1 for no.

    Example: ckpt ties model.pt 2.weight 4.weight && echo same tensor
    """
    layout = style_of(style, json=json)
    files, pair = parted(file, names)
    if pair and len(pair) != 2:
        raise UsageError("ties takes no name or two", hint="ckpt ties FILE NAME NAME")

    def ask(path: str) -> Reply:
        with opened(path) as checkpoint:
            if pair:
                return _judged(checkpoint, *pair)
            ties = find_ties(checkpoint, equal=equal)

        def aside() -> None:
            if ties.claim:
                talk(f"note: {f'{escaped(path)}: ' if len(files) > 1 else ''}{escaped(ties.claim)}\n")

        return Reply(ties_block(ties, layout), lambda: to_json(ties), aside=aside)

    return reply_about(files, layout, ask)


def _judged(checkpoint: Checkpoint, a: str, b: str) -> Reply:
    verdict = judge(checkpoint, a, b)
    code = 0 if verdict.tied else 1
    return Reply(verdict_block(verdict), lambda: verdict_to_json(verdict), code, text=[verdict_text(verdict)])
