"""Storages whose bytes are the sum of a matrix and products of thin ones, made by blocks of rows on an executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.dtypes import DType
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.ops.lora import Adapter, Low
from ckpt_cli.parallel.made import Given, MadeBytes, Rows, Source, Whole, pieces_made
from ckpt_cli.parallel.tensor_chunks import TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.low_rank import Term

_BLOCK = 256 << 10
"""Elements of a block of rows, with those of the factors that belong to it; smaller and larger ones take longer."""


@dataclass(frozen=True, slots=True)
class Product:
    """The part of an adapter that is added to one tensor."""

    adapter: Adapter
    low: Low
    scale: float
    """The number that its effect is multiplied by, beside its own scaling."""
    transposed: bool = False
    """True if the tensor is in × out, so that down and up change places."""
    bias: bool = False
    """True if the bias of `up` is added to that of the module, and not the product to its weight."""

    @property
    def scaling(self) -> float:
        """The number that the product is multiplied by."""
        return self.low.scaling * self.scale


def made_storage(
    checkpoint: Checkpoint,
    tensor: Tensor,
    products: Sequence[Product],
    dtype: DType,
    name: str,
    note: Callable[[Any], None],
    executor: Executor | None,
    location: str,
) -> Storage:
    """Return a storage that has a tensor with some products added to it, in another dtype if wanted.

    The blocks depend on the shapes alone, so that the bits depend neither on the executor nor on the format.
    """
    from ckpt_cli.arrays.low_rank import LowRank, wide_of

    columns = 1 if any(product.bias for product in products) else prod((tensor.shape or ())[1:])
    terms = [_term(product, tensor) for product in products]
    making = LowRank(tensor.dtype, dtype, columns, terms, name)
    for product in products:
        _read(product)
    piece = blocks_of(columns, [term.rank for term in terms])

    def sources() -> list[Source]:
        plain: list[Source] = [TensorReader(checkpoint, tensor, Region.of(tensor))]
        found = list(plain)
        for product, term in zip(products, terms, strict=True):
            factors = _factors(product, columns, wide_of(tensor.dtype))
            found += factors
            if term.magnitude:
                found.append(_magnitudes(product, term, [*plain, *factors], tensor, columns, executor))
        return found

    bytes_ = MadeBytes(sources, making, tensor.numel, dtype.itemsize, note, executor, piece)
    return Storage(name, dtype.nbytes(tensor.numel), location, bytes_)


def blocks_of(columns: int, ranks: Sequence[int]) -> int:
    """Return the elements of a block of whole rows."""
    columns = max(columns, 1)
    return max(_BLOCK // (columns + sum(ranks)), 1) * columns


def _term(product: Product, tensor: Tensor) -> Term:
    from ckpt_cli.arrays.low_rank import DORA_COLUMNS, DORA_ROWS, Term, wide_of

    low = product.low
    if product.bias:
        assert low.bias is not None
        return Term(product.scaling, low.bias.dtype)
    left = low.down if product.transposed else low.up
    if low.magnitude is None:
        return Term(product.scaling, left.dtype, low.rank)
    if product.transposed:
        return Term(product.scaling, left.dtype, low.rank, DORA_COLUMNS, wide_of(tensor.dtype))
    return Term(product.scaling, left.dtype, low.rank, DORA_ROWS, low.magnitude.dtype)


def _read(product: Product) -> None:
    """Count the reading of what belongs to a product."""
    low = product.low
    budget = Budget.of(product.adapter.checkpoint)
    for tensor in (low.down, low.up, low.bias, low.magnitude):
        if tensor is not None:
            budget.read(tensor, Region.of(tensor))


def _factors(product: Product, columns: int, wide: DType) -> list[Source]:
    """Return the sources of a product: the left factor by rows, and the right one whole."""
    from ckpt_cli.arrays.cast import Cast

    checkpoint, low = product.adapter.checkpoint, product.low
    if product.bias:
        assert low.bias is not None
        return [TensorReader(checkpoint, low.bias, Region.of(low.bias))]
    left, right = (low.down, low.up) if product.transposed else (low.up, low.down)
    readers = []
    for each in (left, right):
        region = Region.of(each)
        if product.transposed:
            region = Region(region.shape[::-1], region.stride[::-1], region.offset)
        readers.append(TensorReader(checkpoint, each, region))
    cast = None if right.dtype is wide else Cast(right.dtype, wide, right.name)
    return [Rows(readers[0], low.rank, columns), Whole(readers[1], cast)]


def _magnitudes(
    product: Product, term: Term, sources: Sequence[Source], tensor: Tensor, columns: int, executor: Executor | None
) -> Source:
    """Return the source of DoRA's lengths of rows; of columns, the factors that give them these lengths.

    The lengths of columns are only known once all rows were gone through, so these are made twice.
    """
    import numpy as np

    from ckpt_cli.arrays.cast import Cast, Losses
    from ckpt_cli.arrays.low_rank import DORA_ROWS, SquaresOfColumns, Term

    magnitude = product.low.magnitude
    assert magnitude is not None
    reader = TensorReader(product.adapter.checkpoint, magnitude, Region.of(magnitude))
    if term.magnitude == DORA_ROWS:
        return Rows(reader, 1, columns)
    alone = Term(term.scaling, term.left, term.rank)
    making = SquaresOfColumns(tensor.dtype, columns, alone, tensor.name)
    squares = np.zeros(columns)
    for data, _ in pieces_made(making, sources, tensor.numel, blocks_of(columns, [term.rank]), executor):
        squares += np.frombuffer(data)
    cast = Cast(magnitude.dtype, making.wide, magnitude.name) if magnitude.dtype is not making.wide else None
    data = reader.read_plainly(reader.chunk(0, reader.numel))
    kind = np.dtype(making.wide.name)
    lengths = np.frombuffer(data if cast is None else cast.run(data, Losses()), kind)
    with np.errstate(all="ignore"):
        return Given((lengths / np.sqrt(squares).astype(kind)).tobytes())
