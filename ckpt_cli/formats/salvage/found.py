"""What is found in a cut file: storages as far as their bytes are there, and entries told apart by that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.model.checkpoint import Checkpoint, Entry, PlainBytes, Storage, StorageSource, Tensor
from ckpt_cli.pickles.graph import Graph


@dataclass(frozen=True, slots=True)
class Lost:
    """Something that was in the file before it was cut."""

    name: str
    """The entry's name; empty for what has no name in what is left."""
    why: str


@dataclass(frozen=True, slots=True)
class Document:
    """The pickle of a cut file, where it is all there, and what it refers to."""

    graph: Graph
    entries: Sequence[Entry]
    """Its entries, also those whose bytes are not there."""
    storages: CutStorages
    begin: int | None
    """The byte at which it stands; None where it is compressed."""

    @property
    def tensors(self) -> list[Tensor]:
        """The entries that are tensors."""
        return [entry for entry in self.entries if isinstance(entry, Tensor)]


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What can be had of a file, and what cannot."""

    checkpoint: Checkpoint
    """The entries that are all there."""
    problem: str = ""
    """The error that opening the file has; empty for a file that is whole."""
    lost: tuple[Lost, ...] = ()
    document: Document | None = None
    """The file's one pickle, where it is whole."""

    @property
    def is_whole(self) -> bool:
        """True if nothing is wrong with the file."""
        return not self.problem

    def close(self) -> None:
        """Close the file."""
        self.checkpoint.close()


class CutStorages:
    """A container and finder of storages, each with the number of its bytes that are there."""

    def __init__(self, file: SourceFile, *, big_endian: bool = False) -> None:
        self.container = PlainFile(file)
        self.big_endian = big_endian
        self.places: dict[str, tuple[int, int]] = {}
        """The first byte of each storage, by its key, and the number of its bytes that are there."""
        self.sources: dict[str, StorageSource] = {}
        """Other sources of bytes, of storages that do not stand in the file as they are."""
        self.present: dict[Storage, int] = {}
        """The number of bytes that are there of each storage that was found."""
        self.prefix = ""
        """The beginning of the keys that storages get, where a file has several pickles."""

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage of a key, whether its bytes are there or not."""
        begin, has = self.places.get(key, (0, 0))
        source = self.sources.get(key) or PlainBytes(self.container.files[0], begin)
        storage = Storage(f"{self.prefix}{key}", nbytes, location, source)
        self.present[storage] = min(has, nbytes)
        return storage


def told_apart(entries: Iterable[Entry], storages: CutStorages) -> tuple[list[Entry], list[Lost]]:
    """Return the entries whose bytes are all there, over storages that end where the bytes do, and what is lost."""
    kept: list[Entry] = []
    lost: list[Lost] = []
    cut: dict[Storage, Storage] = {}
    for entry in entries:
        why = missing_of(entry, storages.present) if isinstance(entry, Tensor) else None
        if why is not None:
            lost.append(Lost(entry.name, why))
        elif isinstance(entry, Tensor):
            kept.append(_over(entry, storages.present, cut))
        else:
            kept.append(entry)
    return kept, lost


def missing_of(tensor: Tensor, present: dict[Storage, int]) -> str | None:
    """Say which bytes of a tensor, or of its parts, are not there; None where all are."""
    storage = tensor.storage
    if storage is not None and storage in present:
        begin, end = tensor.span
        has = present[storage]
        if end > has and end > begin:
            if has <= begin:
                return f"its {end - begin} bytes are not there"
            return f"of its {end - begin} bytes the last {end - has} are not there"
    return next((why for part in tensor.parts if (why := missing_of(part, present))), None)


def _over(tensor: Tensor, present: dict[Storage, int], cut: dict[Storage, Storage]) -> Tensor:
    """Return a tensor over a storage that ends where the bytes do, and so its parts."""
    storage = tensor.storage
    parts = tuple(_over(part, present, cut) for part in tensor.parts)
    if storage is not None and present.get(storage, storage.nbytes) < storage.nbytes:
        if storage not in cut:
            cut[storage] = Storage(storage.key, present[storage], storage.location, storage.source)
        return replace(tensor, storage=cut[storage], parts=parts)
    return tensor if parts == tensor.parts else replace(tensor, parts=parts)


def checkpoint_of(
    file: SourceFile, kind: str, entries: Sequence[Entry], *, metadata: dict[str, str] | None = None
) -> Checkpoint:
    """The checkpoint of what was found: its format is that of the whole file, with the word that it is cut."""
    return Checkpoint(
        path=file.path,
        format=f"{kind} (cut)",
        entries=entries,
        container=PlainFile(file),
        version=f"{kind}, cut short",
        metadata=metadata or {},
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in entries)),
    )
