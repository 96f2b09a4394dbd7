"""The tar file that torch.save wrote up to 0.1.10: storages and tensors in lists of their own, and a pickle.

Source: torch/serialization.py (`_legacy_load.legacy_load`). The pickle names tensors and storages by their numbers.
`members` finds those of any tar file, also for the scan. Their layout is POSIX's ustar with pax's extended headers,
GNU's long names and its numbers in base 256 (POSIX.1-2017, pax; GNU tar's manual, "Basic Tar Format").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

from ckpt_cli import limits
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError, UnknownFormatError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import ByteSource, SourceFile, Window
from ckpt_cli.formats.plain import NoStorages, PlainFile
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.pickles.flatten import entries_of, objects_of, top_level_of
from ckpt_cli.pickles.graph import Global, PersistentId
from ckpt_cli.pickles.legacy_save import pickle_at
from ckpt_cli.pickles.tensors.arguments import COUNT_END, is_count, sizes, storage_dtype, text_of
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.tensors.rebuild import Rebuilder

NAME = "tar"

MEMBERS = ("storages", "tensors", "pickle")
_LEAST = 20
"""Bytes that one storage or tensor takes at least in its list."""


_BLOCK = 512
_FILES = (b"0", b"\0")
_EXTENDED, _GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"
_DESCRIBING = (_EXTENDED, _GLOBAL, _LONG_NAME, _LONG_LINK)
"""Kinds of members that say something of the next one, or of all."""

_EXTENDED_BYTES = 64 << 10
"""Bytes of an extended header that are looked at: names and sizes are short."""


class Member(NamedTuple):
    """One member of a tar file, one that only describes the next included."""

    name: str
    kind: bytes
    begin: int
    """The first byte of its content."""
    size: int

    @property
    def end(self) -> int:
        """The first byte of the next member's header."""
        return self.begin + -(-self.size // _BLOCK) * _BLOCK


def members(file: ByteSource, *, tolerant: bool = False) -> Iterator[Member]:
    """The members of a tar file in their order.

    Raises MalformedError for a header that makes no sense, TruncatedError for a member that is not all there, and
    unless `tolerant` also for a wrong checksum, a missing end mark and, as LimitError, for far too many members.
    """
    position = 0
    extended: dict[str, str] = {}
    for number in count():
        if position + _BLOCK > file.size:
            if tolerant:
                return
            raise TruncatedError(f"the tar file ends at byte {file.size}, before its end mark")
        header = file.read(position, _BLOCK)
        if not any(header):
            return
        found = _member(header, position + _BLOCK, extended, check=not tolerant)
        if found.begin + found.size > file.size:
            raise TruncatedError(
                f"member {found.name!r} needs bytes {found.begin}–{found.begin + found.size}, the file has {file.size}"
            )
        if found.kind == _EXTENDED:
            extended = _records(file.read(found.begin, min(found.size, _EXTENDED_BYTES)))
        elif found.kind == _LONG_NAME:
            extended["path"] = _text(file.read(found.begin, min(found.size, _EXTENDED_BYTES)))
        elif found.kind not in _DESCRIBING:
            extended = {}
        yield found
        position = found.end
        if number + 1 == limits.TAR_MEMBERS and not tolerant:
            raise LimitError(f"a tar file of more than {limits.TAR_MEMBERS} members")


def _member(header: bytes, begin: int, extended: Mapping[str, str], *, check: bool) -> Member:
    """The member whose header this is; what an extended header said of it comes first. Raises MalformedError."""
    kind, name, size = header[156:157], _text(header[:100]), _number(header[124:136])
    if kind not in _DESCRIBING:
        name, size = extended.get("path", name), _decimal(extended.get("size"), size)
    if check and _number(header[148:156]) != sum(header[:148]) + 256 + sum(header[156:]):
        raise MalformedError(f"the tar header at byte {begin - _BLOCK} does not have its own checksum")
    return Member(name, kind, begin, size)


def files_in(file: SourceFile) -> dict[str, Window]:
    """The regular files in a tar file by their names; of several of one name, the last, as tarfile takes it."""
    return {found.name: Window(file, found.begin, found.size) for found in members(file) if found.kind in _FILES}


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or from GNU tar a number in base 256 after a byte of 128."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    try:
        number = int(digits or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise MalformedError(f"a tar header has {field!r} in the place of a number")
    return number


def _decimal(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else default


def _records(data: bytes) -> dict[str, str]:
    """The records of a pax header: `LENGTH KEY=VALUE` and a newline each, whose length counts all of it."""
    found = {}
    position = 0
    while position < len(data):
        length, space, _ = data[position : position + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        record = data[position + len(length) + 1 : position + int(length) - 1]
        key, _, value = record.partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += int(length)
    return found


@dataclass(frozen=True, slots=True)
class _View:
    """A storage by its number, or a part of one."""

    storage: Storage
    dtype: DType
    offset: int = 0
    """The first element of the part."""
    numel: int = 0


class _Cursor:
    """A place in a member, moving on as things are read."""

    def __init__(self, window: Window, name: str) -> None:
        self.window = window
        self.name = name
        self.position = 0

    def pickle(self) -> Any:
        """The value of the next pickle."""
        graph = pickle_at(self.window, self.position)
        self.position += graph.nbytes
        return graph.root

    def numbers(self, count: int) -> tuple[int, ...]:
        """So many 64-bit integers."""
        found: tuple[int, ...] = struct.unpack(f"<{count}q", self.window.read(self.position, 8 * count))
        self.position += 8 * count
        return found

    def count(self) -> int:
        """Return the number of items that follow."""
        count = self.pickle()
        if not is_count(count):
            raise MalformedError(f"member {self.name!r} does not begin with a count")
        if count > self.window.size // _LEAST:
            raise TruncatedError(f"member {self.name!r} has {self.window.size} bytes, too few for {count} items")
        if count > limits.TAR_ITEMS:
            raise LimitError(f"member {self.name!r} lists {count} items")
        found: int = count
        return found

    def skip(self, nbytes: int) -> int:
        """Pass over bytes; where the first one is."""
        begin = self.position
        if begin + nbytes > self.window.size:
            raise TruncatedError(
                f"bytes {begin}–{begin + nbytes} of member {self.name!r} are promised, it has {self.window.size}"
            )
        self.position += nbytes
        return begin


class _Tar:
    """The storages and tensors of the lists, by the numbers that the pickle uses."""

    def __init__(self, file: SourceFile) -> None:
        found = files_in(file)
        if missing := [name for name in MEMBERS if name not in found]:
            raise UnknownFormatError(
                f"a tar file, but not one of torch.save's: it has no member {missing[0]!r}",
                hint="tar -xf unpacks it",
            )
        self.container = PlainFile(file)
        self.pickle = found["pickle"]
        self.storages: dict[str, _View] = {}
        self.tensors: dict[str, Tensor] = {}
        self._read_storages(_Cursor(found["storages"], "storages"))
        self._read_tensors(_Cursor(found["tensors"], "tensors"))

    def _read_storages(self, cursor: _Cursor) -> None:
        for _ in range(cursor.count()):
            key, location, kind = _three(cursor)
            where = text_of(location)
            if where is None or not isinstance(kind, Global):
                raise MalformedError("the list of storages has something else in it")
            dtype = storage_dtype(kind)
            (numel,) = cursor.numbers(1)
            if not is_count(numel):
                raise MalformedError(f"storage {key!r} has {numel} elements")
            nbytes = numel * max(dtype.bits // 8, 1)
            begin = cursor.window.begin + cursor.skip(nbytes)
            self.storages[key] = _View(self.container.storage(key, nbytes, begin, where), dtype, 0, numel)
        views = cursor.pickle()
        if not isinstance(views, list):
            raise MalformedError("the list of views of storages is none")
        for view in views:
            self._add_view(view)

    def _add_view(self, view: object) -> None:
        """A (target, root, offset, numel), in elements."""
        if not isinstance(view, tuple) or len(view) != 4 or not is_count(view[2]) or not is_count(view[3]):
            raise MalformedError("the list of views of storages has something else in it")
        target, root = _key(view[0]), self.storages.get(_key(view[1]))
        if root is None or view[2] + view[3] > root.numel:
            raise MalformedError(f"storage {target!r} is a view of what is not there")
        self.storages[target] = replace(root, offset=root.offset + view[2], numel=view[3])

    def _read_tensors(self, cursor: _Cursor) -> None:
        for _ in range(cursor.count()):
            key, storage_id, _kind = _three(cursor)
            view = self.storages.get(_key(storage_id))
            if view is None:
                raise MalformedError(f"tensor {key!r} is a view of storage {_key(storage_id)!r}, which is not there")
            (dimensions,) = struct.unpack("<i", cursor.window.read(cursor.skip(8), 4))
            if not 0 <= dimensions <= limits.DIMENSIONS:
                raise LimitError(f"tensor {key!r} has {dimensions} dimensions", fixed=True)
            shape, stride = (sizes(key, cursor.numbers(dimensions)), cursor.numbers(dimensions))
            (offset,) = cursor.numbers(1)
            if not all(0 <= number < COUNT_END for number in (*stride, offset)):
                raise MalformedError(f"tensor {key!r} has a stride or an offset below 0")
            tensor = Tensor("", view.dtype, shape, stride, view.storage, view.offset + offset)
            end = tensor.span[1]
            if end > (view.offset + view.numel) * max(view.dtype.bits // 8, 1):
                raise MalformedError(f"tensor {key!r} needs byte {end} of storage {view.storage.key!r}")
            self.tensors[key] = tensor


def _three(cursor: _Cursor) -> tuple[str, object, object]:
    """A pickled (key, …, class)."""
    item = cursor.pickle()
    if not isinstance(item, tuple) or len(item) != 3:
        raise MalformedError(f"member {cursor.name!r} has something else than its list in it")
    return _key(item[0]), item[1], item[2]


def _key(node: object) -> str:
    """A number as the pickle's references spell it."""
    text = str(node) if is_count(node) else text_of(node)
    if text is None or not text.isascii() or not text.isdigit():
        raise MalformedError("a storage or a tensor is numbered by something that is not a number")
    return text


class _Numbered(Rebuilder):
    """Tensors of a pickle that names them by their numbers."""

    def tensor(self, name: str, node: object) -> Tensor | None:
        """The tensor that a reference is to, or that a call would make of one."""
        if type(node) is PersistentId and isinstance(self._finder, _Finder):
            return self._finder.named(name, node.pid)
        return super().tensor(name, node)


class _Finder(NoStorages):
    """The tensors of the lists; a reference to a storage came with a later format."""

    def __init__(self, tar: _Tar) -> None:
        super().__init__("the pickle of a tar file refers to a storage as later files do")
        self._tar = tar

    def named(self, name: str, pid: object) -> Tensor | None:
        """The tensor of a number; None for a class with its source code, or for a storage by itself."""
        if isinstance(pid, tuple):
            return None
        tensor = self._tar.tensors.get(_key(pid))
        return None if tensor is None else replace(tensor, name=name)


def read(file: SourceFile) -> Checkpoint:
    """Open a tar file: its lists and its pickle are read, no storage is."""
    with about(file.path):
        tar = _Tar(file)
        graph = pickle_at(tar.pickle, 0)
        entries = entries_of(graph, _Finder(tar), place=PicklePlace(tar.pickle.begin, file), rebuilder=_Numbered)
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=entries,
        container=tar.container,
        version="torch.save tar of up to 0.1.10",
        objects=objects_of(graph),
        top_level=top_level_of(graph),
        document=graph,
    )
