"""safetensors: a JSON header, then the bytes of every tensor without gaps; and the names of ties in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ckpt_cli.errors import CkptError
from ckpt_cli.files.source import ByteSource, Extent, SourceFile
from ckpt_cli.formats.safetensors.header import read_header
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

NAME = "safetensors"


class Safetensors:
    """The container: each tensor is its own storage, at an offset from the end of the header."""

    def __init__(self, file: ByteSource, begin: int, number: int = 0) -> None:
        """Of a file, or of a part of file `number` of a container of several."""
        self.source = file
        self.number = number
        self.files: Sequence[SourceFile] = (file.whole,)
        self.begin = begin
        """The first byte after the header."""
        self.has_more = False
        """True if tensors may have fields in the header that mean nothing."""

    def extents(self, storage: Storage, offset: int, nbytes: int) -> Sequence[Extent]:
        """Return the extents of a range of a tensor."""
        return storage.extents(offset, nbytes)

    def seal(self, overlay: Overlay) -> None:
        """Nothing follows from changed bytes: the format has no checksums."""

    def close(self) -> None:
        """Close the file."""
        self.files[0].close()


def read(file: SourceFile) -> Checkpoint:
    """Open a safetensors file: only its header is read."""
    container, tensors, metadata = read_part(file)
    entries = with_aliases(tensors, metadata)
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=entries,
        container=container,
        version=f"safetensors, header of {container.begin} bytes",
        metadata=metadata,
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in entries)),
    )


def read_part(file: ByteSource, number: int = 0) -> tuple[Safetensors, list[Tensor], dict[str, str]]:
    """The container, tensors and metadata of a file, or of a part of file `number` of a container of several."""
    try:
        header = read_header(file, number)
    except CkptError as error:
        error.path = error.path or file.path
        raise
    container = Safetensors(file, header.nbytes, number)
    container.has_more = header.has_more
    return container, header.tensors, header.metadata


ORDER = "ckpt.order"
"""The key of our own in the metadata that says at which places among all names the aliases stood: {name: place}."""


def order_text(names: Sequence[str], aliases: Mapping[str, str]) -> str:
    """Return the content of `ORDER` for names in their order, some of which are aliases."""
    return json.dumps({name: place for place, name in enumerate(names) if name in aliases}, ensure_ascii=False)


def renamed_order(text: str, names: Mapping[str, str], aliases: set[str]) -> str:
    """The same once names are others: of those that are aliases still, by their old names."""
    places = _places(text)
    return json.dumps({names.get(name, name): places[name] for name in places if name in aliases}, ensure_ascii=False)


def _places(text: str) -> dict[str, int]:
    """The places that `ORDER` says; none where it does not read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: place for name, place in found.items() if type(place) is int and place >= 0}


def with_aliases(tensors: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
    """The tensors and the dropped names of tied ones, which `save_model` notes in the metadata as {dropped: kept}.

    Where we wrote the file, each is at the place that it had; else all come last.
    """
    if not metadata:
        return list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors if isinstance(tensor, Tensor)}
    aliases = {
        dropped: replace(by_name[kept], name=dropped, alias_of=kept)
        for dropped, kept in metadata.items()
        if kept in by_name and dropped not in by_name
    }
    places = _places(metadata[ORDER]) if ORDER in metadata and aliases else {}
    placed = sorted((place, name) for name, place in places.items() if name in aliases)
    found: list[Entry] = []
    rest = iter(tensors)
    for place, name in placed:
        found.extend(islice(rest, max(place - len(found), 0)))
        found.append(aliases.pop(name))
    return [*found, *rest, *aliases.values()]


def repeated_names(file: SourceFile) -> list[str]:
    """The names that stand in the header of a sound file more than once; readers take the last."""
    length = int.from_bytes(file.read(0, 8), "little")
    from collections import Counter

    repeated: list[str] = []

    def noting(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) and all(isinstance(value, dict) for value in made.values()):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return made

    json.loads(file.read(8, length), object_pairs_hook=noting)
    return repeated
