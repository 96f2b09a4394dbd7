"""The engine of `diff`: compare two checkpoints by value, whatever formats and shards they are in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.errors import NameNotFoundError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, Tensor, Value
from ckpt_cli.ops.aliasing import tie_groups
from ckpt_cli.ops.differences import Change, Diff, Fact, Tie
from ckpt_cli.ops.optimizer_names import by_parameter
from ckpt_cli.ops.rename_rules import Rule, in_turn
from ckpt_cli.ops.select import excluded_names, select
from ckpt_cli.parallel.tensor_pairs import Pair, compare_pairs

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.compare import Tolerance


@dataclass(frozen=True, slots=True)
class Asked:
    """Options of a comparison."""

    names: Sequence[str] = ()
    """NAMEs, as they are after the renaming."""
    rules: Sequence[Rule] = ()
    """Functions from old names to new ones, applied to both in turn."""
    quick: bool = False
    """True if only it matters that there is a difference, not which."""
    exclude: Sequence[str] = ()
    """What is left out, named as NAMEs are."""
    ignore_dtype: bool = False
    """True if dtypes may differ: only values that differ are differences."""


def diff(
    a: Checkpoint,
    b: Checkpoint,
    asked: Asked,
    tolerance: Tolerance,
    executor: Executor,
    on_progress: OnProgress = lambda _, __: None,
) -> Diff:
    """Compare two checkpoints on an executor; `on_progress` gets the bytes done and in all.

    With `quick` only whether the answer has differences is right. States of optimizers are compared by parameter, where
    it is known which are whose. Raises UsageError where names fall together,
    NameNotFoundError for a NAME that neither has.
    """
    a, b = by_parameter([a, b], asked.names)
    for file in (*a.container.files, *b.container.files) if not asked.names else ():
        file.note_whole()
    with about(a.path):
        return _Comparison(a, b, asked, tolerance).run(executor, on_progress)


class _Comparison:
    """One comparison under way."""

    def __init__(self, a: Checkpoint, b: Checkpoint, asked: Asked, tolerance: Tolerance) -> None:
        self._sides = (_aligned(a, asked), _aligned(b, asked))
        self._budgets = (Budget.of(a), Budget.of(b))
        self._asked = asked
        self._tolerance = tolerance
        self._changed: list[Callable[[], Change | None]] = []
        self._values: list[Fact] = []
        self._pairs: dict[object, Pair] = {}
        self._pairs_of_parts: set[object] = set()
        self._both = 0
        """Tensors that both have."""
        self._names: set[str] = set()
        """Their names."""

    def run(self, executor: Executor, on_progress: OnProgress) -> Diff:
        """All of it."""
        a, b = map(_numbered, self._chosen())
        for key in a:
            if key in b:
                self._entries(key[0], a[key], b[key])
        found = Diff(
            [name for name, place in a if (name, place) not in b],
            [name for name, place in b if (name, place) not in a],
            [change for made in self._changed if (change := made()) is not None],
            self._values,
            _ties(_firsts(a), _firsts(b)),
            [] if self._asked.names else self._metadata(),
        )
        if self._asked.quick and not found.equal:
            return found
        compare_pairs(list(self._pairs.values()), executor, on_progress, quick=self._asked.quick)
        found = replace(
            found, changed=[self._placed(change) for made in self._changed if (change := made()) is not None]
        )
        return replace(
            found,
            tensors_equal=self._both - len(found.differing),
            tensors_only_a=sum(isinstance(entry, Tensor) for key, entry in a.items() if key not in b),
            tensors_only_b=sum(isinstance(entry, Tensor) for key, entry in b.items() if key not in a),
        )

    def _placed(self, change: Change) -> Change:
        """Return a change with the name of the whole tensor, where it is that of a part."""
        name = change.name
        while name and name not in self._names:
            name = name.rpartition(".")[0]
        return change if name == change.name else replace(change, tensor=name)

    def _chosen(self) -> list[Sequence[Entry]]:
        """Return the entries of each that NAMEs select: one that neither has is an error."""
        chosen = self._named()
        excluded = self._excluded()
        if not excluded:
            return chosen
        return [[entry for entry in entries if entry.name not in excluded] for entries in chosen]

    def _excluded(self) -> set[str]:
        """Return the names that are left out: an argument that selects nothing in either is an error."""
        found: set[str] = set()
        a, b = self._sides
        for name in self._asked.exclude:
            with suppress(NameNotFoundError):
                found |= excluded_names(a, [name])
                with suppress(NameNotFoundError):
                    found |= excluded_names(b, [name])
                continue
            found |= excluded_names(b, [name])
        return found

    def _named(self) -> list[Sequence[Entry]]:
        """Return the entries of each that NAMEs select."""
        names = self._asked.names
        if not names:
            return [checkpoint.entries for checkpoint in self._sides]
        found: list[list[Entry]] = [[], []]
        for name in names:
            errors = []
            for entries, checkpoint in zip(found, self._sides, strict=True):
                try:
                    selections = select(checkpoint, [name])
                except NameNotFoundError as error:
                    errors.append(error)
                    continue
                if any(selection.index is not None for selection in selections):
                    raise UsageError("diff compares whole tensors: leave the index out")
                entries.extend(selection.entry for selection in selections)
            if len(errors) == 2:
                raise errors[0]
        return [list({id(entry): entry for entry in entries}.values()) for entries in found]

    def _metadata(self) -> list[Fact]:
        a, b = self._sides
        if a.format != b.format:
            return []
        keys = dict.fromkeys([*a.metadata, *b.metadata])
        return [
            Fact(key, a.metadata.get(key), b.metadata.get(key))
            for key in keys
            if a.metadata.get(key) != b.metadata.get(key)
        ]

    def _entries(self, name: str, a: Entry, b: Entry) -> None:
        """Compare what has one name in both."""
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            self._both += 1
            self._names.add(name)
            self._tensors(name, a, b)
        elif isinstance(a, Value) and isinstance(b, Value):
            if not _same_value(a.value, b.value):
                self._values.append(Fact(name, a.value, b.value))
        else:
            self._values.append(Fact(name, *(_or_tensor(entry) for entry in (a, b))))

    def _tensors(self, name: str, a: Tensor, b: Tensor) -> None:
        numel = a.numel
        if a.layout != b.layout:
            self._changed.append(lambda: Change(name, "layout", a.layout, b.layout, numel))
        elif a.shape != b.shape or (a.storage is None) != (b.storage is None):
            self._changed.append(lambda: Change(name, "shape", _list(a.shape), _list(b.shape), numel))
        elif a.storage is None:
            self._parts(name, a, b)
        elif not _comparable(a, b):
            self._changed.append(lambda: Change(name, "dtype", a.dtype.name, b.dtype.name, numel))
        else:
            pair = self._pair(a, b)
            self._changed.append(lambda: _change(name, a, b, pair.found, ignore_dtype=self._asked.ignore_dtype))
            if a.attributes or b.attributes:
                self._parts(name, replace(a, parts=a.attributes), replace(b, parts=b.attributes))

    def _parts(self, name: str, a: Tensor, b: Tensor) -> None:
        """Compare the parts of tensors, or the facts about those that have no values."""
        roles_a, roles_b = [part.name for part in a.parts], [part.name for part in b.parts]
        if roles_a != roles_b:
            self._changed.append(lambda: Change(name, "layout", roles_a, roles_b, a.numel))
        elif not roles_a and a.dtype.name != b.dtype.name and not self._asked.ignore_dtype:
            self._changed.append(lambda: Change(name, "dtype", a.dtype.name, b.dtype.name, a.numel, 0))
        key = (a.view or id(a), b.view or id(b))
        if a.parts and key not in self._pairs_of_parts:
            self._pairs_of_parts.add(key)
            for part_a, part_b in zip(a.parts, b.parts, strict=False):
                if part_a.name == part_b.name:
                    self._tensors(f"{name}.{part_a.name}", part_a, part_b)

    def _pair(self, a: Tensor, b: Tensor) -> Pair:
        """Return the comparison of two views, which tied names share."""
        from ckpt_cli.arrays.compare import Apart

        key = (a.view or id(a), b.view or id(b))
        if key not in self._pairs:
            for checkpoint, budget, tensor in zip(self._sides, self._budgets, (a, b), strict=True):
                with about(checkpoint.path):
                    budget.read_parts(tensor, Region.of)
                    budget.read(tensor, Region.of(tensor))
            self._pairs[key] = Pair(self._sides, (a, b), self._tolerance, Apart())
        return self._pairs[key]


def _numbered(entries: Sequence[Entry]) -> dict[tuple[str, int], Entry]:
    """Entries by their name and how many before them have it too: keys that flatten to one name are all compared."""
    found: dict[tuple[str, int], Entry] = {}
    counts: Counter[str] = Counter()
    for entry in entries:
        found[entry.name, counts[entry.name]] = entry
        counts[entry.name] += 1
    return found


def _firsts(entries: Mapping[tuple[str, int], Entry]) -> dict[str, Entry]:
    """Return the first entry of each name."""
    return {name: entry for (name, place), entry in entries.items() if not place}


def _comparable(a: Tensor, b: Tensor) -> bool:
    """True if elements of both can be compared one by one: of one dtype, or each one value."""
    if a.dtype.name == b.dtype.name or a.layout == "quantized":
        return True
    return all(side.dtype.numpy is not None and side.dtype.name != "float4_e2m1fn_x2" for side in (a, b))


def _change(name: str, a: Tensor, b: Tensor, found: object, *, ignore_dtype: bool) -> Change | None:
    """Return the difference of a compared tensor; None where there is no difference."""
    from ckpt_cli.arrays.codec import value_shape
    from ckpt_cli.arrays.compare import Apart, Sums

    assert isinstance(found, Apart)
    if (a.dtype.name == b.dtype.name or ignore_dtype) and not found.differing:
        return None
    shape = a.shape or ()
    sums = found.sums
    if a.dtype.numpy is None and a.layout == "strided":  # compared byte by byte
        shape = (a.nbytes,)
        sums = Sums()
    shape = value_shape(a.dtype, shape)
    first = [_index(shape, number) for number, _, _ in found.first]
    what, values_a, values_b = "value", [was for _, was, _ in found.first], [now for _, _, now in found.first]
    facts: tuple[object, object] = (values_a, values_b)
    if a.dtype.name != b.dtype.name and not ignore_dtype:
        what, facts = "dtype", (a.dtype.name, b.dtype.name)
    return Change(
        name, what, *facts, math.prod(shape), found.differing, found.max_abs, found.max_rel, first,
        sums.mean_abs, sums.relative_l2, sums.cosine,
    )  # fmt: skip


def _index(shape: Sequence[int], number: int) -> list[int]:
    """Return the index of an element, from its number in row-major order."""
    index = []
    for size in reversed(shape):
        number, place = divmod(number, size)
        index.append(place)
    return index[::-1]


def _list(shape: tuple[int, ...] | None) -> list[int] | None:
    return None if shape is None else list(shape)


def _same_value(a: object, b: object) -> bool:
    """True if two plain values are the same; NaN is, and 1 is neither 1.0 nor True."""
    try:
        return repr(a) == repr(b)
    except (ValueError, RecursionError):  # integers of thousands of digits
        return a == b


def _or_tensor(entry: Entry) -> object:
    if isinstance(entry, Value):
        return entry.value
    return Opaque(f"<tensor {entry.dtype} {_list(entry.shape)}>")


def _aligned(checkpoint: Checkpoint, asked: Asked) -> Checkpoint:
    """Return the checkpoint with the names under which it is compared."""
    if not asked.rules:
        return checkpoint
    rename = in_turn([rule.renaming() for rule in asked.rules if rule.value])
    own: dict[str, str] = {}
    entries: list[Entry] = []
    for entry in checkpoint.entries:
        name = rename(entry.name)
        if own.setdefault(name, entry.name) != entry.name:
            raise UsageError(f"{own[name]!r} and {entry.name!r} would both be called {name!r}", path=checkpoint.path)
        entries.append(replace(entry, name=name))
    return replace(checkpoint, entries=entries)


def _ties(a: Mapping[str, Entry], b: Mapping[str, Entry]) -> list[Tie]:
    """Names of both that are tied in one and not in the other."""
    common = [name for name in a if isinstance(a[name], Tensor) and isinstance(b.get(name), Tensor)]
    groups_a, groups_b = _tie_names(a, common), _tie_names(b, common)
    of_a, of_b = ({name: number for number, group in enumerate(groups) for name in group}
                  for groups in (groups_a, groups_b))  # fmt: skip
    found = []
    for groups, of_other, in_a in ((groups_a, of_b, True), (groups_b, of_a, False)):
        for group in groups:
            others = {of_other.get(name, -1) for name in group}
            if others == {-1} or len(others) > 1:
                found.append(Tie(group, in_a, not in_a))
    return found


def _tie_names(side: Mapping[str, Entry], names: Sequence[str]) -> list[list[str]]:
    """Return the groups of tied names, as the names are compared."""
    tensors = [replace(entry, name=name) for name in names if isinstance(entry := side[name], Tensor)]
    return [[tensor.name for tensor in group] for group in tie_groups(tensors)]
