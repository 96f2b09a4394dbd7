"""Storages whose bytes are made of parts of some tensors, where each piece needs other parts of each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ckpt_cli.arrays.indexing import Index, Region
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.parallel.made import Job, MadeBytes, Making, Source
from ckpt_cli.parallel.tensor_chunks import Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor


class Recipe(Protocol):
    """Says how each piece of a tensor is made, and of what."""

    @property
    def numel(self) -> int:
        """Elements in all."""

    @property
    def piece(self) -> int:
        """Elements of a piece; the last one may have fewer."""

    def sources(self, begin: int, end: int) -> Sequence[tuple[Tensor, Index]]:
        """Return the parts of tensors that the elements from `begin` to `end` are made of."""

    def making(self, begin: int, end: int) -> Making:
        """Return what makes these elements of them; it runs on a worker, maybe in another process."""


class PiecedBytes(MadeBytes):
    """The bytes of a storage that a recipe makes, piece by piece."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        itemsize: int,
        note: Callable[[object], None],
        executor: Executor | None,
    ) -> None:
        super().__init__(tuple, _Nothing(), recipe.numel, itemsize, note, executor, recipe.piece)
        self._checkpoint = checkpoint
        self._recipe = recipe

    def write(self, write: Callable[[bytes | memoryview], object]) -> None:
        """Write all bytes, each piece as it is made."""
        for number in range(-(-self._numel // self._most)):
            write(self._piece(number))

    def _job(self, number: int) -> Job:
        """Return the job of making one piece."""
        begin, end = self._range(number)
        sources: list[tuple[Source, Chunk]] = []
        for tensor, index in self._recipe.sources(begin, end):
            reader = TensorReader(self._checkpoint, tensor, Region.of(tensor).at(index))
            reader.expect(reader.nbytes)
            sources.append((reader, reader.chunk(0, reader.numel)))
        return self._recipe.making(begin, end), sources


class _Nothing:
    """Stands for the making of a whole storage, which each piece has for itself."""

    def run(self, parts: object) -> tuple[bytes, object]:
        """Return nothing; it is never called."""
        del parts
        return b"", None
