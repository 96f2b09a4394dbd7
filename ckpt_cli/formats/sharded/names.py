"""The names of shards and indices: which files of a folder are a set, and which one file a folder stands for."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ckpt_cli.errors import UnknownFormatError, UsageError
from ckpt_cli.files.places import exists, folder_of, join, name_of

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""In the order of preference where a checkpoint was saved twice."""

_INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)")


def index_in(path: str, names: Sequence[str]) -> str | None:
    """The index of shards that a folder holds; None where it has none, UsageError where several compete."""
    indices = [name for name in names if name.endswith(tuple(suffix + _INDEX for suffix in _SUFFIXES))]
    return _preferred(path, indices, _INDEX) if indices else None


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
    index = f"{found['stem']}{found['suffix']}{_INDEX}" if found else ""
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
