"""The names in the folder of a training run: which folder is one, and which part of the run each of its files has.

Written by Hugging Face's Trainer (`_save_checkpoint` in transformers/trainer.py: `checkpoint-N/` with optimizer.pt,
scheduler.pt, scaler.pt, rng_state.pth or one for each rank, trainer_state.json and training_args.bin), by Accelerate
(`save_state`, accelerate/checkpointing.py: optimizer.bin, scheduler.bin, sampler.bin, random_states_R.pkl,
custom_checkpoint_N.pkl), by Lightning (`FSDPStrategy.save_checkpoint`: a distributed checkpoint and meta.pt) and by
Megatron-core (`dist_checkpointing.save`: a distributed checkpoint and common.pt).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import is_folder, join, name_of, names_in
from ckpt_cli.formats.sharded.names import SUFFIXES, is_index, set_of, shard_names, whole_set

TRAINER_STATE = "trainer_state.json"

_STATE = re.compile(r"(?:optimizer|scheduler)(?:_\d{1,9})?\.(?:pt|bin)|scaler\.pt")
"""Files that a training goes on from: one of them and another sign make a folder that of a run."""

_SIGNS = (TRAINER_STATE, "training_args.bin")

_RNG = re.compile(r"rng_state(?:_\d{1,9})?\.pth|random_states_\d{1,9}\.pkl")
"""Files that only the folders of runs have."""

_MODEL = re.compile(r"(?:model|pytorch_model|adapter_model|pytorch_model_fsdp)(_\d{1,9})?")
"""The names of files of a model without their ends, those of several models with numbers, as Accelerate has it."""

_RANDOM = re.compile(r"random_states(_\d{1,9})")
_PICKLE = re.compile(r"(?:random_states|custom_checkpoint)_\d{1,9}\.pkl")
_KNOWN = re.compile(
    r"(?:optimizer|scheduler|sampler|scaler|rng_state|dl_state_dict)(?:_\d{1,9})?|training_args|meta|common"
)
_DISTRIBUTED = re.compile(r"(pytorch_model_fsdp|optimizer)_\d{1,9}")
"""Folders in which Accelerate has distributed checkpoints."""

_STEP = re.compile(r"(?:checkpoint|ckpt|global_?step|step|iter|epoch)[-_=]?\d+(?:[-_=.].*)?", re.DOTALL)
"""The names of folders within the folder of a run, each of which is a checkpoint."""

_FIRST = {"pytorch_model_fsdp_0": "model", "optimizer_0": "optimizer"}
"""Parts that Accelerate numbers although there is but one as a rule."""

_COMMON = {"meta.pt": "Lightning", "common.pt": "Megatron-core"}
"""Files beside the `.metadata` of a distributed checkpoint with what is not distributed, and who writes them."""

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")

_ORDER = ("model", "optimizer", "scheduler", "scaler", "rng_state", "trainer_state")
"""Parts that come first, in this order."""

_DIGITS = re.compile(r"(\d+)")


_Found = tuple[str, str, tuple[str, ...]]
"""The name, the kind and the shards of a part."""


@dataclass(frozen=True, slots=True)
class RunFile:
    """A file or a folder of a run that is a part of it."""

    name: str
    """Relative to the folder of the run; of a set without an index, the first of its files."""
    prefix: str
    """The beginning of its entries' names."""
    kind: str
    """`file`, `json`, `index`, `shards` (without an index), or `dcp` for a folder."""
    is_known: bool = True
    """True if it is called as a trainer calls it; another one may also be something that is not a checkpoint."""
    shards: tuple[str, ...] = ()
    """The files of a set without an index."""


def is_of_run(path: str, names: Sequence[str]) -> bool:
    """True for the folder of a training run, by the names in it.

    It has random states as trainers name them; or a state of an optimizer, scheduler or scaler and another of these,
    trainer_state.json or training_args.bin; or it is a distributed checkpoint with Lightning's meta.pt or Megatron's
    common.pt; or its file `latest` names a folder with the files of ranks, and files of checkpoints lie beside that.
    """
    states = sum(_STATE.fullmatch(name) is not None for name in names)
    if any(map(_RNG.fullmatch, names)) or (states and states + sum(sign in names for sign in _SIGNS) > 1):
        return sum(map(_is_part, names)) > 1 or has_ranks(path, names)
    if ".metadata" in names:
        return any(name in names for name in _COMMON)
    return any(name.endswith(SUFFIXES) for name in names) and has_ranks(path, names)


def _is_part(name: str) -> bool:
    """True for the name of a part of a run."""
    return (
        name.endswith(SUFFIXES)
        or name == TRAINER_STATE
        or bool(_PICKLE.fullmatch(name) or _DISTRIBUTED.fullmatch(name))
    )


def has_ranks(path: str, names: Sequence[str]) -> bool:
    """True for a folder whose file `latest` names a folder beside it that has the files of ranks."""
    if "latest" not in names and "latest_universal" not in names:
        return False
    from ckpt_cli.formats.ranks.folder import is_of_ranks

    return is_of_ranks(path, names)


def is_step(name: str) -> bool:
    """True for the name of a folder in that of a run which is a checkpoint, such as `checkpoint-500`."""
    return _STEP.fullmatch(name) is not None


def steps_in(path: str, names: Sequence[str]) -> list[str]:
    """Return the names of the folders in that of a run which are its checkpoints, in natural order."""
    return [name for name in sorted(names, key=natural) if is_step(name) and is_folder(join(path, name))]


def writer_of(names: Sequence[str]) -> str:
    """Return the program that wrote a run, by the names in its folder."""
    for name, writer in _COMMON.items():
        if ".metadata" in names and name in names:
            return writer
    if any(name.startswith("random_states_") for name in names):
        return "Accelerate"
    is_trainer = any(sign in names for sign in _SIGNS) or any(map(_RNG.fullmatch, names))
    return "Hugging Face Trainer" if is_trainer else "training run"


def files_of(path: str, names: Sequence[str], taken: Sequence[str] = ()) -> list[RunFile]:
    """Return the parts of a run, the model first; `taken` are beginnings of names that others have already."""
    indices = [name for name in names if is_index(name)]
    sets = set(map(set_of, indices))
    of_sets = {found[0] for found in shard_names(names) if (found["stem"], found["suffix"]) in sets}
    rest = [name for name in names if name not in of_sets and not name.startswith(".")]
    shards = whole_set(rest)
    found: list[_Found] = [(name, "index", ()) for name in indices]
    if shards is not None:
        found.append((shards[0], "shards", tuple(shards)))
        rest = [name for name in rest if name not in shards]
    found += [(name, "file", ()) for name in rest if name.endswith(SUFFIXES) or _PICKLE.fullmatch(name)]
    found += [(name, "json", ()) for name in rest if name == TRAINER_STATE]
    found += [(name, "dcp" if _DISTRIBUTED.fullmatch(name) else "file", ()) for name in _folders(path, rest)]
    used, files = set(taken), []
    for name, kind, of_set in sorted(found, key=_place):
        stem = _stem(name, kind)
        prefix = _free(_prefix(stem), (stem, name_of(name), name), used)
        used.add(prefix)
        is_known = kind != "file" or bool(_KNOWN.fullmatch(stem) or _MODEL.fullmatch(stem) or _PICKLE.fullmatch(name))
        files.append(RunFile(name, prefix, kind, is_known, of_set))
    return sorted(files, key=lambda file: _rank(file.prefix))


def _folders(path: str, names: Sequence[str]) -> list[str]:
    """Return the distributed checkpoints and the adapters in folders of their own."""
    found = []
    for name in names:
        if "." in name or not is_folder(join(path, name)):
            continue
        within = names_in(join(path, name))
        if _DISTRIBUTED.fullmatch(name) and ".metadata" in within:
            found.append(name)
        elif "adapter_config.json" in within:
            found += [join(name, file) for file in _ADAPTER if file in within][:1]
    return found


def _stem(name: str, kind: str) -> str:
    """Return the name of a part without its end, and without the number of a shard."""
    if kind == "index":
        return set_of(name)[0]
    if kind == "shards":
        return shard_names([name])[0]["stem"]
    if kind == "file" and name_of(name) != name:  # an adapter in a folder of its own
        return name_of(name.removesuffix(name_of(name)).rstrip("/\\"))
    return name.rpartition(".")[0] or name


def _prefix(stem: str) -> str:
    """Return the beginning of the names of a part's entries, if no other part has it."""
    model, random = _MODEL.fullmatch(stem), _RANDOM.fullmatch(stem)
    if stem in _FIRST:
        return _FIRST[stem]
    if model:
        return f"model{model[1] or ''}"
    return f"rng_state{random[1]}" if random else _plain(stem)


def _plain(text: str) -> str:
    return text.replace(".", "_").replace("/", "_")


def _free(wanted: str, others: Sequence[str], used: set[str]) -> str:
    """Return the first of some beginnings of names that is not used yet."""
    for each in (wanted, *map(_plain, others)):
        if each not in used:
            return each
    number = 2
    while f"{wanted}_{number}" in used:
        number += 1
    return f"{wanted}_{number}"


def _place(found: _Found) -> tuple[object, ...]:
    """The order in which parts take their names: of a model that was saved twice safetensors, then torch's own."""
    name, kind, _ = found
    return (kind not in ("index", "shards"), ".safetensors" not in name, "adapter" in name, natural(name))


def _rank(prefix: str) -> tuple[object, ...]:
    """The order of the parts of a run."""
    base = prefix.rstrip("0123456789").rstrip("_")
    place = _ORDER.index(base) if base in _ORDER else len(_ORDER)
    return place, natural(prefix)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key by which `step-9` comes before `step-10`."""
    parts = _DIGITS.split(name)  # every second one is a number
    return [(0, 0, part) if number % 2 == 0 else (1, int(part[:4000]), part) for number, part in enumerate(parts)]
