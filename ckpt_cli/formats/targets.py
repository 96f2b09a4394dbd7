"""The formats that a checkpoint can be converted to, in one table; a format's module is imported when it is written."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import is_folder, names_folder

if TYPE_CHECKING:
    from ckpt_cli.dtypes import DType
    from ckpt_cli.files.copy import Progress
    from ckpt_cli.files.new_folder import Verifier
    from ckpt_cli.files.source import LocalFile
    from ckpt_cli.formats.writing import OpenCopy
    from ckpt_cli.model.checkpoint import Storage
    from ckpt_cli.model.new_checkpoint import NewCheckpoint


class Writer(Protocol):
    """A module that writes a format."""

    def spelled(self, dtype: DType) -> str | None:
        """Return the format's spelling of a dtype; None for one that it does not have."""


class FileWriter(Writer, Protocol):
    """A module that writes one file."""

    def write(self, new: NewCheckpoint, target: LocalFile | None, progress: Progress = ...) -> int:
        """Write all of it into an empty file; returns its bytes. Without a target it only measures."""

    def verify(self, new: NewCheckpoint, path: str, open_copy: OpenCopy) -> None:
        """Raise CkptError where the file that was written does not read back as what it should be."""


class ObjectWriter(FileWriter, Protocol):
    """A module that writes one file of any object, with its tensors."""

    def write_object(
        self,
        root: object,
        storages: Sequence[Storage],
        new: NewCheckpoint,
        target: LocalFile | None,
        progress: Progress,
        data: bytes | memoryview,
    ) -> int:
        """Write an object of a graph, which was read from `data`, and its storages by their numbers."""


class FolderWriter(Writer, Protocol):
    """A module that writes several files into a new folder."""

    def write_folder(self, new: NewCheckpoint, create: Callable[[str], LocalFile | None], progress: Progress) -> int:
        """Write all of it into files that `create` makes, and only measure where it makes none; returns their bytes."""

    def verify_folder(self, new: NewCheckpoint, folder: str, open_copy: OpenCopy) -> None:
        """Raise CkptError where the folder that was written does not read back as what it should be."""

    def verifier(self, new: NewCheckpoint, folder: str, open_copy: OpenCopy) -> Verifier | None:
        """Return what verifies single files of the folder; None where they can only be verified together."""


@dataclass(frozen=True, slots=True)
class Target:
    """One format that a checkpoint can be converted to."""

    name: str
    """Its name for `--to`."""
    what: str
    """A description of it."""
    module: str
    """A `FileWriter`, or a `FolderWriter`: a module, or after a colon an object in it."""
    suffixes: tuple[str, ...] = ()
    """The suffixes of its files."""
    is_folder: bool = False
    files: str = ""
    """An expression that the names of its files in a folder match, so that an older checkpoint can give way."""
    is_set: bool = False
    """True if it is a set of shards, of a size that can be chosen."""
    is_of_items: bool = False
    """True if each entry becomes a torch.save file of its own within it, which takes time and bytes."""
    keeps_views: bool = False
    """True if tensors can be any views of shared storages."""
    keeps_ties: bool = True
    """True if it can say that tensors are tied."""
    keeps_requires_grad: bool = False
    """True if it says of a tensor that it is trained."""
    keeps_metadata: bool = False
    """True if it has a place for a map of strings."""
    keeps_objects: bool = False
    """True if it can hold non-tensor entries, where they are pickled already."""
    keeps_nesting: bool = False
    """True if it keeps containers and the values in them, and not only flat names."""
    is_zip: bool = False
    """True if it is a zip file of torch.save, so that one becomes another record by record."""
    keeps_notes: bool = False
    """True if it has a place for the `_metadata` of a state_dict."""

    def spelled(self, dtype: DType) -> str | None:
        """Return the format's spelling of a dtype; None for one that it does not have."""
        writer: Writer = self._writer()
        return writer.spelled(dtype)

    def file_writer(self) -> FileWriter:
        """The writer of a format of one file."""
        writer: FileWriter = self._writer()
        return writer

    def object_writer(self) -> ObjectWriter:
        """The writer of a format that keeps objects or nesting in one file."""
        writer: ObjectWriter = self._writer()
        return writer

    def folder_writer(self) -> FolderWriter:
        """The writer of a format of several files."""
        writer: FolderWriter = self._writer()
        return writer

    def _writer(self) -> Any:
        module, _, name = self.module.partition(":")
        found = importlib.import_module(module)
        return getattr(found, name) if name else found


TARGETS = (
    Target(
        "pt", "a torch.save file", "ckpt_cli.formats.torch_zip.write", (".pt", ".pth", ".ckpt", ".bin"),
        keeps_views=True, keeps_requires_grad=True, keeps_objects=True, keeps_nesting=True,
        keeps_notes=True, is_zip=True,
    ),
    Target(
        "pt-legacy", "a torch.save file of before 1.6", "ckpt_cli.formats.torch_legacy.write", keeps_views=True,
        keeps_requires_grad=True, keeps_objects=True, keeps_nesting=True, keeps_notes=True,
    ),
    Target(
        "safetensors", "a safetensors file", "ckpt_cli.formats.safetensors.write", (".safetensors",),
        keeps_metadata=True,
    ),
    Target("npz", "an npz file", "ckpt_cli.formats.numpy.npz", (".npz",), keeps_ties=False),
    Target(
        "hf", "safetensors shards", "ckpt_cli.formats.sharded.write:SAFETENSORS", is_folder=True, is_set=True,
        keeps_metadata=True, files=r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?",
    ),
    Target(
        "hf-bin", "torch.save shards", "ckpt_cli.formats.sharded.write:TORCH", is_folder=True, is_set=True,
        keeps_views=True, keeps_requires_grad=True, files=r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?",
    ),
    Target(
        "dcp", "a torch.distributed.checkpoint", "ckpt_cli.formats.dcp.write", is_folder=True, is_of_items=True,
        keeps_ties=False, keeps_requires_grad=True, keeps_nesting=True, files=r"__\d+_\d+\.distcp|(__\d+)?\.metadata",
    ),
)  # fmt: skip

_SHARDED = {"safetensors": "hf", "pt": "hf-bin"}
"""The set of shards for each format of a single file."""

_BY_NAME = {target.name: target for target in TARGETS}


_NOT_WRITTEN: dict[str, tuple[str, str | None]] = {
    ".gguf": ("GGUF", "llama.cpp's convert_hf_to_gguf.py makes one of a model's folder: ckpt convert FILE FOLDER"),
    ".ggml": ("GGML", None),
    ".onnx": ("ONNX", "torch.onnx.export makes one of a model, with its code"),
    ".h5": ("HDF5", None),
    ".mlmodel": ("Core ML", None),
    ".mlpackage": ("Core ML", None),
    ".msgpack": ("msgpack (Flax)", None),
    ".tflite": ("TensorFlow Lite", None),
    ".pb": ("TensorFlow", None),
    ".keras": ("Keras", None),
    ".pkl": ("pickle", "a name that ends in .pt is a file of torch.save"),
    ".joblib": ("joblib", "a name that ends in .npz is a file of arrays"),
    ".pt2": ("torch.export", "a name that ends in .pt is a file of torch.save with the state_dict"),
    ".npy": ("npy", "one array: ckpt show FILE NAME -o OUT.npy; several: a name that ends in .npz"),
    ".tar": ("tar", "a name that ends in .pt is a file of torch.save"),
    ".distcp": ("single .distcp files", "--to dcp writes a folder of them"),
    ".zip": ("plain zip", "a name that ends in .pt is a file of torch.save, which is a zip file"),
}
"""What suffixes say that is not written, with a hint for those who want it."""

_SUFFIXES_TOO = {".hdf5": ".h5", ".pickle": ".pkl"}
"""Other suffixes for some of these."""


def _not_written(suffix: str, path: str | None = None) -> UsageError | None:
    """Return the error for a known format that is not written; None for any other suffix."""
    known = _NOT_WRITTEN.get(_SUFFIXES_TOO.get(suffix, suffix))
    if known is None:
        return None
    what, hint = known
    return UsageError(f"ckpt does not write {what}", path=path, hint=hint or f"--to is one of {', '.join(_BY_NAME)}")


def target_of(path: str, name: str | None, *, sharded: bool) -> Target:
    """The format to write: the one that is named, else what the path's suffix says; a folder is a set of shards.

    Raises UsageError where neither says one, or what they say does not go together.
    """
    to_folder = names_folder(path) or is_folder(path)
    suffix = os.path.splitext(path)[1].lower()
    if name is not None:
        found = _named(name)
    else:
        by_suffix = next((target for target in TARGETS if suffix in target.suffixes), None)
        found = by_suffix if by_suffix is not None and not to_folder else _BY_NAME["hf"]
        if found.is_folder and not (to_folder or sharded) and suffix:
            known = " ".join(suffix for target in TARGETS for suffix in target.suffixes)
            raise _not_written(suffix, path) or UsageError(
                f"{suffix!r} does not say which format to write", path=path,
                hint=f"--to {'|'.join(_BY_NAME)}, or a name that ends in one of {known}",
            )  # fmt: skip
        if sharded and found is by_suffix:
            raise UsageError("shards go to a folder, and this is named like a file", path=path, hint="--to hf|hf-bin")
    if (to_folder or sharded) and not found.is_folder:
        found = _BY_NAME[_SHARDED.get(found.name, found.name)]
    if sharded and not found.is_set:
        raise UsageError(f"{found.what} is not written in shards", hint="--to hf|hf-bin")
    return found


def _named(name: str) -> Target:
    found = _BY_NAME.get(name.lower())
    if found is None:
        raise _not_written(f".{name.lower().removeprefix('.')}") or UsageError(
            f"there is no format {name!r} to write", hint=f"one of {', '.join(_BY_NAME)}"
        )
    return found
