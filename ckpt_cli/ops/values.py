"""What `show` answers: the values of entries, no more of them read than are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.regions import Index, Region
from ckpt_cli.errors import UnsupportedError, UsageError, about
from ckpt_cli.model import Checkpoint, Entry, Tensor, Value
from ckpt_cli.ops.names import Selection, part_of, select
from ckpt_cli.ops.outputs import check_output, writing
from ckpt_cli.ops.work import Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUMMARY_OVER = 1000
"""Elements over which a tensor is summarised, as torch does."""

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
    """Whether no index was given."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values; a packed float4 has two a stored element."""
        from ckpt_cli.arrays.codec import value_shape

        return value_shape(self.tensor.dtype, self.region.shape)

    def array(self, index: Index = ()) -> NDArray[Any]:
        """The values, or those at a basic index into the stored elements."""
        from ckpt_cli.arrays.codec import values_of

        return values_of(self.checkpoint, self.tensor, self.region.at(index))

    def edges(self) -> NDArray[Any]:
        """The values that a summary shows; only the corners' bytes are read."""
        import itertools

        import numpy as np

        from ckpt_cli.arrays.codec import Codec, stored_of

        codec = Codec(self.tensor)
        ends = [_ends(size) for size in self.region.shape]
        found = np.empty([sum(stop - start for start, stop in pairs) for pairs in ends], codec.stored)
        for corner in itertools.product(*map(_targets, ends)):
            part = tuple(slice(*source) for source, _ in corner)
            target = tuple(slice(*place) for _, place in corner)
            found[target] = stored_of(self.checkpoint, self.tensor, codec, self.region.at(part))
        return codec.decode(found)


def _ends(size: int) -> list[tuple[int, int]]:
    """The ranges of a dimension that a summary shows: all of it, or both ends of a longer one."""
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
class Unshown:
    """A tensor whose values cannot be told, met while showing many."""

    tensor: Tensor
    reason: str


def show(checkpoint: Checkpoint, arguments: Sequence[str]) -> list[Shown | Unshown | Value]:
    """What each NAME selects, in order, nothing read yet; no NAME selects the whole checkpoint.

    Raises UnsupportedError for a tensor without plain values that was named exactly.
    """
    with about(checkpoint.path):
        return [_shown(checkpoint, selection) for selection in select(checkpoint, arguments)]


def _shown(checkpoint: Checkpoint, selection: Selection) -> Shown | Unshown | Value:
    from ckpt_cli.arrays.codec import require_plain

    entry: Entry = selection.entry
    if isinstance(entry, Value):
        if selection.index is not None:
            raise UsageError(f"{entry.name!r} is no tensor, so it takes no index", path=checkpoint.path)
        return entry
    try:
        require_plain(entry)
    except UnsupportedError as error:
        if selection.exact:
            raise
        return Unshown(entry, error.problem)
    region = part_of(entry, selection.index)
    if selection.index is None:
        return Shown(checkpoint, entry, region, entry.name, whole=True)
    return Shown(checkpoint, entry, region, f"{entry.name}[{spell_index(selection.index)}]", whole=False)


def spell_index(index: Index) -> str:
    """An index as it is written between brackets."""
    return ",".join(map(_spell_item, index))


def _spell_item(item: object) -> str:
    if isinstance(item, slice):
        bounds = ["" if bound is None else str(bound) for bound in (item.start, item.stop)]
        return ":".join([*bounds, str(item.step)] if item.step is not None else bounds)
    return "..." if item is Ellipsis else str(item)


def require_bounded(items: Sequence[Shown | Unshown | Value]) -> None:
    """Raise LimitError where the values as text are far more than the file has, as shared storages allow."""
    shown = [item for item in items if isinstance(item, Shown)]
    if shown:
        work = Work(shown[0].checkpoint, as_text=True)
        for item in shown:
            work.add(item.tensor, item.region)


def blocks(shown: Shown, most: int = _PIECE) -> Iterator[NDArray[Any]]:
    """The values in row-major order, flat, at most about `most` elements at a time."""
    from ckpt_cli.arrays.sharing import row_pieces

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
    import os

    import numpy as np

    Work(shown.checkpoint).add(shown.tensor, shown.region)
    check_output(path, shown.checkpoint.path, "a numpy file holds one tensor: name another file")
    first = shown.array(tuple(slice(0, 0) for _ in shown.region.shape))
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shown.shape}
    np.lib.format.write_array_header_1_0(header, described)
    with writing(path) as target, open(target.fd, "wb", closefd=False) as out:
        out.write(header.getvalue())
        for block in blocks(shown):
            out.write(block.tobytes())
        out.flush()
        return os.fstat(target.fd).st_size
