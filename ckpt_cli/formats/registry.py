"""The formats that can be read, in one table: how each is recognized, and the modules that read and rewrite it.

Content decides the format of a file, never its suffix. Modules are imported on first use.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.formats.signatures import (
    is_dcp_metadata,
    is_json_object,
    is_legacy,
    is_npy,
    is_npz,
    is_pickle,
    is_safetensors,
    is_tar,
    is_zip,
)
from ckpt_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ckpt_cli.files.copy import Progress
    from ckpt_cli.files.patches import Overlay
    from ckpt_cli.formats.writing import OpenCopy
    from ckpt_cli.model.changes import Changes


ReadOne = Callable[[SourceFile], Checkpoint]
"""Reads one file of a set; readers of sets are given it, as they stand below what opens any format."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format that can be read; its module is imported on first use."""

    name: str
    sniff: Callable[[bytes], bool]
    """True for the first bytes of a file in this format."""
    module: str
    """Has `read(file) -> Checkpoint`, or, of a set, `read_set(file, opener, read_one) -> Checkpoint`."""
    is_set: bool = False
    """True if the file names others that belong to the checkpoint."""
    rewriter: str = ""
    """Has `Rewriting`, a `Rewriter`, which carries out structural edits; empty where only elements can be changed."""


@dataclass(frozen=True, slots=True)
class Folder:
    """One kind of folder that is a checkpoint as a whole; in any other, a checkpoint is looked for among its files."""

    name: str
    sniff: Callable[[Sequence[str]], bool]
    """True for the file names of such a folder."""
    module: str
    """Has `read_folder(path, names, opener, read_one) -> Checkpoint`."""


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
    Format("npz", is_npz, _AT + "numpy.npz"),
    Format("legacy", is_legacy, _AT + "torch_legacy.read", rewriter=_AT + "torch_legacy.rewrite"),
    Format("pickle", is_pickle, _AT + "torch_legacy.read"),
    Format("npy", is_npy, _AT + "numpy.read"),
    Format("tar", is_tar, _AT + "torch_legacy.tar"),
    Format("zip", is_zip, _AT + "torch_zip.read", rewriter=_AT + "torch_zip.rewrite"),
    Format("safetensors", is_safetensors, _AT + "safetensors.read", rewriter=_AT + "safetensors.rewrite"),
    Format("dcp", is_dcp_metadata, _AT + "dcp.read", is_set=True),
    Format("shards", is_json_object, _AT + "sharded.read", is_set=True, rewriter=_AT + "sharded.rewrite"),
)
"""In the order in which a file is compared with them; names and modules of what `ckpt` reads."""

FOLDERS: tuple[Folder, ...] = (
    Folder("dcp", lambda names: ".metadata" in names or "__0.metadata" in names, _AT + "dcp.read"),
    Folder("dcp", _has_rank_shards, _AT + "dcp.safetensors"),
    Folder("deepspeed", _is_of_ranks, _AT + "deepspeed"),
)


class Rewriter(Protocol):
    """A checkpoint about to be rewritten, with some changes."""

    @property
    def nbytes(self) -> int:
        """Bytes of a new file, or about that."""

    def patch(self, overlay: Overlay) -> bool:
        """Put the whole edit into an overlay of the old file, checksums included, if it fits in place; else False."""

    def write(self, target: LocalFile, progress: Progress) -> None:
        """Write all of it into an empty file."""

    def verify(self, path: str) -> None:
        """Raise CkptError where the file that was written does not read back as what it should be."""


def rewriting(checkpoint: Checkpoint, changes: Changes, open_copy: OpenCopy) -> Any:
    """The work of writing a checkpoint again in its own format: a `Rewriter`, or of a set one of several files.

    `open_copy` opens the new file to read it back. Raises UnsupportedError where that cannot be done.
    """
    known = next((known for known in FORMATS if known.name == checkpoint.format), None)
    if known is None or not known.rewriter:
        raise UnsupportedError(
            f"of a checkpoint of format {checkpoint.format} only the elements of tensors can be changed",
            path=checkpoint.path,
            hint=f"ckpt convert {checkpoint.path} OUT.pt makes one that can be changed freely",
        )
    make = importlib.import_module(known.rewriter).Rewriting
    if known.is_set:
        return make(checkpoint, changes, partial(rewriting, open_copy=open_copy))
    return make(checkpoint, changes, open_copy)


def folder_kind(names: Sequence[str]) -> Folder | None:
    """Return the kind of checkpoint that a folder with these file names is as a whole; None for a folder of files."""
    return next((known for known in FOLDERS if known.sniff(names)), None)
