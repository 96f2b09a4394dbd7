"""A file in which every storage stands plainly, without checksums: what all formats from before the zip are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_cli.files.source import Extent, LocalFile
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.pickles.tensors.inline_bytes import Embedded

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay


class PlainFile:
    """The container: where each storage begins is noted by its key."""

    def __init__(self, file: LocalFile) -> None:
        self.files: Sequence[LocalFile] = (file,)
        self._begins: dict[str, int] = {}

    def add(self, storage: Storage, begin: int) -> Storage:
        """Note where a storage's first byte is."""
        self._begins[storage.key] = begin
        return storage

    def view(self, storage: Storage, offset: int, nbytes: int) -> memoryview:
        """Bytes of a storage."""
        if isinstance(storage, Embedded):
            return storage.view(offset, nbytes)
        return self.files[0].view(self._begins[storage.key] + offset, nbytes)

    def extents(self, storage: Storage, offset: int, nbytes: int) -> Sequence[Extent]:
        """Where they stand; raises UnsupportedError for those that a pickle has as text."""
        if isinstance(storage, Embedded):
            return storage.extents(offset, nbytes)
        return [Extent(0, self._begins[storage.key] + offset, nbytes)]

    def seal(self, overlay: Overlay) -> None:
        """There are no checksums."""

    def close(self) -> None:
        """Close the file."""
        self.files[0].close()
