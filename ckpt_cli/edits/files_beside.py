"""The small files beside the weights of a model: its config, its tokenizer. A new folder gets copies of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import field, replace

from ckpt_cli import limits
from ckpt_cli.errors import CkptError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.atomic import creating
from ckpt_cli.files.backup import parse_backup
from ckpt_cli.files.copy import copy_into
from ckpt_cli.files.places import (
    folder_of,
    is_file,
    is_folder,
    is_listed,
    is_same,
    is_taken,
    join,
    name_of,
    names_in,
    open_file,
    present,
    size_of,
)
from ckpt_cli.files.system import write_all
from ckpt_cli.formats.runs.read import RunFiles, name_within
from ckpt_cli.formats.sharded.names import is_index
from ckpt_cli.formats.sharded.read import ShardSet
from ckpt_cli.formats.signatures import GGUF, GZIP, HDF5, NUMPY, PROTO, ZIP_RECORD
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.hf_config import config_beside

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pt2", ".ptl", ".gguf", ".ggml", ".h5", ".hdf5", ".keras",
    ".msgpack", ".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel", ".npz", ".npy", ".pkl", ".pickle",
    ".joblib", ".distcp", ".tar", ".tar.gz", ".tgz", ".zip", ".ot", ".pb", ".pdparams", ".params", ".nemo", ".eqx",
    ".engine", ".index.json",
)  # fmt: skip
"""Suffixes of files that hold weights, or name the files of weights."""

_HEADS = (ZIP_RECORD, HDF5, GGUF, NUMPY, GZIP, *(PROTO + bytes((protocol,)) for protocol in (2, 3, 4, 5)))
"""First bytes of files of weights, whatever their names are."""

_CONFIGS = ("config.json", "adapter_config.json")
"""Files that only the folder of a model has."""


_USUAL = (
    *_CONFIGS, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json", "README.md",
)  # fmt: skip
"""Names that Hugging Face's libraries give the files beside weights."""


@dataclass(frozen=True, slots=True)
class Left:
    """A file that is not copied."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Beside:
    """The files beside a checkpoint: which are copied, and which are not."""

    copied: tuple[str, ...] = ()
    """The names of those that the new folder gets, or would get."""
    left: tuple[Left, ...] = ()
    """Those that it does not get; hidden ones are not counted."""
    nbytes: int = 0
    """Bytes of those that are copied."""
    stale: str = ""
    """A statement of a copied config that is no longer true of the weights, in words."""
    edited: Mapping[str, bytes] = field(default_factory=dict)
    """New contents of those among the copied ones that are not copied as they are."""

    def with_edits(self, contents: Mapping[str, bytes | None]) -> Beside:
        """Return the same with other contents of some files; those of None are not copied."""
        copied = tuple(name for name in self.copied if contents.get(name, b"") is not None)
        edited = {name: content for name, content in contents.items() if content is not None and name in copied}
        return replace(self, copied=copied, edited=edited)


def files_beside(checkpoint: Checkpoint, output: str) -> Beside | None:
    """Find what lies beside a checkpoint and goes to the folder `output`; None where it is not a model's folder.

    A sharded checkpoint and a run lie in one, and a single file does where a config.json is beside it.
    """
    container = checkpoint.container
    folder = _folder_of(checkpoint)
    is_model = isinstance(container, ShardSet | RunFiles) or bool(present(folder, _CONFIGS))
    if not is_model or is_same(folder, output):
        return None
    own = {name_within(checkpoint, file).partition("/")[0] for file in container.files}
    own.update(container.leading if isinstance(container, RunFiles) else ())
    there = set(names_in(output)) if is_folder(output) else set()
    copied: list[str] = []
    left: list[Left] = []
    nbytes = 0
    for name in _names(folder, own, left):
        why, size = _why_not(join(folder, name), there)
        if not why and (len(copied) >= limits.BESIDE_FILES or nbytes + size > limits.BESIDE_BYTES):
            why = "too many files to copy all"
        if why:
            left.append(Left(name, why))
        else:
            copied.append(name)
            nbytes += size
    return Beside(tuple(copied), tuple(left), nbytes)


def _folder_of(checkpoint: Checkpoint) -> str:
    """Return the folder that a checkpoint lies in; of a run its own."""
    container = checkpoint.container
    return container.folder if isinstance(container, RunFiles) else folder_of(container.files[0].path) or "."


def _names(folder: str, own: Collection[str], left: list[Left]) -> list[str]:
    """The names in a folder, without the checkpoint's own and hidden ones; no more than a limit.

    On a server without lists, those of the usual names that are there.
    """
    if not is_listed(folder):
        left.append(Left("…", "its server has no lists: files of unusual names were not found"))
        return [name for name in present(folder, _USUAL) if name not in own]
    names = names_in(folder, most=limits.BESIDE_LOOKED_AT + 1)
    if len(names) > limits.BESIDE_LOOKED_AT:
        left.append(Left("…", f"the folder has more than {limits.BESIDE_LOOKED_AT:,} files"))
        del names[limits.BESIDE_LOOKED_AT :]
    return [name for name in names if not name.startswith(".") and name not in own]


def _why_not(path: str, there: Collection[str]) -> tuple[str, int]:
    """Return the reason not to copy a file, or an empty text; and its bytes."""
    name = name_of(path)
    try:
        size = size_of(path)  # of what a link leads to: the caches of the hub consist of links
        if is_folder(path):
            return "a folder", 0
        if not is_file(path):
            return "not a regular file", 0
        if parse_backup(name.lower()) is not None:
            return "a backup", 0
        if name.lower().endswith(_WEIGHTS) or is_index(name) or _is_weights(path):
            return "weights", 0
    except (OSError, CkptError):
        return "cannot be read", 0
    if name in there:
        return "already in the new folder", 0
    if size > limits.BESIDE_FILE:
        return f"{size:,} bytes", 0
    return "", size


def _is_weights(path: str) -> bool:
    """True if a file begins as one of weights does."""
    with closing(open_file(path)) as file:
        head = file.read(0, min(9, file.size))
    return head.startswith(_HEADS) or (head[8:] == b"{" and head[5:8] == bytes(3))


def copy_beside(checkpoint: Checkpoint, beside: Beside | None, folder: str) -> list[str]:
    """Copy the files into a new folder that is not in place yet; returns their names."""
    source = _folder_of(checkpoint)
    copied = []
    for name in beside.copied if beside else ():
        target = join(folder, name)
        if is_taken(target):  # made since by the writer: what is written for the weights stays
            continue
        with closing(open_file(join(source, name))) as file, creating(target, mode_of=file.path) as new:
            if beside is not None and name in beside.edited:
                write_all(new.fd, beside.edited[name], 0)
            else:
                copy_into(file, new)
        copied.append(name)
    return copied


def stale_dtype(checkpoint: Checkpoint, after: Iterable[Tensor]) -> str:
    """Say so where the config beside a checkpoint names a dtype that tensors had and that none has afterwards."""
    config = config_beside(join(_folder_of(checkpoint), name_of(checkpoint.container.files[0].path))) or {}
    key = next((key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)), "")
    said = str(config.get(key, "")).removeprefix("torch.")[:40]
    had = _floats(checkpoint.tensors)
    has = _floats(after)
    if not key or said not in had or said in has or not has:
        return ""
    return f"config.json says {key} {said}, which the weights are not any more: they are {' and '.join(sorted(has))}"


def _floats(tensors: Iterable[Tensor]) -> set[str]:
    return {tensor.dtype.name for tensor in tensors if tensor.dtype.category == "float"}
