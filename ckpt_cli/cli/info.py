"""`ckpt info`."""

from __future__ import annotations

from ckpt_cli.cli.options import File, Format, Json, MoreFiles, Style, opened
from ckpt_cli.cli.output import Reply, style_of, warn_of_danger
from ckpt_cli.cli.several import all_files, reply_about
from ckpt_cli.ops.info import place_in_run, summarize
from ckpt_cli.render.info import summary_block, summary_text, to_json


def info_command(file: File, more: MoreFiles = None, style: Format = Style.auto, json: Json = False) -> int:
    """Summarize a checkpoint in a dozen lines.

    Format, sizes, dtypes, top-level keys, ties, waste, metadata and what pickled objects it holds. Of several
    checkpoints, one row each.

    Example: ckpt info model.safetensors
    """
    layout = style_of(style, json=json)

    def ask(path: str) -> Reply:
        with opened(path) as checkpoint:
            summary = summarize(checkpoint)
            place = place_in_run(checkpoint)
        return Reply(
            summary_block(summary, place, layout),
            lambda: to_json(summary),
            aside=lambda: warn_of_danger(checkpoint),
            text=summary_text(summary, layout),
        )

    return reply_about(all_files(file, more), layout, ask)
