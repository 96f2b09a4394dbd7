"""Plans of commands that combine checkpoints of one model: a tensor of each name is made of those of all files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.edits.convert_contents import plain_view
from ckpt_cli.edits.derive import Derived, DeriveOptions, derive
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import RefusedError, UnsupportedError, about, listed, quoted, some_of
from ckpt_cli.facts import dataclass
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.changes import Changes, Content, content_of
from ckpt_cli.model.checkpoint import Checkpoint, Storage, StorageSource, Tensor
from ckpt_cli.model.new_checkpoint import tied_groups
from ckpt_cli.ops.aliasing import all_strided, by_storage, digest_of_all, is_array, partly_shared
from ckpt_cli.ops.match_states import model_tensors
from ckpt_cli.parallel.made import MadeBytes, Making, MakingAt
from ckpt_cli.parallel.tensor_chunks import TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.cast import Losses

COMBINE = Verb("combined", "combine")

FIRST, LAST, EQUAL, MAX = "first", "last", "equal", "max"
INTS = (EQUAL, FIRST, LAST, MAX)

_WIDER = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
"""The dtypes that are combined, by width; of two others of the same width the result is float32."""


class Asked(Protocol):
    """Options that all these commands have."""

    @property
    def select(self) -> str | None:
        """The prefix below which tensors are combined; None for those of the model."""

    @property
    def ints(self) -> str:
        """`first`, `last` or `max` if integers that differ are those, else `equal`."""

    @property
    def common(self) -> bool:
        """True if only the names that all have are combined, and others are left as they are."""

    @property
    def untie(self) -> bool:
        """True if names that are tied in some checkpoints only get bytes of their own."""

    @property
    def finite(self) -> bool:
        """True if NaN and infinities are an error."""

    @property
    def dtype(self) -> DType | None:
        """The new dtype; None for the widest of each tensor."""

    @property
    def output(self) -> DeriveOptions:
        """Options of the new checkpoint."""


class Sources(NamedTuple):
    """The tensors of one name, of which a new one is made."""

    name: str
    dtypes: Sequence[DType]
    numel: int
    target: DType
    """The new dtype."""
    readers: Callable[[], Sequence[TensorReader]]
    note: Callable[[object], None]
    """Takes the facts of each piece, a `Summed`."""
    executor: Executor | None


Method = Callable[[Sources], StorageSource]
"""Makes the bytes of a tensor of those of several."""


@dataclass(frozen=True, slots=True)
class Combined:
    """The result of a combination, or of its dry run."""

    made: int
    """The number of tensors that were made; tied ones count for each name."""
    copied: Sequence[str]
    """Tensors of the model that were taken as they are."""
    warnings: Sequence[str]
    derived: Derived


def combine(
    paths: Sequence[str], place: int, output: str, method: Method, options: Asked, *, drops: bool = False
) -> Combined:
    """Write a combination of some checkpoints as `output`, all or nothing.

    What is not combined is that of the checkpoint number `place`; if it `drops` that, it is left out. Raises
    RefusedError where names, shapes or ties differ.
    """
    with ExitStack() as stack:
        others = [
            None if number == place else stack.enter_context(closing(_opened(path)))
            for number, path in enumerate(paths)
        ]
        plan = _Plan(paths, others, place, method, options)
        how = options.output
        base = stack.enter_context(closing(_opened(paths[place])))
        if drops:
            how = replace(how, only=model_tensors(base, options.select)[0].removesuffix("."))
        derived = derive(paths[place], output, plan.make, how, base)
    return Combined(plan.made, plan.copied, [*plan.warnings(), *derived.notes], derived)


def _opened(path: str) -> Checkpoint:
    with about(path):
        return open_checkpoint(path)


class _Plan:
    """Plans the combination once the checkpoint that the rest is taken from is open."""

    def __init__(
        self,
        paths: Sequence[str],
        others: Sequence[Checkpoint | None],
        place: int,
        method: Method,
        options: Asked,
    ) -> None:
        from ckpt_cli.arrays.cast import Losses

        self._paths = paths
        self._others = others
        self._place = place
        self._method = method
        self._options = options
        self._losses: Losses = Losses()
        self._not_finite: dict[str, set[int]] = {}
        self._left: list[str] = []
        self._counters: list[str] = []
        self.made = 0
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
        self.made = len(tensors)
        if not tensors:
            raise RefusedError("nothing of it can be combined: it has no floating tensors", path=base.path)
        return EditPlan(COMBINE, tuple(tensors), changes=Changes(tensors=tensors, contents=contents), check=self._check)

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
        if is_alike and len({digest_of_all(*pair) for pair in zip(checkpoints, row, strict=True)}) == 1:
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
        """Return a storage that has the elements of one new tensor."""
        dtype, base, executor = self._dtype(row), row[self._place], self._options.output.executor

        def readers() -> list[TensorReader]:
            pairs = zip(checkpoints, row, strict=True)
            return [TensorReader(checkpoint, tensor, Region.of(tensor)) for checkpoint, tensor in pairs]

        def note(facts: Any) -> None:
            self._losses.add(facts.losses)
            if facts.not_finite:
                self._not_finite.setdefault(name, set()).update(facts.not_finite)

        sources = Sources(name, [tensor.dtype for tensor in row], base.numel, dtype, readers, note, executor)
        source = self._method(sources) if _is_floating(base) else self._chosen(sources)
        location = base.storage.location if base.storage is not None else "cpu"
        return Storage(base.name, dtype.nbytes(base.numel), location, source)

    def _chosen(self, sources: Sources) -> StorageSource:
        """Return the bytes of integers that differ: those of one of the files, or the greatest of all."""
        from ckpt_cli.arrays.weighted import Chosen

        last = len(sources.dtypes) - 1
        making = Chosen(sources.target, {FIRST: 0, LAST: last}.get(self._options.ints))
        return made_bytes(sources, making)


def made_bytes(sources: Sources, making: Making | MakingAt) -> MadeBytes:
    """Return the bytes that are made of some sources."""
    size = sources.target.itemsize
    return MadeBytes(sources.readers, making, sources.numel, size, sources.note, sources.executor)


_MOST = 10
"""Names that a message spells out."""


def _by_name(checkpoints: Sequence[Checkpoint], prefix: str | None) -> list[dict[str, Tensor]]:
    """Return the tensors to be combined of each, by their names below the prefix, or below that of the model.

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
    """True if it has floats that can be combined."""
    return (
        tensor.layout == "strided"
        and tensor.storage is not None
        and tensor.dtype.name in _WIDER
        and not is_array(tensor)
    )
