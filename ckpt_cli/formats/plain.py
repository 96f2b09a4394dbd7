"""A container whose storages are plain ranges of the file, without checksums; and finders of storages by key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ckpt_cli.errors import MalformedError, UnsupportedError
from ckpt_cli.files.source import SourceFile
from ckpt_cli.model.checkpoint import PlainBytes, Storage, Tensor

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay


class PlainFile:
    """The container: each storage is a range of the file."""

    def __init__(self, file: SourceFile) -> None:
        self.files: Sequence[SourceFile] = (file,)

    def storage(self, key: str, nbytes: int, begin: int, location: str = "cpu") -> Storage:
        """The storage whose first byte is at `begin` in the file."""
        return Storage(key, nbytes, location, PlainBytes(self.files[0], begin))

    def seal(self, overlay: Overlay) -> None:
        """There are no checksums."""

    def close(self) -> None:
        """Close the file."""
        self.files[0].close()


class KnownStorages:
    """Finds the storages that entries have, by the keys that the pickle refers to them by."""

    big_endian = False

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._by_key: dict[str, Storage] = {}
        pending = list(tensors)
        while pending:
            tensor = pending.pop()
            if tensor.storage is not None:
                self._by_key.setdefault(tensor.storage.key, tensor.storage)
            pending.extend(tensor.parts)

    def find(self, key: str, nbytes: int, location: str) -> Storage:  # noqa: ARG002 - as the protocol has it
        """The storage of a key; raises UnsupportedError for one that only an object has which does not open up."""
        if key not in self._by_key:
            raise UnsupportedError(f"storage {key!r} is used by an object only that does not open up to entries")
        return self._by_key[key]


class NoStorages:
    """Finds no storage: raises MalformedError for a pickle that refers to one outside of it."""

    big_endian = False

    def __init__(self, problem: str) -> None:
        self._problem = problem

    def find(self, key: str, nbytes: int, location: str) -> Storage:  # noqa: ARG002 - as the protocol has it
        """Raise MalformedError."""
        raise MalformedError(self._problem)
