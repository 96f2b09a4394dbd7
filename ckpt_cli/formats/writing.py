"""Parts of every writer: append the bytes of storages to a new file, and read the file back before it takes its name.

Ranges of old files are copied by the kernel, other bytes are written in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from ckpt_cli.errors import CkptError, FormatError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import announce, is_elsewhere
from ckpt_cli.files.copy import AHEAD, CHUNK, PIECE, Progress, copy_range, no_progress, write_back
from ckpt_cli.files.source import Extent, LocalFile, SourceFile
from ckpt_cli.files.system import write_all
from ckpt_cli.formats.signatures import is_safetensors
from ckpt_cli.model.changes import Content, difference
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

_Bytes = TypeVar("_Bytes", bound="Content | Storage | None")

OpenCopy = Callable[[str], Checkpoint]
"""Opens a new file or folder as a checkpoint; writers are given one, as they stand below what opens any format."""


class Appender:
    """Appends to a file from a byte on; without a file it only measures."""

    def __init__(self, target: LocalFile | None, begin: int = 0) -> None:
        self.target = target
        """None to measure only."""
        self._begin = begin
        self.position = 0
        """The byte that is written next, counted from the begin."""
        self._begun = 0
        """The first byte that the system was not asked to write to the disk yet."""

    def append(self, piece: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        if self.target is not None:
            write_all(self.target.fd, piece, self._begin + self.position)
        self.position += len(piece)
        self._note_size()
        if self.position - self._begun >= CHUNK:
            self._write_back()

    def append_range(self, source: SourceFile, offset: int, nbytes: int, progress: Progress = no_progress) -> None:
        """Append a range of a file; holes stay holes."""
        if self.target is not None:
            self._write_back()
            copy_range(source, offset, nbytes, self.target, self._begin + self.position, progress)
        self.position = self._begun = self.position + nbytes

    def append_contents(self, contents: Iterable[Content | Storage], progress: Progress = no_progress) -> None:
        """Append the bytes of storages. Ranges that follow each other go as one.

        Raises CkptError where what is made comes to another number of bytes than was said.
        """

        def append(piece: bytes | memoryview) -> None:
            self.append(piece)
            progress(len(piece))

        file: SourceFile | None = None
        first = end = 0  # the range that is about to be copied
        for content in contents if self.target is None else announced(contents):
            if self.target is None:
                self.position += content.nbytes
                continue
            ranges = content.extents(0, content.nbytes) if isinstance(content, Storage) else content.extents
            for extent in ranges or ():
                if extent.file is not file or extent.offset != end:
                    self._append_run(file, first, end, progress)
                    file, first, end = extent.file, extent.offset, extent.offset
                end += extent.nbytes
                if end - first > PIECE and is_elsewhere(extent.file):  # what was fetched for it makes room
                    self._append_run(file, first, end, progress)
                    first = end
            if isinstance(content, Content) and ranges is None and content.make is not None:
                self._append_run(file, first, end, progress)
                file, begin = None, self.position
                content.make(append)
                self._write_back()
                if self.position - begin != content.nbytes:
                    raise CkptError(f"a storage of {content.nbytes} bytes came to {self.position - begin}")
        self._append_run(file, first, end, progress)

    def _append_run(self, file: SourceFile | None, begin: int, end: int, progress: Progress) -> None:
        if file is not None and end > begin:
            self.append_range(file, begin, end - begin, progress)

    def _write_back(self) -> None:
        if self.target is not None:
            write_back(self.target.fd, self._begin + self._begun, self.position - self._begun)
        self._begun = self.position

    def _note_size(self) -> None:
        if self.target is not None:
            self.target.size = max(self.target.size, self._begin + self.position)


def announced(contents: Iterable[_Bytes]) -> Iterator[_Bytes]:
    """Yield contents; the bytes that they are made of are asked for a while before, where these lie elsewhere."""
    before: list[_Bytes] = []
    batch: list[_Bytes] = []
    short: list[Extent] = []
    held = 0
    rest = iter(contents)
    for content in rest:
        extents = _read_for(content)
        if not (before or batch) and extents and not is_elsewhere(extents[0].file):
            yield content
            yield from rest
            return
        nbytes = sum(extent.nbytes for extent in extents)
        batch.append(content)
        if nbytes <= PIECE:  # a longer range is fetched in pieces while it is copied
            short += extents
        held += min(nbytes, PIECE)
        if held > AHEAD // 2 or len(batch) > _CONTENTS:
            _expect(short)
            yield from before
            before, batch, short, held = batch, [], [], 0
    _expect(short)
    yield from before
    yield from batch


def _expect(extents: Sequence[Extent]) -> None:
    """Begin to fetch ranges that are read next, neighbours together."""
    announce((extent.file, extent.offset, extent.nbytes) for extent in extents)
    for extent in extents:
        extent.file.expect(extent.offset, extent.nbytes)


def _read_for(content: Content | Storage | None) -> Sequence[Extent]:
    """Return the ranges of files that are read to write a content, as far as they are known."""
    if isinstance(content, Content):
        return content.extents or content.reads
    try:
        return content.extents(0, content.nbytes) if content is not None else ()
    except CkptError:  # whoever writes it says so
        return ()


_CONTENTS = 10_000
"""Contents that are announced before they are written, at most."""


class Rewriter(Protocol):
    """A checkpoint about to be rewritten, with some changes."""

    @property
    def nbytes(self) -> int:
        """Bytes of a new file, or about that."""

    def patch(self, overlay: Overlay) -> bool:
        """Put the whole edit into an overlay of the old file, checksums included, if it fits in place; else False."""

    def write(self, target: LocalFile, progress: Progress) -> None:
        """Write all of it into an empty file."""

    def verify(self, path: str) -> None:
        """Raise CkptError where the file that was written does not read back as what it should be."""


class SetRewriter(Protocol):
    """A set of files about to be rewritten, with some changes; files that none of them concern stay as they are."""

    parts: Sequence[ShardWork]
    """The shards that are rewritten."""
    removed: Sequence[str]
    """Shards of which nothing is left."""
    unchanged: Sequence[str]
    """Shards that stay as they are."""
    index: tuple[str, bytes] | None
    """The new index: its file name and content; None where there is none."""

    unreferenced: int
    """Bytes that stay in old files, though nothing refers to them any more."""

    @property
    def nbytes(self) -> int:
        """Bytes of the new files, or about that."""

    def for_new_folder(self) -> None:
        """Plan for a folder of its own, before anything else is asked."""

    @property
    def first(self) -> str:
        """The file that the journal stands beside: the index, or a shard that stays."""

    @property
    def names(self) -> Sequence[str]:
        """The files that are written."""

    def patch(self, overlay: Overlay) -> bool:
        """Put the whole edit into an overlay of the old files if it fits in place; else False."""


@dataclass(frozen=True, slots=True)
class ShardWork:
    """One shard to be rewritten."""

    name: str
    """Its file name, which stays."""
    work: Rewriter


@contextmanager
def reading_back(path: str, open_copy: OpenCopy) -> Iterator[Checkpoint]:
    """Context manager: open a new checkpoint before it takes its name.

    Raises CkptError for each FormatError, also one that is raised within the block for a difference.
    """
    try:
        with closing(open_copy(path)) as copy:
            yield copy
    except FormatError as error:
        raise not_read_back(error.problem) from None


def not_read_back(problem: str) -> CkptError:
    """The error for a new checkpoint that is not what was meant."""
    return CkptError(f"the new file did not read back as it should, so nothing was replaced: {problem}")


def verify_new(wanted: Sequence[Tensor], path: str, open_copy: OpenCopy, *, in_order: bool = True) -> None:
    """Open a new checkpoint before it takes its name, and compare its tensors with those that were meant.

    Raises CkptError where their names, order, dtypes, shapes or ties are others.
    """
    with reading_back(path, open_copy) as copy:
        fault = difference(wanted, copy.entries)
        if in_order and not fault and [entry.name for entry in copy.entries] != [entry.name for entry in wanted]:
            fault = "its tensors are in another order"
    if fault:
        raise not_read_back(fault)


def verify_copy(original: Checkpoint, path: str, output: str, open_copy: OpenCopy) -> None:
    """Open a patched copy again before it becomes `output`, with the format's reference reader where there is one.

    Raises CkptError where it does not read back as the same entries over the same ranges.
    """
    try:
        same, why = _reads_back(original, path, open_copy), ""
    except FormatError as error:
        same, why = False, f": {error.problem}"
    if not same:
        raise CkptError(f"the new file did not read back as it should, so nothing was replaced{why}", path=output)


def _reads_back(original: Checkpoint, path: str, open_copy: OpenCopy) -> bool:
    """True if the copy opens to the original's entries, and its safetensors files in their own library."""
    copy = open_copy(path)
    with closing(copy):
        for file in copy.container.files:
            if is_safetensors(file.read(0, min(9, file.size))):
                open_with_safetensors(file.path)
        return len(copy.entries) == len(original.entries) and all(
            _facts(one) == _facts(other) for one, other in zip(copy.entries, original.entries, strict=True)
        )


def _facts(entry: Entry) -> tuple[object, ...]:
    """Return the facts of an entry that an edit of values leaves as they are."""
    if isinstance(entry, Tensor):
        storage = entry.storage
        own = (
            entry.name,
            entry.dtype.name,
            entry.shape,
            entry.stride,
            entry.storage_offset,
            None if storage is None else (storage.key, storage.nbytes, storage.location),
            entry.layout,
        )
        return (*own, *map(_facts, entry.parts))
    return (entry.name,)


def open_with_safetensors(path: str) -> None:
    """Open a file with the safetensors library; raises FormatError where it refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass  # opening is what checks the header
    except SafetensorError as error:
        raise FormatError(f"the safetensors library refuses it: {error}") from None
