"""The names of shards and indices: which files of a folder are a set, and which one file a folder stands for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from ckpt_cli.errors import RefusedError, UnknownFormatError, UsageError, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import exists, folder_of, join, name_of

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""In the order of preference where a checkpoint was saved twice."""

_OTHERS = (".msgpack", ".onnx", ".nemo", ".eqx", ".keras", ".weights.h5")
"""The ends of the names of other libraries' checkpoints, which a folder stands for where there is nothing else."""

INDEX = ".index.json"
_SHARD = r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)"
_INDEX = r"(?P<base>.+)(?P<suffix>\.[a-z]+)\.index(\.(?P<variant>\w+))?\.json"
_WITH_VARIANTS = ("model", "pytorch_model", "diffusion_pytorch_model")
"""The stems after which loaders know a variant: `model.fp16-00001-of-00002.safetensors`."""


def shard_name(name: str) -> re.Match[str] | None:
    """Match the name of a shard, with its `stem`, `number`, `count` and `suffix`; None for another name."""
    return re.fullmatch(_SHARD, name)


def shard_names(names: Iterable[str]) -> list[re.Match[str]]:
    """Match those of some names that are names of shards."""
    return [found for found in map(shard_name, names) if found]


def is_index(name: str) -> bool:
    """True for the name of an index: `model.safetensors.index.json`, `model.safetensors.index.fp16.json`."""
    found = re.fullmatch(_INDEX, name)
    return found is not None and found["suffix"] in SUFFIXES


def set_of(index: str) -> tuple[str, str]:
    """Return the stem and the suffix of the shards that an index is about by its name."""
    found = re.fullmatch(_INDEX, index)
    if found is None:
        return os.path.splitext(index.removesuffix(INDEX))[0], os.path.splitext(index.removesuffix(INDEX))[1]
    return found["base"] + (f".{found['variant']}" if found["variant"] else ""), found["suffix"]


def _index_names(stem: str, suffix: str) -> list[str]:
    """Return the names that an index of shards may have; the first is the one that loaders look for.

    That of a variant is made by `_add_variant` in transformers and diffusers; some files are published under the other.
    """
    base, _, variant = stem.partition(".")
    plain = f"{stem}{suffix}{INDEX}"
    return [f"{base}{suffix}.index.{variant}.json", plain] if variant and base in _WITH_VARIANTS else [plain]


def _plain_name(index: str) -> str:
    """Return the name of an index with the variant in its stem, as shards have it."""
    return "".join((*set_of(index), INDEX))


def index_in(path: str, names: Sequence[str]) -> str | None:
    """The index of shards that a folder holds; None where it has none, UsageError where several compete."""
    indices = [name for name in names if is_index(name)]
    plain = {_plain_name(name): name for name in indices}
    wanted = [name for name in indices if name.endswith(INDEX)] or list(plain)  # a variant is not taken by itself
    return plain[_preferred(path, wanted, INDEX)] if indices else None


def file_in(path: str, names: Sequence[str]) -> str:
    """The one checkpoint file that a folder holds; UnknownFormatError where it has none, UsageError for several."""
    files = [name for name in names if name.endswith(SUFFIXES)]
    if not files:
        others = [name for name in names if name.endswith(_OTHERS)]
        if len(others) == 1:
            return others[0]
        raise UnknownFormatError(
            "a folder without a checkpoint: no .metadata, no index and no checkpoint file", path=path
        )
    return _preferred(path, files, "")


def several_in(names: Sequence[str]) -> list[str]:
    """Return the checkpoint files of a folder that is none itself, of what was saved in two formats the first.

    Empty for a folder that stands for one checkpoint, or for none.
    """
    files = [name for name in names if name.endswith(SUFFIXES)]
    if ".metadata" in names or any(map(is_index, names)) or whole_set(names) is not None:
        return []
    stems = dict.fromkeys(map(_stem, files))
    return [_preferred("", [name for name in files if _stem(name) == stem], "") for stem in stems if len(stems) > 1]


def index_of(path: str) -> str | None:
    """Return the name of the index beside a file whose name is that of a shard; None where there is none."""
    found = shard_name(name_of(path))
    names = _index_names(found["stem"], found["suffix"]) if found else []
    return next((name for name in names if exists(join(folder_of(path), name))), None)


def _preferred(path: str, names: Sequence[str], ending: str) -> str:
    """The one of these files that is meant: the only one, or of the same thing saved in two formats the first."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(_stem(name.removesuffix(ending)), []).append(name)
    if len(by_stem) > 1:
        raise UsageError(
            f"a folder of {len(names)} checkpoints: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}",
            path=path,
            hint="name one of them",
        )
    (same,) = by_stem.values()
    order = [suffix + ending for suffix in SUFFIXES]
    return min(same, key=lambda name: next(place for place, suffix in enumerate(order) if name.endswith(suffix)))


def _stem(name: str) -> str:
    """Return the name of a checkpoint without its suffix, the same for one model in two formats."""
    stem = os.path.splitext(name)[0]
    return _STEMS.get(stem, stem)


_STEMS = {"pytorch_model": "model", "diffusion_pytorch_model": "model"}
"""The names of the same model in transformers' and diffusers' two formats."""


def whole_set(names: Sequence[str]) -> list[str] | None:
    """Return the shards of the only set in a folder that is complete without an index; None without exactly one."""
    shards = [found for found in shard_names(names) if found["suffix"] in SUFFIXES]
    sets = sorted({(found["stem"], found["count"], found["suffix"]) for found in shards})
    whole = [found for found in (_shard_names(*each) for each in sets) if set(found) <= set(names)]
    return whole[0] if len(whole) == 1 else None


def counted_set(names: Sequence[str], index: str = "") -> list[str] | None:
    """Return the shards of the only set in a folder, there or not, as their names count them; None without exactly one.

    With the name of an index, the set that it is about.
    """
    shards = [found for found in shard_names(names) if found["suffix"] in SUFFIXES]
    if index:
        shards = [found for found in shards if (found["stem"], found["suffix"]) == set_of(index)]
    sets = {(found["stem"], found["count"], found["suffix"]) for found in shards}
    return _shard_names(*sets.pop()) if len(sets) == 1 else None


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
        if not is_index(index):
            raise UsageError(f"the name of an index ends in {listed(SUFFIXES, 9, lambda each: each + INDEX)}")
        return index
    shards = [found for found in shard_names(names) if found["suffix"] in SUFFIXES]
    sets = dict.fromkeys(f"{found['stem']}{found['suffix']}{INDEX}" for found in shards)
    indices = [_plain_name(name) for name in names if is_index(name)]
    if not sets and not indices:
        raise UnknownFormatError(
            "a folder without shards: no file is named like model-00001-of-00002.safetensors", path=path
        )
    wanted = _index_names(*set_of(_preferred(path, list(sets or dict.fromkeys(indices)), INDEX)))
    return next((name for name in wanted if name in names), wanted[0])


def shards_to_index(path: str, names: Sequence[str], index: str, named: Sequence[str]) -> ToIndex:
    """The shards that an index is about, of which the old one names `named`.

    If all of these are there, they are the set, with those that their names count too. If not, it is the one set that
    is complete by its names. Raises RefusedError where a shard is missing, UsageError where two sets are complete.
    """
    there = set(names)
    stem, suffix = set_of(index)
    matches = shard_names(sorted(names))
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
