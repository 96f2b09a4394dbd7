"""The engine of `info`: the facts of a whole checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import name_of
from ckpt_cli.model.checkpoint import Checkpoint, Value
from ckpt_cli.ops.aliasing import all_named, stored_nbytes, tie_groups, unique_numel
from ckpt_cli.ops.ls import list_waste


@dataclass(frozen=True, slots=True)
class DTypeShare:
    """The share of one dtype in a checkpoint."""

    tensors: int
    numel: int
    """Elements, those of tied tensors counted once."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The facts of a checkpoint as a whole."""

    path: str
    format: str
    version: str
    """The container's version, in words."""
    file_nbytes: int
    """Bytes of all its files."""
    shards: int
    """The number of files with tensors: an index does not count."""
    tensors: int
    parameters: int
    """Elements of all tensors, those of tied ones counted once."""
    nbytes: int
    """Bytes of all storages."""
    values: int
    """The number of non-tensor entries."""
    dtypes: Mapping[str, DTypeShare]
    top_level: Sequence[str]
    ties: int
    """Groups of tied names."""
    tie_nbytes: int
    """Bytes that the ties save."""
    waste_nbytes: int
    """Bytes of storages that no view uses."""
    metadata: Mapping[str, str]
    objects: Sequence[str]
    """Names that its pickle would import, beyond those that plain tensors and dicts need."""


def summarize(checkpoint: Checkpoint) -> Summary:
    """Summarize a checkpoint; reads nothing beyond what opening it has read."""
    tensors = checkpoint.tensors
    by_dtype: dict[str, list[int]] = {}
    for number, tensor in enumerate(tensors):
        by_dtype.setdefault(tensor.dtype.name, []).append(number)
    groups = tie_groups(all_named(tensors))
    return Summary(
        path=checkpoint.path,
        format=checkpoint.format,
        version=checkpoint.version,
        file_nbytes=sum(file.size for file in checkpoint.container.files),
        shards=_shards(checkpoint),
        tensors=len(tensors),
        parameters=unique_numel(tensors),
        nbytes=stored_nbytes(tensors),
        values=len(checkpoint.entries) - len(tensors),
        dtypes={
            name: DTypeShare(len(numbers), unique_numel(tensors[number] for number in numbers))
            for name, numbers in by_dtype.items()
        },
        top_level=checkpoint.top_level,
        ties=len(groups),
        tie_nbytes=sum((len(group) - 1) * group[0].nbytes for group in groups),
        waste_nbytes=sum(waste.nbytes - waste.used for waste in list_waste(checkpoint)),
        metadata=checkpoint.metadata,
        objects=checkpoint.objects,
    )


@dataclass(frozen=True, slots=True)
class PlaceInRun:
    """How far a training run had come, by what the checkpoint says."""

    step: int | float | None
    epoch: int | float | None


_STEPS = ("global_step", "step", "iteration", "iter", "num_updates", "global_steps")
"""Names of the entry that counts steps, the likeliest first."""


def place_in_run(checkpoint: Checkpoint) -> PlaceInRun:
    """Return the step and the epoch, where the checkpoint has top-level entries with such names."""
    found = {
        entry.name: entry.value
        for entry in checkpoint.entries
        if isinstance(entry, Value) and entry.name in (*_STEPS, "epoch")
    }
    numbers = {
        name: value for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return PlaceInRun(next((numbers[name] for name in _STEPS if name in numbers), None), numbers.get("epoch"))


def _shards(checkpoint: Checkpoint) -> int:
    """Count the files that have the tensors; an index of shards and the metadata of a DCP folder do not count."""
    names = [name_of(file.path) for file in checkpoint.container.files]
    return max(sum(not name.endswith((".index.json", ".metadata")) for name in names), 1)
