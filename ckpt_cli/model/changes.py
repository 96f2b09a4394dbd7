"""A structural edit as facts: the changes of entries, which each writable format carries out in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, fields, replace
from operator import attrgetter

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import PIECE
from ckpt_cli.files.source import Extent, SourceFile
from ckpt_cli.model.checkpoint import AGAIN, Entry, Opaque, Storage, Tensor, Value
from ckpt_cli.model.names import Below, Holders

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
    reads: Sequence[Extent] = ()
    """Ranges of files elsewhere that it reads for that, which are asked for before."""
    origin: Storage | None = None
    """The old storage of which this is a whole copy, whose checksum therefore holds."""


_EXTENTS = 10_000
"""Ranges of a storage above which they are read rather than copied one by one."""

_FORGOTTEN = 16
"""Pieces after which the memory of those that were read is given back."""


def content_of(
    storage: Storage, ranges: Sequence[tuple[int, int]] | None = None, files: Sequence[SourceFile] = ()
) -> Content:
    """The bytes of some ranges of a storage, or of all: copied where they stand plainly, else read in pieces.

    `files` are those that may map what is read to memory, which is given back from time to time.
    """
    ranges = [(0, storage.nbytes)] if ranges is None else ranges
    nbytes = sum(end - begin for begin, end in ranges)
    with suppress(UnsupportedError):
        extents = [extent for begin, end in ranges if end > begin for extent in storage.extents(begin, end - begin)]
        if len(extents) <= _EXTENTS:
            return Content(nbytes, extents=extents)

    def make(write: Write) -> None:
        for begin, end in ranges:
            for piece in pieces_of(storage, begin, end, files):
                write(piece)

    return Content(nbytes, make=make)


def pieces_of(
    storage: Storage, begin: int, end: int, files: Sequence[SourceFile], most: int = PIECE
) -> Iterator[memoryview]:
    """Yield a range of a storage's bytes, at most `most` at a time; gives back the memory that `files` map."""
    for number, at in enumerate(range(begin, end, most), 1):
        yield storage.view(at, min(most, end - at))
        if not number % _FORGOTTEN or at + most >= end:
            for file in files:
                file.forget()


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes of a checkpoint; whatever is not named stays as it is."""

    names: Mapping[str, str] = field(default_factory=dict)
    """The new name of each entry that gets another one."""
    rename: Callable[[str], str] | None = None
    """The rule of the new names, for things that are named by prefixes only (a state_dict's `_metadata`)."""
    dropped: frozenset[str] = frozenset()
    """Entries that go."""
    dropped_prefixes: frozenset[str] = frozenset()
    """Prefixes that go with all that is below them: a container that is called so goes itself."""
    root: str = ""
    """The prefix that becomes the whole checkpoint."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """New facts of tensors, by their old names: another dtype, another storage, another view of it."""
    contents: Mapping[Storage, Content] = field(default_factory=dict)
    """The bytes of each storage that is new."""
    values: Mapping[str, object] = field(default_factory=dict)
    """New values of non-tensor entries: plain data."""
    cast: bool = False
    """True if new values are converted to the types of the old ones where these cannot hold them."""
    added: Mapping[str, object] = field(default_factory=dict)
    """Values under names that are new: plain data, or tensors over storages that have contents."""
    metadata: Mapping[str, str] | None = None
    """The container's string map, where it changes; of a set of shards, that of its index."""
    in_shards: Mapping[str, str | None] = field(default_factory=dict)
    """Strings that each shard of a set gets, None for those that it loses."""

    device: str | None = None
    """The device that loading shall put every tensor on, such as `cpu` or `cuda:1`; None where that stays."""
    rewrite: bool = False
    """True if the file is rewritten whatever else changes, for its layout and without unused storages."""

    @property
    def new_tensors(self) -> dict[str, Tensor]:
        """The tensors among what is added."""
        return {name: value for name, value in self.added.items() if isinstance(value, Tensor)}

    @property
    def only_names_and_metadata(self) -> bool:
        """True if every storage that stays keeps its bytes and its place."""
        return not (self.rewrite or self.dropped or self.dropped_prefixes or self.root or self.tensors or self.contents)


_OF_TENSOR = attrgetter(*(one.name for one in fields(Tensor)[1:]))
"""The fields of a tensor but for its name, in their order."""


def entries_after(entries: Sequence[Entry], changes: Changes) -> list[Entry]:
    """The entries that stay, as they are afterwards: new names, new facts. Added ones are not among them."""
    found: list[Entry] = []
    below = Below(changes.dropped_prefixes)
    for entry in entries:
        if entry.name in changes.dropped or entry.name in below:
            continue
        after = changes.tensors.get(entry.name, entry) if isinstance(entry, Tensor) else entry
        name = changes.names.get(entry.name, entry.name)
        found.append(after if name == after.name else _called(after, name))
    return found


def _called(entry: Entry, name: str) -> Entry:
    """Return an entry under another name; `replace` takes ten times as long, and a rename asks for every entry."""
    return Tensor(name, *_OF_TENSOR(entry)) if isinstance(entry, Tensor) else replace(entry, name=name)


def over(tensor: Tensor, storage: Storage, stride: tuple[int, ...]) -> Tensor:
    """Return a tensor over a storage of its own, from the storage's first element on, without an alias's name.

    `replace` takes several times as long, and an edit may do this for every tensor.
    """
    values = list(_OF_TENSOR(tensor))
    for place, value in zip(_OWN, (storage, 0, stride, None), strict=True):
        values[place] = value
    return Tensor(tensor.name, *values)


_OWN = [[one.name for one in fields(Tensor)[1:]].index(name)
        for name in ("storage", "storage_offset", "stride", "alias_of")]  # fmt: skip
"""The places of some fields among these."""


def _opened(meant: Mapping[str, Entry], named: Mapping[str, Entry]) -> list[str]:
    """The names of what stood for an object that is listed elsewhere, and is listed there no more."""
    return [
        name
        for name, entry in meant.items()
        if isinstance(entry, Value) and entry.holder is not None and name not in named
        and isinstance(entry.value, Opaque) and entry.value.text == AGAIN
    ]  # fmt: skip


def difference(
    wanted: Sequence[Entry],
    found: Sequence[Entry],
    added: Sequence[str] = (),
    emptied: Holders | None = None,
    names: Mapping[str, str] | None = None,
) -> str | None:
    """In what the entries that were read back differ from those that were meant, in words; None where they do not.

    `added` are names of new values, which may open up to entries below them; `emptied` are containers of which
    nothing may be left, which then are values; `names` has the new names of entries that still have their old ones.
    Names, dtypes, shapes, and which tensors share a storage with which.
    """
    new_name = (names or {}).get
    meant = {new_name(entry.name, entry.name): entry for entry in wanted}
    if emptied:
        found = [entry for entry in found if isinstance(entry, Tensor) or entry.name in meant
                 or (entry.name and entry.name not in emptied)]  # fmt: skip
    named = {entry.name: entry for entry in found}
    opened = _opened(meant, named)
    for name in opened:
        del meant[name]
    new = {*added, *opened}
    below, holders = Below(new), Holders(named if new else ())
    missing = [name for name in meant if name not in named]
    missing += [name for name in (*added, *opened) if name not in named and name not in holders]
    if missing:
        return f"it has no {missing[0]!r}"
    extra = [name for name in named if name not in meant and name not in new and name not in below]
    if extra or (not new and len(wanted) != len(found)):
        return f"it has {extra[0]!r} as well" if extra else "it has another number of entries"
    return _other_facts(meant, named)


def _other_facts(meant: Mapping[str, Entry], named: Mapping[str, Entry]) -> str | None:
    """In what the entries of the same names differ, in words."""
    new: dict[Storage, Storage] = {}
    old: dict[Storage, Storage] = {}
    for name, entry in meant.items():
        other = named[name]
        if not isinstance(entry, Tensor) or not isinstance(other, Tensor):
            continue
        if entry.dtype.name != other.dtype.name or entry.shape != other.shape:
            return f"{name!r} is {other.dtype} {other.shape} in it"
        ours, theirs = entry.storage, other.storage
        if ours is None or theirs is None or not entry.numel:
            continue
        if new.setdefault(ours, theirs) is not theirs or old.setdefault(theirs, ours) is not ours:
            return f"{name!r} shares its bytes with other names than it should"
    return None
