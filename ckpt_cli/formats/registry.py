"""Which format a file is in, told by its content and never by its suffix."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ckpt_cli.errors import TruncatedError, UnknownFormatError
from ckpt_cli.files.local import LocalFile
from ckpt_cli.files.opening import Opener
from ckpt_cli.model import Checkpoint

_HEAD = 600
"""Bytes from the beginning that tell formats apart; tar has its magic at byte 257."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format that can be read; its module is imported on first use."""

    name: str
    sniff: Callable[[bytes], bool]
    """Whether a file that begins with these bytes is in this format."""
    module: str
    """Has `read(file) -> Checkpoint`, or, of a set, `read_set(file, opener) -> Checkpoint`."""
    is_set: bool = False
    """Whether the file names others that belong to the checkpoint."""


@dataclass(frozen=True, slots=True)
class Folder:
    """One kind of folder that is a checkpoint as a whole."""

    name: str
    sniff: Callable[[Sequence[str]], bool]
    """Whether a folder with these file names is one."""
    module: str
    """Has `read_folder(path, names, opener) -> Checkpoint`."""


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins so is a safetensors file: the length of a header and its brace."""
    return head[8:9] == b"{" and not head[:8].isalnum()


def _is_json_object(head: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{" and head[8:9] != b"{"


FORMATS = (
    Format("zip", lambda head: head[:4] in (b"PK\3\4", b"PK\5\6"), "ckpt_cli.formats.zip_file"),
    Format("safetensors", is_safetensors, "ckpt_cli.formats.safetensors"),
    Format("shards", _is_json_object, "ckpt_cli.formats.shard_set", is_set=True),
)

FOLDERS: tuple[Folder, ...] = (Folder("shards", lambda _: True, "ckpt_cli.formats.folder"),)

_LOOKS_LIKE: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (
        lambda head: b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in head[:40],
        "a torch.save file from before 1.6, which is not read yet",
    ),
    (lambda head: head[:1] == b"\x80" and head[1:2] <= b"\5", "a bare pickle, which is not read yet"),
    (lambda head: head[257:262] == b"ustar", "a tar file, which is not read yet"),
    (lambda head: head[:2] == b"\x1f\x8b", "a gzip file: unpack it first"),
    (lambda head: head[:4] == b"\x28\xb5\x2f\xfd", "a zstandard file: unpack it first"),
    (lambda head: head[:4] == b"GGUF", "a GGUF file, which is not read yet"),
    (lambda head: head[:8] == b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, PyTables), which is not read"),
    (lambda head: head[:6] == b"\x93NUMPY", "a numpy array, which is not read yet"),
    (lambda head: head[:8] == b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (
        lambda head: head.startswith(b"version https://git-lfs"),
        "a git LFS pointer: fetch the real file with git lfs pull",
    ),
    (lambda head: head[:1] in b"<" and b"html" in head[:200].lower(), "a web page: the download got an error page"),
    (lambda head: head.lstrip()[:1] in (b"{", b"["), "a JSON file"),
    (lambda head: bool(head) and not any(head[:256]), "a file of zero bytes: a download or a copy that was cut short"),
    (lambda head: bool(head) and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head), "a text file"),
)


def open_checkpoint(path: str, *, write: bool = False) -> Checkpoint:
    """Open a path as a checkpoint: its names are read, its tensors are not.

    An edit that was interrupted is finished first. To `write`, every file of it is locked until the checkpoint is
    closed. Raises OSError, BusyError, or a FormatError that says what the file looks like.
    """
    opener = Opener(write=write)
    if os.path.isdir(path):
        return _open_folder(path, opener)
    file = opener.open(path)
    try:
        checkpoint = _read(file, opener)
    except BaseException:
        file.close()
        raise
    return _noting_the_set(checkpoint) if "-of-" in os.path.basename(path) else checkpoint


def _noting_the_set(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with a note where it is but one shard of a set."""
    from ckpt_cli.formats.folder import index_of

    index = index_of(checkpoint.path)
    return replace(checkpoint, notes=[*checkpoint.notes, f"one shard of {index}"]) if index else checkpoint


def _read(file: LocalFile, opener: Opener) -> Checkpoint:
    """The checkpoint that an open file is, or is the index of."""
    head = file.read(0, min(_HEAD, file.size))
    for known in FORMATS:
        if known.is_set and known.sniff(head):
            checkpoint: Checkpoint = importlib.import_module(known.module).read_set(file, opener)
            return checkpoint
    return read_one(file)


def read_one(file: LocalFile) -> Checkpoint:
    """The checkpoint that one open file is, be it a part of a set; raises UnknownFormatError for an index."""
    head = file.read(0, min(_HEAD, file.size))
    for known in FORMATS:
        if not known.is_set and known.sniff(head):
            checkpoint: Checkpoint = importlib.import_module(known.module).read(file)
            return checkpoint
    raise _unknown(head, file.path)


def _open_folder(path: str, opener: Opener) -> Checkpoint:
    """The checkpoint that a folder holds, by the names of the files in it."""
    names = sorted(os.listdir(path))
    for known in FOLDERS:
        if known.sniff(names):
            module = importlib.import_module(known.module)
            checkpoint: Checkpoint = module.read_folder(path, names, opener)
            return checkpoint
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def _unknown(head: bytes, path: str) -> UnknownFormatError | TruncatedError:
    if not head:
        return TruncatedError("the file is empty", path=path)
    looks = next((words for matches, words in _LOOKS_LIKE if matches(head)), None)
    return UnknownFormatError(
        f"this looks like {looks}" if looks else "not a checkpoint of a kind that ckpt knows",
        path=path,
        hint="ckpt reads torch.save zip files and safetensors" if not looks else None,
    )
