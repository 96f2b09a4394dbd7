"""The folders of DeepSpeed and Megatron-LM: files of ranks, each a torch.save file, listed as what they are.

DeepSpeed writes `latest`, which names a folder of `mp_rank_NN_model_states.pt` and `zero_pp_rank_N_…_optim_states.pt`
(deepspeed/runtime/engine.py and zero/stage_1_and_2.py, stage3.py there). ZeRO flattens parameters and splits them over
the ranks, so a tensor of the model is no entry here; DeepSpeed's own zero_to_fp32.py puts them together. Megatron-LM
writes `latest_checkpointed_iteration.txt` and `iter_NNNNNNN/mp_rank_NN/model_optim_rng.pt`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError
from ckpt_cli.files.open import Opener
from ckpt_cli.files.places import head_of, is_folder, is_plain_name, join, names_in
from ckpt_cli.formats.sharded.read import ReadOne, ShardSet
from ckpt_cli.formats.signatures import documented
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, Value

NAME = "deepspeed"

_STATES = ("_model_states.pt", "_optim_states.pt")
_LATEST, _ITERATION = "latest", "latest_checkpointed_iteration.txt"
_TAG = 256
"""Bytes of the file that names the latest folder."""

_RANK = re.compile(r"(?:^|_)zero_pp_rank_(\d+)_")
_MODEL_RANK = re.compile(r"mp_rank_\d+(?:_\d+)*")
_STAGE = re.compile(r"\d")


def read_folder(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open the files of all ranks side by side; an entry's name begins with its file's."""
    folder, tag = _latest(path, names)
    found = _files(folder)
    if not found:
        raise MalformedError("a folder of DeepSpeed or Megatron without a file of a rank", path=folder)
    if len(found) > limits.SHARDS:
        raise LimitError(f"it has {len(found)} files", path=folder)
    files = opener.open_all([join(folder, name) for name in found])
    try:
        shards = [read_one(file) for file in documented(files)]
        container = ShardSet(None, shards)
        entries: list[Entry] = []
        for name, shard in zip(found, shards, strict=True):
            prefix = os.path.splitext(name)[0]
            entries += (_prefixed(prefix, container.adopt(shard, entry)) for entry in shard.entries)
    except BaseException:
        for file in files:
            file.close()
        raise
    version, notes = _version_and_notes(found, shards, tag)
    return Checkpoint(
        path=path,
        format=NAME,
        entries=entries,
        container=container,
        version=version,
        objects=list(dict.fromkeys(name for shard in shards for name in shard.objects)),
        top_level=[os.path.splitext(name)[0] for name in found],
        is_set=True,
        notes=notes,
    )


def _latest(path: str, names: Sequence[str]) -> tuple[str, str]:
    """The folder that has the files, and its name as a tag; the folder itself where it has them."""
    for name, layout in ((_LATEST, "{}"), (_ITERATION, "iter_{:0>7}")):
        if name not in names:
            continue
        said = head_of(join(path, name), _TAG).decode("utf-8", "replace").strip()
        tag = "release" if said == "release" else layout.format(said)
        if not said or not is_plain_name(tag):
            raise MalformedError(f"it does not name a folder beside it, but {said!r}", path=join(path, name))
        folder = join(path, tag)
        if not is_folder(folder):
            raise MalformedError(f"it names {tag}, which is not there", path=join(path, name))
        return folder, tag
    return path, os.path.basename(os.path.abspath(path))


def _files(folder: str) -> list[str]:
    """The files of ranks, relative to the folder."""
    found: list[str] = []
    for name in names_in(folder):
        if name.endswith(_STATES):
            found.append(name)
        elif _MODEL_RANK.fullmatch(name) and is_folder(join(folder, name)):
            within = names_in(join(folder, name))
            found += [f"{name}/{file}" for file in within if file.endswith(".pt") and not file.startswith(".")]
    return found


def _prefixed(prefix: str, entry: Entry) -> Entry:
    return replace(entry, name=f"{prefix}.{entry.name}" if entry.name else prefix)


def _version_and_notes(names: Sequence[str], shards: Sequence[Checkpoint], tag: str) -> tuple[str, list[str]]:
    """Return a description of it, and notes on it."""
    if any("/" in name for name in names):
        ranks = len({name.partition("/")[0] for name in names})
        return f"Megatron-LM, {_count(ranks, 'model-parallel rank')}, {tag}", []
    ranks = len({found[1] for found in map(_RANK.search, names) if found})
    stage = next((stage for stage in map(_stage, shards) if stage), "")
    said = f"DeepSpeed ZeRO stage {stage}" if stage and stage != "0" else "DeepSpeed"
    notes = []
    if ranks:
        notes.append(
            f"its optimizer's parameters are flattened and split over {_count(ranks, 'rank')}; each file is listed "
            f"as it is, the model's shapes under param_shapes: DeepSpeed's zero_to_fp32.py merges them"
        )
    return f"{said}, {_count(max(ranks, 1), 'rank')}, tag {tag}", notes


def _stage(shard: Checkpoint) -> str:
    """The stage that an optimizer's file says or shows; empty where it is another file."""
    shown = ""
    for entry in shard.entries:
        if entry.name == "optimizer_state_dict.zero_stage" and isinstance(entry, Value):
            value = entry.value  # an enum of DeepSpeed's, or its number
            found = _STAGE.findall(value.text if isinstance(value, Opaque) else str(value))
            if found:
                return str(found[-1])
        if ".fp32_flat_groups" in entry.name:
            shown = "3"
        elif ".single_partition_of_fp32_groups" in entry.name:
            shown = shown or "1 or 2"
    return shown


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
