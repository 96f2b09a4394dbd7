"""The files of ranks in a folder, each a torch.save file, listed side by side as what they are.

DeepSpeed writes `latest`, which names a folder of `mp_rank_NN_model_states.pt` and `zero_pp_rank_N_…_optim_states.pt`
(deepspeed/runtime/engine.py). Megatron-LM writes `latest_checkpointed_iteration.txt` and
`iter_NNNNNNN/mp_rank_NN/model_optim_rng.pt`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, listed
from ckpt_cli.files.open import Opener, closed_on_error
from ckpt_cli.files.places import files_below, head_of, is_folder, is_plain_name, join, names_in
from ckpt_cli.formats.ranks.names import LATEST
from ckpt_cli.formats.sharded.read import ReadOne, ShardSet
from ckpt_cli.formats.signatures import documented
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, Value

NAME = "deepspeed"

_STATES = ("_model_states.pt", "_optim_states.pt")
_ITERATION = "latest_checkpointed_iteration.txt"
UNIVERSAL = "zero"
"""The folder with a folder for each parameter, in a universal checkpoint."""
LOOSE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""The ends of the names of files that may be checkpoints of their own."""

_TAG = 256
"""Bytes of the file that names the latest folder."""

_RANK = re.compile(r"(?:^|_)zero_pp_rank_(\d+)_")
_MODEL_RANK = re.compile(r"mp_rank_\d+(?:_\d+)*")
_STAGE = re.compile(r"\d")


def list_files(path: str, folder: str, tag: str, opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open the files of all ranks in a folder side by side; an entry's name begins with its file's."""
    found = files_of_ranks(folder)
    if not found:
        raise MalformedError("a folder of DeepSpeed or Megatron without a file of a rank", path=folder)
    if len(found) > limits.SHARDS:
        raise LimitError(f"it has {len(found)} files", path=folder)
    container, entries = side_by_side(folder, found, opener, read_one)
    version, notes = _version_and_notes(found, container.shards, tag)
    return replace(_of_files(path, found, container, entries), format=NAME, version=version, notes=notes)


def as_they_are(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open some files of a folder side by side, of which its joined tensors are made; it has no format yet."""
    found = _of_files(path, names, *side_by_side(path, names, opener, read_one))
    return replace(found, notes=["its files are listed as they are"])


def _of_files(path: str, names: Sequence[str], container: ShardSet, entries: Sequence[Entry]) -> Checkpoint:
    return Checkpoint(
        path=path,
        format="",
        entries=entries,
        container=container,
        objects=list(dict.fromkeys(name for shard in container.shards for name in shard.objects)),
        top_level=[os.path.splitext(name)[0] for name in names],
        is_set=True,
    )


def side_by_side(folder: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> tuple[ShardSet, list[Entry]]:
    """Open some files of a folder, each entry's name after that of its file."""
    files = opener.open_all([join(folder, name) for name in names])
    with closed_on_error(files):
        shards = [read_one(file) for file in documented(files)]
        container = ShardSet(None, shards)
        entries: list[Entry] = []
        for name, shard in zip(names, shards, strict=True):
            prefix = os.path.splitext(name)[0]
            entries += (_prefixed(prefix, container.adopt(shard, entry)) for entry in shard.entries)
    return container, entries


def beside_note(names: Sequence[str]) -> list[str]:
    """Return the note on those of some names that are of checkpoints, which are not opened; none without any."""
    loose = [name for name in names if name.endswith(LOOSE)]
    return [f"not opened with it: {listed(loose, 3)}"] if loose else []


def latest(path: str, names: Sequence[str]) -> tuple[str, str]:
    """The folder that has the files, and its name as a tag; the folder itself where it has them."""
    for name, layout in (*((name, "{}") for name in LATEST), (_ITERATION, "iter_{:0>7}")):
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


def files_of_ranks(folder: str) -> list[str]:
    """The files of ranks, relative to the folder."""
    found: list[str] = []
    for name in names_in(folder):
        if name.endswith(_STATES):
            found.append(name)
        elif _MODEL_RANK.fullmatch(name) and is_folder(join(folder, name)):
            within = names_in(join(folder, name))
            found += [f"{name}/{file}" for file in within if file.endswith(".pt") and not file.startswith(".")]
        elif name == UNIVERSAL and is_folder(join(folder, name)):
            found += islice(universal_files(folder), limits.SHARDS + 1)
    return found


def universal_files(folder: str) -> Iterator[str]:
    """Yield the files of parameters of a universal checkpoint, relative to its folder."""
    for name, _ in files_below(join(folder, UNIVERSAL)):
        if name.endswith(".pt"):
            yield f"{UNIVERSAL}/{name}"


def _prefixed(prefix: str, entry: Entry) -> Entry:
    return replace(entry, name=f"{prefix}.{entry.name}" if entry.name else prefix)


def _version_and_notes(names: Sequence[str], shards: Sequence[Checkpoint], tag: str) -> tuple[str, list[str]]:
    """Return a description of it, and notes on it."""
    if any("/" in name for name in names):
        ranks = len({name.partition("/")[0] for name in names})
        return f"Megatron-LM, {count(ranks, 'model-parallel rank')}, {tag}", []
    ranks = len({found[1] for found in map(_RANK.search, names) if found})
    stage = next((stage for stage in map(_stage, shards) if stage), "")
    said = f"DeepSpeed ZeRO stage {stage}" if stage and stage != "0" else "DeepSpeed"
    return f"{said}, {count(max(ranks, 1), 'rank')}, tag {tag}", ["its files are listed as they are"]


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


def count(number: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{number} {what}{'' if number == 1 else 's'}"
