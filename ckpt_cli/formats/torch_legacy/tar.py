"""The tar file that torch.save wrote up to 0.1.10: storages and tensors in lists of their own, and a pickle.

Source: torch/serialization.py (`_legacy_load.legacy_load`). The pickle names tensors and storages by their numbers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

from ckpt_cli import limits
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError, UnknownFormatError, about
from ckpt_cli.files.source import SourceFile, Window
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.formats.torch_legacy.tar_members import members
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.pickles.flatten import entries_of, objects_of, top_level_of
from ckpt_cli.pickles.graph import Global, PersistentId
from ckpt_cli.pickles.legacy_save import pickle_at
from ckpt_cli.pickles.tensors.arguments import COUNT_END, is_count, sizes, storage_dtype, text_of
from ckpt_cli.pickles.tensors.inline_bytes import Place
from ckpt_cli.pickles.tensors.rebuild import Rebuilder

NAME = "tar"

_MEMBERS = ("storages", "tensors", "pickle")
_LEAST = 20
"""Bytes that one storage or tensor takes at least in its list."""


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
        """How many items follow."""
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
    """What the lists say, by the numbers that the pickle uses."""

    def __init__(self, file: SourceFile) -> None:
        found = members(file)
        if missing := [name for name in _MEMBERS if name not in found]:
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
                raise LimitError(f"tensor {key!r} has {dimensions} dimensions")
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
        raise MalformedError("a storage or a tensor is numbered by something that is no number")
    return text


class _Numbered(Rebuilder):
    """Tensors of a pickle that names them by their numbers."""

    def tensor(self, name: str, node: object) -> Tensor | None:
        """The tensor that a reference is to, or that a call would make of one."""
        if type(node) is PersistentId and isinstance(self._finder, _Finder):
            return self._finder.named(name, node.pid)
        return super().tensor(name, node)


class _Finder:
    """The tensors of the lists."""

    big_endian = False

    def __init__(self, tar: _Tar) -> None:
        self._tar = tar

    def find(self, key: str, nbytes: int, location: str) -> Storage:  # noqa: ARG002 - as the protocol has it
        """Such references came with a later format."""
        raise MalformedError("the pickle of a tar file refers to a storage as later files do")

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
        entries = entries_of(graph, _Finder(tar), place=Place(tar.pickle.begin), rebuilder=_Numbered)
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
