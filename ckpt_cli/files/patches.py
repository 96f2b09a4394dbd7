"""Pending writes over open files: reads see them, nothing is written until they are applied."""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field
from typing import IO

from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import Extent, SourceFile

IN_MEMORY = 32 << 20
"""Bytes of new data held in memory; more goes to an unnamed temporary file."""

CHUNK = 8 << 20
"""Bytes in one patch at most, so that applying an overlay takes bounded memory."""


@dataclass(frozen=True, slots=True, order=True)
class Patch:
    """One range to be overwritten."""

    offset: int
    """The first byte in the file."""
    nbytes: int
    """Bytes replaced by as many new ones."""
    position: int = field(compare=False)
    """The first byte of the new content in the overlay's own store."""

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.nbytes


class _Store:
    """The new bytes of all patches, one after another; many go to an unnamed temporary file."""

    def __init__(self) -> None:
        self._held: IO[bytes] = io.BytesIO()
        self._size = 0

    def read(self, position: int, nbytes: int) -> bytes:
        self._held.seek(position)
        return self._held.read(nbytes)

    def write(self, position: int, data: bytes) -> None:
        self._held.seek(position)
        self._held.write(data)

    def append(self, data: bytes) -> int:
        """Keep more bytes; returns where they begin."""
        if isinstance(self._held, io.BytesIO) and self._size + len(data) > IN_MEMORY:
            import tempfile

            held = self._held.getvalue()
            self._held = tempfile.TemporaryFile(prefix="ckpt-")  # noqa: SIM115
            self._held.write(held)
        position = self._size
        self.write(position, data)
        self._size += len(data)
        return position

    def close(self) -> None:
        self._held.close()


@dataclass(slots=True)
class _Pending:
    """The planned changes of one file."""

    size: int
    """The bytes that it will have."""
    patches: list[Patch] = field(default_factory=list)


class Overlay:
    """A set of patches over some open files; patches of one file never overlap.

    A file may become longer or shorter: bytes beyond its end, now or then, count as zeros.
    """

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self.files = files
        self._pending = [_Pending(file.size) for file in files]
        self._store = _Store()

    def part(self, first: int, count: int) -> Overlay:
        """The patches of some of the files, counted from 0: what is written there is written here."""
        part = Overlay(self.files[first : first + count])
        part._pending = self._pending[first : first + count]
        part._store = self._store
        return part

    @property
    def nbytes(self) -> int:
        """Bytes that applying would change in the files, the journal not counted."""
        return sum(patch.nbytes for pending in self._pending for patch in pending.patches)

    def __bool__(self) -> bool:
        return any(map(self.touches, range(len(self.files))))

    def touches(self, file: int) -> bool:
        """True if file number `file` would change."""
        return bool(self._pending[file].patches) or self.size(file) != self.files[file].size

    def patches(self, file: int) -> Sequence[Patch]:
        """The patches of file number `file`, in the order of their offsets."""
        return self._pending[file].patches

    def size(self, file: int) -> int:
        """The bytes that the file will have."""
        return self._pending[file].size

    def replace_end(self, file: int, offset: int, data: bytes) -> None:
        """Make `data` the last bytes of the file, from `offset` on: it becomes longer, or shorter."""
        self._pending[file].size = max(self.size(file), offset + len(data))
        self.write(file, offset, data.ljust(self.size(file) - offset, b"\0"))
        self._pending[file].size = offset + len(data)

    def new_bytes(self, patch: Patch) -> bytes:
        """Return the bytes that the patch writes."""
        return self._store.read(patch.position, patch.nbytes)

    def old_bytes(self, file: int, patch: Patch) -> bytes:
        """Return the old bytes where the patch will write, zeros beyond the end of the file."""
        return read_padded(self.files[file], patch.offset, patch.nbytes)

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        """The range as it will be once every pending patch is applied."""
        touching = list(self._touching(file, offset, offset + nbytes))
        base = read_padded(self.files[file], offset, nbytes)
        if not touching:
            return base
        data = bytearray(base)
        for patch in touching:
            first, last = max(patch.offset, offset), min(patch.end, offset + nbytes)
            new = self.new_bytes(patch)
            data[first - offset : last - offset] = new[first - patch.offset : last - patch.offset]
        return bytes(data)

    def write(self, file: int, offset: int, data: bytes) -> None:
        """Make `data` stand at `offset`; bytes that stand there already become no patch."""
        end = offset + len(data)
        position = offset
        for patch in list(self._touching(file, offset, end)):
            self._add(file, position, data[position - offset : max(patch.offset, position) - offset])
            first, last = max(patch.offset, offset), min(patch.end, end)
            self._store.write(patch.position + first - patch.offset, data[first - offset : last - offset])
            position = last
        self._add(file, position, data[position - offset :])

    def gather(self, extents: Iterable[Extent]) -> bytes:
        """Return the bytes in some extents, one after another, with the patches applied."""
        return b"".join(self.read(extent.file, extent.offset, extent.nbytes) for extent in extents)

    def scatter(self, extents: Iterable[Extent], data: bytes) -> None:
        """Make `data` stand in some extents, one after another."""
        position = 0
        for extent in extents:
            self.write(extent.file, extent.offset, data[position : position + extent.nbytes])
            position += extent.nbytes

    def _touching(self, file: int, begin: int, end: int) -> Iterator[Patch]:
        """The patches that share bytes with the range, in order."""
        patches = self._pending[file].patches
        first = bisect_right(patches, begin, key=lambda patch: patch.offset) - 1
        if first < 0 or patches[first].end <= begin:
            first += 1
        last = bisect_left(patches, end, lo=first, key=lambda patch: patch.offset)
        yield from patches[first:last]

    def _add(self, file: int, offset: int, data: bytes) -> None:
        """A patch for a range that no patch covers yet, cut to chunks."""
        for begin in range(0, len(data), CHUNK):
            piece = data[begin : begin + CHUNK]
            if piece == read_padded(self.files[file], offset + begin, len(piece)):
                continue
            insort(self._pending[file].patches, Patch(offset + begin, len(piece), self._store.append(piece)))

    def close(self) -> None:
        """Drop what is pending."""
        self._store.close()


def read_padded(file: SourceFile, offset: int, nbytes: int) -> bytes:
    """A range of a file that may reach beyond its end, where zeros are."""
    there = min(max(file.size - offset, 0), nbytes)
    data = file.read(offset, there) if there else b""
    return data if there == nbytes else data.ljust(nbytes, b"\0")
