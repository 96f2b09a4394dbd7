"""A structural edit as facts: what becomes of each entry, which each writable format carries out in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ckpt_cli.files.extents import Extent
from ckpt_cli.model import Storage, Tensor

Write = Callable[["bytes | memoryview"], object]
"""Takes the next bytes."""


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes that a new storage gets: ranges of old files, or bytes that are made when they are written."""

    nbytes: int
    extents: Sequence[Extent] | None = None
    """The ranges to copy, in order; None where the bytes are made."""
    make: Callable[[Write], object] | None = None
    """Writes the bytes, a bounded piece at a time."""
    origin: Storage | None = None
    """The old storage of which this is a whole copy, whose checksum therefore holds."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to become of a checkpoint; whatever is not named stays as it is."""

    names: Mapping[str, str] = field(default_factory=dict)
    """The new name of each entry that gets another one."""
    rename: Callable[[str], str] | None = None
    """What the new names follow from, for what is named by prefixes only (a state_dict's `_metadata`)."""
    dropped: frozenset[str] = frozenset()
    """Entries that go."""
    dropped_prefixes: frozenset[str] = frozenset()
    """Prefixes that go with all that is below them: a container that is called so goes itself."""
    root: str = ""
    """The prefix that becomes the whole checkpoint."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """New facts of tensors, by their old names: another dtype, another storage, another view of it."""
    contents: Mapping[int, Content] = field(default_factory=dict)
    """The bytes of each storage that is new, by the identity of the storage."""
    values: Mapping[str, object] = field(default_factory=dict)
    """New values of entries that are no tensors: plain data."""
    added: Mapping[str, object] = field(default_factory=dict)
    """Values under names that are new."""
    metadata: Mapping[str, str] | None = None
    """The container's string map, where it changes."""

    @property
    def only_names_and_metadata(self) -> bool:
        """Whether every storage that stays keeps its bytes and its place."""
        return not (self.dropped or self.dropped_prefixes or self.root or self.tensors or self.contents)
