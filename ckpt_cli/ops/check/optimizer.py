"""Checks of an optimizer's state against the model that it is saved with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ckpt_cli.files.places import name_of
from ckpt_cli.model.checkpoint import Checkpoint, Tensor, Value
from ckpt_cli.ops.check.finding import Check, Occurrence
from ckpt_cli.ops.optimizer_pairing import Pairing, may_be_parameter, pairings_of
from ckpt_cli.ops.optimizer_states import LIKE_PARAMETER, Optimizer, Shape, Slot
from ckpt_cli.ops.parts import roles_of

_NAMED = 3
"""Names that one finding spells out."""


def _optimizers(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    pairings = pairings_of(checkpoint)
    if not pairings:
        return
    others = _possible(checkpoint)
    for pairing in pairings:
        where = name_of(checkpoint.path)
        if pairing.optimizer.prefix:
            where = f"{where}: {pairing.optimizer.prefix}"
        for message, severity in _faults(pairing, others):
            yield Occurrence(where, message, severity)


def _possible(checkpoint: Checkpoint) -> list[Tensor]:
    """Return every tensor that may be a parameter, wherever it stands; tied ones once."""
    found: dict[object, Tensor] = {}
    for tensor, (role, _) in zip(checkpoint.tensors, roles_of(checkpoint), strict=True):
        if role in ("model", "other") and may_be_parameter(tensor):
            found.setdefault(tensor.view or id(tensor), tensor)
    return list(found.values())


def _faults(pairing: Pairing, possible: list[Tensor]) -> Iterator[tuple[str, str]]:
    """Yield what does not fit, and its severity, empty for that of the check."""
    optimizer = pairing.optimizer
    if optimizer.is_broken:
        yield optimizer.fault, "error"
    if optimizer.fault:
        return
    yield from _name_counts(optimizer)
    yield from _strays(optimizer)
    yield from _incomplete(optimizer)
    if pairing.how == "named":
        yield from _by_name(pairing)
    elif pairing.how is None and possible and not optimizer.is_of_all:
        yield from _by_shape(optimizer, possible)


def _name_counts(optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    for group in optimizer.groups:
        names = group.settings.get("param_names")
        listed = names.value if isinstance(names, Value) else None
        if isinstance(listed, list | tuple) and len(listed) != len(group.keys):
            yield f"group {group.number} has {len(group.keys):,} parameters, and names for {len(listed):,}", "error"


def _strays(optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    found = [str(key) for key, states in optimizer.strays.items() if any(name in LIKE_PARAMETER for name in states)]
    if found:
        yield f"it has states that belong to no parameter of its groups: {_some(found)}", ""


def _incomplete(optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    """States that lack something that half of their group and kind, or more, have."""
    kinds: dict[tuple[int, int], list[Slot]] = {}
    for slot in optimizer.slots:
        if slot.states and slot.shape is not None:
            kinds.setdefault((id(slot.group), len(slot.shape)), []).append(slot)
    lacking: dict[str, list[str]] = {}
    for slots in kinds.values():
        counts = Counter(key for slot in slots for key in slot.states if key in LIKE_PARAMETER)
        usual = [key for key, count in counts.items() if 2 * count >= len(slots)]
        for slot in slots:
            for key in usual:
                if key not in slot.states:
                    lacking.setdefault(key, []).append(str(slot.key))
    for key, names in lacking.items():
        yield f"states have no {key}, which the others have: {_some(names)}", ""


def _by_name(pairing: Pairing) -> Iterator[tuple[str, str]]:
    """Names that the model does not have, and shapes that differ."""
    missing = [slot.name or "" for slot in pairing.unmatched]
    if missing:
        yield f"the model does not have {_count(len(missing), 'parameter')} of it: {_some(missing)}", ""
    for slot, tensor in pairing.pairs:
        shape = slot.shape
        if tensor is None or shape is None or tensor.shape is None or shape == tensor.shape:
            continue
        if len(shape) != 1 or len(tensor.shape) == 1:  # a vector may be a matrix's elements
            yield (
                f"the state of {pairing.name_of(tensor)} has the shape {list(shape)}, "
                f"and the parameter {list(tensor.shape)}",
                "error",
            )
            return


def _by_shape(optimizer: Optimizer, possible: list[Tensor]) -> Iterator[tuple[str, str]]:
    """More states than there are parameters, and shapes that no parameter has, where most of them fit."""
    with_state = [slot for slot in optimizer.slots if slot.states]
    if optimizer.is_flattened or not with_state:
        return
    wanted: Counter[Shape] = Counter(slot.shape for slot in with_state if slot.shape is not None)
    there = Counter(tensor.shape for tensor in possible if tensor.shape is not None)
    unfit = wanted - there
    if 2 * unfit.total() > wanted.total():
        return  # of another kind of optimizer, which keeps parts or whole buffers of parameters
    if len(with_state) > len(possible):
        yield (
            f"it has states of {_count(len(with_state), 'parameter')}, and the model at most "
            f"{_count(len(possible), 'parameter')}",
            "",
        )
    elif unfit:
        shapes = [str(list(shape)) for shape in unfit]
        yield f"it has states of more parameters of these shapes than the model has: {_some(shapes)}", ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


CHECKS: tuple[Check[Checkpoint], ...] = (
    Check(
        "optimizer-fit",
        "warning",
        "the state of an optimizer does not fit the model beside it: other names, numbers or shapes of parameters, "
        "states without a parameter, or incomplete ones; an error where shapes or groups contradict",
        _optimizers,
        "ckpt ls --optimizer FILE",
    ),
)
