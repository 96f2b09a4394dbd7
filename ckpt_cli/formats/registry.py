"""Which format a file is in, told by its content and never by its suffix."""

from __future__ import annotations

import errno
import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import FormatError, UnsupportedError, UsageError
from ckpt_cli.files.copy import Progress
from ckpt_cli.files.open import Opener, finish_edits, open_beside_writers
from ckpt_cli.files.source import LocalFile
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.model.new_checkpoint import NewCheckpoint

if TYPE_CHECKING:
    from ckpt_cli.files.copy import Progress
    from ckpt_cli.files.patches import Overlay
    from ckpt_cli.model.changes import Changes


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


def _is_npz(head: bytes) -> bool:
    """Whether the first record of a zip is an array."""
    return head[:4] == b"PK\3\4" and head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy")


def _is_legacy(head: bytes) -> bool:
    """Whether torch.save wrote it before 1.6: its magic number in a pickle, as binary after a protocol or as text."""
    return b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." in head[:24] or head.startswith(b"L119547037146038801333356L\n.")


def _is_pickle(head: bytes) -> bool:
    """Whether it begins with a protocol, or as protocols 0 and 1 begin a dict, a list, a tuple or an object."""
    if is_safetensors(head) and not any(head[4:8]):  # the length of a header, whatever its bytes look like
        return False
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return True
    return _OLD_PICKLE.match(head) is not None


_OLD_PICKLE = re.compile(
    rb"""\([XT]..\0\0 | \(?(?: [dl]p\d+\n | [}\]][qru(.] | [dl)][.q] | [ci][A-Za-z_][\w.]*\n\w[\w.]*\n[(pq)]
    | [IL]-?\d+L?\n[.ILFSVNp(tcg] | F[-+.\dinfae]+\n[.ILFSVNp(tcg] | [SV][^\n]{0,400}\np\d+\n )""",
    re.VERBOSE,
)


def _is_dcp_metadata(head: bytes) -> bool:
    """Whether a file begins as a pickled `Metadata` of torch.distributed.checkpoint."""
    return head[:1] == b"\x80" and b"torch.distributed.checkpoint.metadata" in head[:64]


def _has_rank_shards(names: Sequence[str]) -> bool:
    """Whether torch.distributed.checkpoint wrote it as safetensors, a file a rank: no index says what is where."""
    shards = any(name.startswith("shard-") and name.endswith(".safetensors") for name in names)
    return shards and not any(name.endswith(".index.json") for name in names)


def _is_of_ranks(names: Sequence[str]) -> bool:
    """Whether it is DeepSpeed's or Megatron's, and not a model that transformers' Trainer saved with one beside it."""
    if "latest_checkpointed_iteration.txt" in names or any(_RANK_FILE.search(name) for name in names):
        return True
    return "latest" in names and not any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) for name in names)


_RANK_FILE = re.compile(r"_(model|optim)_states\.pt$|^mp_rank_\d+(_\d+)*$")

FORMATS = (
    Format("npz", _is_npz, "ckpt_cli.formats.numpy.npz"),
    Format("legacy", _is_legacy, "ckpt_cli.formats.torch_legacy.read"),
    Format("pickle", _is_pickle, "ckpt_cli.formats.torch_legacy.read"),
    Format("npy", lambda head: head[:6] == b"\x93NUMPY", "ckpt_cli.formats.numpy.read"),
    Format("tar", lambda head: head[257:262] == b"ustar", "ckpt_cli.formats.torch_legacy.tar"),
    Format("zip", lambda head: head[:4] in (b"PK\3\4", b"PK\5\6"), "ckpt_cli.formats.torch_zip.kinds"),
    Format("safetensors", is_safetensors, "ckpt_cli.formats.safetensors.read"),
    Format("dcp", _is_dcp_metadata, "ckpt_cli.formats.dcp.read", is_set=True),
    Format("shards", _is_json_object, "ckpt_cli.formats.sharded.read", is_set=True),
)

WRITERS = {
    "zip": "ckpt_cli.formats.torch_zip.rewrite",
    "legacy": "ckpt_cli.formats.torch_legacy.rewrite",
    "safetensors": "ckpt_cli.formats.safetensors.rewrite",
    "shards": "ckpt_cli.formats.sharded.rewrite",
}
"""By the name of a format: has `Rewriting`, which writes a checkpoint of it anew with some changes."""

FOLDERS: tuple[Folder, ...] = (
    Folder("dcp", lambda names: ".metadata" in names or "__0.metadata" in names, "ckpt_cli.formats.dcp.read"),
    Folder("dcp", _has_rank_shards, "ckpt_cli.formats.dcp.safetensors"),
    Folder("deepspeed", _is_of_ranks, "ckpt_cli.formats.deepspeed"),
    Folder("shards", lambda _: True, "ckpt_cli.formats.sharded.names"),
)


def open_checkpoint(path: str, *, write: bool = False) -> Checkpoint:
    """Open a path as a checkpoint: its names are read, its tensors are not.

    An edit that was interrupted is finished first. To `write`, every file of it is locked until the checkpoint is
    closed. Raises OSError, BusyError, or a FormatError that says what the file looks like.
    """

    def read(opener: Opener) -> Checkpoint:
        return _open_folder(path, opener) if os.path.isdir(path) else _open_file(path, opener)

    return open_beside_writers(path, read, write=write)


def _open_file(path: str, opener: Opener) -> Checkpoint:
    """The checkpoint that a path names: a file, or the index of several."""
    file = opener.open(path)
    try:
        checkpoint = _read(file, opener)
    except BaseException:
        file.close()
        raise
    return _noting_the_set(checkpoint) if "-of-" in os.path.basename(path) else checkpoint


class Rewriter(Protocol):
    """A checkpoint about to be written anew."""

    @property
    def nbytes(self) -> int:
        """The bytes of a new file, or about so many."""

    def patch(self, overlay: Overlay) -> bool:
        """Put the whole edit into an overlay of the old file, checksums included, if it fits in place; else False."""

    def write(self, target: LocalFile, progress: Progress) -> None:
        """Write all of it into an empty file."""

    def verify(self, path: str) -> None:
        """Raise CkptError where the file that was written does not read back as what it should be."""


def rewriting(checkpoint: Checkpoint, changes: Changes) -> Any:
    """The work of writing a checkpoint anew in its own format: a `Rewriter`, or of a set one of several files.

    Raises UnsupportedError where that cannot be done.
    """
    module = WRITERS.get(checkpoint.format)
    if module is None:
        raise UnsupportedError(
            f"of a checkpoint of format {checkpoint.format} only the elements of tensors can be changed",
            path=checkpoint.path,
            hint=f"ckpt convert {checkpoint.path} OUT.pt makes one that can be changed freely",
        )
    return importlib.import_module(module).Rewriting(checkpoint, changes)


def _noting_the_set(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with a note where it is but one shard of a set."""
    from ckpt_cli.formats.sharded.names import index_of

    index = index_of(checkpoint.path)
    return replace(checkpoint, notes=[*checkpoint.notes, f"one shard of {index}"]) if index else checkpoint


def _read(file: LocalFile, opener: Opener) -> Checkpoint:
    """The checkpoint that an open file is, or is the index of."""
    try:
        return _read_any(file, opener)
    except FormatError as error:
        folder = os.path.dirname(file.path)
        if file.path.endswith(".distcp") and os.path.exists(os.path.join(folder, ".metadata")):
            error.hint = f"this is one rank's part of a checkpoint: name its folder, {folder or '.'}"
        raise


def _beginning(file: LocalFile) -> bytes:
    """Return the bytes that decide the format: where JSON stands before arrays, those of the first array."""
    head = file.read(0, min(_HEAD, file.size))
    if head.lstrip()[:1] != b"{":
        return head
    from ckpt_cli.formats.numpy.preface import preface_size

    begin = preface_size(file)
    return file.read(begin, min(_HEAD, file.size - begin)) if begin else head


def _read_any(file: LocalFile, opener: Opener) -> Checkpoint:
    """The checkpoint that an open file is, or is the index of."""
    head = _beginning(file)
    for known in FORMATS:
        if known.is_set and known.sniff(head):
            checkpoint: Checkpoint = importlib.import_module(known.module).read_set(file, opener)
            return checkpoint
    return read_one(file)


def read_one(file: LocalFile) -> Checkpoint:
    """The checkpoint that one open file is, be it a part of a set; raises UnknownFormatError for an index."""
    head = _beginning(file)
    for known in FORMATS:
        if not known.is_set and known.sniff(head):
            checkpoint: Checkpoint = importlib.import_module(known.module).read(file)
            return checkpoint
    from ckpt_cli.formats.signatures import unknown

    raise unknown(head, file.path, FORMATS)


def is_index(file: LocalFile) -> bool:
    """Whether an open file looks like the index of a set of shards."""
    return _is_json_object(_beginning(file))


def folder_kind(names: Sequence[str]) -> Folder | None:
    """What kind of checkpoint a folder with these file names is as a whole."""
    return next((known for known in FOLDERS if known.sniff(names)), None)


def _open_folder(path: str, opener: Opener) -> Checkpoint:
    """The checkpoint that a folder holds, by the names of the files in it."""
    finish_edits(path)
    opener.note_folder(path)
    names = sorted(os.listdir(path))
    known = folder_kind(names)
    if known is not None:
        checkpoint: Checkpoint = importlib.import_module(known.module).read_folder(path, names, opener)
        return checkpoint
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


class FileWriter(Protocol):
    """A module that writes one file."""

    def spelled(self, dtype: DType) -> str | None:
        """How the format says a dtype; None for one that it has not."""

    def write(self, new: NewCheckpoint, target: LocalFile, progress: Progress) -> None:
        """Write all of it into an empty file."""

    def verify(self, new: NewCheckpoint, path: str) -> None:
        """Raise CkptError where the file that was written does not read back as what it should be."""


class FolderWriter(Protocol):
    """A module that writes several files into a new folder."""

    def spelled(self, dtype: DType) -> str | None:
        """How the format says a dtype; None for one that it has not."""

    def write_folder(self, new: NewCheckpoint, create: Callable[[str], LocalFile], progress: Progress) -> None:
        """Write all of it into files that `create` makes."""

    def verify_folder(self, new: NewCheckpoint, folder: str) -> None:
        """Raise CkptError where the folder that was written does not read back as what it should be."""


@dataclass(frozen=True, slots=True)
class Target:
    """One format that a checkpoint can be converted to."""

    name: str
    """What `--to` calls it."""
    what: str
    """What it is, in words."""
    module: str
    """A `FileWriter`, or a `FolderWriter`."""
    suffixes: tuple[str, ...] = ()
    """How the names of its files end."""
    is_folder: bool = False
    files: str = ""
    """An expression that the names of its files in a folder match, so that an older checkpoint can give way."""
    is_set: bool = False
    """Whether it is a set of shards, of a size that can be chosen."""
    keeps_views: bool = False
    """Whether tensors can be any views of shared storages."""
    keeps_ties: bool = True
    """Whether it can say that tensors are one."""
    keeps_requires_grad: bool = False
    """Whether it says of a tensor that it is trained."""
    keeps_metadata: bool = False
    """Whether it has a place for a map of strings."""
    keeps_objects: bool = False
    """Whether it can hold what is no tensor, where that is pickled already."""

    keeps_notes: bool = False
    """Whether it has a place for the `_metadata` of a state_dict."""

    def writer(self) -> Any:
        """Its module."""
        return importlib.import_module(self.module)


TARGETS = (
    Target(
        "pt", "a torch.save file", "ckpt_cli.formats.torch_zip.write", (".pt", ".pth", ".ckpt", ".bin"),
        keeps_views=True, keeps_requires_grad=True, keeps_objects=True, keeps_notes=True,
    ),
    Target(
        "safetensors", "a safetensors file", "ckpt_cli.formats.safetensors.write", (".safetensors",),
        keeps_metadata=True,
    ),
    Target("npz", "an npz file", "ckpt_cli.formats.numpy.npz", (".npz",), keeps_ties=False),
    Target(
        "hf", "safetensors shards", "ckpt_cli.formats.sharded.write_safetensors", is_folder=True, is_set=True,
        keeps_metadata=True, files=r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?",
    ),
    Target(
        "hf-bin", "torch.save shards", "ckpt_cli.formats.sharded.write_bin", is_folder=True, is_set=True,
        keeps_views=True, keeps_requires_grad=True, files=r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?",
    ),
    Target(
        "dcp", "a torch.distributed.checkpoint", "ckpt_cli.formats.dcp.write", is_folder=True, keeps_ties=False,
        keeps_requires_grad=True, files=r"__\d+_\d+\.distcp|(__\d+)?\.metadata",
    ),
)  # fmt: skip

_SHARDED = {"safetensors": "hf", "pt": "hf-bin"}
"""The set of shards for each format of a single file."""

_BY_NAME = {target.name: target for target in TARGETS}


def target_of(path: str, name: str | None, *, sharded: bool) -> Target:
    """The format to write: the one that is named, else what the path's suffix says; a folder is a set of shards.

    Raises UsageError where neither says one, or what they say does not go together.
    """
    is_folder = path.endswith("/") or os.path.isdir(path)
    suffix = os.path.splitext(path)[1].lower()
    if name is not None:
        found = _named(name)
    else:
        by_suffix = next((target for target in TARGETS if suffix in target.suffixes), None)
        found = by_suffix if by_suffix is not None and not is_folder else _BY_NAME["hf"]
        if found.is_folder and not (is_folder or sharded) and suffix:
            known = " ".join(suffix for target in TARGETS for suffix in target.suffixes)
            raise UsageError(
                f"{suffix!r} does not say which format to write", path=path,
                hint=f"--to {'|'.join(_BY_NAME)}, or a name that ends in one of {known}",
            )  # fmt: skip
        if sharded and found is by_suffix:
            raise UsageError("shards go to a folder, and this is named like a file", path=path, hint="--to hf|hf-bin")
    if (is_folder or sharded) and not found.is_folder:
        found = _BY_NAME[_SHARDED.get(found.name, found.name)]
    if sharded and not found.is_set:
        raise UsageError(f"{found.what} is not written in shards", hint="--to hf|hf-bin")
    return found


def _named(name: str) -> Target:
    found = _BY_NAME.get(name.lower())
    if found is None:
        raise UsageError(f"there is no format {name!r} to write", hint=f"one of {', '.join(_BY_NAME)}")
    return found
