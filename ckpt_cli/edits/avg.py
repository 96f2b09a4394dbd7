"""The engine of `avg`: the weighted average of several checkpoints of one model, in one pass over their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.edits.avg_options import DROP, EQUAL, FIRST, LAST, AvgOptions, named_twice, place_of_rest, weights_of
from ckpt_cli.edits.convert_contents import plain_view
from ckpt_cli.edits.derive import Derived, derive
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import RefusedError, UnsupportedError, about, listed, quoted, some_of
from ckpt_cli.facts import dataclass
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.changes import Changes, Content, content_of
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.model.new_checkpoint import tied_groups
from ckpt_cli.ops.aliasing import all_strided, by_storage, content_digest, is_array, partly_shared
from ckpt_cli.ops.match_states import model_tensors
from ckpt_cli.parallel.made import MadeBytes, Making
from ckpt_cli.parallel.tensor_chunks import TensorReader

if TYPE_CHECKING:
    from ckpt_cli.arrays.cast import Losses

AVERAGE = Verb("averaged", "average")


_WIDER = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
"""The dtypes that are averaged, by width; of two others of the same width the result is float32."""


@dataclass(frozen=True, slots=True)
class Average:
    """The result of an average, or of its dry run."""

    inputs: Sequence[tuple[str, float]]
    """Each checkpoint and its weight."""
    averaged: int
    """The number of tensors that were averaged; tied ones count for each name."""
    copied: Sequence[str]
    """Tensors of the model that were taken as they are."""
    source: str
    """The checkpoint that everything else is from."""
    warnings: Sequence[str]
    derived: Derived


def average(paths: Sequence[str], output: str, options: AvgOptions) -> Average:
    """Write the average of some checkpoints as `output`, all or nothing.

    Sums are made in float32, or float64 for float64, in the order of the checkpoints, and rounded once. What is not
    averaged is that of one of them. Raises RefusedError where names, shapes or ties differ, UsageError for options
    that do not go together.
    """
    weights, divisor = weights_of(len(paths), options)
    place = place_of_rest(len(paths), options)
    with ExitStack() as stack:
        others = [
            None if number == place else stack.enter_context(closing(_opened(path)))
            for number, path in enumerate(paths)
        ]
        plan = _Plan(paths, others, place, weights, divisor, options)
        how = options.output
        base = stack.enter_context(closing(_opened(paths[place])))
        if options.rest == DROP:
            how = replace(how, only=model_tensors(base, options.select)[0].removesuffix("."))
        try:
            derived = derive(paths[place], output, plan.make, how, base)
        except RefusedError as error:
            if error.hint is not None and "--tensors-only" in error.hint:  # which is an option of convert
                error.hint = "--rest drop writes the averaged tensors alone"
            raise
    warnings = [*named_twice(paths), *plan.warnings(), *derived.notes]
    return Average(list(zip(paths, weights, strict=True)), plan.averaged, plan.copied, paths[place], warnings, derived)


def _opened(path: str) -> Checkpoint:
    with about(path):
        return open_checkpoint(path)


class _Plan:
    """Plans the average once the checkpoint that the rest is taken from is open."""

    def __init__(
        self,
        paths: Sequence[str],
        others: Sequence[Checkpoint | None],
        place: int,
        weights: Sequence[float],
        divisor: float | None,
        options: AvgOptions,
    ) -> None:
        from ckpt_cli.arrays.cast import Losses

        self._paths = paths
        self._others = others
        self._place = place
        self._weights = weights
        self._divisor = divisor
        self._options = options
        self._losses: Losses = Losses()
        self._not_finite: dict[str, set[int]] = {}
        self._left: list[str] = []
        self._counters: list[str] = []
        self.averaged = 0
        self.copied: list[str] = []

    def make(self, base: Checkpoint) -> EditPlan:
        """Return the plan for the checkpoint that the rest is taken from."""
        checkpoints = [other or base for other in self._others]
        sides = _by_name(checkpoints, self._options.select)
        names = self._shared_names(sides)
        rows = {name: [side[name] for side in sides] for name in names}
        chosen = {name: row for name, row in rows.items() if self._is_made(checkpoints, name, row)}
        budgets = [Budget.of(checkpoint) for checkpoint in checkpoints]
        tensors: dict[str, Tensor] = {}
        contents: dict[Storage, Content] = {}
        for group in self._groups(base, chosen):
            row = chosen[group[0]]
            self._require_alike(group[0], row)
            for budget, tensor in zip(budgets, row, strict=True):
                budget.read(tensor, Region.of(tensor))
            storage = self._made(checkpoints, group[0], row)
            contents[storage] = content_of(storage)
            for name in group:
                tensor = chosen[name][self._place]
                tensors[tensor.name] = plain_view(tensor, self._dtype(row), storage)
        self.averaged = len(tensors)
        if not tensors:
            raise RefusedError("nothing of it can be averaged: it has no floating tensors", path=base.path)
        return EditPlan(AVERAGE, tuple(tensors), changes=Changes(tensors=tensors, contents=contents), check=self._check)

    def warnings(self) -> list[str]:
        """Return what is to be said of the average, a line each."""
        found = [
            f"NaN or infinities in {name}: {listed([self._paths[number] for number in sorted(files)], _MOST)}"
            for name, files in self._not_finite.items()
        ]
        if len(found) > _MOST:
            found[_MOST:] = [f"NaN or infinities in {len(found) - _MOST} more tensors"]
        if self._counters:
            path = self._paths[self._place]
            found.append(f"counters that differ are those of {path}: {listed(self._counters, _MOST)}")
        if self._left:
            found.append(f"not in all of them, so left as they are: {listed(self._left, _MOST)}")
        return found

    def _check(self) -> None:
        if self._not_finite and self._options.finite:
            raise RefusedError(
                "there are NaN or infinities among the values",
                details=some_of(self.warnings()),
                hint="leave --finite out",
            )
        if self._losses.infinite:
            raise RefusedError(
                f"{self._losses.infinite:,} finite sums are too large for the new dtype", hint="--dtype float32"
            )

    def _shared_names(self, sides: Sequence[Mapping[str, Tensor]]) -> list[str]:
        """Return the names to be averaged; raises RefusedError where they differ, unless those of all are wanted."""
        base = sides[self._place]
        shared = [name for name in base if all(name in side for side in sides)]
        every = {name for side in sides for name in side}
        if self._options.common:
            self._left = [name for name in every if name not in set(shared)]
            if not shared:
                raise RefusedError("no name is in all of them")
            return shared
        for number, side in enumerate(sides):
            missing = [name for name in every if name not in side]
            if missing:
                raise RefusedError(
                    f"it lacks {len(missing)} of the {len(every)} names of the others",
                    path=self._paths[number],
                    details=some_of(missing),
                    hint="--common averages what all have",
                )
        return shared

    def _is_made(self, checkpoints: Sequence[Checkpoint], name: str, row: Sequence[Tensor]) -> bool:
        """True for a tensor that is made of those of all files: of floats, or of integers that differ.

        False for one that is equal in all of them, or a counter: it stays that of the checkpoint with the rest. Raises
        UnsupportedError for all others.
        """
        base = row[self._place]
        if all(_is_floating(tensor) for tensor in row):
            return True
        is_alike = len({(tensor.dtype.name, tensor.shape, tensor.layout) for tensor in row}) == 1
        if is_alike and len({_digest(*pair) for pair in zip(checkpoints, row, strict=True)}) == 1:
            self.copied.append(base.name)
            return False
        if is_alike and base.layout == "strided" and base.dtype.category in ("int", "bool"):
            if self._options.ints != EQUAL:
                return True
            if base.numel == 1:
                self._counters.append(base.name)
                return False
            raise RefusedError(
                f"integers of {name!r} differ, and have no average", hint="--ints first|last|max says which to take"
            )
        problem = f"tensor {name!r} of {base.dtype} differs, and cannot be averaged"
        hint = f"ckpt cast {quoted(self._paths[self._place])} float32 first" if base.dtype.category == "float" else None
        raise UnsupportedError(problem, path=self._paths[self._place], hint=hint)

    def _groups(self, base: Checkpoint, chosen: Mapping[str, Sequence[Tensor]]) -> list[list[str]]:
        """Return the names in groups of those that stay tied; raises RefusedError where that is not so in all files."""
        if not self._options.untie:
            self._refuse_overlaps(base, [row[self._place] for row in chosen.values()])
        every: list[dict[tuple[str, ...], None]] = []
        for number in range(len(self._paths)):
            by_tensor = {id(row[number]): name for name, row in chosen.items()}
            groups = tied_groups([row[number] for row in chosen.values()])
            every.append(dict.fromkeys(tuple(by_tensor[id(tensor)] for tensor in group) for group in groups))
        if self._options.untie and any(groups.keys() != every[0].keys() for groups in every):
            return [[name] for name in chosen]
        for number, tied in enumerate(every):
            other = tied.keys() ^ every[self._place].keys()
            if other:
                apart = max(other, key=len)
                raise RefusedError(
                    f"{listed(apart, 3)} are tied in some of them only",
                    path=self._paths[number],
                    hint="--untie gives each bytes of its own",
                )
        return [list(group) for group in every[self._place]]

    def _refuse_overlaps(self, base: Checkpoint, tensors: Sequence[Tensor]) -> None:
        """Raise RefusedError for tensors that share bytes with others, averaged or not, and would not any more."""
        budget = Budget.of(base)
        made = {tensor.name for tensor in tensors}
        for _, views in by_storage(all_strided(base.tensors)):
            if made.isdisjoint(view.name for view in views):
                continue
            staying = {view.view for view in views if view.name not in made}
            tied = [view for view in views if view.view in staying]
            sharing = [*tied, *partly_shared(views, budget)[0]]
            if not made.isdisjoint(view.name for view in sharing):
                raise RefusedError(
                    f"{listed(list(dict.fromkeys(view.name for view in sharing)), 3)} share their bytes",
                    path=base.path,
                    hint="--untie gives each bytes of its own",
                )

    def _require_alike(self, name: str, row: Sequence[Tensor]) -> None:
        shapes = [list(tensor.shape or ()) for tensor in row]
        other = next((number for number, shape in enumerate(shapes) if shape != shapes[self._place]), None)
        if other is not None:
            raise RefusedError(
                f"tensor {name!r} is {shapes[other]}, and {shapes[self._place]} in {self._paths[self._place]}",
                path=self._paths[other],
            )

    def _dtype(self, row: Sequence[Tensor]) -> DType:
        """Return the new dtype: that of the options, else the widest."""
        if not _is_floating(row[self._place]):
            return row[self._place].dtype
        if self._options.dtype is not None:
            return self._options.dtype
        names = {tensor.dtype.name for tensor in row}
        widest = max(names, key=lambda name: _WIDER[name])
        return BY_NAME["float32" if names == {"float16", "bfloat16"} else widest]

    def _made(self, checkpoints: Sequence[Checkpoint], name: str, row: Sequence[Tensor]) -> Storage:
        """Return a storage that has the average of one tensor."""
        from ckpt_cli.arrays.weighted import Chosen, WeightedSum

        dtype, base = self._dtype(row), row[self._place]
        making: Making = WeightedSum([tensor.dtype for tensor in row], self._weights, self._divisor, dtype, name)
        if not _is_floating(base):
            making = Chosen(dtype, {FIRST: 0, LAST: len(row) - 1}.get(self._options.ints))

        def readers() -> list[TensorReader]:
            pairs = zip(checkpoints, row, strict=True)
            return [TensorReader(checkpoint, tensor, Region.of(tensor)) for checkpoint, tensor in pairs]

        def note(facts: Any) -> None:
            self._losses.add(facts.losses)
            if facts.not_finite:
                self._not_finite.setdefault(name, set()).update(facts.not_finite)

        source = MadeBytes(readers, making, base.numel, dtype.itemsize, note, self._options.output.executor)
        location = base.storage.location if base.storage is not None else "cpu"
        return Storage(base.name, dtype.nbytes(base.numel), location, source)


_MOST = 10
"""Names that a message spells out."""


def _by_name(checkpoints: Sequence[Checkpoint], prefix: str | None) -> list[dict[str, Tensor]]:
    """Return the tensors to be averaged of each, by their names below the prefix, or below that of the model.

    Where only some say which part is the model, it is below the same prefix in others that have tensors there.
    """
    found = [model_tensors(checkpoint, prefix) for checkpoint in checkpoints]
    known = [inside for inside, _ in found if inside]
    sides = []
    for checkpoint, (inside, tensors) in zip(checkpoints, found, strict=True):
        if not inside and prefix is None:
            names = [tensor.name for tensor in tensors]
            other = next((one for one in known if any(name.startswith(one) for name in names)), None)
            if other is not None:
                inside, tensors = model_tensors(checkpoint, other)
        sides.append({tensor.name[len(inside) :]: tensor for tensor in tensors})
    return sides


def _is_floating(tensor: Tensor) -> bool:
    """True if it has floats that can be averaged."""
    return (
        tensor.layout == "strided"
        and tensor.storage is not None
        and tensor.dtype.name in _WIDER
        and not is_array(tensor)
    )


def _digest(checkpoint: Checkpoint, tensor: Tensor) -> object:
    """Return a digest of a tensor's bytes; of one without bytes of its own, those of its parts."""
    if tensor.storage is None:
        return tuple((part.name, _digest(checkpoint, part)) for part in tensor.parts)
    return content_digest(checkpoint, tensor)
