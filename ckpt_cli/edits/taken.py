"""Tensors of one checkpoint as another one takes them: the same elements, those that are tied over one storage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.edits.convert_contents import is_as_stored
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.files.source import Extent
from ckpt_cli.model.changes import Content, content_of
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor, contiguous_stride
from ckpt_cli.ops.aliasing import is_array
from ckpt_cli.parallel.made import MadeBytes
from ckpt_cli.parallel.tensor_chunks import TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor


class Taken:
    """Takes tensors of one checkpoint, which has to stay open while what they become is written."""

    def __init__(self, checkpoint: Checkpoint, executor: Executor | None = None) -> None:
        self._checkpoint = checkpoint
        self._executor = executor
        self._budget = Budget.of(checkpoint)
        self._storages: dict[object, Storage] = {}

    def tensor(self, tensor: Tensor, name: str, like: Tensor | None = None) -> Tensor:
        """Return a tensor under a new name: contiguous and alone in its storage, but for those that are one with it.

        What is not its elements, such as requires_grad, is that of `like`. Raises UnsupportedError for tensors that
        are not strided.
        """
        if tensor.layout != "strided" or tensor.storage is None or tensor.shape is None or is_array(tensor):
            what = "array of an object" if is_array(tensor) else f"{tensor.layout} tensor"
            raise UnsupportedError(
                f"{tensor.name!r} is a {what}, which no other checkpoint can take", path=self._checkpoint.path
            )
        storage = self._storage(tensor)
        facts = like or tensor
        return Tensor(
            name,
            tensor.dtype,
            tensor.shape,
            contiguous_stride(tensor.shape),
            storage,
            kind=facts.kind,
            requires_grad=facts.requires_grad,
        )

    def contents(self) -> dict[Storage, Content]:
        """Return the bytes of each storage of what was taken."""
        files = self._checkpoint.container.files
        return {storage: content_of(storage, files=files) for storage in self._storages.values()}

    def _storage(self, tensor: Tensor) -> Storage:
        """Return the storage of a taken tensor, which tied ones have in common."""
        key = tensor.view or tensor.name
        found = self._storages.get(key)
        if found is None:
            found = self._storages[key] = self._new_storage(tensor)
        return found

    def _new_storage(self, tensor: Tensor) -> Storage:
        storage = tensor.storage
        assert storage is not None
        self._budget.read(tensor, Region.of(tensor))
        begin, end = tensor.span
        if is_as_stored(tensor):
            return Storage(tensor.name, end - begin, storage.location, _Part(storage, begin))

        def readers() -> list[TensorReader]:
            return [TensorReader(self._checkpoint, tensor, Region.of(tensor))]

        size = tensor.dtype.itemsize
        source = MadeBytes(readers, _Copying(), tensor.numel, size, lambda _: None, self._executor)
        return Storage(tensor.name, tensor.nbytes, storage.location, source)


class _Part:
    """A range of another storage as the bytes of a storage of its own."""

    def __init__(self, storage: Storage, begin: int) -> None:
        self._storage = storage
        self._begin = begin

    @property
    def composed(self) -> bool:
        """True if the bytes are gathered from several places."""
        return self._storage.composed

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""
        return self._storage.view(self._begin + begin, nbytes)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Return the ranges of files in which they stand as they are."""
        return self._storage.extents(self._begin + begin, nbytes)


class _Copying:
    """Makes elements that are those of its one source."""

    def run(self, parts: Iterable[memoryview]) -> tuple[bytes, None]:
        """Return the elements as bytes."""
        return b"".join(parts), None
