"""The parts of a training checkpoint, recognized by their names: model, optimizer state, EMA, gradients and the rest.

The layouts are those that torch, Lightning, the Trainer of Hugging Face, Accelerate, timm, Ultralytics (YOLO), fairseq,
MMEngine and DeepSpeed write. Nothing is recognized by values, and nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ckpt_cli.facts import dataclass
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.checkpoint import Checkpoint, Tensor, Value
from ckpt_cli.ops.aliasing import stored_nbytes, unique_numel

ROLES = ("model", "EMA", "optimizer", "gradients", "other")
"""The roles that a part can play, in the order in which they are reported."""

_MOST = 8
"""Parts of one role that are listed one by one; more are counted together."""

_DEPTH = 3
"""Parts of a name, from its beginning, in which the words of a role are looked for."""

_WORD = r"[A-Z]{2,}(?![a-z])|[A-Z]?[a-z]+"

_OPTIMIZER = frozenset(["optimizer", "optimizers", "optim", "optims", "optimiser"])
_EMA = frozenset(["ema", "polyak"])
_EMA_KEYS = frozenset(["shadow_params", "averaging_state", "averaged_model", "averaged_state_dict", "swa_model"])
_GRADIENTS = frozenset(["grads", "grad", "gradients"])

_MOMENTS = frozenset(
    ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_avg_sq_row", "exp_avg_sq_col", "square_avg",
     "acc_delta", "exp_inf", "exp_avg_diff"]
)  # fmt: skip
"""The names under which torch's and transformers' optimizers keep their state of a parameter."""

_OTHER = frozenset(
    ["callback", "callbacks", "loops", "scheduler", "schedulers", "scaler", "rng", "random", "sampler", "metric",
     "metrics", "criterion", "meter", "meters", "args", "cfg", "config", "hyper", "hparams", "history", "results",
     "stats", "extra", "dataloader", "dataloaders"]
)  # fmt: skip
"""Words in the outermost keys of what is not a part of a model."""

MODEL_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights",
              "params_ema", "params", "ema")  # fmt: skip
"""Keys of training checkpoints below which a model is, the likeliest first."""

_MODEL = frozenset(MODEL_KEYS) - {"params_ema", "ema"} | {"models"}
"""Outermost keys of models: below these no other role than EMA is looked for."""

_BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked")
"""Ends of the names of buffers that torch's normalization layers register; other names say nothing."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that play one role."""

    role: str
    """`model`, `EMA`, `optimizer`, `gradients`, or `other`: counters, random states and the like."""
    name: str
    """The prefix that they have in common; empty where the whole file has one role, or where there are several."""
    tensors: int
    parameters: int
    """Their elements, those of tied tensors counted once; of an optimizer these are the numbers of its state."""
    buffers: int
    """Elements among these that are known to be buffers, not parameters."""
    nbytes: int
    """Bytes of their storages."""


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of a checkpoint."""

    parts: Sequence[Part]
    """In the order of `ROLES`; an ordinary state_dict is one part, the model."""
    parameters: int
    """Elements of the model, those of tied tensors counted once, also where parts share them; where there is no model,
    those of its EMA, or of all tensors."""


def parts_of(checkpoint: Checkpoint) -> Parts:
    """Return the parts of a checkpoint; reads no tensor."""
    tensors = checkpoint.tensors
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for tensor, place in zip(tensors, _Recognizer(checkpoint).places(tensors), strict=True):
        groups.setdefault(place, []).append(tensor)
    roles = {role for role, _ in groups}
    found: list[Part] = []
    counted: list[Tensor] = tensors
    for role in ("EMA", "model"):
        counted = [tensor for (own, _), group in groups.items() if own == role for tensor in group] or counted
    for role in ROLES:
        of_role = {name: group for (own, name), group in groups.items() if own == role}
        is_one = role == "model" and ("" in of_role or roles == {"model"})
        if len(of_role) > (1 if is_one else _MOST):
            of_role = {"": [tensor for group in of_role.values() for tensor in group]}
        found += [_part(role, name, group) for name, group in of_role.items()]
    return Parts(found, unique_numel(counted))


def parameters_of(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> int | None:
    """Return the elements of those tensors that are a model's, else an EMA's; None where all of them are a model's."""
    roles = by_role(checkpoint, tensors)
    if roles.keys() <= {"model"}:
        return None
    return unique_numel(roles.get("model") or roles.get("EMA") or [])


def by_role(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Return those of some tensors that play each role."""
    found: dict[str, list[Tensor]] = {}
    for tensor, (role, _) in zip(tensors, _Recognizer(checkpoint).places(tensors), strict=True):
        found.setdefault(role, []).append(tensor)
    return found


def optimizer_prefixes(checkpoint: Checkpoint) -> list[str]:
    """Return the prefixes under which the state_dicts of optimizers stand: those that have `param_groups`.

    A whole file that is one has the prefix ''.
    """
    found = {}
    for entry in checkpoint.entries:
        if "param_groups" in entry.name:
            before, here, _ = f".{entry.name}".partition(".param_groups.")
            if here:
                found[before[1:]] = True
    return list(found)


def roles_of(checkpoint: Checkpoint) -> Iterable[tuple[str, str]]:
    """Yield the role of each tensor, and the prefix of the part that it belongs to."""
    return _Recognizer(checkpoint).places(checkpoint.tensors)


def is_buffer(tensor: Tensor) -> bool:
    """True for a tensor that is known to be a buffer, by the file or by its name."""
    return tensor.kind == "buffer" or f".{tensor.name}".endswith(_BUFFERS)


def _part(role: str, name: str, tensors: Sequence[Tensor]) -> Part:
    buffers = [tensor for tensor in tensors if is_buffer(tensor)]
    return Part(role, name, len(tensors), unique_numel(tensors), unique_numel(buffers), stored_nbytes(tensors))


class _Recognizer:
    """Finds the role of each tensor by its name; names that begin alike are looked at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        names = checkpoint.names
        self._nested = {key for key in checkpoint.top_level if key not in names}
        """Outermost keys that are containers, rather than names of a flat state_dict."""
        if format_of(checkpoint).keeps_strings and not checkpoint.weights:
            self._nested = set()
        self._optimizers = sorted(optimizer_prefixes(checkpoint), key=len, reverse=True)
        self._has_model = any(key in _MODEL or self._has_ema(["", key]) for key in self._nested)
        self._known: dict[str, tuple[str, str] | None] = {}

    def places(self, tensors: Iterable[Tensor]) -> Iterable[tuple[str, str]]:
        """Yield the role and the prefix of each."""
        for tensor in tensors:
            yield self._place(tensor.name, tensor.numel)

    def _place(self, name: str, numel: int) -> tuple[str, str]:
        parts = name.split(".", _DEPTH + 1)
        leaf = name.rpartition(".")[2]
        if leaf in _MOMENTS:
            prefix = self._optimizer_of(name)
            return "optimizer", parts[0] if prefix is None else prefix
        if leaf == "grad":
            return "gradients", ""
        head = ".".join(parts[:_DEPTH] if len(parts) > _DEPTH else parts[:-1])
        if head not in self._known:
            self._known[head] = self._of_head(head)
        found = self._known[head]
        if found is not None:
            return found
        if parts[0] in self._nested and len(parts) > 1:
            return "model", parts[0]
        if len(parts) == 1 and (self._optimizers or numel == 1) and self._has_model:
            return "other", ""  # a loss or a counter beside the containers
        return "model", ""

    def _of_head(self, head: str) -> tuple[str, str] | None:
        """Return the role that the beginning of a name says; None where it says nothing."""
        optimizer = self._optimizer_of(f"{head}.")
        if optimizer is not None:
            return "optimizer", optimizer
        keys = head.split(".") if head else []
        for at, key in enumerate(keys):
            words = {word.lower() for word in re.findall(_WORD, key[:200])}
            prefix = ".".join(keys[: at + 1])
            if words & _EMA or key in _EMA_KEYS:
                return "EMA", prefix
            if at == 0 and keys[0] not in _MODEL:
                role = self._of_outermost(key, words)
                if role is not None and not self._has_ema(keys):
                    return role, prefix
        return None

    def _of_outermost(self, key: str, words: set[str]) -> str | None:
        """Return the role of what stands under an outermost key."""
        if words & _OPTIMIZER:
            return "optimizer"
        if key in _GRADIENTS:
            return "gradients"
        return "other" if words & _OTHER and key in self._nested else None

    def _has_ema(self, keys: Sequence[str]) -> bool:
        """True if a key further in names an EMA, as of one that a callback keeps."""
        return any({word.lower() for word in re.findall(_WORD, key[:200])} & _EMA for key in keys[1:])

    def _optimizer_of(self, name: str) -> str | None:
        """Return the prefix of the optimizer whose state_dict a name lies in."""
        for prefix in self._optimizers:
            if name.startswith(f"{prefix}." if prefix else "state."):
                return prefix
        return None


# --- the gradient of one tensor ---------------------------------------------------------------------------------------


def gradient_of(checkpoint: Checkpoint, tensor: Tensor, parts: Iterable[Part]) -> str | None:
    """Return the name of the gradient of a tensor in the file; None where it has none, as torch stores none."""
    if tensor.part("grad") is not None or f"{tensor.name}.grad" in checkpoint.names:
        return f"{tensor.name}.grad"
    prefixes = [part.name for part in parts if part.role == "gradients" and part.name]
    by_name = {entry.name: entry for entry in checkpoint.tensors} if prefixes else {}
    rest = tensor.name
    while rest and prefixes:
        for prefix in prefixes:
            found = by_name.get(f"{prefix}.{rest}")
            if found is not None and found is not tensor and found.shape == tensor.shape:
                return found.name
        rest = rest.partition(".")[2]
    return None


# --- facts about the training -----------------------------------------------------------------------------------------

_STEPS = ("global_step", "step", "steps", "iteration", "iter", "num_updates", "updates", "global_steps", "current_step")
_EPOCHS = ("epoch", "current_epoch", "epochs")
_WITHIN = ("", "meta.", "trainer_state.", "extra_state.", "extra_state.train_iterator.", "trainer.", "state.")
"""Prefixes under which epochs and steps stand: the file's own, MMEngine's, fairseq's and others."""

_SETTINGS = ("hyper_parameters", "hparams", "args", "train_args", "cfg", "config", "opt", "opts", "meta.config")
"""Containers of hyper-parameters."""


@dataclass(frozen=True, slots=True)
class Training:
    """The state of a training, as far as a checkpoint says it."""

    writer: str | None = None
    """The program that wrote the checkpoint, with its version where that is stored."""
    epoch: object = None
    global_step: object = None
    learning_rates: Sequence[object] = ()
    """The distinct learning rates of the optimizers' groups."""
    hyper_parameters: Mapping[str, object] | None = None
    """Settings by their names, without the container that they stand in."""

    @property
    def is_empty(self) -> bool:
        """True if nothing is known but the writer."""
        rest = (self.epoch, self.global_step, self.hyper_parameters)
        return not self.learning_rates and all(fact is None for fact in rest)


def training_of(checkpoint: Checkpoint) -> Training:
    """Return what the entries of a checkpoint say of its training."""
    values = {entry.name: entry for entry in checkpoint.entries if isinstance(entry, Value)}
    rates: dict[object, None] = {}
    settings: dict[str, object] = {}
    for name, value in values.items():
        if ".lr" in name and re.search(r"(?:^|\.)param_groups\.\d+\.lr$", name):
            rates[_hashable(value.value)] = None
        for container in _SETTINGS:
            if name.startswith(f"{container}."):
                settings[name[len(container) + 1 :]] = value.value
    return Training(
        writer=_writer(checkpoint, values),
        epoch=_first(values, _EPOCHS),
        global_step=_first(values, _STEPS) if _first(values, _STEPS) is not None else _updates(values),
        learning_rates=tuple(rates),
        hyper_parameters=settings or None,
    )


def _hashable(value: object) -> object:
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _first(values: Mapping[str, Value], keys: Sequence[str]) -> object:
    """Return the first number that stands under one of some keys."""
    for prefix in _WITHIN:
        for key in keys:
            found = values.get(prefix + key)
            if found is not None and isinstance(found.value, int | float) and not isinstance(found.value, bool):
                return found.value
    return None


def _updates(values: Mapping[str, Value]) -> object:
    """Return fairseq's number of updates, of the last optimizer that it used."""
    numbers = [
        value.value
        for name, value in values.items()
        if name.startswith("optimizer_history.") and name.endswith(".num_updates")
    ]
    return next((number for number in reversed(numbers) if isinstance(number, int)), None)


def _text(values: Mapping[str, Value], name: str) -> str:
    """Return a value as text; empty where there is no such value."""
    found = values.get(name)
    return str(found.value)[:100] if found is not None and isinstance(found.value, str | int | float) else ""


def _writer(checkpoint: Checkpoint, values: Mapping[str, Value]) -> str | None:
    """Return the program that wrote a checkpoint, by the keys that only it writes."""
    keys = set(checkpoint.top_level)
    known = format_of(checkpoint)
    lightning = _text(values, "pytorch-lightning_version")
    if lightning:
        return f"Lightning {lightning}"
    if {"train_args", "ema", "updates"} <= keys or "ultralytics" in _text(values, "docs"):
        return f"Ultralytics {_text(values, 'version')}".strip()
    if {"last_optimizer_state", "optimizer_history"} & keys and "extra_state" in keys:
        return "fairseq"
    for package, name in (("MMEngine", "mmengine_version"), ("MMCV", "mmcv_version"), ("DeepSpeed", "ds_version")):
        version = _text(values, f"meta.{name}") or _text(values, name)
        if version:
            return f"{package} {version}"
    if {"arch", "state_dict", "version"} <= keys:
        return f"timm (layout {_text(values, 'version')})"
    if known.is_torch_save:
        return "torch"
    return "torch.distributed.checkpoint" if known.is_distributed else None
