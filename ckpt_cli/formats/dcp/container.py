"""A container of tensors that are stored in chunks: their bytes are gathered, and each range of them is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from types import MappingProxyType
from typing import TYPE_CHECKING

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import CkptError, UnsupportedError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import Extent, SourceFile
from ckpt_cli.formats.dcp.boxes import ChunkPart, Chunks, boxes_of_range, check_scattered, copy_part, part_of
from ckpt_cli.model.checkpoint import Container, Storage

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

_READ = 8 << 20
"""Bytes of a chunk up to which they are read rather than mapped."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One chunk, opened."""

    container: Container
    """The container that reads it; its extents count the files of the whole checkpoint."""
    storage: Storage
    offset: int
    """The element within the storage that is its first."""
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor and its chunks."""

    name: str
    dtype: DType
    chunks: Chunks
    open: Callable[[int], Stored]
    """Opens the chunk of that number; raises CkptError where it is not as it should be."""
    opened: dict[int, Stored] = field(default_factory=dict)

    def stored(self, number: int) -> Stored:
        """A chunk, opened once."""
        found = self.opened.get(number)
        if found is None:
            found = self.opened[number] = self.open(number)
        return found

    def parts(self, begin: int, end: int) -> list[ChunkPart]:
        """Return the part of each chunk in the elements `begin` to `end`."""
        chunks = self.chunks
        found: list[ChunkPart] = []
        try:
            numbers = chunks.meeting(begin, end)
        except CkptError as error:
            error.problem = f"tensor {self.name!r}: {error.problem}"
            raise
        for box in boxes_of_range(chunks.shape, begin, end):
            for number in numbers:
                if box.meet(chunks.boxes[number]) is not None:
                    part = part_of(number, chunks.boxes[number], box, chunks.shape, self.stored(number).stride)
                    found += [part] if part else []
        return found


class Composed:
    """The container: each tensor is a storage of its own, in the row-major order of the whole tensor."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        seal: Callable[[Overlay], None],
        paths: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.files = files
        self.paths = paths
        """The path of each entry in the state that was saved, as its writer noted it; nothing is checked."""
        self._seal = seal

    def storage(self, key: str, nbytes: int, chunked: ChunkedTensor, *, composed: bool) -> Storage:
        """Return the storage of a tensor that was saved in chunks."""
        return Storage(key, nbytes, "cpu", GatheredBytes(self.files, chunked, composed=composed))

    def extents(self, storage: Storage, offset: int, nbytes: int) -> Sequence[Extent]:
        """Return the extents of a range of a tensor, piece by piece."""
        return storage.extents(offset, nbytes)

    def seal(self, overlay: Overlay) -> None:
        """Bring the checksums of changed items along."""
        self._seal(overlay)

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


class GatheredBytes:
    """The bytes of a tensor that was saved in chunks, in the row-major order of the whole tensor."""

    __slots__ = ("chunked", "composed", "files")

    def __init__(self, files: Sequence[SourceFile], chunked: ChunkedTensor, *, composed: bool) -> None:
        self.files = files
        """The files that the extents of its chunks count."""
        self.chunked = chunked
        self.composed = composed

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of a tensor: those of one chunk where it has them in a row, else gathered."""
        if not nbytes:
            return memoryview(b"")
        chunked = self.chunked
        size = chunked.dtype.itemsize
        begin, end = offset // size, -(-(offset + nbytes) // size)
        with about(self.files[0].path):
            parts = chunked.parts(begin, end)
            if len(parts) == 1 and parts[0].run == end - begin:
                found = self._bytes_of(chunked, parts[0])
            else:
                gathered = bytearray((end - begin) * size)
                for part in parts:
                    copy_part(gathered, self._bytes_of(chunked, part), part, begin, size)
                found = memoryview(gathered)
        skipped = offset - begin * size
        return found[skipped : skipped + nbytes]

    def _bytes_of(self, chunked: ChunkedTensor, part: ChunkPart) -> memoryview:
        """The bytes of a part's span, read where they are not too many: a mapped file must not become shorter."""
        stored = chunked.stored(part.chunk)
        low, high = part.span
        size = chunked.dtype.itemsize
        begin, nbytes = (stored.offset + low) * size, (high - low) * size
        if nbytes <= _READ:
            with suppress(UnsupportedError):  # compressed
                extents = stored.container.extents(stored.storage, begin, nbytes)
                if len(extents) == 1:
                    return memoryview(self.files[extents[0].file].read(extents[0].offset, nbytes))
        return stored.storage.view(begin, nbytes)

    def extents(self, offset: int, nbytes: int) -> Sequence[Extent]:
        """Return the extents of a range of a tensor, piece by piece in row-major order.

        Raises UnsupportedError where it is compressed, or scattered over far too many pieces.
        """
        if not nbytes:
            return []
        chunked = self.chunked
        size = chunked.dtype.itemsize
        begin, end = offset // size, -(-(offset + nbytes) // size)
        with about(self.files[0].path):
            parts = chunked.parts(begin, end)
            check_scattered(parts)
            runs = sorted((target, part.run, part.chunk, source) for part in parts for target, source in part.starts())
            found: list[Extent] = []
            for target, run, number, source in runs:
                stored = chunked.stored(number)
                first, last = max(target * size, offset), min((target + run) * size, offset + nbytes)
                place = (stored.offset + source) * size + first - target * size
                found += stored.container.extents(stored.storage, place, last - first)
        return found
