"""The names of shards and indices: which files of a folder are a set, and which one file a folder stands for."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_cli.errors import RefusedError, UnknownFormatError, UsageError, listed
from ckpt_cli.files.places import exists, folder_of, join, name_of

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""In the order of preference where a checkpoint was saved twice."""

INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)")


def index_in(path: str, names: Sequence[str]) -> str | None:
    """The index of shards that a folder holds; None where it has none, UsageError where several compete."""
    indices = [name for name in names if name.endswith(tuple(suffix + INDEX for suffix in _SUFFIXES))]
    return _preferred(path, indices, INDEX) if indices else None


def file_in(path: str, names: Sequence[str]) -> str:
    """The one checkpoint file that a folder holds; UnknownFormatError where it has none, UsageError for several."""
    files = [name for name in names if name.endswith(_SUFFIXES)]
    if not files:
        raise UnknownFormatError(
            "a folder without a checkpoint: no .metadata, no index and no checkpoint file", path=path
        )
    return _preferred(path, files, "")


def index_of(path: str) -> str | None:
    """Return the name of the index beside a file whose name is that of a shard; None where there is none."""
    found = _SHARD.fullmatch(name_of(path))
    index = f"{found['stem']}{found['suffix']}{INDEX}" if found else ""
    return index if index and exists(join(folder_of(path), index)) else None


def _preferred(path: str, names: Sequence[str], ending: str) -> str:
    """The one of these files that is meant: the only one, or of the same thing saved in two formats the first."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        stem = name.removesuffix(ending)
        by_stem.setdefault(_STEMS.get(os.path.splitext(stem)[0], os.path.splitext(stem)[0]), []).append(name)
    if len(by_stem) > 1:
        raise UsageError(
            f"a folder of {len(names)} checkpoints: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}",
            path=path,
            hint="name one of them",
        )
    (same,) = by_stem.values()
    order = [suffix + ending for suffix in _SUFFIXES]
    return min(same, key=lambda name: next(place for place, suffix in enumerate(order) if name.endswith(suffix)))


_STEMS = {"pytorch_model": "model", "diffusion_pytorch_model": "model"}
"""The names of the same model in transformers' and diffusers' two formats."""


def whole_set(names: Sequence[str]) -> list[str] | None:
    """Return the shards of the only set in a folder that is complete without an index; None without exactly one."""
    shards = [found for found in map(_SHARD.fullmatch, names) if found and found["suffix"] in _SUFFIXES]
    sets = sorted({(found["stem"], found["count"], found["suffix"]) for found in shards})
    whole = [found for found in (_shard_names(*each) for each in sets) if set(found) <= set(names)]
    return whole[0] if len(whole) == 1 else None


def _shard_names(stem: str, count: str, suffix: str) -> list[str]:
    return [f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]


# --- the files that a new index is about ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToIndex:
    """The files of a folder that an index is written for."""

    shards: list[str]
    left: list[str]
    """Files that are named as shards of the set, but belong to another save of it."""


def indexed_set(path: str, names: Sequence[str], index: str) -> str:
    """The name of the index that is to be written in a folder: `index`, or, without one, that of its only set.

    Raises UnknownFormatError for a folder without shards, UsageError where several sets compete.
    """
    if index:
        if not index.removesuffix(INDEX).endswith(_SUFFIXES):
            raise UsageError(f"the name of an index ends in {listed(_SUFFIXES, 9, lambda each: each + INDEX)}")
        return index
    shards = [found for found in map(_SHARD.fullmatch, names) if found and found["suffix"] in _SUFFIXES]
    sets = dict.fromkeys(f"{found['stem']}{found['suffix']}{INDEX}" for found in shards)
    indices = [name for name in names if name.endswith(tuple(suffix + INDEX for suffix in _SUFFIXES))]
    if not sets and not indices:
        raise UnknownFormatError(
            "a folder without shards: no file is named like model-00001-of-00002.safetensors", path=path
        )
    return _preferred(path, list(sets or dict.fromkeys(indices)), INDEX)


def shards_to_index(path: str, names: Sequence[str], index: str, named: Sequence[str]) -> ToIndex:
    """The shards that an index is about, of which the old one names `named`.

    If all of these are there, they are the set, with those that their names count too. If not, it is the one set that
    is complete by its names. Raises RefusedError where a shard is missing, UsageError where two sets are complete.
    """
    there = set(names)
    stem, suffix = os.path.splitext(index.removesuffix(INDEX))
    matches = [found for found in map(_SHARD.fullmatch, sorted(names)) if found]
    own = {found[0]: found["count"] for found in matches if (found["stem"], found["suffix"]) == (stem, suffix)}
    if named and there >= set(named):
        counts = {own.get(name) for name in named}
        shards = list(dict.fromkeys((*named, *(name for name, count in own.items() if count in counts))))
    else:
        shards = _complete(path, stem, suffix, own, named)
    return ToIndex(shards, [name for name in own if name not in shards])


def _complete(path: str, stem: str, suffix: str, own: dict[str, str], named: Sequence[str]) -> list[str]:
    """The shards of the only set that is complete, by names that each say how many there are."""
    by_count: dict[str, list[str]] = {}
    for name, count in own.items():
        by_count.setdefault(count, []).append(name)
    wanted = (_shard_names(stem, count, suffix) for count in by_count)
    whole = [shards for shards in wanted if shards and set(shards) <= own.keys()]
    if len(whole) > 1:
        raise UsageError(
            f"two sets are complete, that of {whole[0][0]} and that of {whole[1][0]}",
            path=path,
            hint="move the files of one of them elsewhere",
        )
    if whole:
        return whole[0]
    if not by_count:
        raise RefusedError(
            f"none of its shards is there, such as {named[0]}" if named else f"no shard {stem}-…{suffix} is there",
            path=path,
            hint="fetch them first",
        )
    count, shards = max(by_count.items(), key=lambda item: len(item[1]))
    missing = [name for name in named if name not in own] or _first_missing(stem, suffix, count, shards)
    raise RefusedError(
        f"{listed(missing, 3)} is not there, and an index of the others would leave its tensors out",
        path=path,
        hint="fetch it first",
    )


def _first_missing(stem: str, suffix: str, count: str, shards: Sequence[str]) -> list[str]:
    """The first shard that is missing of a set whose names count more than there are."""
    return [name for name in _shard_names(stem, count, suffix) if name not in shards][:1]
