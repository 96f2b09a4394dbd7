"""The checkpoints of a run, the steps at which they were written, and their order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ckpt_cli.errors import CkptError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import canonical, exists, is_folder, join, matching, names_in
from ckpt_cli.formats.registry import folder_kind
from ckpt_cli.formats.runs.names import is_step, natural, steps_in
from ckpt_cli.formats.sharded.names import SUFFIXES, several_in
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Tensor, Value
from ckpt_cli.ops.hf_config import config_beside

Number = int | float

_KEYS = {
    "step": (
        "global_step", "step", "global_steps", "iteration", "iter", "num_updates", "n_iter",
        "optimizer_history.0.num_updates", "extra_state.train_iterator.num_updates", "trainer.global_step",
    ),
    "epoch": ("epoch", "last_epoch", "current_epoch", "extra_state.train_iterator.epoch", "extra_state.epoch"),
}  # fmt: skip
"""Names of entries, or keys of the metadata, that say the step and the epoch: Lightning, DeepSpeed, fairseq, YOLO and
scripts. The first that is there counts."""

_FOLDER = re.compile(r"(?:^|[/\\])(?:checkpoint-|global_step)(\d{1,18})(?=$|[/\\])")
"""The folders of Hugging Face's Trainer and of DeepSpeed."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The order of some checkpoints."""

    order: Sequence[int]
    """Their numbers, by step."""
    by: str
    """`step` or `epoch`, if all of them say it and that decides; else `name`."""
    numbers: Sequence[Mapping[str, Number]]
    """What each says, in the order in which they were given: `step`, `epoch`, where it does."""


def checkpoints_at(path: str) -> list[str]:
    """Return the checkpoints that a path stands for: those in the folder of a run or that a glob matches, else itself.

    The folder of a run has folders such as `checkpoint-500` or, if it is not one checkpoint, several files of them.
    Raises OSError for a folder that cannot be listed.
    """
    if not exists(path):
        return [found for each in matching(path) for found in checkpoints_at(each)] or [path]
    if not is_folder(path):
        return [path]
    names = names_in(path)
    steps = [name for name in names if is_step(name) and is_folder(join(path, name))]
    return [join(path, name) for name in steps or several_in(names)] or [path]


def checkpoints_within(path: str) -> list[str]:
    """Return the checkpoints in the folder of a run, in natural order; none of a folder that is a checkpoint itself.

    Raises OSError for a folder that cannot be listed.
    """
    if not is_folder(path):
        return []
    names = names_in(path)
    if any(name.endswith((*SUFFIXES, ".index.json")) for name in names) or folder_kind(path, names) is not None:
        return []
    return [join(path, name) for name in steps_in(path, names)]


def steps_of(checkpoints: Sequence[Checkpoint]) -> Steps:
    """Order checkpoints by their steps, else by their epochs, else by their names in natural order."""
    numbers = [_numbers_of(checkpoint) for checkpoint in checkpoints]
    shared = [key for key in _KEYS if all(key in known for known in numbers)]
    by = next((key for key in shared if len({known[key] for known in numbers}) > 1), None)

    def key(place: int) -> tuple[object, ...]:
        return (*(numbers[place][name] for name in shared), natural(checkpoints[place].path))

    return Steps(sorted(range(len(checkpoints)), key=key), by or "name", numbers)


def _numbers_of(checkpoint: Checkpoint) -> dict[str, Number]:
    found: dict[str, Number] = {}
    wanted = {name: key for key, names in _KEYS.items() for name in names}
    entries = {entry.name: entry for entry in checkpoint.entries if entry.name in wanted}
    for key, names in _KEYS.items():
        said: Iterable[object] = (_said(checkpoint, entries.get(name), name) for name in names)
        number = next((number for value in said if (number := _number(value)) is not None), None)
        if number is not None:
            found[key] = number
    for key, number in _beside(checkpoint.path).items():
        found.setdefault(key, number)
    return found


def _said(checkpoint: Checkpoint, entry: Value | Tensor | None, name: str) -> object:
    """Return what an entry or a key of the metadata says; None if there is neither."""
    if isinstance(entry, Value):
        return entry.value
    if entry is None:
        return checkpoint.metadata.get(name)
    if entry.numel != 1 or entry.storage is None:
        return None
    from ckpt_cli.arrays.quantized import values_of

    try:
        return values_of(checkpoint, entry).reshape(-1)[0].item()
    except (CkptError, OSError):
        return None


def _number(value: object) -> Number | None:
    """Return a number, also of text; None of what is not a finite number."""
    if isinstance(value, Opaque):  # a numpy scalar: np.int64(3)
        value = re.sub(r"^(?:np|numpy)\.\w+\((.*)\)$", r"\1", value.text)
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}(\.\d{1,18})?", value.strip()):
        value = float(value) if "." in value else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 2**63 else None


def _beside(path: str) -> dict[str, Number]:
    """Return what the folder of a checkpoint says: by the Trainer's state in it, else by its name."""
    found: dict[str, Number] = {}
    state = config_beside(path, "trainer_state.json") or {}
    for key, name in (("step", "global_step"), ("epoch", "epoch")):
        number = _number(state.get(name))
        if number is not None:
            found[key] = number
    if "step" not in found:
        named = _FOLDER.findall(canonical(path))
        if named:
            found["step"] = int(named[-1])
    return found
