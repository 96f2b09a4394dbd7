"""Rewrite a safetensors file as a new file, or with a new header in the room that the old one had.

The header gets spaces at its end, which every reader takes for white space, so that later edits of names and metadata
fit into it. Data keeps its order, but for a change of dtypes: then wider elements come first, as the reference writer
has it (safetensors, `prepare`), so that all of them are aligned.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NoReturn

from ckpt_cli import limits
from ckpt_cli.errors import MalformedError, RefusedError, UnsupportedError, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.safetensors.header import FIELDS
from ckpt_cli.formats.safetensors.read import ORDER, Safetensors, renamed_order
from ckpt_cli.formats.writing import Appender, OpenCopy, open_with_safetensors, reading_back
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, PlainBytes, Storage, Tensor

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

_ROOM = 1024
"""Bytes of spaces that a new header gets at least, for later edits."""

_ALIGNMENT = 64
"""The alignment of the data's begin, in bytes."""

_NO_MORE: Mapping[str, Any] = {}
"""What nearly every tensor has beside its fields: nothing, in one dict for 100,000."""


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


def header_bytes(items: Sequence[Item], metadata: Mapping[str, str]) -> bytearray:
    """Return the length and the header of a file, with room at its end for later edits, so that data begins aligned.

    `items` stand in the order of their data.
    """
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    least = sum(len(item.name) for item in items) + sum(len(key) + len(text) for key, text in metadata.items())
    if least > limits.SAFETENSORS_WRITTEN:  # before that takes several times the memory
        _refuse_long(least)
    header = bytearray(8)
    header += b"{"
    if metadata:
        header += f'"__metadata__":{encode(dict(metadata))},'.encode()
    for begin, item in _as_listed(items):
        sizes, end = ",".join(map(str, item.shape)), begin + item.content.nbytes
        more = f",{encode(item.more)[1:-1]}" if item.more else ""
        text = f'{{"dtype":"{item.dtype}","shape":[{sizes}],"data_offsets":[{begin},{end}]{more}}}'
        header += f"{encode(item.name)}:{text},".encode()
    if header.endswith(b","):
        del header[-1:]
    header += b"}"
    header += b" " * (_ROOM + -(len(header) + _ROOM) % _ALIGNMENT)
    nbytes = len(header) - 8
    if nbytes > limits.SAFETENSORS_WRITTEN:
        _refuse_long(nbytes)
    header[:8] = nbytes.to_bytes(8, "little")
    return header


def _refuse_long(nbytes: int) -> NoReturn:
    raise RefusedError(f"the header would have {nbytes} bytes or more; {limits.SAFETENSORS_WRITTEN} is the most")


def _as_listed(items: Sequence[Item]) -> Iterable[tuple[int, Item]]:
    """Return items in the order of the header, each with the first byte of its data, counted from the first of all."""
    pairs = zip(accumulate([item.content.nbytes for item in items], initial=0), items, strict=False)
    places = [item.place for item in items]
    if places == sorted(places):
        return pairs
    return sorted(pairs, key=lambda pair: pair[1].place)


def as_header_spells(tensor: Tensor) -> tuple[str | None, tuple[int, ...]]:
    """The dtype and shape of a tensor in a header, None for a dtype that there is none for.

    Torch's pairs of float4 are single values there, so that a scalar of them cannot be.
    """
    shape = tuple(tensor.shape or ())
    if tensor.dtype.name == "float4_e2m1fn_x2":
        return ("F4", (*shape[:-1], 2 * shape[-1])) if shape else (None, shape)
    return tensor.dtype.safetensors, shape


def write_file(
    header: bytes | bytearray,
    items: Sequence[Item],
    target: LocalFile | None,
    progress: Progress = no_progress,
) -> int:
    """Write a whole file: its header, then every tensor's bytes; returns how many they are.

    Without a target it only measures.
    """
    out = Appender(target)
    out.append(header)
    out.append_contents((item.content for item in items), progress)
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
    """The first byte of a tensor in its file."""
    source = tensor.storage.source if tensor.storage is not None else None
    return source.file.begin + source.begin if isinstance(source, PlainBytes) else 0


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
                hint=f"ckpt meta {quoted(checkpoint.path)} {quoted(name)}=… sets a string of its metadata; "
                "--dtype makes a tensor of numbers",
            )
        self._file = container.files[0]
        self._begin = container.begin
        self._changes = changes
        self._open_copy = open_copy
        self._is_in_place = changes.only_names_and_metadata
        fields = json.loads(self._file.read(8, container.begin - 8)) if container.has_more else {}
        self._aliases = {tensor.name: tensor.alias_of for tensor in checkpoint.tensors if tensor.alias_of is not None}
        self._tied: dict[str, str] = {}
        """The aliases afterwards: {name: the one that is stored}, by old names."""
        self._items = self._planned(checkpoint, fields)
        self._metadata = self._new_metadata(checkpoint)
        if self._metadata:
            refuse_new_ties(set(self.stored), self._metadata, self.aliases)
        self._header = header_bytes(self._items, self._metadata)
        self.nbytes = write_file(self._header, self._items, None)
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

    def _planned(self, checkpoint: Checkpoint, fields: Mapping[str, Any]) -> list[Item]:
        """Return every tensor that stays and is no alias, in the order in which their bytes are to stand."""
        items: list[Item] = []
        offsets: list[int] = []
        stored: dict[tuple[Storage | None, str], str] = {}
        tensors = checkpoint.tensors
        for place, tensor in self._stored(tensors):
            new = self._changes.tensors.get(tensor.name, tensor)
            items.append(self._item(tensor, new, fields.get(tensor.name, _NO_MORE), place))
            offsets.append(_offset(tensor))
            stored[new.storage, new.dtype.name] = tensor.name
        if offsets != sorted(offsets):
            items = [items[number] for number in sorted(range(len(items)), key=offsets.__getitem__)]
        for place, new in enumerate(self._changes.new_tensors.values(), len(tensors)):
            kept = stored.setdefault((new.storage, new.dtype.name), new.name)
            if kept == new.name or not new.nbytes:
                items.append(self._item(new, new, _NO_MORE, place))
            else:
                self._tied[new.name] = kept
        if not self._is_in_place and not _are_aligned(items):
            items.sort(key=lambda item: -item.itemsize)
        return items

    def _stored(self, tensors: Sequence[Tensor]) -> Iterable[tuple[int, Tensor]]:
        """Return the tensors that have bytes of their own afterwards, each with its place among all.

        Of a tie whose kept name goes, the first alias is one.
        """
        dropped = self._changes.dropped
        stays = ((place, tensor) for place, tensor in enumerate(tensors) if tensor.name not in dropped)
        return self._untied(stays) if self._changes.tensors or self._aliases else stays

    def _untied(self, tensors: Iterable[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        """Return those of some tensors that are stored, and note the others as aliases of them."""
        found: list[tuple[int, Tensor]] = []
        seen: dict[tuple[Storage | None, str], str] = {}
        for place, tensor in sorted(tensors, key=lambda pair: (self._is_moved(pair[1]), pair[1].alias_of is not None)):
            new = self._changes.tensors.get(tensor.name, tensor)
            key = (new.storage, new.dtype.name)
            kept = seen.setdefault(key, tensor.name)
            if kept == tensor.name:
                found.append((place, tensor))
            else:
                self._tied[tensor.name] = kept
        return found

    def _is_moved(self, tensor: Tensor) -> bool:
        """True if it becomes another name of what is stored already."""
        new = self._changes.tensors.get(tensor.name, tensor).storage
        return new is not tensor.storage and new not in self._changes.contents

    def _item(self, old: Tensor, new: Tensor, info: Mapping[str, Any], place: int) -> Item:
        if new.storage is None:
            raise UnsupportedError(f"tensor {old.name!r} has no bytes to be written")
        content = self._changes.contents.get(new.storage, new.storage)
        dtype, shape = as_header_spells(new)
        if dtype is None:
            raise UnsupportedError(f"safetensors has no dtype for tensor {old.name!r}, which would be {new.dtype}")
        more = {key: value for key, value in info.items() if key not in FIELDS} if info else _NO_MORE
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
                hint=f"ckpt meta FILE -d {quoted(taken)} removes it",
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
        raw = bytes(self._header[8:]).rstrip(b" ")
        if 8 + len(raw) > self._begin:
            return False
        old = self._file.read(8, self._begin - 8)
        raw = raw.ljust(len(old.rstrip()))  # what follows are spaces already, or may be white space
        overlay.write(self._file, 8, raw)
        return True

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write the whole file."""
        write_file(self._header, self._items, target, progress)

    def verify(self, path: str) -> None:
        """Open the new file with the reference reader and with our own, one after the other for the memory they take.

        Raises CkptError where the names, dtypes, shapes, places of bytes or metadata are others than were meant.
        """
        self._header = bytearray()
        with reading_back(path, self._opened_by_both) as copy:
            fault = self._fault(copy)
            if fault:
                raise MalformedError(fault)

    def _opened_by_both(self, path: str) -> Checkpoint:
        open_with_safetensors(path)
        return self._open_copy(path)

    def _fault(self, copy: Checkpoint) -> str | None:
        """Return in what a copy differs from what was meant, in words; None where it does not."""
        found = [tensor for tensor in copy.tensors if tensor.alias_of is None]
        if not isinstance(copy.container, Safetensors):
            return f"it is read as {copy.format}"
        if len(found) != len(self._items) or copy.metadata != self._metadata:
            return "its names or its metadata are others"
        first = copy.container.begin
        for (begin, item), tensor in zip(_as_listed(self._items), found, strict=True):
            if tensor.name != item.name:
                return "its names or its metadata are others"
            if as_header_spells(tensor) != (item.dtype, item.shape):
                return f"{item.name!r} is {tensor.dtype} {tensor.shape} in it"
            if _offset(tensor) - first != begin:
                return f"the bytes of {item.name!r} are elsewhere in it"
        return None
