"""A checkpoint to be written in any format: its tensors in their order, and the sources of their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from ckpt_cli.errors import CkptError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import SourceFile
from ckpt_cli.model.changes import Content
from ckpt_cli.model.checkpoint import Storage, Tensor


@dataclass(frozen=True, slots=True)
class SavedValue:
    """A value that is not a tensor, as the pickle that it was read from has it."""

    name: str
    root: object
    """Its node."""
    data: bytes | memoryview
    """The pickle, for the strings that are left in it."""
    storages: Mapping[int, Storage] = field(default_factory=dict)
    """The storages of tensors within it, by the identity of each reference."""
    contents: Mapping[Storage, Content] = field(default_factory=dict)
    """The bytes of these storages."""


@dataclass(frozen=True, slots=True)
class NewCheckpoint:
    """A new checkpoint before it is in any format.

    Tensors that share a storage are tied or views of the same bytes. For a format that keeps no views each is
    contiguous, little-endian and alone in its storage but for those that it is tied to.
    """

    tensors: Sequence[Tensor]
    """In the order in which they are to be listed."""
    contents: Mapping[Storage, Content]
    """The bytes of each storage."""
    files: Sequence[SourceFile]
    """The files that the extents of `contents` refer to."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Strings to be kept where the format can."""
    index: Mapping[str, object] = field(default_factory=dict)
    """Of a set of shards, what its index noted, as it stood there; its strings are among the metadata too."""
    values: Sequence[SavedValue] = ()
    """Values that are also written, if the format holds values by themselves."""
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    """The keys and indices that lead to each entry, in their order, where dicts and lists were nested."""
    ordered: bool = False
    """True if it is the state_dict of a module, which torch saves as an OrderedDict."""
    notes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """The `_metadata` of the state_dict: of each module its version."""
    mode_of: str = ""
    """The file whose permissions the new ones get."""
    stem: str = "archive"
    """The name of the target without its suffix."""
    max_shard: int = 5 * 10**9
    """Bytes of the tensors of one shard, where it is written as a set of them."""

    def content(self, tensor: Tensor) -> Content:
        """The bytes of a tensor's storage."""
        if tensor.storage is None:
            raise CkptError(f"tensor {tensor.name!r} has no bytes to be written")
        return self.contents[tensor.storage]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages."""
        return sum(content.nbytes for content in self.contents.values())

    def part(self, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> NewCheckpoint:
        """Some of its tensors as a checkpoint of their own."""
        storages = {tensor.storage for tensor in tensors}
        contents = {key: content for key, content in self.contents.items() if key in storages}
        return replace(self, tensors=tensors, contents=contents, metadata=metadata)


def tied_groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups of those that are one, in the order of the first of each."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.view or id(tensor), []).append(tensor)
    return list(groups.values())
