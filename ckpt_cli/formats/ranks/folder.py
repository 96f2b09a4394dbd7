"""Folders of rank files, opened as the model, or their files as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError, MalformedError, RanksError, UnsupportedError, about, quoted
from ckpt_cli.files.open import Opener, closed_on_error
from ckpt_cli.files.places import is_folder, join, name_of, names_in
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.dcp.container import Composed
from ckpt_cli.formats.ranks.listed import (
    LOOSE,
    NAME,
    UNIVERSAL,
    beside_note,
    count,
    latest,
    list_files,
    universal_files,
)
from ckpt_cli.formats.ranks.model_states import Joined
from ckpt_cli.formats.ranks.names import LATEST, MODEL
from ckpt_cli.formats.ranks.rank_file import RankFile
from ckpt_cli.formats.ranks.refused import FIXED, as_files, tensor_parallel
from ckpt_cli.formats.ranks.zero import join_zero
from ckpt_cli.formats.sharded.read import ReadOne
from ckpt_cli.formats.signatures import documented
from ckpt_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

_RANK_FILE = r"_(model|optim)_states\.pt$|^mp_rank_\d+(_\d+)*$"
_ZERO_RANK = re.compile(r"(?:^|_)zero_pp_rank_(\d+)_")
_MODEL_RANK = re.compile(r"mp_rank_(\d+)")
_EXPERT = re.compile(r"(?:^|_)expert_\d+_")
_STAGE_OF_PIPELINE = re.compile(r"layer_\d+-model_(\d+-)?.*states\.pt")
_DIGITS = re.compile(r"(\d+)")


def is_of_ranks(path: str, names: Sequence[str]) -> bool:
    """True for a folder of DeepSpeed or Megatron-LM: of the files of ranks, or of what names a folder of them."""
    if "latest_checkpointed_iteration.txt" in names or any(re.search(_RANK_FILE, name) for name in names):
        return True
    if not any(name in names for name in LATEST):
        return False
    if not any(name.endswith(LOOSE) for name in names):
        return True
    try:
        folder, _ = latest(path, names)
        return any(re.search(_RANK_FILE, name) for name in names_in(folder))
    except (FormatError, OSError):
        return False


def read_folder(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open what the ranks saved of a model as the model, where its files say how it is put together."""
    folder, tag = latest(path, names)
    within = names_in(folder)
    if any(_MODEL_RANK.match(name) and is_folder(join(folder, name)) for name in within):
        return list_files(path, folder, tag, opener, read_one)
    notes = beside_note(names if folder != path else ())
    if _is_universal(folder, within):
        return _universal(path, folder, tag, opener, read_one, notes)
    models, optims = _found(path, folder, within)
    files = opener.open_all([join(folder, name) for name in (*models, *optims)])
    with closed_on_error(files):
        return _joined(path, tag, files, len(models), read_one, notes)


def read_files(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open the same files side by side, as they are."""
    folder, tag = latest(path, names)
    return list_files(path, folder, tag, opener, read_one)


def _found(path: str, folder: str, within: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files of model states and those of optimizer states, in the order of the ranks.

    Raises UnsupportedError for those of models that are cut by more than data parallelism.
    """
    models = sorted((name for name in within if name.endswith("_model_states.pt")), key=_natural)
    optims = sorted((name for name in within if name.endswith("_optim_states.pt")), key=_natural)
    if not models and not optims:
        raise MalformedError("a folder of DeepSpeed or Megatron without a file of a rank", path=folder)
    if len(models) + len(optims) > limits.SHARDS:
        raise LimitError(f"it has {len(models) + len(optims)} files", path=folder)
    experts = [name for name in (*models, *optims) if _EXPERT.search(name)]
    if experts:
        raise UnsupportedError(
            f"experts (MoE) are in files of their own, such as {experts[0]}, and are not joined", path=folder,
            hint=f"DeepSpeed's ds_to_universal.py puts them together; {as_files(path)}",
        )  # fmt: skip
    layers = [name for name in within if _STAGE_OF_PIPELINE.fullmatch(name)]
    if layers:
        raise UnsupportedError(
            f"pipeline parallel: each layer is in a file of its own, such as {layers[0]}, under numbers of layers",
            path=folder, hint=f"the model's own tools merge it; {as_files(path)}",
        )  # fmt: skip
    parallel = [name for name in (*models, *optims) if (found := _MODEL_RANK.search(name)) and int(found[1])]
    if parallel:
        raise tensor_parallel(join(folder, parallel[0]), path)
    return models, optims


def _is_universal(folder: str, within: Sequence[str]) -> bool:
    """True for a folder of files of model states with the parameters' own folders in another one."""
    return (
        UNIVERSAL in within
        and not any(name.endswith("_optim_states.pt") for name in within)
        and (is_folder(join(folder, UNIVERSAL)))
    )


def _universal(path: str, folder: str, tag: str, opener: Opener, read_one: ReadOne, notes: list[str]) -> Checkpoint:
    """Open a universal checkpoint: all files below its `zero`, and those of model states."""
    from ckpt_cli.formats.ranks.universal import join_universal

    names = names_in(folder)
    models = sorted((name for name in names if name.endswith("_model_states.pt")), key=_natural)
    saved = list(islice(universal_files(folder), limits.SHARDS + 1))
    if not models:
        raise RanksError("the files of model states are missing, which name its parameters", path=folder)
    if len(models) + len(saved) > limits.SHARDS:
        raise LimitError(f"it has more than {limits.SHARDS:,} files", path=folder)
    files = opener.open_all([join(folder, name) for name in (*models, *saved)])
    with closed_on_error(files):
        ranks = [RankFile(file, read_one) for file in documented(files)]
        by_name = {name.partition("/")[2]: rank for name, rank in zip(saved, ranks[len(models) :], strict=True)}
        with about(path):
            try:
                joined = join_universal(path, ranks[: len(models)], by_name)
            except (FormatError, UnsupportedError) as error:
                error.hint = error.hint or as_files(path)
                raise
        said = f"DeepSpeed, universal checkpoint, tag {tag}; {joined.dtypes}"
        return _checkpoint(path, files, ranks, joined, said, notes)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """The key by which names are sorted as people number them: rank 10 after rank 9."""
    parts = _DIGITS.split(name)  # every second one is a number
    return [(bool(at % 2), int(part) if at % 2 else 0, part) for at, part in enumerate(parts)]


def _joined(
    path: str, tag: str, files: Sequence[SourceFile], models: int, read_one: ReadOne, notes: list[str]
) -> Checkpoint:
    """The files, those of model states first, as one checkpoint."""
    ranks = [_rank_of(path, file) for file in files[models:]]
    if len(set(ranks)) < len(ranks):
        twice = next(rank for rank in ranks if ranks.count(rank) > 1)
        raise RanksError(f"two files are of rank {twice}: some are of another save", path=path, hint=as_files(path))
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    saved = [RankFile(file, read_one) for file in documented(files)]
    with about(path):
        try:
            joined = join_zero(path, saved[:models], [saved[models + at] for at in order], sorted(ranks))
        except (FormatError, UnsupportedError) as error:
            error.hint = error.hint or as_files(path)
            raise
    said = f"DeepSpeed ZeRO stage {joined.stage}" if joined.stage else "DeepSpeed"
    said = f"{said}, {count(max(len(ranks), 1), 'rank')}, tag {tag}; {joined.dtypes}"
    return _checkpoint(path, files, saved, joined, said, notes)


def _checkpoint(
    path: str, files: Sequence[SourceFile], ranks: Sequence[RankFile], joined: Joined, said: str, notes: list[str]
) -> Checkpoint:
    """What was joined of some files, as a checkpoint."""
    return Checkpoint(
        path=path,
        format=NAME,
        entries=joined.entries,
        container=Composed(files, _no_seal),
        version=said,
        objects=list(dict.fromkeys(name for rank in ranks for name in rank.objects)),
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in joined.entries)),
        is_set=True,
        notes=[*notes, *joined.notes],
        weights=MODEL,
        fixed=FIXED,
    )


def _rank_of(path: str, file: SourceFile) -> int:
    found = _ZERO_RANK.search(name_of(file.path))
    if found is None:
        raise UnsupportedError(f"{quoted(file.path)} does not say by its name which rank wrote it", hint=as_files(path))
    return int(found[1])


def _no_seal(_: Overlay) -> None:
    """Nothing is patched."""
