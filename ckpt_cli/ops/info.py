"""The engine of `info`: the facts of a whole checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import field, replace

from ckpt_cli.errors import CkptError, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import revision_of
from ckpt_cli.files.places import folder_of, is_folder, is_listed, join, name_of, present
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.aliasing import all_named, stored_nbytes, tie_groups, unique_numel
from ckpt_cli.ops.hf_config import config_beside
from ckpt_cli.ops.ls import list_waste
from ckpt_cli.ops.parts import Part, Training, optimizer_prefixes, parts_of, training_of
from ckpt_cli.ops.quantization import quantized_groups


@dataclass(frozen=True, slots=True)
class DTypeShare:
    """The share of one dtype in a checkpoint."""

    tensors: int
    numel: int
    """Elements, those of tied tensors counted once."""


@dataclass(frozen=True, slots=True)
class Largest:
    """A tensor, or several whose names differ only in numbers, of one dtype and shape."""

    name: str
    """With `[N]` for numbers that differ."""
    count: int
    dtype: str
    shape: tuple[int, ...] | None
    nbytes: int
    """Bytes of all of them."""


@dataclass(frozen=True, slots=True)
class QuantizedShare:
    """The weights of one scheme."""

    scheme: str
    weights: int
    parameters: int | None
    """The numbers that they stand for; None where that is not certain."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Something that can be done about a checkpoint."""

    message: str
    command: str
    """The command that does it, as a shell takes it."""


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
    """Elements of the model's tensors, those of tied ones counted once; where there is no model, those of its EMA, or
    of all tensors."""
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
    parts: Sequence[Part] = ()
    """The tensors by the role that they play: model, EMA, optimizer, gradients, other."""
    beside: Sequence[Part] = ()
    """Parts of the same training in other files of its folder, by the names of the files."""
    training: Training = field(default_factory=Training)
    largest: Sequence[Largest] = ()
    """The largest tensors, with numbered ones of one kind counted together."""
    advice: Sequence[Advice] = ()
    quantization: Sequence[QuantizedShare] = ()
    """The schemes in which weights are quantized; of the parameters above these count as what they stand for."""
    revision: str | None = None
    """The commit of the hub that it was read at; None for what is not on one."""

    @property
    def gradients(self) -> bool:
        """True if there are tensors that are gradients."""
        return any(part.role == "gradients" for part in self.parts)

    @property
    def is_training(self) -> bool:
        """True if there is more than a model."""
        return any(part.role in ("optimizer", "EMA", "gradients") for part in self.parts)


def summarize(checkpoint: Checkpoint) -> Summary:
    """Summarize a checkpoint; reads nothing beyond what opening it has read."""
    tensors = checkpoint.tensors
    by_dtype: dict[str, list[int]] = {}
    for number, tensor in enumerate(tensors):
        by_dtype.setdefault(tensor.dtype.name, []).append(number)
    groups = tie_groups(all_named(tensors))
    found = parts_of(checkpoint)
    parts = found.parts
    waste = sum(waste.nbytes - waste.used for waste in list_waste(checkpoint))
    training, beside = _training(checkpoint)
    quantization, packed = _quantization(checkpoint)
    return Summary(
        path=checkpoint.path,
        revision=revision_of(checkpoint.container.files),
        format=checkpoint.format,
        version=checkpoint.version,
        file_nbytes=sum(file.size for file in checkpoint.container.files),
        shards=_shards(checkpoint),
        tensors=len(tensors),
        parameters=found.parameters + packed,
        quantization=quantization,
        nbytes=stored_nbytes(tensors),
        values=len(checkpoint.entries) - len(tensors),
        dtypes={
            name: DTypeShare(len(numbers), unique_numel(tensors[number] for number in numbers))
            for name, numbers in by_dtype.items()
        },
        top_level=checkpoint.top_level,
        ties=len(groups),
        tie_nbytes=sum((len(group) - 1) * group[0].nbytes for group in groups),
        waste_nbytes=waste,
        metadata=checkpoint.metadata,
        objects=checkpoint.objects,
        parts=parts,
        beside=beside,
        training=training,
        largest=_largest(tensors),
        advice=_advice(checkpoint, parts, waste),
    )


def _quantization(checkpoint: Checkpoint) -> tuple[list[QuantizedShare], int]:
    """Return the schemes of quantized weights, and how many more parameters these have than stored elements.

    What is not certain counts as it is stored.
    """
    groups = [group for group in quantized_groups(checkpoint.path, checkpoint.tensors) if not group.is_alone]
    if not groups:
        return [], 0
    from ckpt_cli.ops.quantized_layout import config_of
    from ckpt_cli.ops.quantized_schemes import parameters_in

    config = config_of(checkpoint)
    schemes: dict[str, list[int | None]] = {}
    more = 0
    for group in groups:
        numel = parameters_in(group, config)
        schemes.setdefault(group.scheme, []).append(numel)
        if numel is not None:
            more += numel - sum(tensor.numel for tensor in group.tensors)
    shares = [
        QuantizedShare(scheme, len(counts), None if None in counts else sum(filter(None, counts)))
        for scheme, counts in schemes.items()
    ]
    return shares, more


_LARGEST = 5
"""Rows of the largest tensors."""


def _largest(tensors: Sequence[Tensor]) -> list[Largest]:
    """Return the largest tensors, numbered ones of one dtype and shape counted together."""
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in tensors:
        parts = tensor.name[:_FOLDED].split(".")
        pattern = ".".join("[N]" if part.isdecimal() else part for part in parts) + tensor.name[_FOLDED:]
        groups.setdefault((pattern, tensor.dtype.name, tensor.shape), []).append(tensor)
    found = [
        Largest(str(key[0]) if len(group) > 1 else group[0].name, len(group), group[0].dtype.name, group[0].shape,
                sum(tensor.nbytes for tensor in group))
        for key, group in groups.items()
    ]  # fmt: skip
    return sorted(found, key=lambda row: -row.nbytes)[:_LARGEST]


_FOLDED = 1000
"""Characters of a name in which numbers are folded."""


# --- files beside ---------------------------------------------------------------------------------------------------

_STATES = ("optimizer.pt", "optimizer.bin")
"""Files in which the Trainer of Hugging Face, and Accelerate, keep the state of the optimizer."""


def _training(checkpoint: Checkpoint) -> tuple[Training, list[Part]]:
    """Return what a checkpoint and the files of the same training beside it say."""
    training = training_of(checkpoint)
    path = checkpoint.path
    folder = path if is_folder(path) else folder_of(path)
    if not is_listed(folder):
        return training, []
    files = present(folder, (*_STATES, "trainer_state.json", "random_states_0.pkl"))
    state = config_beside(path, "trainer_state.json") if "trainer_state.json" in files else None
    if state is not None:
        training = _by_trainer(training, state, config_beside(path) or {})
    elif "random_states_0.pkl" in files:
        training = replace(training, writer="Accelerate")
    if optimizer_prefixes(checkpoint) or not {"trainer_state.json", "random_states_0.pkl"} & {*files}:
        return training, []
    beside: list[Part] = []
    own = {name_of(file.path) for file in checkpoint.container.files}
    for name in (name for name in files if name in _STATES and name not in own):
        parts, rates = _optimizer_in(join(folder, name))
        beside += [replace(part, name=name) for part in parts]
        training = replace(training, learning_rates=training.learning_rates or rates)
    return training, beside


def _optimizer_in(path: str) -> tuple[list[Part], Sequence[object]]:
    """Return the state of the optimizer that a file has, and the learning rates; nothing of one that cannot be read."""
    try:
        with closing(open_checkpoint(path)) as other:
            parts = [part for part in parts_of(other).parts if part.role == "optimizer"]
            return parts, training_of(other).learning_rates
    except (CkptError, OSError):  # it is not this file that was asked about
        return [], ()


def _by_trainer(training: Training, state: Mapping[str, object], config: Mapping[str, object]) -> Training:
    """Return the state that the Trainer of Hugging Face keeps in trainer_state.json."""
    version = config.get("transformers_version")
    history = state.get("log_history")
    logged = [line for line in history if isinstance(line, dict)] if isinstance(history, list) else []
    rates = [line["learning_rate"] for line in logged if isinstance(line.get("learning_rate"), int | float)]
    names = ("max_steps", "num_train_epochs", "train_batch_size", "best_metric", "best_model_checkpoint")
    settings = {name: state[name] for name in names if isinstance(state.get(name), int | float | str)}
    return Training(
        writer="Hugging Face Trainer" + (f", transformers {version[:40]}" if isinstance(version, str) else ""),
        epoch=_number(state.get("epoch"), training.epoch),
        global_step=_number(state.get("global_step"), training.global_step),
        learning_rates=training.learning_rates or tuple(rates[-1:]),
        hyper_parameters={**settings, **(training.hyper_parameters or {})} or None,
    )


def _number(value: object, other: object) -> object:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else other


# --- advice -----------------------------------------------------------------------------------------------------------

_WORTH = 0.2
"""Share of the bytes from which taking something out is advised."""


def _is_fixed(checkpoint: Checkpoint) -> bool:
    """True if it cannot be edited, or if a part of the run that it is cannot."""
    if checkpoint.fixed or not checkpoint.is_set:
        return bool(checkpoint.fixed)
    from ckpt_cli.formats.runs.read import run_parts

    return any(part.fixed for part in run_parts(checkpoint))


def _advice(checkpoint: Checkpoint, parts: Sequence[Part], waste: int) -> list[Advice]:
    """Return what can be done to make a file smaller; each command can be carried out as it stands."""
    known = format_of(checkpoint)
    whole = stored_nbytes(checkpoint.tensors)
    if not known.rewriter or _is_fixed(checkpoint) or not whole:
        return []
    path = quoted(checkpoint.path)
    size = sum(file.size for file in checkpoint.container.files)
    of_what = "the file" if whole * 2 >= size else "its tensors"
    found = []
    if any(part.role in ("model", "EMA") for part in parts):
        for role, what in (("optimizer", "optimizer state is"), ("gradients", "gradients are")):
            share = sum(part.nbytes for part in parts if part.role == role) / whole
            names = _removable([part.name for part in parts if part.role == role])
            if share >= _WORTH and names:
                command = f"ckpt rm {path} {' '.join(map(quoted, names))}"
                found.append(Advice(f"{what} {100 * share:.0f} % of {of_what}", command))
    if waste / whole >= _WORTH:
        found.append(Advice(f"{100 * waste / whole:.0f} % of {of_what} is used by no tensor", f"ckpt compact {path}"))
    return found + _cast_advice(checkpoint, parts)


def _removable(names: Sequence[str]) -> list[str]:
    """Return the prefixes to remove: of the items of a list all together, by the name of the list."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        while parts and parts[-1].isdecimal():
            parts.pop()
        if not parts or any(char in name for char in "*?[]\"'"):
            return []
        found[".".join(parts)] = None
    return list(found)


def _cast_advice(checkpoint: Checkpoint, parts: Sequence[Part]) -> list[Advice]:
    """Return the advice to store a model's weights in half as many bytes, where all of its floats are float32."""
    models = [part for part in parts if part.role == "model"]
    names = [part.name for part in models] if len(parts) > len(models) else []
    inside = tuple(f"{name}." for name in names if name)
    floats = [
        tensor
        for tensor in checkpoint.tensors
        if tensor.dtype.is_plain_float and (not inside or tensor.name.startswith(inside))
    ]
    if not models or {tensor.dtype.name for tensor in floats} != {"float32"} or len(inside) != len(names):
        return []
    size = sum(file.size for file in checkpoint.container.files)
    if not names and 2 * stored_nbytes(floats) < size:
        return []  # a small file is mostly its container
    if any(char in name for name in names for char in "*?[]\"'"):
        return []
    message = "float32 only" if not names else f"{' and '.join(names)}: float32 only"
    these = "".join(f" {quoted(name)}" for name in names)
    halves = "halves it" if not names else "halves the model"
    return [Advice(f"{message}; bfloat16 {halves}", f"ckpt cast {quoted(checkpoint.path)} bfloat16{these}")]


def _shards(checkpoint: Checkpoint) -> int:
    """Count the files that have the tensors; an index, the metadata of a DCP folder and other JSON do not count."""
    names = [name_of(file.path) for file in checkpoint.container.files]
    return max(sum(not name.endswith((".json", ".metadata")) for name in names), 1)
