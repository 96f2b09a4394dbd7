"""The plan of `resize`: tensors with more or fewer rows, such as embeddings, and the states of their optimizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.arrays.random_normal import NormalSource, key_of
from ckpt_cli.budget import Budget
from ckpt_cli.edits.carried_states import carry
from ckpt_cli.edits.expression_tensors import require_kept
from ckpt_cli.edits.optimizer import CHOICES
from ckpt_cli.edits.plan import Carried, EditPlan, Verb
from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.ops.aliasing import all_strided, by_storage, partly_shared
from ckpt_cli.ops.hf_config import config_beside
from ckpt_cli.ops.optimizer_pairing import KNOWN, Pairing, pairings_of
from ckpt_cli.ops.quantization import groups_text, quantized_groups
from ckpt_cli.ops.select import select_to_edit
from ckpt_cli.parallel.lazy import Filled, Home, Lazy, Leaf, Normal, made_of
from ckpt_cli.parallel.lazy_made import Joined, MeanRows

if TYPE_CHECKING:
    from concurrent.futures import Executor

MEAN, ZERO, NORMAL = INITS = ("mean", "zero", "normal")
"""What new rows are: the mean of the old ones, zeros, or normal numbers."""

_ASKED = re.compile(r"(.+)=(\d{1,18})(?::(\w+))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Resize:
    """One `NAME=ROWS:INIT`."""

    name: str
    rows: int
    init: str = MEAN


@dataclass(frozen=True, slots=True)
class ResizeOptions:
    """Options of `resize`."""

    std: float = 0.02
    """The standard deviation of normal numbers."""
    seed: int = 0
    optimizer: str | None = None
    """One of `CHOICES`; None to refuse where it is not known which states belong to a tensor."""
    executor: Executor | None = None


def resize_of(text: str) -> Resize:
    """Parse `NAME=ROWS` or `NAME=ROWS:INIT`; raises UsageError for anything else."""
    found = _ASKED.fullmatch(text)
    init = found[3] or MEAN if found is not None else MEAN
    if found is None or init not in INITS:
        raise UsageError(
            f"{text!r} is not NAME=ROWS or NAME=ROWS:INIT", hint=f"INIT is {', '.join(INITS)}; without it {MEAN}"
        )
    return Resize(found[1], int(found[2]), init)


def plan_resize(checkpoint: Checkpoint, asked: Sequence[Resize], options: ResizeOptions) -> EditPlan:
    """Give tensors more or fewer rows (indices of the first dimension); names that are tied to them follow.

    The states of optimizers get zeros for new rows. Raises RefusedError where it is not known which these are, or
    where a tensor shares bytes with others that are not tied to it, UnsupportedError for tensors without rows.
    """
    if options.optimizer is not None and options.optimizer not in CHOICES:
        raise UsageError(f"{options.optimizer!r} is not one of {', '.join(CHOICES)}")
    resizing = _Resizing(checkpoint, options)
    for each in asked:
        for selection in select_to_edit(checkpoint, each.name):
            if selection.index is not None or not isinstance(selection.entry, Tensor):
                raise UsageError(f"{each.name!r} is not the name of a tensor: rows are those of whole ones")
            resizing.resize(selection.entry, each)
    resizing.refuse_shared()
    if options.optimizer not in ("leave", "drop"):
        for pairing in pairings_of(checkpoint):
            resizing.carry(pairing)
    plan = resizing.plan()
    return carry(checkpoint, plan, "drop") if options.optimizer == "drop" else plan


class _Resizing:
    """Tensors of one checkpoint that get other rows."""

    def __init__(self, checkpoint: Checkpoint, options: ResizeOptions) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._asked: dict[object, Resize] = {}
        """What was asked for, by the view of each tensor."""
        self._tensors: dict[str, Tensor] = {}
        self._contents: dict[Storage, Content] = {}
        self._checks: list[Callable[[], None]] = []
        self._named: list[str] = []
        self._also: list[str] = []
        self._rows: dict[str, tuple[int, int]] = {}
        """The old and the new rows of each tensor."""
        self._carried: list[Carried] = []

    def resize(self, tensor: Tensor, asked: Resize) -> None:
        """Resize one tensor, with all that are tied to it."""
        self._require_rows(tensor, asked)
        before = self._asked.setdefault(tensor.view or tensor.name, asked)
        if (before.rows, before.init) != (asked.rows, asked.init):
            raise UsageError(f"{before.name!r} and {asked.name!r} are one tensor, and would have different rows")
        if tensor.name in self._tensors or (tensor.shape or (0,))[0] == asked.rows:
            self._also = [name for name in self._also if name != tensor.name]
            if tensor.name in self._tensors and tensor.name not in self._named:
                self._named.append(tensor.name)
            return
        self._named.append(tensor.name)
        self._put(tensor, asked.rows, asked.init)

    def _put(self, tensor: Tensor, rows: int, init: str) -> list[str]:
        """Make a tensor with other rows, in the place of all names of the old one; returns these names."""
        lazy = self._lazy(tensor, rows, init)
        location = tensor.storage.location if tensor.storage is not None else "cpu"
        made, content = made_of(lazy, tensor.name, self._options.executor, location)
        assert made.storage is not None
        self._contents[made.storage] = content
        self._checks.append(lambda: require_kept(lazy))
        names = []
        for each in self._checkpoint.tensors:
            if each is tensor or (tensor.view is not None and each.view == tensor.view):
                self._tensors[each.name] = replace(
                    each, shape=made.shape, stride=made.stride, storage=made.storage, storage_offset=0,
                    conj=False, neg=False, big_endian=False,
                )  # fmt: skip
                self._rows[each.name] = (tensor.shape or (0,))[0], rows
                names.append(each.name)
        self._also += [name for name in names if name not in self._named and name != tensor.name]
        return names

    def _lazy(self, tensor: Tensor, rows: int, init: str) -> Lazy:
        """Return the tensor with other rows."""
        home = Home(tensor.name, self._checkpoint, allow=False)
        old: Lazy = Leaf(home, self._checkpoint, tensor)
        shape = old.shape
        if rows <= shape[0]:
            return old.at((slice(0, rows),))
        more = (rows - shape[0], *shape[1:])
        if init == NORMAL:
            source = NormalSource(key_of(self._options.seed, tensor.name))
            new: Lazy = Normal(home, tensor.dtype, more, source, 0.0, self._options.std)
        elif init == MEAN and old.numel:
            new = MeanRows(old, more[0])
        else:
            new = Filled(home, tensor.dtype, more, bytes(tensor.dtype.itemsize))
        return Joined([old, new], 0)

    def _require_rows(self, tensor: Tensor, asked: Resize) -> None:
        """Raise where a tensor has no rows that can be added or taken away."""
        from ckpt_cli.arrays.codec import require_plain

        require_plain(tensor)
        tensor.dtype.itemsize  # noqa: B018 - raises for packed elements
        if not tensor.shape:
            raise UnsupportedError(f"tensor {tensor.name!r} has no dimensions, so it has no rows")
        if asked.rows > tensor.shape[0] and asked.init != ZERO and tensor.dtype.category != "float":
            raise UnsupportedError(f"tensor {tensor.name!r} is {tensor.dtype}", hint=f"{asked.name}={asked.rows}:zero")
        row = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else tensor.dtype.itemsize
        if row * asked.rows > limits.EXPRESSION_BYTES:
            raise RefusedError(f"{tensor.name!r} would have {row * asked.rows:,} bytes")
        if asked.init == MEAN and row > _ROW and asked.rows > tensor.shape[0]:
            raise UnsupportedError(
                f"a row of {tensor.name!r} has {row:,} bytes", hint=f"{asked.name}={asked.rows}:zero"
            )

    def refuse_shared(self) -> None:
        """Raise RefusedError where a resized tensor shares bytes with another one, or is scaled."""
        if not self._tensors:
            raise RefusedError("every one of them has that many rows already", path=self._checkpoint.path)
        budget = Budget.of(self._checkpoint)
        for _, views in by_storage(all_strided(self._checkpoint.tensors)):
            if self._tensors.keys().isdisjoint(view.name for view in views):
                continue
            sharing = dict.fromkeys(view.name for view in partly_shared(views, budget)[0])
            if not self._tensors.keys().isdisjoint(sharing):
                raise RefusedError(
                    f"{listed(list(sharing), 3)} share their bytes, and not as one tensor",
                    path=self._checkpoint.path,
                    hint="ckpt untie FILE NAME gives one bytes of its own",
                )
        groups = quantized_groups(self._checkpoint.path, self._checkpoint.tensors)
        scaled = [group for group in groups if any(part.name in self._tensors for part in group.tensors)]
        if scaled:
            raise RefusedError(f"scaled or packed weights have rows that belong together ({groups_text(scaled)})")

    # --- optimizers --------------------------------------------------------------------------------------------------

    def carry(self, pairing: Pairing) -> None:
        """Resize the states of one optimizer."""
        candidates = [tensor for tensor in pairing.scope.candidates if tensor.name in self._tensors]
        if not candidates or not pairing.optimizer.slots:
            return
        if pairing.how not in KNOWN and not (pairing.how == "order" and self._options.optimizer == "trust"):
            raise self._refusal(pairing)
        done = []
        for slot, tensor in pairing.pairs:
            rows = self._rows.get(tensor.name) if tensor is not None else None
            if tensor is None or rows is None:
                continue
            for key, state in slot.states.items():
                if isinstance(state, Tensor) and state.numel != 1:
                    self._resize_state(state, key, tensor, rows)
            if slot.states:
                done.append(pairing.name_of(tensor))
        if done:
            self._carried.append(
                Carried(pairing.optimizer.prefix, "resized", tuple(done), pairing.how, pairing.hypothesis)
            )

    def _resize_state(self, state: Tensor, key: str, tensor: Tensor, rows: tuple[int, int]) -> None:
        """Resize a state that has the rows of its parameter; of Adafactor's factors, that of the rows."""
        like_rows = ("row_var", "exp_avg_sq_row")
        if state.shape == tensor.shape or (key in like_rows and state.shape and state.shape[0] == rows[0]):
            self._put(state, rows[1], ZERO)
        elif key not in ("col_var", "exp_avg_sq_col"):
            raise RefusedError(
                f"the state {state.name!r} is {list(state.shape or ())}, which is not the shape of {tensor.name!r}",
                path=self._checkpoint.path,
                hint="--optimizer drop takes the optimizer out, leave changes nothing in it",
            )

    def _refusal(self, pairing: Pairing) -> RefusedError:
        name = f"of {pairing.optimizer.prefix!r}" if pairing.optimizer.prefix else "of the optimizer"
        why, trust = pairing.reason, "--optimizer "
        if pairing.how == "order":
            why = f"the shapes fit an order ({pairing.hypothesis}), which is no proof"
            trust = "--optimizer trust goes by that order, "
        return RefusedError(
            f"it is not known which states {name} belong to what is resized: {why}",
            path=self._checkpoint.path,
            hint=f"{trust}drop takes the optimizer out, leave changes nothing in it",
        )

    # --- the result --------------------------------------------------------------------------------------------------

    def plan(self) -> EditPlan:
        """Return the plan of all."""

        def check() -> None:
            for each in self._checks:
                each()

        states = {name for name in self._tensors if self._carried and name not in (*self._named, *self._also)}
        also = [name for name in self._also if name not in states and name not in self._named]
        return EditPlan(
            Verb("resized", "resize"),
            self._named,
            also,
            Changes(tensors=self._tensors, contents=self._contents),
            check=check,
            carried=self._carried,
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        """Return what the config beside the checkpoint says of rows, and which others have as many."""
        config = config_beside(self._checkpoint.container.files[0].path) or {}
        text = config.get("text_config")
        said = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
        found = [new for old, new in self._rows.values() if old == said != new]
        notes = [f"config.json says vocab_size {said}, and the rows are {found[0]} now"] if found else []
        before = {old for old, _ in self._rows.values() if old >= _MANY}
        others = [
            tensor.name
            for tensor in self._checkpoint.own
            if isinstance(tensor, Tensor) and tensor.shape and tensor.shape[0] in before
            and tensor.name not in self._tensors
        ]  # fmt: skip
        if others:
            notes.append(f"with as many rows as before: {listed(others, 5)}")
        return notes


_MANY = 64
"""Rows from which on it is no chance that another tensor has as many."""

_ROW = 64 << 20
"""Bytes of a row whose mean is held in memory."""
