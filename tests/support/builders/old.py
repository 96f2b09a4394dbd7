"""What torch.save wrote before the zip files, field by field: the stream of 0.1.11 to 1.5, and the tar before it."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builders.pickles import Ops, named, persistent, pickled, value

MAGIC = 0x1950A86A20F9469CFC6C


def save(
    root: Any,
    storages: Mapping[str, bytes] | None = None,
    *,
    itemsize: int | Mapping[str, int] = 4,
    protocol: int = 2,
    magic: int = MAGIC,
    version: int = 1001,
    little_endian: bool = True,
    keys: Sequence[Any] | None = None,
    numels: Mapping[str, int] | None = None,
) -> bytes:
    """One save of a stream; `root` is what `builders.pickles` makes a pickle of, with `storage` as references."""
    storages = storages or {}
    info = {
        "protocol_version": version,
        "little_endian": little_endian,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    pickles = (magic, version, info, root, list(storages) if keys is None else list(keys))
    body = b"".join(pickled(item, protocol) for item in pickles)
    for key, content in storages.items():
        width = itemsize if isinstance(itemsize, int) else itemsize[key]
        body += struct.pack("<q", (numels or {}).get(key, len(content) // width)) + content
    return body


def reference(
    key: Any, numel: int, kind: str = "Float", *, location: Any = "cpu", view: tuple[Any, int, int] | None = None,
    tag: Any = "storage",
) -> Ops:  # fmt: skip
    """A reference to a storage, with the part of it that torch 0.3 gave."""
    return persistent((tag, named(f"torch.{kind}Storage"), key, location, numel, view))


def module(kind: str, file: Any = None, source: Any = None) -> Ops:
    """A module's class with its source code."""
    return persistent(("module", named(kind), file, source))


# --- the tar ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarStorage:
    """A storage of the list."""

    key: int
    kind: str
    content: bytes
    itemsize: int = 4
    location: str = "cpu"


@dataclass(frozen=True)
class TarTensor:
    """A tensor of the list."""

    key: int
    storage: int
    kind: str
    shape: Sequence[int]
    stride: Sequence[int]
    offset: int = 0


def tar(
    root: Any,
    storages: Iterable[TarStorage],
    tensors: Iterable[TarTensor],
    views: Iterable[tuple[int, int, int, int]] = (),
) -> bytes:
    """The whole file; `root` refers to tensors by `numbered`."""
    return archive(
        [
            ("sys_info", pickled({"protocol_version": 1000, "little_endian": True})),
            ("pickle", pickled(root)),
            ("tensors", _tensors(list(tensors))),
            ("storages", _storages(list(storages), list(views))),
        ]
    )


def numbered(key: int) -> Ops:
    """A reference to a tensor or storage."""
    return persistent(str(key))


def _storages(storages: list[TarStorage], views: list[tuple[int, int, int, int]]) -> bytes:
    body = pickled(len(storages))
    for each in storages:
        body += pickled((each.key, each.location, named(f"torch.{each.kind}Storage")))
        body += struct.pack("<q", len(each.content) // each.itemsize) + each.content
    return body + pickled(views)


def _tensors(tensors: list[TarTensor]) -> bytes:
    body = pickled(len(tensors))
    for each in tensors:
        body += pickled((each.key, each.storage, named(f"torch.{each.kind}Tensor")))
        body += struct.pack("<ii", len(each.shape), 0)
        body += struct.pack(f"<{2 * len(each.shape) + 1}q", *each.shape, *each.stride, each.offset)
    return body


def archive(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar file that ends with one block of zeros."""
    return b"".join(member(name, content) for name, content in files) + bytes(512)


def member(name: str, content: bytes, *, size: bytes | None = None, kind: bytes = b"0") -> bytes:
    """A header and a content, padded to whole blocks."""
    number = b"%011o\0" % len(content) if size is None else size
    fields = struct.pack("100s8s8s8s12s12s8sc100s8s247x", name.encode(), b"0000600\0", b"0000000\0", b"0000000\0",
                         number, b"%011o\0" % 0, b" " * 8, kind, b"", b"ustar\x0000")  # fmt: skip
    fields = fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]
    return fields + content + bytes(-len(content) % 512)


# --- text, as protocol 2 has bytes -----------------------------------------------------------------------------------


def latin1(raw: bytes) -> Ops:
    """`_codecs.encode(text, 'latin1')`."""
    return Ops(named("_codecs.encode") + value((raw.decode("latin-1"), "latin1")) + b"R")
