"""The formats that can be read, in one table: how each is recognized, and the modules that read and rewrite it.

Content decides the format of a file, never its suffix. Modules are imported on first use.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.model.checkpoint import Checkpoint

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
    """True if the file names others that belong to the checkpoint."""
    rewriter: str = ""
    """Has `Rewriting`, which carries out structural edits; empty where only the elements of tensors can be changed."""


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


def _is_zip(head: bytes) -> bool:
    """True if it begins with a record, or is a zip file without any."""
    return head[:4] in (b"PK\3\4", b"PK\5\6")


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

_AT = "ckpt_cli.formats."
"""The package of the modules that the tables name."""

FORMATS = (
    Format("npz", _is_npz, _AT + "numpy.npz"),
    Format("legacy", _is_legacy, _AT + "torch_legacy.read", rewriter=_AT + "torch_legacy.rewrite"),
    Format("pickle", _is_pickle, _AT + "torch_legacy.read"),
    Format("npy", lambda head: head[:6] == b"\x93NUMPY", _AT + "numpy.read"),
    Format("tar", lambda head: head[257:262] == b"ustar", _AT + "torch_legacy.tar"),
    Format("zip", _is_zip, _AT + "torch_zip.kinds", rewriter=_AT + "torch_zip.rewrite"),
    Format("safetensors", is_safetensors, _AT + "safetensors.read", rewriter=_AT + "safetensors.rewrite"),
    Format("dcp", _is_dcp_metadata, _AT + "dcp.read", is_set=True),
    Format("shards", _is_json_object, _AT + "sharded.read", is_set=True, rewriter=_AT + "sharded.rewrite"),
)
"""In the order in which a file is compared with them; names and modules of what `ckpt` reads."""

FOLDERS: tuple[Folder, ...] = (
    Folder("dcp", lambda names: ".metadata" in names or "__0.metadata" in names, _AT + "dcp.read"),
    Folder("dcp", _has_rank_shards, _AT + "dcp.safetensors"),
    Folder("deepspeed", _is_of_ranks, _AT + "deepspeed"),
    Folder("shards", lambda _: True, _AT + "open"),
)


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
    module = next((known.rewriter for known in FORMATS if known.name == checkpoint.format), "")
    if not module:
        raise UnsupportedError(
            f"of a checkpoint of format {checkpoint.format} only the elements of tensors can be changed",
            path=checkpoint.path,
            hint=f"ckpt convert {checkpoint.path} OUT.pt makes one that can be changed freely",
        )
    return importlib.import_module(module).Rewriting(checkpoint, changes)


def beginning(file: SourceFile) -> bytes:
    """Return the bytes that decide the format: where JSON stands before arrays, those of the first array."""
    head = file.read(0, min(_HEAD, file.size))
    if head.lstrip()[:1] != b"{":
        return head
    from ckpt_cli.formats.numpy.preface import preface_size

    begin = preface_size(file)
    return file.read(begin, min(_HEAD, file.size - begin)) if begin else head


def is_index(file: SourceFile) -> bool:
    """Whether an open file looks like the index of a set of shards."""
    return _is_json_object(beginning(file))


def folder_kind(names: Sequence[str]) -> Folder | None:
    """What kind of checkpoint a folder with these file names is as a whole."""
    return next((known for known in FOLDERS if known.sniff(names)), None)
