"""The engine of `show`: the values of entries, no more of them read than are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Index, Region
from ckpt_cli.budget import Budget
from ckpt_cli.errors import UnsupportedError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor, Value
from ckpt_cli.ops.select import Selection, part_of, select, select_one

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUMMARY_OVER = 1000
"""Elements over which a tensor is summarized, as torch does."""

EDGE_ITEMS = 3
"""Elements that a summary keeps at each end of a dimension."""

FULL_OVER = 500_000
"""Elements over which text in full is refused: its layout needs all values at once."""

TABLE_OVER = 50_000
"""Elements over which a table with columns in step is refused."""

_PIECE = 1 << 20
"""Elements decoded at a time."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A tensor, or a part of one, that can be read piece by piece."""

    checkpoint: Checkpoint
    tensor: Tensor
    region: Region
    label: str
    """Its name, with the index that was asked for."""
    whole: bool
    """True if no index was given."""
    index: Index = ()
    """The index that `region` is of the tensor."""
    absent: bool = False
    """True if it stands for elements that a sparse tensor does not store: zeros."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the values; a packed float4 has two a stored element."""
        from ckpt_cli.arrays.codec import value_shape

        return value_shape(self.tensor.dtype, self.region.shape)

    def array(self, index: Index = ()) -> NDArray[Any]:
        """Return the values, or those at a basic index into the stored elements."""
        from ckpt_cli.arrays.codec import stored_of
        from ckpt_cli.arrays.quantized import codec_of

        region = self.region.at(index)
        codec = codec_of(self.checkpoint, self.tensor).at(self.index).at(index)
        if self.absent:
            import numpy as np

            return codec.decode(np.zeros(region.shape, codec.stored))
        return codec.decode(stored_of(self.tensor, codec, region))

    def edges(self) -> NDArray[Any]:
        """Return the values that a summary shows; only the corners' bytes are read."""
        import itertools

        import numpy as np

        ends = [_ends(size) for size in self.region.shape]
        sizes = [sum(stop - start for start, stop in pairs) for pairs in ends]
        found: NDArray[Any] | None = None
        for corner in itertools.product(*map(_targets, ends)):
            values = self.array(tuple(slice(*source) for source, _ in corner))
            if found is None:
                found = np.empty([*sizes, *values.shape[len(sizes) :]], values.dtype)
            found[tuple(slice(*place) for _, place in corner)] = values
        return self.array() if found is None else found


def _ends(size: int) -> list[tuple[int, int]]:
    """Return the ranges of a dimension that a summary shows: all of it, or both ends of a longer one."""
    return [(0, size)] if size <= 2 * EDGE_ITEMS else [(0, EDGE_ITEMS), (size - EDGE_ITEMS, size)]


def _targets(ends: list[tuple[int, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Each range with the one that it takes in the summary."""
    placed = []
    position = 0
    for start, stop in ends:
        placed.append(((start, stop), (position, position + stop - start)))
        position += stop - start
    return placed


@dataclass(frozen=True, slots=True)
class Composed:
    """A tensor that is made of others, or that has no values and is shown all the same."""

    tensor: Tensor
    label: str
    parts: tuple[Shown | Composed | Unshown, ...] = ()
    """Its parts, or the constituents of a nested tensor."""


@dataclass(frozen=True, slots=True)
class Unshown:
    """A tensor whose values cannot be shown, met while showing many."""

    tensor: Tensor
    reason: str


Item = Shown | Composed | Unshown | Value
"""The items that one NAME selects."""


def show(checkpoint: Checkpoint, arguments: Sequence[str], *, raw: bool = False, settings: bool = False) -> list[Item]:
    """Return what each NAME selects, in order, nothing of plain tensors read yet; no NAME selects the whole checkpoint.

    The settings of a module, such as `training`, are left out as its state_dict leaves them out, unless `settings`
    asks for them, a NAME is exactly one, or selects nothing else. With `raw`, quantized tensors are their integers.
    Raises UnsupportedError for a tensor whose values cannot be read
    and that was named exactly.
    """
    with about(checkpoint.path):
        reader = _Reader(checkpoint, Budget.of(checkpoint), raw)
        chosen = [
            selection
            for found in _each(checkpoint, arguments)
            for selection in _without_settings(checkpoint, found, settings=settings)
        ]
        return [_shown(reader, selection) for selection in chosen]


def _each(checkpoint: Checkpoint, arguments: Sequence[str]) -> Iterator[list[Selection]]:
    """Yield what each NAME selects, or all."""
    if not arguments:
        yield select(checkpoint, ())
    for argument in arguments:
        yield select_one(checkpoint, argument)


def _without_settings(checkpoint: Checkpoint, found: list[Selection], *, settings: bool) -> list[Selection]:
    """Leave out the settings of modules, unless they were asked for or nothing else is there."""
    if settings:
        return found
    if all(selection.exact or isinstance(selection.entry, Tensor) for selection in found):
        return found
    from ckpt_cli.nn.state_dict import is_one_module

    whole = is_one_module(checkpoint)
    kept = [
        selection
        for selection in found
        if selection.exact or isinstance(selection.entry, Tensor) or not (whole or selection.entry.of_module)
    ]
    return kept or found


@dataclass(frozen=True, slots=True)
class _Reader:
    """The state that the items of one `show` share."""

    checkpoint: Checkpoint
    budget: Budget
    raw: bool
    """True if quantized tensors are their integers."""


def _shown(reader: _Reader, selection: Selection) -> Item:
    entry: Entry = selection.entry
    if isinstance(entry, Value):
        if selection.index is not None:
            raise UsageError(f"{entry.name!r} is not a tensor, so it takes no index")
        return entry
    try:
        if selection.index is None:
            return _whole(reader, entry, entry.name)
        return _indexed(reader, entry, selection.index)
    except UnsupportedError as error:
        if selection.exact:
            raise
        return Unshown(entry, error.problem)


def _whole(reader: _Reader, tensor: Tensor, label: str) -> Shown | Composed:
    """Show all of a tensor; raise UnsupportedError where that is not possible."""
    from ckpt_cli.arrays.codec import require_plain

    if tensor.layout == "quantized" or (tensor.layout == "strided" and tensor.storage is not None):
        tensor = _checked(reader, tensor)
        return Shown(reader.checkpoint, tensor, part_of(tensor, None), label, whole=True)
    if tensor.layout in ("meta", "uninitialized"):
        return Composed(tensor, label)
    parts: Iterable[Tensor] = tensor.parts
    if tensor.layout in ("nested", "jagged"):
        from ckpt_cli.arrays.sparse_and_nested import constituents, count_constituents

        reader.budget.constituents(count_constituents(tensor))
        parts = constituents(reader.checkpoint, tensor)
    elif tensor.layout.startswith("sparse"):
        from ckpt_cli.arrays.sparse_and_nested import check_sparse

        check_sparse(tensor)
    elif tensor.layout != "wrapper" or not tensor.parts:
        require_plain(tensor)  # which raises
    return Composed(tensor, label, tuple(_part(reader, part) for part in parts))


def _part(reader: _Reader, part: Tensor) -> Shown | Composed | Unshown:
    try:
        return _whole(reader, part, part.name)
    except UnsupportedError as error:
        return Unshown(part, error.problem)


def _indexed(reader: _Reader, tensor: Tensor, index: Index) -> Shown:
    from ckpt_cli.arrays.sparse_and_nested import place

    label = f"{tensor.name}[{spell_index(index)}]"
    if tensor.layout == "quantized":
        part, inner, stored = tensor, index, True
    else:
        reader.budget.read_parts(tensor, Region.of)
        placed = place(reader.checkpoint, tensor, index)
        part, inner, stored = replace(placed.part, name=tensor.name), placed.index, placed.stored
    part = _checked(reader, part)
    region = part_of(part, inner)
    return Shown(reader.checkpoint, part, region, label, whole=False, index=inner, absent=not stored)


def _checked(reader: _Reader, tensor: Tensor) -> Tensor:
    """A tensor whose values can be shown: the integers of a quantized one with `raw`."""
    from ckpt_cli.arrays.codec import require_plain

    if tensor.layout != "quantized":
        require_plain(tensor)
    elif reader.raw:
        from ckpt_cli.arrays.quantized import integers

        return integers(tensor)
    else:
        reader.budget.read_parts(tensor, Region.of)
    return tensor


def spell_index(index: Index) -> str:
    """An index as it is written between brackets."""
    return ",".join(map(_spell_item, index))


def _spell_item(item: object) -> str:
    if isinstance(item, slice):
        bounds = ["" if bound is None else str(bound) for bound in (item.start, item.stop)]
        return ":".join([*bounds, str(item.step)] if item.step is not None else bounds)
    return "..." if item is Ellipsis else str(item)


def shown_in(items: Iterable[Item]) -> Iterator[Shown]:
    """Yield the items and parts that have values."""
    for item in items:
        if isinstance(item, Shown):
            yield item
        elif isinstance(item, Composed):
            yield from shown_in(item.parts)


def require_bounded(items: Sequence[Item]) -> None:
    """Raise LimitError where the values as text are far more than the file has, as shared storages allow."""
    shown = list(shown_in(items))
    if shown:
        budget = Budget.of(shown[0].checkpoint, as_text=True)
        for item in shown:
            budget.read(item.tensor, item.region)


def printed_numel(shown: Shown, *, full: bool) -> tuple[int, bool]:
    """Return the number of elements that are printed of a tensor, and whether that is a summary."""
    numel = math.prod(shown.shape)
    summarized = not full and numel > SUMMARY_OVER
    return math.prod(min(size, 2 * EDGE_ITEMS) for size in shown.shape) if summarized else numel, summarized


def require_printable(items: Iterable[Item], *, full: bool) -> None:
    """Raise LimitError where the elements that are printed are far more than the file has bytes."""
    budget: Budget | None = None
    for shown in shown_in(items):
        budget = budget or Budget.of(shown.checkpoint, as_text=True)
        numel, _ = printed_numel(shown, full=full)
        budget.print(numel if numel <= FULL_OVER else 0)  # of which more are refused one by one


def blocks(shown: Shown, most: int = _PIECE) -> Iterator[NDArray[Any]]:
    """Yield the values in row-major order, flat, at most about `most` elements at a time."""
    from ckpt_cli.arrays.indexing import row_pieces

    for part in row_pieces(shown.region, most):
        yield shown.array(part).reshape(-1)
        for file in shown.checkpoint.container.files:
            file.forget()


def save_npy(shown: Shown, path: str) -> int:
    """Write the values as a numpy file, atomically; returns its bytes.

    A dtype that numpy has not (bfloat16, float8…) is written as float32, which holds each of its values exactly.
    Raises UsageError where `path` is the checkpoint itself.
    """
    import io

    import numpy as np

    from ckpt_cli.ops.output import check_output, writing

    Budget.of(shown.checkpoint).read(shown.tensor, shown.region)
    check_output(path, shown.checkpoint.path, "a numpy file holds one tensor: name another file")
    first = shown.array(tuple(slice(0, 0) for _ in shown.region.shape))
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shown.shape}
    np.lib.format.write_array_header_1_0(header, described)
    with writing(path) as target, target.stream() as out:
        out.write(header.getvalue())
        for block in blocks(shown):
            out.write(block.tobytes())
        return out.tell()
