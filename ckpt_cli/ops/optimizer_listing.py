"""The engine of `ls --optimizer`: each parameter with its state in an optimizer, and with the settings of its group."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError, RefusedError, UnsupportedError, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import fetch, is_elsewhere
from ckpt_cli.files.source import SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor, Value
from ckpt_cli.ops.optimizer_pairing import Pairing, pairings_of
from ckpt_cli.ops.optimizer_states import Slot
from ckpt_cli.ops.select import excluded_names, refuse_index, select_one

_CODES = {
    "float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "uint8": "B", "int8": "b",
}  # fmt: skip
"""The dtypes of counters and learning rates that are tensors, as `struct` reads them, without numpy."""


@dataclass(frozen=True, slots=True)
class State:
    """One parameter, with what an optimizer has of it."""

    name: str
    """Its name in the state_dict; that which the optimizer has, or empty, where it is paired with no parameter."""
    parameter: Tensor | None
    optimizer: str | None
    """The prefix of the optimizer; None for a parameter that none has."""
    dtype: str
    shape: tuple[int, ...] | None
    """That of the parameter, else that which its state shows."""
    states: Mapping[str, str]
    """The names of the entries that are its state, by their keys."""
    place: str = ""
    """The prefix of its state, where it is paired with no parameter."""
    step: object = None
    group: int | None = None
    lr: object = None
    weight_decay: object = None
    how: str | None = None
    hypothesis: str | None = None

    @property
    def path(self) -> str:
        """The name of its parameter's entry; empty where it is paired with none."""
        return self.parameter.name if self.parameter is not None else ""


@dataclass(frozen=True, slots=True)
class OptimizerFacts:
    """One optimizer as a whole."""

    prefix: str
    model: str
    """The prefix of the model, or part of one, whose parameters it has."""
    how: str | None
    hypothesis: str | None
    reason: str
    """The reason why no pairing is known."""
    groups: int
    parameters: int
    """Parameters that its groups list."""
    paired: int
    """Those of them that are known to be one of the model's."""


@dataclass(frozen=True, slots=True)
class OptimizerListing:
    """The states of all optimizers of a checkpoint."""

    path: str
    format: str
    optimizers: Sequence[OptimizerFacts]
    states: Sequence[State]
    """Of the model's parameters in the file's order, then those that are paired with none."""

    def rows(self) -> list[dict[str, object]]:
        """Return a dict with equal keys for each parameter, for a DataFrame; `state` has the names of its states."""
        return [
            {
                "name": row.name, "parameter": row.path or None, "optimizer": row.optimizer, "dtype": row.dtype,
                "shape": None if row.shape is None else list(row.shape), "state": dict(row.states), "step": row.step,
                "group": row.group, "lr": row.lr, "weight_decay": row.weight_decay, "how": row.how,
                "hypothesis": row.hypothesis,
            }
            for row in self.states
        ]  # fmt: skip


def list_states(
    checkpoint: Checkpoint,
    names: Sequence[str] = (),
    *,
    exclude: Sequence[str] = (),
    model: Checkpoint | None = None,
) -> OptimizerListing:
    """Return each parameter that `names` select with its states; only counters and settings are read.

    `model` is the checkpoint that has the parameters, where that is another one. Raises RefusedError where there is
    no optimizer.
    """
    pairings = pairings_of(checkpoint, model)
    if not pairings:
        raise RefusedError(
            "it has no state of an optimizer: there are no param_groups",
            path=checkpoint.path,
            hint=f"ckpt ls -a {quoted(checkpoint.path)} lists all that it has",
        )
    of_model = checkpoint if model is None else model
    chosen = _chosen(of_model, names, exclude)
    Budget.of(checkpoint)
    read = _Reader(checkpoint, pairings)
    rows: dict[str, State] = {}
    left: dict[str, State] = {}
    unpaired: list[State] = []
    for pairing in pairings:
        for slot, tensor in pairing.pairs:
            row = read.state(pairing, slot, tensor)
            if tensor is None:
                unpaired.append(row)
            else:
                rows[f"{tensor.name}\0{pairing.optimizer.prefix}"] = row
        for tensor in pairing.left:
            left[tensor.name] = State(pairing.name_of(tensor), tensor, None, tensor.dtype.name, tensor.shape, {})
        unpaired += [read.stray(pairing, key, states) for key, states in pairing.optimizer.strays.items()]
    paired = {row.parameter.name for row in rows.values() if row.parameter is not None}
    order = {name: at for at, name in enumerate(of_model.names)}
    found = [*rows.values(), *(row for name, row in left.items() if name not in paired)]
    found.sort(key=lambda row: order[row.path])
    if chosen is not None:
        found, unpaired = [row for row in found if row.path in chosen], []
    return OptimizerListing(
        checkpoint.path, checkpoint.format, [_facts(each) for each in pairings], [*found, *unpaired]
    )


def _chosen(checkpoint: Checkpoint, names: Sequence[str], exclude: Sequence[str]) -> set[str] | None:
    """Return the names that are asked for; None for all."""
    if not names and not exclude:
        return None
    chosen: set[str] = set()
    for name in names:
        selections = select_one(checkpoint, name)
        refuse_index(checkpoint, name, selections, "ls")
        chosen |= {selection.entry.name for selection in selections}
    return (chosen if names else set(checkpoint.names)) - excluded_names(checkpoint, exclude)


def _facts(pairing: Pairing) -> OptimizerFacts:
    optimizer = pairing.optimizer
    return OptimizerFacts(
        optimizer.prefix, pairing.scope.prefix, pairing.how, pairing.hypothesis, pairing.reason, len(optimizer.groups),
        len(optimizer.slots), sum(tensor is not None for _, tensor in pairing.pairs),
    )  # fmt: skip


class _Reader:
    """Reads single numbers: steps, learning rates and the like."""

    def __init__(self, checkpoint: Checkpoint, pairings: Sequence[Pairing]) -> None:
        self._known: dict[int, object] = {}
        if any(map(is_elsewhere, checkpoint.container.files)):
            fetch(_places(pairings))

    def state(self, pairing: Pairing, slot: Slot, tensor: Tensor | None) -> State:
        """Return one parameter of an optimizer."""
        settings = slot.group.settings if slot.group is not None else {}
        shown = slot.shape
        first = next((entry for entry in slot.states.values() if isinstance(entry, Tensor) and entry.shape), None)
        return State(
            name=pairing.name_of(tensor) if tensor is not None else slot.name or "",
            parameter=tensor,
            optimizer=pairing.optimizer.prefix,
            dtype=tensor.dtype.name if tensor is not None else first.dtype.name if first is not None else "",
            shape=tensor.shape if tensor is not None else shown,
            states={key: entry.name for key, entry in slot.states.items()},
            place="" if tensor is not None else pairing.optimizer.path("state", slot.key),
            step=_whole(self._number(slot.states.get("step", settings.get("step")))),
            group=slot.group.number if slot.group is not None else None,
            lr=self._number(settings.get("lr")),
            weight_decay=self._number(settings.get("weight_decay")),
            how=pairing.how if tensor is not None else None,
            hypothesis=pairing.hypothesis if tensor is not None else None,
        )

    def stray(self, pairing: Pairing, key: object, states: Mapping[str, Entry]) -> State:
        """Return a state of a parameter that no group lists."""
        tensors = [entry for entry in states.values() if isinstance(entry, Tensor) and entry.shape]
        return State(
            name="", parameter=None, optimizer=pairing.optimizer.prefix,
            dtype=tensors[0].dtype.name if tensors else "", shape=tensors[0].shape if tensors else None,
            states={name: entry.name for name, entry in states.items()},
            place=pairing.optimizer.path("state", key), step=_whole(self._number(states.get("step"))),
        )  # fmt: skip

    def _number(self, entry: Entry | None) -> object:
        """Return a number that is a value or a tensor of one element; None for anything else."""
        if isinstance(entry, Value):
            return entry.value if isinstance(entry.value, int | float) and not isinstance(entry.value, bool) else None
        if entry is None or not _is_number(entry):
            return None
        if id(entry) not in self._known:
            self._known[id(entry)] = _read(entry)
        return self._known[id(entry)]


def _whole(value: object) -> object:
    """Return a count that is stored as a floating number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_number(tensor: Tensor) -> bool:
    return tensor.storage is not None and tensor.numel == 1 and tensor.dtype.name in _CODES


def _read(tensor: Tensor) -> object:
    """Return the one element of a tensor; None where it cannot be read."""
    storage = tensor.storage
    begin, end = tensor.span
    try:
        raw = bytes(storage.view(begin, end - begin)) if storage is not None else b""
    except CkptError:
        return None
    value: int | float = struct.unpack((">" if tensor.big_endian else "<") + _CODES[tensor.dtype.name], raw)[0]
    return -value if tensor.neg else value


def _places(pairings: Sequence[Pairing]) -> dict[SourceFile, list[tuple[int, int]]]:
    """Return the ranges of files elsewhere that numbers are read from."""
    wanted: dict[SourceFile, list[tuple[int, int]]] = {}
    for tensor in _numbers(pairings):
        begin, end = tensor.span
        with suppress(UnsupportedError):  # compressed
            for extent in tensor.storage.extents(begin, end - begin) if tensor.storage is not None else ():
                wanted.setdefault(extent.file, []).append((extent.offset, extent.nbytes))
    return wanted


def _numbers(pairings: Sequence[Pairing]) -> Iterator[Tensor]:
    for pairing in pairings:
        for slot in pairing.optimizer.slots:
            step = slot.states.get("step")
            if isinstance(step, Tensor) and _is_number(step) and step.storage is not None and not step.storage.composed:
                yield step
