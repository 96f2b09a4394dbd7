"""The conversion of all that the folder of a training run has to one file of torch.save, `convert RUN OUT.pt --all`.

The file has a dict with each part under its name: of a file that torch.save wrote its objects as they are, of other
files of tensors a dict of these, of JSON its data.
"""

from __future__ import annotations

from ckpt_cli.arrays.cast import Losses
from ckpt_cli.edits.convert_contents import Casting, pack_plain
from ckpt_cli.edits.convert_nested import check_bytes, whole_value
from ckpt_cli.edits.convert_options import ConvertOptions, ConvertPlan, stem_of
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.dcp.paths import nest
from ckpt_cli.formats.runs.json_values import JsonFile
from ckpt_cli.formats.runs.read import RunFiles
from ckpt_cli.formats.sharded.rewrite import TOTALS
from ckpt_cli.formats.torch_zip.write import nested
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint, SavedValue
from ckpt_cli.pickles.graph import Dict, Graph


def plan_run(checkpoint: Checkpoint, output: str, options: ConvertOptions) -> ConvertPlan | None:
    """Plan one file of torch.save with all of a run; None for what is not a run, or has parts that it cannot hold."""
    container = checkpoint.container
    if not isinstance(container, RunFiles) or options.dtype is not None:
        return None
    paths: dict[str, tuple[str | int, ...]] = {}
    tensors: list[Tensor] = []
    values: list[SavedValue] = []
    for part in container.parts:
        alone = part.checkpoint
        if isinstance(alone.container, JsonFile):
            values.append(SavedValue(part.prefix, _node(alone.container.data), b""))
        elif isinstance(alone.document, Graph) and "[1]" not in alone.top_level:
            values.append(whole_value(alone, alone.document, part.prefix))
        elif part.prefix and all(isinstance(entry, Tensor) and entry.layout == "strided" for entry in alone.entries):
            for entry in container.entries_of(part):
                if isinstance(entry, Tensor):
                    tensors.append(entry)
                    paths[entry.name] = part.prefix, part.inner(entry.name)
            continue
        else:
            return None
        paths[part.prefix] = (part.prefix,)
    check_bytes(checkpoint, tensors, values)
    casting = Casting(None, Losses(), options.executor)
    packed, contents = pack_plain(checkpoint, tensors, casting, tied=True)
    files = checkpoint.container.files
    new = NewCheckpoint(packed, contents, values=values, paths=paths, mode_of=files[0].path, stem=stem_of(output))
    not_kept = tuple(checkpoint.unread)
    strings = [key for key in checkpoint.metadata if key not in ("format", *TOTALS)]
    if strings:
        not_kept += (f"metadata of the model ({', '.join(strings[:3])})",)
    job = nested(new, nest, open_checkpoint)
    return ConvertPlan(job, len(checkpoint.tensors), casting.losses, contents, not_kept=not_kept)


def _node(data: object) -> object:
    """Return JSON data as the nodes of a pickle, whose scalars and lists are those of Python."""
    if isinstance(data, dict):
        return Dict([node for key, value in data.items() for node in (key, _node(value))])
    return [_node(item) for item in data] if isinstance(data, list) else data
