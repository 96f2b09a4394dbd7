"""`ckpt info`."""

from __future__ import annotations

from ckpt_cli.cli.options import File, Format, Json, Style, opened
from ckpt_cli.cli.output import answer, style_of, warn_of_danger
from ckpt_cli.ops.info import summarize
from ckpt_cli.render.info import summary_text, to_json
from ckpt_cli.render.json import json_text


def info_command(file: File, style: Format = Style.auto, json: Json = False) -> None:
    """Summarize a checkpoint in a dozen lines.

    Format, sizes, dtypes, top-level keys, ties, waste, metadata and what pickled objects it holds.

    Example: ckpt info model.safetensors
    """
    layout = style_of(style, json=json)
    with opened(file) as checkpoint:
        summary = summarize(checkpoint)
    if layout == "json":
        answer(json_text(to_json(summary)))
    else:
        answer(summary_text(summary, layout))
    warn_of_danger(checkpoint)
