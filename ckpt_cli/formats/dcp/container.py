"""A container of tensors that are stored in chunks: items are opened when their bytes are asked for, and gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from types import MappingProxyType
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.budget import current
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import CkptError, LimitError, MalformedError, UnsupportedError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import Ahead, is_elsewhere
from ckpt_cli.files.places import name_of
from ckpt_cli.files.source import Extent, SourceFile, Window
from ckpt_cli.formats.dcp.boxes import Box, ChunkPart, Chunks, boxes_of_range, check_scattered, copy_part, part_of
from ckpt_cli.formats.dcp.metadata import ItemPlace
from ckpt_cli.formats.safetensors.read import read_part
from ckpt_cli.formats.signatures import is_safetensors
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages, prefix_of
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import Opaque, Storage, Tensor, Value
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.graph import Graph

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

_READ = 8 << 20
"""Bytes of a chunk up to which they are read rather than mapped."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One chunk, opened."""

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
        document: SourceFile | None = None,
        places: Sequence[ItemPlace] = (),
    ) -> None:
        self.files = files
        self.document = document
        """The file that says what the checkpoint has and where; None where the files themselves say it."""
        self.places = places
        """The places of all items."""
        self.paths = paths
        """The path of each entry in the state that was saved, as its writer noted it; nothing is checked."""
        self._seal = seal

    def storage(self, key: str, nbytes: int, chunked: ChunkedTensor, *, composed: bool) -> Storage:
        """Return the storage of a tensor that was saved in chunks."""
        return Storage(key, nbytes, "cpu", GatheredBytes(self.files[0].path, chunked, composed=composed))

    def seal(self, overlay: Overlay) -> None:
        """Bring the checksums of changed items along."""
        self._seal(overlay)

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


class GatheredBytes:
    """The bytes of a tensor that was saved in chunks, in the row-major order of the whole tensor."""

    __slots__ = ("chunked", "composed", "path")

    def __init__(self, path: str, chunked: ChunkedTensor, *, composed: bool) -> None:
        self.path = path
        """The path of the checkpoint's first file, for errors."""
        self.chunked = chunked
        self.composed = composed

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of a tensor: those of one chunk where it has them in a row, else gathered."""
        if not nbytes:
            return memoryview(b"")
        chunked = self.chunked
        size = chunked.dtype.itemsize
        begin, end = offset // size, -(-(offset + nbytes) // size)
        with about(self.path):
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
                extents = stored.storage.extents(begin, nbytes)
                if len(extents) == 1:
                    return memoryview(extents[0].file.read(extents[0].offset, nbytes))
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
        with about(self.path):
            parts = chunked.parts(begin, end)
            check_scattered(parts)
            runs = sorted((target, part.run, part.chunk, source) for part in parts for target, source in part.starts())
            found: list[Extent] = []
            for target, run, number, source in runs:
                stored = chunked.stored(number)
                first, last = max(target * size, offset), min((target + run) * size, offset + nbytes)
                place = (stored.offset + source) * size + first - target * size
                found += stored.storage.extents(place, last - first)
        return found


_ZIP = b"PK"

_RECORD_COST = 100
"""The cost of reading the directory of an item, for each record, in bytes of pickle that take as long."""


_END = 4 << 10
"""Bytes at each end of an item in which its directory and the header of its pickle are."""


class Items:
    """Opens the items in the files of one checkpoint, and brings checksums along where they were changed."""

    def __init__(self, folder: str, files: Mapping[str, SourceFile], places: Sequence[ItemPlace]) -> None:
        """`files` has each file that is there, by its name; `places` are those of all items, in their order."""
        self._folder = folder
        self._files = files
        self._places = (
            [place for place in places if place.file in files] if any(map(is_elsewhere, files.values())) else []
        )
        self._numbers = {(place.file, place.offset): number for number, place in enumerate(self._places)}
        self._ahead = Ahead(len(self._places), self._ends_of)
        """Fetches the ends of items elsewhere, where each would cost requests."""
        self._most = limits.READ_TIMES * sum(file.size for file in files.values()) + limits.ITEMS_READ
        """The cost that one request may spend on opening items, as any number may be said to be at one place."""
        self._zips: list[ZipStorages] = []
        """The items of tensors that were opened."""
        self._safetensors: dict[tuple[str, int], dict[str, Tensor]] = {}
        """By file and offset, as one has all tensors of its file."""

    def _ends_of(self, number: int) -> list[tuple[SourceFile, int, int]]:
        """Return the ranges of an item in which all is but its elements."""
        place = self._places[number]
        file = self._files[place.file]
        if place.nbytes <= 2 * _END:
            return [(file, place.offset, place.nbytes)]
        return [(file, place.offset, _END), (file, place.offset + place.nbytes - _END, _END)]

    def _ask(self, place: ItemPlace) -> None:
        """Fetch what is needed to open an item, and those that will be opened after it."""
        number = self._numbers.get((place.file, place.offset))
        if number is not None:
            self._ahead.ask(number)

    def has(self, place: ItemPlace) -> bool:
        """True if the file of an item is there."""
        return place.file in self._files

    def value(self, place: ItemPlace) -> object:
        """A pickled value: plain data, or its text."""
        file = self._files[place.file]
        self._ask(place)
        with about(file.path):
            _, graph, saved = self._opened(file, place)
            entries = entries_of(graph, saved)
            if len(entries) == 1 and entries[0].name == "" and isinstance(entries[0], Value):
                return entries[0].value
            return Opaque(describe(graph.root))

    def saved(self, place: ItemPlace) -> tuple[Graph, SavedPickle]:
        """The item of a pickled value, of any size, as torch.save wrote it."""
        if place.transforms:
            raise UnsupportedError(f"it was written through {', '.join(place.transforms)}, which is not read")
        if place.file not in self._files:
            raise MalformedError(f"it is in {place.file}, which is missing", path=self._folder)
        file = self._files[place.file]
        self._ask(place)
        with about(file.path):
            if file.read(place.offset, min(2, file.size - place.offset)) != _ZIP:
                raise MalformedError(f"byte {place.offset} does not begin a torch.save file")
            return self._opened(file, place, limits.DCP_VALUES)[1:]

    def tensor(self, name: str, dtype: DType, box: Box, place: ItemPlace | None) -> Stored:
        """The chunk `box` of a tensor, checked to be what the metadata says.

        Raises MalformedError where it is not, or nothing says where it is, UnsupportedError where it was transformed.
        """
        if place is None:
            raise MalformedError(f"tensor {name!r}: nothing says where its chunk at {list(box.offsets)} is")
        if place.transforms:
            raise UnsupportedError(
                f"tensor {name!r} was written through {', '.join(place.transforms)}, which is not read",
                hint="load it with torch.distributed.checkpoint and save it without extensions",
            )
        if place.file not in self._files:
            raise MalformedError(f"tensor {name!r} has a chunk in {place.file}, which is missing", path=self._folder)
        file = self._files[place.file]
        self._ask(place)
        with about(file.path):
            tensor = self._open(name, place, file)
            _check(name, tensor, dtype, box)
            if tensor.storage is None:
                raise MalformedError(f"tensor {name!r}: its chunk has no bytes")
            return Stored(tensor.storage, tensor.storage_offset, tensor.stride)

    def _open(self, name: str, place: ItemPlace, file: SourceFile) -> Tensor:
        if file.read(place.offset, min(2, file.size - place.offset)) != _ZIP:
            return self._in_safetensors(name, place, file)
        item, graph, saved = self._opened(file, place)
        entries = entries_of(graph, saved)
        if len(entries) != 1 or not isinstance(entries[0], Tensor) or entries[0].name:
            raise MalformedError(f"tensor {name!r}: its item is not a tensor, but {describe(graph.root)}")
        self._zips.append(item)
        return entries[0]

    def _opened(
        self, file: SourceFile, place: ItemPlace, most: int | None = None
    ) -> tuple[ZipStorages, Graph, SavedPickle]:
        """One item of torch.save: its directory and its pickle are read."""
        records = ZipRecords(Window(file, place.offset, place.nbytes))
        storages = ZipStorages(records)
        saved = SavedPickle(storages, records, prefix_of(records))
        pickle = records.by_name.get(f"{saved.prefix}data.pkl")
        nbytes = pickle.nbytes if pickle else 0
        if nbytes > (limits.ITEM_BYTES if most is None else most):
            raise LimitError(f"its item at byte {place.offset} has a pickle of {nbytes} bytes")
        current().open_item(self, nbytes + _RECORD_COST * len(records.by_name), self._most)
        return storages, saved.graph(), saved

    def _in_safetensors(self, name: str, place: ItemPlace, file: SourceFile) -> Tensor:
        key = (place.file, place.offset)
        found = self._safetensors.get(key)
        if found is None:
            if file.read(place.offset, min(9, file.size - place.offset))[8:] != b"{":
                raise MalformedError(
                    f"tensor {name!r}: byte {place.offset} begins neither a torch.save file nor safetensors"
                )
            _, tensors, _ = read_part(Window(file, place.offset, file.size - place.offset))
            found = self._safetensors[key] = {tensor.name: tensor for tensor in tensors}
        tensor = found.get(name)
        if tensor is None:
            raise MalformedError(f"tensor {name!r} is not among the tensors at byte {place.offset}")
        return tensor

    def seal(self, overlay: Overlay) -> None:
        """Patch the checksums of the items that changed."""
        for item in self._zips:
            item.seal(overlay)


def _check(name: str, tensor: Tensor, dtype: DType, box: Box) -> None:
    """Raise if a chunk is not part of the tensor that the metadata describe."""
    if tensor.dtype is not dtype or tensor.shape != box.sizes:
        raise MalformedError(
            f"tensor {name!r}: its chunk at {list(box.offsets)} should be {dtype} of shape {list(box.sizes)}, it is "
            f"{tensor.dtype} of shape {list(tensor.shape or ())}"
        )
    if tensor.layout != "strided" or tensor.conj or tensor.neg or tensor.big_endian:
        raise UnsupportedError(f"tensor {name!r} is stored conjugated, negated, big-endian or {tensor.layout}")


# --- what nothing refers to -------------------------------------------------------------------------------------------


def is_one_safetensors(file: SourceFile) -> bool:
    """True if a file of items is one safetensors file, not items of torch.save one after another."""
    return is_safetensors(file.read(0, min(9, file.size)))


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in their order, those that touch as one."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def unreferenced_bytes(container: object) -> dict[str, int]:
    """Bytes of each file of items that no item has, where there are any; of safetensors files that is not known."""
    if not isinstance(container, Composed) or container.document is None:
        return {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for place in container.places:
        ranges.setdefault(place.file, []).append((place.offset, place.offset + place.nbytes))
    found: dict[str, int] = {}
    for file in container.files:
        own = ranges.get(name_of(file.path))
        left = file.size - sum(end - begin for begin, end in joined(own)) if own else 0
        if left and not is_one_safetensors(file):
            found[name_of(file.path)] = left
    return found
