"""Options and result of a conversion."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from ckpt_cli.dtypes import DType
from ckpt_cli.edits.files_beside import Beside
from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress, Progress, no_progress
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.targets import Target
from ckpt_cli.model.new_checkpoint import NewCheckpoint

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.cast import Losses
    from ckpt_cli.edits.plain import PlainValue
    from ckpt_cli.formats.salvage.found import Lost
    from ckpt_cli.model.changes import Content
    from ckpt_cli.model.checkpoint import Storage

Written = tuple[tuple[str, ...], int]
"""The names of the files of a folder, and the bytes of all that is written."""

KEEP_ONE, CLONE, ERROR = "keep-one", "clone", "error"

NOT_STATE = "not in the state_dict of the module"
"""The reason to leave out what a module has besides its state_dict."""

NOT_WEIGHTS = "not the model's own"
"""The reason to leave out what the checkpoint of a run has besides the model's weights."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Options of a conversion."""

    to: str | None = None
    """The name of the format; None to choose it by the output's name."""
    select: str = ""
    """The prefix below which entries are taken; empty for all."""
    names: Sequence[str] = ()
    """NAMEs of what is written; none for all."""
    exclude: Sequence[str] = ()
    """NAMEs of what is left out."""
    dtype: DType | None = None
    """The new dtype of floats."""
    max_shard: int | None = None
    """Bytes of one shard, where shards are wanted."""
    shared: str = KEEP_ONE
    """The way to write tensors that share bytes: `keep-one`, `clone` or `error`."""
    everything: bool = False
    """True if of the checkpoint of a run all entries are taken, and not only the model's weights."""
    tensors_only: bool = False
    """True if what the format cannot hold may be left out."""
    plain: bool = False
    """True if objects become plain values, so that `torch.load(weights_only=True)` takes the new file."""
    lossy: bool = False
    """True if values may become infinite or zero in a cast."""
    raw: bool = False
    """True if the numbers of scaled and packed weights may be cast as they are stored."""
    salvage: bool = False
    """True if of a file that was cut the tensors that are all there may be taken."""
    weights_only: bool = False
    """True if a new folder gets no copies of the files beside the weights."""
    force: bool = False
    """True if what is there already may be replaced."""
    dry_run: bool = False
    progress: Progress = field(default=no_progress)
    """Called with the number of bytes just written."""
    on_progress: OnProgress | None = None
    """Called instead with bytes done and bytes in all, once the conversion takes a while."""
    executor: Executor | None = None
    """The executor that casts in parallel."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An entry that is left out, and the reason."""

    name: str
    why: str
    is_tensor: bool = False


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of a conversion, or of its dry run."""

    path: str
    output: str
    format: str
    """The name of the new format."""
    what: str
    """A description of the format in words."""
    tensors: int
    """The number of tensors written."""
    bytes_written: int
    left_out: tuple[LeftOut, ...] = ()
    """The entries that were left out."""
    separated: tuple[str, ...] = ()
    """Names that shared bytes with others and have their own now."""
    not_kept: tuple[str, ...] = ()
    """Facts about kept entries that the format cannot hold, in words."""
    left: tuple[str, ...] = ()
    """Names of floats that stay as they are, as they cannot be cast."""
    files: tuple[str, ...] = ()
    """The names of the files, where the output is a folder."""
    dry_run: bool = False
    added: tuple[str, ...] = ()
    """Facts that the new checkpoint has and the old one did not, in words."""
    plain: tuple[PlainValue, ...] = ()
    """The values that became plain."""
    problem: str = ""
    """The error that the file has, where it was cut and salvaged."""
    lost: tuple[Lost, ...] = ()
    """The entries that are lost of a file that was cut."""
    beside: Beside | None = None
    """The result for the files beside a model's weights, where a new folder was written."""

    @property
    def is_cut(self) -> bool:
        """True if the source was a file that was cut, of which tensors were salvaged."""
        return bool(self.problem)


class Job(Protocol):
    """A planned conversion, ready to be written."""

    @property
    def nbytes(self) -> int:
        """Bytes that will be written, or about that."""

    def write(self, target: LocalFile, progress: Progress) -> None:
        """Write the one file."""

    def verify(self, path: str) -> None:
        """Raise where it does not read back."""


@dataclass(frozen=True, slots=True)
class NewFiles:
    """The job of writing tensors, and values where the format has a place for them, as one file or a folder."""

    new: NewCheckpoint
    target: Target

    @property
    def nbytes(self) -> int:
        """Bytes of the storages."""
        return self.new.nbytes

    def measured(self) -> Written:
        """Return the names of the files and the bytes that would be written."""
        if not self.target.is_folder:
            return (), self.target.file_writer().write(self.new, None)
        names: list[str] = []
        nbytes = self.target.folder_writer().write_folder(self.new, names.append, no_progress)  # which makes no file
        return tuple(names), nbytes

    def write(self, target: LocalFile, progress: Progress) -> None:
        """Write the one file."""
        self.target.file_writer().write(self.new, target, progress)

    def verify(self, path: str) -> None:
        """Raise where it does not read back."""
        self.target.file_writer().verify(self.new, path, open_checkpoint)


@dataclass(slots=True)
class ConvertPlan:
    """The plan of a conversion."""

    job: Job
    tensors: int
    losses: Losses
    contents: Mapping[Storage, Content]
    """The bytes that are made, among others."""
    left_out: tuple[LeftOut, ...] = ()
    separated: tuple[str, ...] = ()
    not_kept: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    """Names of floats that stay as they are, as they cannot be cast."""
    added: tuple[str, ...] = ()
    plain: tuple[PlainValue, ...] = ()

    def measured(self) -> Written:
        """Return the names of the files of a folder and the bytes that would be written."""
        return self.job.measured() if isinstance(self.job, NewFiles) else ((), self.job.nbytes)

    @property
    def largest(self) -> int:
        """Bytes of the largest file that is written at once, or about that."""
        job = self.job
        if not isinstance(job, NewFiles) or not job.target.is_set:
            return job.nbytes
        largest = max((tensor.storage.nbytes for tensor in job.new.tensors if tensor.storage is not None), default=0)
        return min(job.nbytes, max(job.new.max_shard, largest))


def stem_of(output: str) -> str:
    """Return the name of the folder within a torch zip file: the file's name without its last suffix."""
    return os.path.splitext(os.path.basename(output))[0] or "archive"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip

_SIZE = r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)"


def size_of(text: str) -> int:
    """Return the bytes of a size such as `5GB` or `512MiB`: powers of ten, or of two with an i, as huggingface_hub."""
    match = re.fullmatch(_SIZE, text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise UsageError(f"{text!r} is not a size", hint="5GB, 500MB or 2GiB, say")
    return int(float(match[1]) * unit)
