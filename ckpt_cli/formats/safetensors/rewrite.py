"""Rewrite a safetensors file as a new file, or with a new header in the room that the old one had.

The header gets spaces at its end, which every reader takes for white space, so that later edits of names and metadata
fit into it. Data keeps its order, but for a change of dtypes: then wider elements come first, as the reference writer
has it (safetensors, `prepare`), so that all of them are aligned.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from ckpt_cli import limits
from ckpt_cli.errors import MalformedError, RefusedError, UnsupportedError
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.formats.safetensors.read import ORDER, Safetensors, renamed_order
from ckpt_cli.formats.writing import Appender, OpenCopy, open_with_safetensors, reading_back
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

_ROOM = 1024
"""Bytes of spaces that a new header gets at least, for later edits."""

_ALIGNMENT = 64
"""The alignment of the data's begin, in bytes."""


@dataclass(slots=True)
class Item:
    """One tensor to be written."""

    name: Final[str]
    dtype: Final[str]
    """In safetensors' spelling."""
    shape: Final[tuple[int, ...]]
    """As the header counts it: single values of float4."""
    content: Final[Content | Storage]
    """Its new bytes, or the storage that is copied."""
    itemsize: Final[int]
    more: Final[Mapping[str, Any]]
    """Fields of its header that have no meaning, which are kept."""
    place: Final[int] = 0
    """Its place in the header, whose order need not be that of the bytes."""


def header_bytes(items: Sequence[Item], metadata: Mapping[str, str], listed: Sequence[str] = ()) -> bytes:
    """The length and the header of a file, with room for later edits at its end, so that data begins aligned.

    Tensors are listed in the order of `listed`, where that is given, else in that of their data.
    """
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    fields = dict.fromkeys(listed, "")
    begins = accumulate((item.content.nbytes for item in items), initial=0)
    for item, begin in sorted(zip(items, begins, strict=False), key=lambda pair: pair[0].place):
        sizes, end = ",".join(map(str, item.shape)), begin + item.content.nbytes
        more = f",{encode(item.more)[1:-1]}" if item.more else ""
        text = f'{{"dtype":"{item.dtype}","shape":[{sizes}],"data_offsets":[{begin},{end}]{more}}}'
        fields[item.name] = f"{encode(item.name)}:{text}"
    strings = [f'"__metadata__":{encode(dict(metadata))}'] if metadata else []
    body = ",".join((*strings, *fields.values())).encode()
    nbytes = len(body) + 2 + _ROOM
    nbytes += -(8 + nbytes) % _ALIGNMENT
    if nbytes > limits.SAFETENSORS_HEADER:
        raise RefusedError(f"the header would have {nbytes} bytes; {limits.SAFETENSORS_HEADER} is the most")
    return b"".join((nbytes.to_bytes(8, "little"), b"{", body, b"}".ljust(nbytes - len(body) - 1)))


def as_header_spells(tensor: Tensor) -> tuple[str | None, tuple[int, ...]]:
    """The dtype and shape of a tensor in a header, None for a dtype that there is none for.

    Torch's pairs of float4 are single values there, so that a scalar of them cannot be.
    """
    shape = tuple(tensor.shape or ())
    if tensor.dtype.name == "float4_e2m1fn_x2":
        return ("F4", (*shape[:-1], 2 * shape[-1])) if shape else (None, shape)
    return tensor.dtype.safetensors, shape


def write_file(
    header: bytes,
    items: Sequence[Item],
    files: Sequence[SourceFile],
    target: LocalFile | None,
    progress: Progress = no_progress,
) -> int:
    """Write a whole file: its header, then every tensor's bytes; returns how many they are.

    Without a target it only measures.
    """
    out = Appender(target)
    out.append(header)
    out.append_contents((item.content for item in items), files, progress)
    return out.position


def refuse_new_ties(stored: Collection[str], metadata: Mapping[str, str], aliases: Mapping[str, str]) -> None:
    """Raise RefusedError where a string of the metadata would be read as a tie that nobody made."""
    for key, value in metadata.items():
        if value in stored and key not in stored and aliases.get(key) != value:
            raise RefusedError(f"{key!r} in its metadata says {value!r}, which would then record a tie of the two")


def _are_aligned(items: Sequence[Item]) -> bool:
    """True if each tensor's bytes begin at a multiple of its elements' size, without which torch cannot map them."""
    begins = accumulate((item.content.nbytes for item in items), initial=0)
    return all(
        not item.content.nbytes or begin % item.itemsize == 0 for item, begin in zip(items, begins, strict=False)
    )


def _offset(tensor: Tensor) -> int:
    """The first byte of a tensor in the old file."""
    return tensor.storage.extents(0, 0)[0].offset if tensor.storage is not None else 0


class Rewriting:
    """A safetensors file about to be rewritten with some changes."""

    def __init__(self, checkpoint: Checkpoint, changes: Changes, open_copy: OpenCopy) -> None:
        container = checkpoint.container
        if not isinstance(container, Safetensors):
            raise UnsupportedError(f"a checkpoint of format {checkpoint.format} cannot be written as safetensors")
        name = next((name for name in (*changes.values, *changes.added) if name not in changes.new_tensors), None)
        if name is not None:
            raise UnsupportedError(
                f"a safetensors file holds tensors and strings only, so {name!r} cannot be set",
                path=checkpoint.path,
                hint=f"ckpt meta {checkpoint.path} {name}=… sets a string of its metadata; "
                "--dtype makes a tensor of numbers",
            )
        self._files = container.files
        self._begin = container.begin
        self._changes = changes
        self._open_copy = open_copy
        self._is_in_place = changes.only_names_and_metadata
        fields = json.loads(self._files[0].read(8, container.begin - 8)) if container.has_more else {}
        self._aliases = {tensor.name: tensor.alias_of for tensor in checkpoint.tensors if tensor.alias_of is not None}
        self._tied: dict[str, str] = {}
        """The aliases afterwards: {name: the one that is stored}, by old names."""
        self._items = [item for _, item in self._planned(checkpoint, fields)]
        self._metadata = self._new_metadata(checkpoint)
        refuse_new_ties(set(self.stored), self._metadata, self.aliases)
        self._header = header_bytes(self._items, self._metadata)
        self.nbytes = write_file(self._header, self._items, self._files, None)
        """The bytes of a new file."""

    @property
    def stored(self) -> list[str]:
        """The names that have bytes of their own afterwards."""
        return [item.name for item in self._items]

    @property
    def aliases(self) -> dict[str, str]:
        """The aliases afterwards: {name: the one that is stored}."""
        rename = self._changes.names
        return {rename.get(name, name): rename.get(kept, kept) for name, kept in self._tied.items()}

    # --- planning ----------------------------------------------------------------------------------------------------

    def _planned(self, checkpoint: Checkpoint, fields: Mapping[str, Any]) -> list[tuple[int, Item]]:
        """Every tensor that stays and is no alias, in the order in which their bytes are to stand."""
        found: list[tuple[int, Item]] = []
        places = {tensor.name: place for place, tensor in enumerate(checkpoint.tensors)}
        for tensor in self._stored(checkpoint):
            new = self._changes.tensors.get(tensor.name, tensor)
            storage = new.storage
            if storage is None:
                raise UnsupportedError(f"tensor {tensor.name!r} has no bytes to be written")
            info = fields.get(tensor.name, {})
            item = self._item(tensor, new, storage, info, places[tensor.name])
            found.append((_offset(tensor), item))
        found.sort(key=itemgetter(0))
        end = found[-1][0] if found else 0
        for place, (name, new) in enumerate(self._changes.new_tensors.items(), len(places)):
            if new.storage is None:
                raise UnsupportedError(f"tensor {name!r} has no bytes to be written")
            found.append((end, self._item(new, new, new.storage, {}, place)))
        if not self._is_in_place and not _are_aligned([item for _, item in found]):
            found.sort(key=lambda pair: (-pair[1].itemsize, pair[0]))
        return found

    def _stored(self, checkpoint: Checkpoint) -> list[Tensor]:
        """The tensors that have bytes of their own afterwards; of a tie whose kept name goes, the first alias."""
        dropped = self._changes.dropped
        stays = [tensor for tensor in checkpoint.tensors if tensor.name not in dropped]
        if not self._changes.tensors and not self._aliases:
            return stays
        found: list[Tensor] = []
        seen: dict[tuple[Storage | None, str], str] = {}
        for tensor in sorted(stays, key=lambda tensor: (self._is_moved(tensor), tensor.alias_of is not None)):
            new = self._changes.tensors.get(tensor.name, tensor)
            key = (new.storage, new.dtype.name)
            kept = seen.setdefault(key, tensor.name)
            if kept == tensor.name:
                found.append(tensor)
            else:
                self._tied[tensor.name] = kept
        return found

    def _is_moved(self, tensor: Tensor) -> bool:
        """True if it becomes another name of what is stored already."""
        new = self._changes.tensors.get(tensor.name, tensor).storage
        return new is not tensor.storage and new not in self._changes.contents

    def _item(self, old: Tensor, new: Tensor, storage: Storage, info: Mapping[str, Any], place: int) -> Item:
        content = self._changes.contents.get(storage, storage)
        dtype, shape = as_header_spells(new)
        if dtype is None:
            raise UnsupportedError(f"safetensors has no dtype for tensor {old.name!r}, which would be {new.dtype}")
        more = (
            {key: value for key, value in info.items() if key not in ("dtype", "shape", "data_offsets")} if info else {}
        )
        name = self._changes.names.get(old.name, old.name)
        return Item(name, dtype, shape, content, max(new.dtype.bits // 8, 1), more, place)

    def _new_metadata(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The string map, aliases under their new names."""
        given = checkpoint.metadata if self._changes.metadata is None else self._changes.metadata
        rename = self._changes.names
        found: dict[str, str] = {}
        for key, value in given.items():
            if key in self._tied:
                found[rename.get(key, key)] = rename.get(self._tied[key], self._tied[key])
            elif key not in self._aliases:
                found[key] = value
        taken = next((name for name in self.aliases if name in given and name not in self._aliases), None)
        if taken is not None:
            raise RefusedError(
                f"the metadata has a string {taken!r}, so that name cannot stand there for a tie as well",
                hint=f"ckpt meta FILE -d {taken} removes it",
            )
        found |= self.aliases
        if ORDER in found:
            found[ORDER] = renamed_order(found[ORDER], rename, set(self._tied))
        return found

    # --- writing -----------------------------------------------------------------------------------------------------

    def patch(self, overlay: Overlay) -> bool:
        """Put the edit into the overlay if it is one of the header alone that fits where the old header stands."""
        if not self._is_in_place:
            return False
        raw = self._header[8:].rstrip(b" ")
        if 8 + len(raw) > self._begin:
            return False
        old = self._files[0].read(8, self._begin - 8)
        overlay.write(0, 8, raw.ljust(len(old.rstrip())))  # what follows are spaces already, or may be white space
        return True

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write the whole file."""
        write_file(self._header, self._items, self._files, target, progress)

    def verify(self, path: str) -> None:
        """Open the new file with the reference reader and with our own, and compare it with what was meant."""
        with reading_back(path, self._open_copy) as copy:
            open_with_safetensors(path)
            found = {tensor.name: tensor for tensor in copy.tensors if tensor.alias_of is None}
            if found.keys() != {item.name for item in self._items} or copy.metadata != self._metadata:
                raise MalformedError("its names or its metadata are others")
