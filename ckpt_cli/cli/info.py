"""`ckpt info`."""

from __future__ import annotations

from ckpt_cli.cli.options import AsFiles, File, Format, Json, NamesAndFiles, Style, opened
from ckpt_cli.cli.output import Reply, answer, style_of, warn_of_danger
from ckpt_cli.cli.progress import progress, workers
from ckpt_cli.cli.several import parted, reply_about
from ckpt_cli.errors import UsageError
from ckpt_cli.files.places import is_folder
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.info import summarize
from ckpt_cli.render.info import summary_block, summary_text, to_json
from ckpt_cli.render.json import LongList, json_text


def info_command(
    file: File,
    names: NamesAndFiles = None,
    as_files: AsFiles = False,
    style: Format = Style.auto,
    json: Json = False,
) -> int:
    """Summarize a checkpoint in a dozen lines, or describe one entry.

    Format, sizes, dtypes, top-level keys, ties, waste, metadata and what pickled objects it holds. Of a training
    checkpoint the model, its EMA and the optimizer's state are counted apart, with the epoch, step and learning rate,
    and what would make the file smaller. Of several checkpoints, and of the folder of a run that has folders of them,
    one row each.

    With a NAME: its class, dtype, shape, stride, gradient, place in the file, names tied to it, and its values. A
    prefix is described as a whole.

    Example: ckpt info model.pt 2.bias
    """
    layout = style_of(style, json=json)
    files, chosen = parted(file, names)
    if chosen:
        if len(files) > 1:
            raise UsageError("NAMEs are described of one file at a time")
        with opened(file, as_files=as_files) as checkpoint:
            _describe(checkpoint, chosen, layout)
        return 0
    if len(files) == 1 and is_folder(file):
        from ckpt_cli.ops.steps import checkpoints_within

        files = checkpoints_within(file) or files

    def ask(path: str) -> Reply:
        with opened(path, as_files=as_files) as checkpoint:
            summary = summarize(checkpoint)
        return Reply(
            summary_block(summary, layout),
            lambda: to_json(summary),
            aside=lambda: warn_of_danger(checkpoint),
            text=summary_text(summary, layout),
        )

    return reply_about(files, layout, ask)


def _describe(checkpoint: Checkpoint, names: list[str], layout: str) -> None:
    """Print the facts of entries; JSON of several is a list."""
    from ckpt_cli.ops.entry import describe_entry
    from ckpt_cli.render.entry import entries_text
    from ckpt_cli.render.entry import to_json as entry_to_json

    with workers(0) as executor, progress() as on_progress:
        found = [facts for name in names for facts in describe_entry(checkpoint, name, executor, on_progress)]
    if layout != "json":
        answer(entries_text(found, layout), checkpoint)
    elif len(found) == 1:
        answer(json_text(entry_to_json(found[0])), checkpoint)
    else:
        answer(json_text(LongList(lambda: ([entry_to_json(facts)] for facts in found), lines=True)), checkpoint)
