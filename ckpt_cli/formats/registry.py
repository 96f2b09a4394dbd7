"""The formats that can be read, in one table: how each is recognized, and the modules that read and rewrite it.

Content decides the format of a file, never its suffix. Modules are imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ckpt_cli.errors import UnsupportedError, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.signatures import (
    is_dcp_metadata,
    is_hdf5,
    is_json_object,
    is_legacy,
    is_msgpack,
    is_npy,
    is_npz,
    is_onnx,
    is_pickle,
    is_safetensors,
    is_tar,
    is_zip,
)
from ckpt_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ckpt_cli.formats.writing import OpenCopy, Rewriter, SetRewriter
    from ckpt_cli.model.changes import Changes


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
    """Has `Rewriting`, a `Rewriter` or `SetRewriter`; empty where only elements can be changed."""
    is_pickle: bool = False
    """True if it is a pickle, with the bytes of tensors beside it or in it."""
    is_torch_save: bool = False
    """True if it is such a pickle with the bytes of tensors beside it, as torch.save writes it."""
    keeps_strings: bool = False
    """True if it has a map of strings that can be changed."""
    has_records: bool = False
    """True if its pickle and storages are records of a zip archive, as torch.save lays them out."""
    has_header: bool = False
    """True if a JSON header names its tensors, and nothing in it is a pickle."""
    is_mapped: bool = False
    """True if the library that loads it maps its bytes into memory."""
    is_distributed: bool = False
    """True if torch.distributed.checkpoint wrote it."""


@dataclass(frozen=True, slots=True)
class Folder:
    """One kind of folder that is a checkpoint as a whole; in any other, a checkpoint is looked for among its files."""

    name: str
    sniff: Callable[[str, Sequence[str]], bool]
    """True for the path of such a folder, and the names in it."""
    module: str
    """Has `read_folder(path, names, opener, read_one) -> Checkpoint`, and `read_files` where `is_joined`."""
    is_joined: bool = False
    """True if its tensors are joined from several files, which `read_files` opens side by side, as they are."""
    is_run: bool = False
    """True if its files are checkpoints of their own, which it has side by side."""


def _has_rank_shards(_: str, names: Sequence[str]) -> bool:
    """True if torch.distributed.checkpoint wrote it as safetensors, a file a rank: no index says what is where."""
    shards = any(name.startswith("shard-") and name.endswith(".safetensors") for name in names)
    return shards and not any(name.endswith(".index.json") for name in names)


def _is_of_ranks(path: str, names: Sequence[str]) -> bool:
    """True if it is DeepSpeed's or Megatron's: files of ranks, or a file that names the folder of them."""
    if not any(name.startswith(("latest", "mp_rank_")) or name.endswith("_states.pt") for name in names):
        return False
    from ckpt_cli.formats.ranks.folder import is_of_ranks

    return is_of_ranks(path, names)


def _is_of_run(path: str, names: Sequence[str]) -> bool:
    """True if a trainer wrote it to go on from: a model, the state of its optimizer, random states."""
    if not any(name.startswith(_OF_RUN) for name in names):
        return False
    from ckpt_cli.formats.runs.names import is_of_run

    return is_of_run(path, names)


_OF_RUN = ("optimizer", "scheduler", "scaler.pt", "rng_state", "random_states_", "meta.pt", "common.pt", "latest")
"""The beginnings of names, of which the folder of a run has one."""


def _has_ranks_of_fsdp(path: str, names: Sequence[str]) -> bool:
    """True if it has a file of each rank of a model under FSDP."""
    if not any("_rank" in name for name in names):
        return False
    from ckpt_cli.formats.ranks.names import is_of_ranks

    return is_of_ranks(path, names)


def _never(_: bytes) -> bool:
    """False: a folder, or a part of one, is not recognized by the bytes of a file."""
    return False


FORMATS = (
    Format("npz", is_npz, "ckpt_cli.formats.numpy.npz"),
    Format("legacy", is_legacy, "ckpt_cli.formats.torch_legacy.read", rewriter="ckpt_cli.formats.torch_legacy.rewrite",
           is_pickle=True, is_torch_save=True),
    Format("pickle", is_pickle, "ckpt_cli.formats.torch_legacy.read", is_pickle=True),
    Format("npy", is_npy, "ckpt_cli.formats.numpy.read"),
    Format("tar", is_tar, "ckpt_cli.formats.containers.tar"),
    Format("zip", is_zip, "ckpt_cli.formats.torch_zip.read", rewriter="ckpt_cli.formats.torch_zip.rewrite",
           is_pickle=True, is_torch_save=True, has_records=True, is_mapped=True),
    Format("safetensors", is_safetensors, "ckpt_cli.formats.safetensors.read",
           rewriter="ckpt_cli.formats.safetensors.rewrite", keeps_strings=True, has_header=True, is_mapped=True),
    Format("msgpack", is_msgpack, "ckpt_cli.formats.containers.msgpack"),
    Format("onnx", is_onnx, "ckpt_cli.formats.containers.onnx", is_set=True),
    Format("h5", is_hdf5, "ckpt_cli.formats.containers.h5"),
    Format("dcp", is_dcp_metadata, "ckpt_cli.formats.dcp.read", is_set=True, is_distributed=True,
           rewriter="ckpt_cli.formats.dcp.rewrite"),
    Format("shards", is_json_object, "ckpt_cli.formats.sharded.read", is_set=True,
           rewriter="ckpt_cli.formats.sharded.rewrite", keeps_strings=True),
    Format("run", _never, "ckpt_cli.formats.runs.read", is_set=True, rewriter="ckpt_cli.formats.runs.rewrite",
           keeps_strings=True),
    Format("json", _never, "ckpt_cli.formats.runs.json_values", rewriter="ckpt_cli.formats.runs.json_rewrite"),
)  # fmt: skip
"""In the order in which a file is compared with them; names and modules of what `ckpt` reads."""

FOLDERS: tuple[Folder, ...] = (
    Folder("run", _is_of_run, "ckpt_cli.formats.runs.read", is_joined=True, is_run=True),
    Folder("dcp", lambda _, names: ".metadata" in names or "__0.metadata" in names, "ckpt_cli.formats.dcp.read"),
    Folder("dcp", _has_rank_shards, "ckpt_cli.formats.dcp.safetensors"),
    Folder("deepspeed", _is_of_ranks, "ckpt_cli.formats.ranks.folder", is_joined=True),
    Folder("fsdp", _has_ranks_of_fsdp, "ckpt_cli.formats.ranks.placed", is_joined=True),
)


def format_of(checkpoint: Checkpoint) -> Format:
    """Return the record of a checkpoint's format; one that says nothing for a format that is not in the table."""
    found = next((known for known in FORMATS if known.name == checkpoint.format), None)
    return found or Format(checkpoint.format, lambda _: False, "")


def rewriting(checkpoint: Checkpoint, changes: Changes, open_copy: OpenCopy) -> Rewriter | SetRewriter:
    """The work of writing a checkpoint again in its own format: a `SetRewriter` of a set, else a `Rewriter`.

    `open_copy` opens the new file to read it back. Raises UnsupportedError where that cannot be done.
    """
    known = format_of(checkpoint)
    if not known.rewriter:
        raise UnsupportedError(
            f"of a checkpoint of format {checkpoint.format} only the elements of tensors can be changed",
            path=checkpoint.path,
            hint=f"ckpt convert {quoted(checkpoint.path)} OUT.pt makes one that can be changed freely",
        )
    make = importlib.import_module(known.rewriter).Rewriting
    given = partial(rewriting, open_copy=open_copy) if known.is_set else open_copy
    work: Rewriter | SetRewriter = make(checkpoint, changes, given)
    return work


def folder_kind(path: str, names: Sequence[str]) -> Folder | None:
    """Return the kind of checkpoint that a folder with these names in it is as a whole; None for a folder of files."""
    return next((known for known in FOLDERS if known.sniff(path, names)), None)
