"""A file in which every storage stands plainly, without checksums: what all formats from before the zip are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_cli.files.source import Extent, SourceFile
from ckpt_cli.model.checkpoint import PlainBytes, Storage

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay


class PlainFile:
    """The container: each storage is a range of the file."""

    def __init__(self, file: SourceFile) -> None:
        self.files: Sequence[SourceFile] = (file,)

    def storage(self, key: str, nbytes: int, begin: int, location: str = "cpu") -> Storage:
        """The storage whose first byte is at `begin` in the file."""
        return Storage(key, nbytes, location, PlainBytes(self.files[0], begin))

    def extents(self, storage: Storage, offset: int, nbytes: int) -> Sequence[Extent]:
        """Where they stand; raises UnsupportedError for those that a pickle has as text."""
        return storage.extents(offset, nbytes)

    def seal(self, overlay: Overlay) -> None:
        """There are no checksums."""

    def close(self) -> None:
        """Close the file."""
        self.files[0].close()
